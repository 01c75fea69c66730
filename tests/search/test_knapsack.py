from __future__ import annotations

import itertools
import math
import random

import pytest

from efficientllava.search.evolution import Risk
from efficientllava.search.knapsack import EVOLVED, LONGEST, KnapsackSearch, Prices, affordable, evaluations
from efficientllava.search.space import Budget, Gene, SearchSpace
from efficientllava.settings.schema import SearchConfig

LEVELS = 5
GENES = tuple(
    Gene(layer, kind, tuple(level / LEVELS for level in range(LEVELS)))
    for layer in range(3)
    for kind in ("attention", "mlp")
)
SIZES = (0.11, 0.2, 0.13, 0.21, 0.12, 0.23)
COSTS = tuple(tuple(size * amount for amount in gene.amounts) for gene, size in zip(GENES, SIZES, strict=True))
SPACE = SearchSpace(GENES, Budget("params", 0.3, COSTS, tolerance=0.01))


def errors(seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    return [sorted([0.0, *(rng.random() for _ in range(LEVELS - 1))]) for _ in GENES]


def total(policy, costs) -> float:
    return sum(of_gene[level] for of_gene, level in zip(costs, policy, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_that_removes_as_much_costs_less(seed):
    costs = errors(seed)
    found = SPACE.solve(costs)
    assert SPACE.feasible(found) and SPACE.removed(found) >= SPACE.budget.target - 1e-3
    for other in itertools.product(range(LEVELS), repeat=len(GENES)):
        if SPACE.feasible(other) and SPACE.removed(other) >= SPACE.budget.target + 1e-3:
            assert total(found, costs) <= total(other, costs) + 1e-12


def test_prices_say_what_goes():
    costs = [[amount for amount in gene.amounts] for gene in GENES]

    def gone(prices: Prices, kind: str) -> float:
        policy = SPACE.solve(prices.costs(GENES, costs))
        return sum(g.amounts[level] for g, level in zip(GENES, policy, strict=True) if g.kind == kind)

    assert gone(Prices(attention=20), "attention") == 0 < gone(Prices(attention=-20), "attention")
    deep = SPACE.solve(Prices(depth=5).costs(GENES, costs))
    assert deep[0] + deep[1] > deep[4] + deep[5]
    floored = SPACE.solve(Prices(floor=0.4).costs(GENES, costs))
    assert max(g.amounts[level] for g, level in zip(GENES, floored, strict=True)) <= 0.6
    assert math.isinf(Prices(floor=0.4).costs(GENES, costs)[0][-1])


def test_a_search_over_prices_finds_what_additive_costs_miss_and_goes_on_where_it_was_killed(tmp_path):
    known = errors(0)

    def evaluate(policies, _share):  # the attention is twice as dear as its costs say
        true = Prices(attention=1.5).costs(GENES, known)
        return [Risk(total(policy, true), 0.0, 0.0) for policy in policies]

    config = SearchConfig("quick", method="knapsack", gap="held_out", rounds=1, generations=3, parents=4)

    def search(path=None, evaluate=evaluate):
        seeds = [SPACE.uniform(), SPACE.ranked(known)]
        return KnapsackSearch(known, 0, SPACE, evaluate, lambda policy: 0.0, config, 0, seeds, path)

    whole = search()
    whole.run_round()
    best = SPACE.solve(Prices(attention=1.5).costs(GENES, known))
    assert evaluate([whole.best], 1)[0].loss == pytest.approx(evaluate([best], 1)[0].loss, abs=0.02)
    assert evaluate([whole.best], 1)[0].loss <= evaluate([SPACE.ranked(known)], 1)[0].loss
    calls = []

    def dies(policies, share):
        calls.append(policies)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(policies, share)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "state.json", dies).run_round()
    resumed = search(tmp_path / "state.json")
    resumed.run_round()
    assert resumed.state.record == whole.state.record and resumed.plain == whole.plain


@pytest.mark.parametrize("evolved", [0, 8])
def test_prices_go_on_where_the_model_has_changed(evolved):
    known, true = errors(1), errors(2)

    def evaluate(policies, _share):
        return [Risk(total(policy, true), 0.0, 0.0) for policy in policies]

    config = SearchConfig("quick", method="knapsack", gap="held_out", rounds=3, generations=1, population=8, parents=2)
    search = KnapsackSearch(known, evolved, SPACE, evaluate, lambda policy: 0.0, config, 0, [SPACE.uniform()])
    before = set()
    while not search.finished:
        search.run_round()
        before |= {*search.risks}
        search.end_round(changed=True)
        assert search.plain in search.risks and search.best in search.risks
    assert len({entry["theta"] for entry in search.state.record}) == 4
    assert total(search.best, true) == min(total(policy, true) for policy in before)


def test_evolution_follows_where_policies_are_cheap_and_finds_what_no_price_says():
    known = errors(1)
    true = errors(2)  # nothing that the prices know of

    def evaluate(policies, _share):
        return [Risk(total(policy, true), 0.0, 0.0) for policy in policies]

    config = SearchConfig("quick", method="knapsack", gap="held_out", rounds=1, generations=3, population=20)

    def found(evolved: int) -> float:
        search = KnapsackSearch(known, evolved, SPACE, evaluate, lambda policy: 0.0, config, 0, [SPACE.uniform()])
        while not search.finished:
            search.run_round()
            search.end_round()
        assert len(search.state.record) <= evaluations(config, EVOLVED / config.population / max(evolved, 0.5))
        return total(search.best, true)

    assert found(8) < found(0)
    assert affordable(config, 1e9) == LONGEST and affordable(config, 1e12) == 0
