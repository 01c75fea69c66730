from __future__ import annotations

import itertools
import random

import pytest

from efficientllava.runtime.errors import UserError
from efficientllava.search.space import (
    Budget,
    Gene,
    Policy,
    SearchSpace,
)


def make_space(
    layers: int = 8,
    groups: int = 8,
    channels: int = 136,
    group_cost: int = 6144,
    channel_cost: int = 288,
    rest: int = 20000,
    target: float = 0.3,
) -> SearchSpace:
    """A decoder's space: every number of KV groups, channels in steps of 5 %."""
    total = layers * (groups * group_cost + channels * channel_cost) + rest
    kept = list(dict.fromkeys(max(1, round(channels * (1 - 0.05 * i))) for i in range(20)))
    pair = (
        ("attention", [group / groups for group in range(groups)], groups * group_cost / total),
        ("mlp", [1 - k / channels for k in kept], channels * channel_cost / total),
    )
    genes = [Gene(layer, kind, tuple(amounts)) for layer in range(layers) for kind, amounts, _ in pair]
    costs = [tuple(a * whole for a in amounts) for _ in range(layers) for _, amounts, whole in pair]
    return SearchSpace(tuple(genes), Budget("params", target, tuple(costs), f"prune.ratio={target:g}"))


SIZES = {
    "llava_7b": dict(
        layers=32, groups=32, channels=11008, group_cost=4 * 4096 * 128, channel_cost=3 * 4096, rest=262_000_000
    ),
    "tiny": dict(layers=8, groups=8, channels=136),
    "gqa": dict(layers=28, groups=2, channels=8960, group_cost=2_752_512, channel_cost=4608, rest=233_000_000),
    "gqa_tiny": dict(layers=8, groups=2, channels=136, group_cost=12288, rest=5000),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("target", [0.1, 0.3, 0.45, 0.6, 0.7])
def test_every_move_meets_the_budget(name: str, target: float) -> None:
    space = make_space(**SIZES[name], target=target)
    rng = random.Random(7)
    made = [space.uniform(), space.shaped([1 + layer for layer in range(32)])]
    made += [space.random(rng) for _ in range(20)]
    made += [space.mutate(rng.choice(made), rng) for _ in range(20)]
    made += [space.exchange(rng.choice(made), rng) for _ in range(20)]
    made += [space.crossover(rng.choice(made), rng.choice(made), rng) for _ in range(20)]
    for policy in made:
        assert abs(space.removed(policy) - target) <= 0.005
        assert all(0 <= level < gene.levels for level, gene in zip(policy, space.genes, strict=True))


def irregular(rng: random.Random) -> SearchSpace:
    """Costs as a stopwatch would give them: uneven, with plateaus; few and coarse genes among them."""
    wholes = [rng.uniform(0.2, 3.0) for _ in range(2 * rng.randint(2, 12))]
    costs = []
    for whole in wholes:
        rises = [0.0, *(rng.choice((0.0, rng.random())) for _ in range(rng.choice((1, 7, 19))))]
        top = sum(rises) or 1.0
        costs.append(tuple(whole * rise / top / (1.2 * sum(wholes)) for rise in itertools.accumulate(rises)))
    genes = [
        Gene(i // 2, ("attention", "mlp")[i % 2], tuple(n / len(c) for n in range(len(c)))) for i, c in enumerate(costs)
    ]
    return SearchSpace(tuple(genes), Budget("latency", rng.uniform(0.05, 0.7), tuple(costs)))


def test_repair_succeeds_on_irregular_costs() -> None:
    rng = random.Random(3)
    tries, met, refused = 0, 0, 0
    for _ in range(300):
        space = irregular(rng)
        try:
            space.require_feasible()
        except UserError:
            refused += 1
            continue
        for _ in range(5):
            start = tuple(rng.randrange(gene.levels) for gene in space.genes)
            tries += 1
            met += space.feasible(space.repair(start, rng))
    assert tries > 900 and refused > 0
    assert met == tries


def test_a_refused_budget_has_no_policy() -> None:
    rng = random.Random(5)
    refused = 0
    for _ in range(400):
        costs = tuple(tuple(sorted([0.0, *(rng.uniform(0, 0.3) for _ in range(2))])) for _ in range(4))
        genes = tuple(Gene(i // 2, ("attention", "mlp")[i % 2], (0.0, 0.4, 0.8)) for i in range(4))
        space = SearchSpace(genes, Budget("params", rng.uniform(0.05, 0.6), costs))
        # Amounts are rounded to 1/200 of the tolerance, so only clear cases are compared.
        distances = [abs(space.removed(p) - space.budget.target) for p in itertools.product(range(3), repeat=4)]
        if 0.0048 < min(distances) < 0.0052:
            continue
        try:
            space.require_feasible()
            assert min(distances) < 0.005
        except UserError:
            refused += 1
            assert min(distances) > 0.005
    assert 20 < refused < 380


def test_repair_keeps_what_is_feasible_and_changes_little() -> None:
    space = make_space(target=0.45)
    rng = random.Random(0)
    policy = space.random(rng)
    assert space.repair(policy, rng) == policy
    raised = (policy[0], min(policy[1] + 4, 19), *policy[2:])
    repaired = space.repair(raised, rng)
    assert space.feasible(repaired)
    assert sum(a != b for a, b in zip(raised, repaired, strict=True)) <= 4


def test_infeasible_budgets_are_refused_with_their_range() -> None:
    space = make_space(target=0.97)
    top = space.removed(tuple(gene.levels - 1 for gene in space.genes))
    with pytest.raises(UserError, match=rf"prune.ratio=0.97: policies remove between 0.000 and {top:.3f} of params"):
        space.require_feasible()
    genes = (Gene(0, "attention", (0.0, 0.5)), Gene(0, "mlp", (0.0, 0.5)))
    coarse = SearchSpace(genes, Budget("latency", 0.3, ((0.0, 0.2), (0.0, 0.5)), "search.budget.target=0.3"))
    with pytest.raises(UserError, match=r"search.budget.target=0.3: .*too coarse"):
        coarse.require_feasible()


def test_masks_have_no_whole_level() -> None:
    amounts = tuple(0.3 + 0.05 * i for i in range(9))
    genes = tuple(Gene(i // 2, ("attention", "mlp")[i % 2], amounts) for i in range(12))
    space = SearchSpace(genes, Budget("weights", 0.5, tuple(tuple(a / 12 for a in amounts) for _ in genes)))
    assert space.uniform() == (4,) * 12
    assert space.feasible(space.random(random.Random(0)))


def test_uniform_is_uniform() -> None:
    space = make_space(**SIZES["llava_7b"], target=0.45)
    for kind in ("attention", "mlp"):
        pairs = [(g, level) for g, level in zip(space.genes, space.uniform(), strict=True) if g.kind == kind]
        levels = [level for _, level in pairs]
        assert max(levels) - min(levels) <= 1
        assert all(abs(gene.amounts[level] - 0.47) < 0.06 for gene, level in pairs)


def test_shaped_spares_influential_layers() -> None:
    space = make_space(target=0.4)
    influence = [3.0, 1.0, 0.8, 0.7, 0.7, 0.8, 1.0, 2.0]
    amounts = [gene.amounts[level] for gene, level in zip(space.genes, space.shaped(influence), strict=True)]
    mlp = amounts[1::2]
    assert mlp[0] < mlp[7] < mlp[1] < mlp[3]
    assert mlp[3] / mlp[0] == pytest.approx(influence[0] / influence[3], rel=0.35)


def test_ranked_adds_least_error() -> None:
    amounts = tuple(0.1 * level for level in range(10))
    genes = tuple(Gene(i // 2, ("attention", "mlp")[i % 2], amounts) for i in range(4))
    costs = [tuple(a * (0.15, 0.3)[i % 2] for a in amounts) for i in range(4)]
    space = SearchSpace(genes, Budget("params", 0.4, tuple(costs), tolerance=0.02))
    errors = [[scale * a**2 for a in amounts] for scale in (0.5, 1.0, 2.0, 0.7)]

    def error(policy: Policy) -> float:
        return sum(of_gene[level] for of_gene, level in zip(errors, policy, strict=True))

    ranked = space.ranked(errors)
    assert space.feasible(ranked)
    as_much = [p for p in itertools.product(range(10), repeat=4) if space.removed(p) >= space.removed(ranked) - 1e-9]
    assert len(as_much) > 1000
    assert error(ranked) <= 1.05 * min(map(error, as_much))


def test_moves_reach_what_they_should() -> None:
    space = make_space(target=0.45)
    rng = random.Random(1)
    one, other = space.random(rng), space.random(rng)
    for _ in range(50):
        changed = [i for i, pair in enumerate(zip(one, space.exchange(one, rng, 1), strict=True)) if pair[0] != pair[1]]
        assert len(changed) == 2
    same = [sum(map(int.__eq__, one, space.mutate(one, rng, 0.2))) for _ in range(200)]
    assert 0.5 < sum(same) / 200 / len(one) < 0.9
    assert sum(space.mutate(one, rng, 1e-9) != one for _ in range(50)) > 40
    children = [space.crossover(one, other, rng) for _ in range(200)]
    for parent in (one, other):
        taken = [sum(map(int.__eq__, parent, child)) for child in children]
        assert 0.25 < sum(taken) / 200 / len(one) < 0.75


def test_same_seed_same_policies() -> None:
    space = make_space()
    first, second = ([space.mutate(space.random(rng), rng)] for rng in (random.Random(4), random.Random(4)))
    assert first == second
    assert space.uniform() == space.uniform()


def test_costs_must_fit_the_genes() -> None:
    genes = (Gene(0, "attention", (0.0, 0.5)),)
    with pytest.raises(ValueError, match="one entry per gene and level"):
        SearchSpace(genes, Budget("params", 0.1, ((0.0,),)))
    with pytest.raises(ValueError, match="must not fall"):
        SearchSpace(genes, Budget("params", 0.1, ((0.2, 0.1),)))
