from __future__ import annotations

import math

import pytest

from efficientllava.search.evolution import Objective, Risk

POPULATION = [Risk(1.0, 0.1, 0.0), Risk(2.0, 0.2, 0.5), Risk(3.0, 0.6, 1.0)]
GAPS = [0.5, 0.7, 0.6]


@pytest.mark.parametrize("kind", ["loss", "kl", "error"])
def test_terms_are_standardised_on_the_population(kind: str) -> None:
    plain = Objective.fitted(kind, 0.0, POPULATION, GAPS)
    values = [plain.value(r, g) for r, g in zip(POPULATION, GAPS, strict=True)]
    assert sum(values) == pytest.approx(0)
    assert sum(v * v for v in values) / 3 == pytest.approx(1)
    gap = Objective.fitted(kind, 3.0, POPULATION, GAPS)
    added = [gap.value(r, g) - v for r, g, v in zip(POPULATION, GAPS, values, strict=True)]
    assert sum(added) == pytest.approx(0)
    assert sum(a * a for a in added) / 3 == pytest.approx(9)
    assert added[1] == max(added)


def test_by_hand() -> None:
    objective = Objective.fitted("loss", 0.3, POPULATION, GAPS)
    deviation = math.sqrt(2 / 3)
    assert objective.value(Risk(4.0, 9.0, 9.0), 0.8) == pytest.approx(2 / deviation + 0.3 * 0.2 / (0.1 * deviation))


def test_constant_terms_and_overflows() -> None:
    objective = Objective.fitted("loss", 1.0, [*POPULATION, Risk(math.inf, math.nan, 1.0)], [0.5] * 4)
    assert objective.risk_mean == 2.0
    assert objective.value(Risk(2.0, 0.0, 0.0), 0.5) == 0
    assert objective.value(Risk(math.nan, 0.0, 0.0), 0.5) == math.inf
    assert objective.value(Risk(math.inf, 0.0, 0.0), 0.5) == math.inf
