from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from efficientllava.runtime.errors import UserError
from efficientllava.search.evolution import Objective, Risk, Search
from efficientllava.search.space import (
    Budget,
    Gene,
    Policy,
    SearchSpace,
)
from efficientllava.settings.schema import SearchConfig

from .test_space import make_space


class Landscape:
    """Risks with a known shape: each sample weighs the genes differently; some pairs of genes help each other."""

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.space, size = space, len(space.genes)
        weights = [rng.lognormvariate(0, 1.2) for _ in range(size)]
        self.samples = [[w * rng.lognormvariate(0, 0.5) for w in weights] for _ in range(16)]
        self.pairs = [(rng.randrange(size), rng.randrange(size), rng.uniform(-0.5, 1.0)) for _ in range(size)]
        self.calls: list[tuple[float, Policy]] = []
        self.shift = 0.0  # what a trained projector changes

    def loss(self, policy: Policy, share: float = 1.0) -> float:
        amounts = [gene.amounts[level] for gene, level in zip(self.space.genes, policy, strict=True)]
        seen = self.samples[: round(share * len(self.samples))]
        alone = sum(w * a * a / (1.05 - a) for s in seen for w, a in zip(s, amounts, strict=True)) / len(seen)
        together = sum(w * amounts[i] * amounts[j] for i, j, w in self.pairs)
        return (alone + together + self.shift * amounts[0]) / len(amounts)

    def __call__(self, policies: Sequence[Policy], share: float) -> list[Risk]:
        self.calls += [(share, policy) for policy in policies]
        return [Risk(self.loss(policy, share), 0.0, 0.0) for policy in policies]


def gap(policy: Policy) -> float:
    return 0.1 * policy[1]


def config(**changes: Any) -> SearchConfig:
    small: dict[str, Any] = dict(
        name="test", gap_weight=0.0, rounds=2, generations=3, population=20, parents=5, mutants=10, crossovers=10
    )
    return SearchConfig(**{**small, **changes})


def run(search: Search, change: Landscape | None = None) -> Search:
    while not search.finished:
        search.run_round()
        if change:
            change.shift = 5.0 * (search.state.round + 1)
        search.end_round(changed=change is not None)
    return search


def small_space() -> SearchSpace:
    genes = tuple(Gene(i // 2, ("attention", "mlp")[i % 2], (0.0, 0.25, 0.5, 0.75)) for i in range(6))
    return SearchSpace(genes, Budget("params", 0.4, tuple(tuple(a / 6 for a in gene.amounts) for gene in genes)))


def every_policy(space: SearchSpace) -> list[Policy]:
    policies: list[Policy] = [()]
    for gene in space.genes:
        policies = [(*policy, level) for policy in policies for level in range(gene.levels)]
    return [policy for policy in policies if space.feasible(policy)]


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_optimum_of_a_small_space(seed: int) -> None:
    space = small_space()
    space = SearchSpace(space.genes, Budget("params", 5 / 12, space.budget.costs))
    landscape = Landscape(space, seed)
    policies = every_policy(space)
    assert len(policies) > 200
    search = run(Search(space, landscape, gap, config(rounds=1, generations=8), seed))
    assert search.best == min(policies, key=landscape.loss)
    assert len({policy for _, policy in landscape.calls}) < 0.8 * len(policies)


def test_beats_random_search_at_equal_evaluations() -> None:
    better = 0
    for seed in range(4):
        space = make_space(target=0.45)
        found = {}
        for method in ("evolution", "random"):
            landscape = Landscape(space, seed)
            search = run(Search(space, landscape, gap, config(method=method), seed, [space.uniform()]))
            found[method] = landscape.loss(search.best), len(landscape.calls), landscape.loss(space.uniform())
        assert found["evolution"][1] == found["random"][1] == 20 + 6 * 20
        better += found["evolution"][0] < 0.9 * found["random"][0]
        assert found["evolution"][0] < 0.8 * found["evolution"][2]
    assert better == 4


@pytest.mark.parametrize("method", ["evolution", "random"])
def test_no_policy_is_evaluated_twice_at_a_stage_and_all_are_feasible(method: str) -> None:
    space = make_space(target=0.45)
    landscape = Landscape(space)
    search = run(Search(space, landscape, gap, config(method=method, stages=[0.25, 1.0])))
    assert max(Counter(landscape.calls).values()) == 1
    assert all(space.feasible(policy) for _, policy in landscape.calls)
    assert len(search.state.record) == len(landscape.calls)
    counted = Counter(share for share, _ in landscape.calls)
    assert counted[0.25] >= 6 * 20
    # As many go on as the parents, if none of these gets that far, and a quarter of the children.
    assert 20 < counted[1.0] <= 20 + 6 * (5 + 5)
    assert search.state.history[-1]["cost"] == pytest.approx(0.25 * counted[0.25] + counted[1.0])


def test_parents_are_scored_on_the_samples_of_their_children() -> None:
    space = make_space(target=0.45)
    landscape = Landscape(space)
    Search(space, landscape, gap, config(stages=[0.25, 1.0], generations=1)).run_round()
    first, staged = landscape.calls[:20], [policy for share, policy in landscape.calls if share == 0.25]
    assert all(share == 1.0 for share, _ in first)
    parents = sorted((policy for _, policy in first), key=landscape.loss)[:5]
    assert len(staged) == 25 and set(staged) & {policy for _, policy in first} == set(parents)
    reached = [policy for share, policy in landscape.calls[20:] if share == 1.0]
    ranked = sorted(staged, key=lambda policy: landscape.loss(policy, 0.25))
    assert set(reached) == set(ranked[:10]) - set(parents)


def test_is_elitist() -> None:
    space = make_space(target=0.45)
    search = run(Search(space, Landscape(space), gap, config(gap="fro", gap_weight=0.5)))
    best = [entry["best"] for entry in search.state.history]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
    assert [(e["round"], e["generation"]) for e in search.state.history] == [
        (0, 0),
        *((r, g) for r in (0, 1) for g in (1, 2, 3)),
    ]
    assert len(search.state.archive) == 5
    full = [entry for entry in search.state.record if entry["share"] == 1.0]
    assert search.best == tuple(min(full, key=lambda entry: entry["objective"])["policy"])


def test_the_gap_term_counts() -> None:
    space = make_space(target=0.45)
    plain = run(Search(space, Landscape(space), gap, config()))
    heavy = run(Search(space, Landscape(space), gap, config(gap="fro", gap_weight=20.0)))
    assert heavy.best[1] < plain.best[1]
    entry = heavy.state.record[0]
    assert entry["gap"] == gap(tuple(entry["policy"]))
    assert set(entry) == {
        *("policy", "removed", "round", "generation", "theta", "share", "loss", "kl", "error", "gap", "objective")
    }


def test_a_new_projector_scores_the_archive_again() -> None:
    space = make_space(target=0.45)
    landscape = Landscape(space)
    search = run(Search(space, landscape, gap, config()), change=landscape)
    assert search.state.theta == 2
    again = [e for e in search.state.record if e["theta"] == 1 and e["generation"] == 0]
    assert {e["round"] for e in again} == {1} and len(again) == 5
    assert max(Counter((e["theta"], e["share"], tuple(e["policy"])) for e in search.state.record).values()) == 1
    final = [e for e in search.state.record if e["theta"] == 2]
    assert [tuple(e["policy"]) for e in sorted(final, key=lambda e: e["objective"])] == search.state.archive
    assert all(e["loss"] == pytest.approx(landscape.loss(tuple(e["policy"]))) for e in final)


class Killed(Exception):
    pass


@pytest.mark.parametrize("survived", range(8))
def test_resumes_from_a_kill_after_any_generation(
    tmp_path: Path, survived: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = make_space(target=0.45)
    changes: dict[str, Any] = {"stages": [0.25, 1.0], "gap_weight": 0.3}

    def start(path: Path, landscape: Landscape) -> Search:
        return Search(space, landscape, gap, config(**changes), 3, [space.uniform()], path)

    landscape = Landscape(space)
    whole = run(start(tmp_path / "whole.json", landscape), change=landscape)
    saved: list[Path] = []

    def dies(state: Any, path: Path) -> None:
        if len(saved) == survived:
            raise Killed
        saved.append(path)
        write(state, path)

    first, landscape = Landscape(space), Landscape(space)
    search = start(tmp_path / "state.json", first)
    write = type(search.state).write
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(type(search.state), "write", dies)
        run(search, change=first)
    resumed = start(tmp_path / "state.json", landscape)
    landscape.shift = 5.0 * resumed.state.theta
    run(resumed, change=landscape)
    assert resumed.best == whole.best
    assert resumed.state.record == whole.state.record and resumed.state.history == whole.state.history
    assert (len(landscape.calls) < len(whole.state.record)) == (survived > 0)
    assert (tmp_path / "state.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_finished_search_is_not_run_again(tmp_path: Path) -> None:
    space = make_space(target=0.45)
    first = run(Search(space, Landscape(space), gap, config(), path=tmp_path / "state.json"))
    landscape = Landscape(space)
    second = run(Search(space, landscape, gap, config(), path=tmp_path / "state.json"))
    assert second.best == first.best and not landscape.calls


def test_other_processes_read_but_do_not_write(tmp_path: Path) -> None:
    space = make_space(target=0.45)
    one = run(Search(space, Landscape(space), gap, config(), path=tmp_path / "state.json"))
    other = run(Search(space, Landscape(space), gap, config(), path=tmp_path / "none.json", writes=False))
    assert other.best == one.best
    assert not (tmp_path / "none.json").exists()
    assert json.loads((tmp_path / "state.json").read_text())["round"] == 2


def test_bad_settings_and_overflows() -> None:
    space = make_space(target=0.45)
    for stages in ([], [0.5], [1.0, 0.5], [0.5, 0.5, 1.0]):
        with pytest.raises(UserError, match=r"search\.stages"):
            Search(space, Landscape(space), gap, config(stages=stages))
    with pytest.raises(UserError, match=r"prune\.ratio=0\.97"):
        Search(make_space(target=0.97), Landscape(space), gap, config())

    def overflowing(policies: Sequence[Policy], share: float) -> list[Risk]:
        return [Risk(float("nan") if policy[0] > 2 else 1.0 + policy[1], 0.0, 0.0) for policy in policies]

    search = run(Search(space, overflowing, gap, config()))
    assert search.best[0] <= 2


def test_an_exhausted_space_ends_well() -> None:
    genes = (Gene(0, "attention", (0.0, 0.5)), Gene(0, "mlp", (0.0, 0.5)))
    space = SearchSpace(genes, Budget("params", 0.25, ((0.0, 0.25), (0.0, 0.25))))
    landscape = Landscape(space)
    search = run(Search(space, landscape, gap, config()))
    assert sorted(search.state.archive) == [(0, 1), (1, 0)] and len(landscape.calls) == 2


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
