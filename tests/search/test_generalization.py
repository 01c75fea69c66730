from __future__ import annotations

import math

import pytest
import torch

from efficientllava.runtime.errors import UserError
from efficientllava.search.generalization import GAPS, LinearNorms, gap_of

DENSE = [LinearNorms(100, 4.0, 4.0, 0.0), LinearNorms(300, 9.0, 9.0, 0.0)]
HALF = [LinearNorms(100, 4.0, 1.0, 3.5), LinearNorms(300, 9.0, 4.0, 6.0)]
UNIFORM = [LinearNorms(100, 4.0, 2.0, 1.0), LinearNorms(300, 9.0, 6.0, 4.5)]


def test_values_by_hand() -> None:
    assert GAPS["none"](HALF, UNIFORM, 64) == 0
    assert GAPS["fro"](HALF, UNIFORM, 64) == pytest.approx((0.25 * 1 / 2 + 0.75 * 2 / 3) / 8)
    assert GAPS["fro_logprod"](HALF, UNIFORM, 64) == pytest.approx(math.sqrt(1 / 2 * 2 / 3) / 8)
    # s^2 = 2 / 2 * median(1/4, 1/2) = 3/8, D^2 = 3.5/4 + 6/9
    inner = (3.5 / 4 + 6 / 9) / (2 * 3 / 8) + math.log(2 * 8 / 0.05)
    assert GAPS["dist"](HALF, UNIFORM, 64) == pytest.approx(math.sqrt(inner / 128))


def test_dense_model_has_the_largest_norm_and_no_distance() -> None:
    assert GAPS["fro"](DENSE, UNIFORM, 64) == pytest.approx(1 / 8)
    assert GAPS["fro_logprod"](DENSE, UNIFORM, 64) == pytest.approx(1 / 8)
    assert GAPS["dist"](DENSE, UNIFORM, 64) == pytest.approx(math.sqrt(math.log(2 * 8 / 0.05) / 128))


@pytest.mark.parametrize("kind", ["fro", "fro_logprod", "dist"])
def test_norm_and_distance_pull_in_opposite_directions_and_shrink_with_samples(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 48)
    values = []
    for kept in (48, 40, 30, 20, 10):
        masked = float(weight[:, :kept].square().sum())
        dense = float(weight.square().sum())
        values.append(GAPS[kind]([LinearNorms(weight.numel(), dense, masked, dense - masked)], UNIFORM, 64))
    assert values == sorted(values, reverse=kind != "dist")
    assert len(set(values)) == 5
    sizes = [GAPS[kind](HALF, UNIFORM, samples) for samples in (16, 32, 64, 128)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[2] == pytest.approx(2, rel=0.05)


def test_extremes_stay_finite() -> None:
    nothing = [LinearNorms(10, 0.0, 0.0, 0.0), LinearNorms(10, 5.0, 0.0, 5.0)]
    assert all(math.isfinite(gap(nothing, DENSE, 1)) for gap in GAPS.values())


def test_gap_of_reads_the_levels_of_a_policy() -> None:
    def norms(gene: int, level: int) -> list[LinearNorms]:
        return [LinearNorms(10 * (gene + 1), 4.0, 4.0 / (1 + level), 1.0)]

    gap = gap_of("fro", norms, (0, 0), 25)
    assert gap((0, 3)) == pytest.approx((1 / 3 * 1 + 2 / 3 * 1 / 2) / 5)
    assert gap((0, 0)) > gap((0, 1)) > gap((1, 1))
    with pytest.raises(UserError, match=r"search\.gap=norm: unknown; choose one of fro, fro_logprod, dist, none"):
        gap_of("norm", norms, (0, 0), 25)
