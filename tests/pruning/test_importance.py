from __future__ import annotations

import itertools

import pytest
import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.importance import (
    activation_scores,
    magnitude_scores,
    wanda_scores,
)
from efficientllava.pruning.obs import eliminate, obs_ranking
from efficientllava.pruning.plan import Ranking

from ..conftest import make_model

DAMPING = 1e-10


def problem(columns: int, out: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def residual(weight: torch.Tensor, gram: torch.Tensor, kept: list[int]) -> float:
    """Least error of any weights on the kept columns: the Schur complement of the Gram matrix, in the weights' norm."""
    gone = [i for i in range(len(gram)) if i not in kept]
    inner = gram[gone][:, gone]
    if kept:
        inner = inner - gram[gone][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone])
    return float(torch.trace(weight[:, gone] @ inner @ weight[:, gone].T))


def greedy(weight: torch.Tensor, gram: torch.Tensor, width: int) -> tuple[list[int], list[float]]:
    """Remove the unit whose loss hurts least after all weights are solved again, one after the other."""
    units, order, costs, before = len(gram) // width, [], [], 0.0
    while len(order) < units:

        def after(unit: int) -> float:
            stay = [u for u in range(units) if u not in (*order, unit)]
            return residual(weight, gram, [u * width + i for u in stay for i in range(width)])

        best = min((u for u in range(units) if u not in order), key=after)
        costs.append(after(best) - before)
        before = after(best)
        order.append(best)
    return order, costs


@pytest.mark.parametrize("width", [1, 3])
def test_obs_with_one_unit_per_round_is_brute_force(width):
    weight, gram = problem(12)
    order, costs = greedy(weight, gram, width)
    ranking = obs_ranking(weight, gram.clone(), width, DAMPING, rounds=12)
    assert list(ranking.order) == order
    assert ranking.costs == pytest.approx(costs, rel=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_obs_costs_add_up_to_the_residual_of_what_is_kept(width):
    weight, gram = problem(24, seed=1)
    ranking = obs_ranking(weight, gram.clone(), width, DAMPING, rounds=24)
    for count in range(24 // width):
        kept = [u * width + i for u in ranking.kept(count) for i in range(width)]
        gone = 24 // width - count
        assert sum(ranking.costs[:gone]) == pytest.approx(residual(weight, gram, kept), rel=1e-5)


def test_obs_in_rounds_orders_every_unit_once():
    weight, gram = problem(50)
    ranking = obs_ranking(weight, gram, 1, 0.01)
    assert sorted(ranking.order) == list(range(50))
    assert min(ranking.costs) >= 0


def test_obs_first_removes_a_column_that_others_can_replace():
    weight, _ = problem(10)
    inputs = torch.randn(100, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs[:, 4] = inputs[:, 1] - 2 * inputs[:, 7]
    ranking = obs_ranking(weight, inputs.T @ inputs / 100, 1, 1e-9, rounds=10)
    assert ranking.order[0] in (1, 4, 7)
    assert ranking.costs[0] < 1e-4 < ranking.costs[1]


def test_obs_damping_decides_on_a_singular_gram_matrix():
    weight, gram = problem(8)
    gram[0] = gram[:, 0] = 0
    ranking = obs_ranking(weight, gram, 1, 0.01, rounds=8)
    assert ranking.order[0] == 0
    assert all(cost == cost for cost in ranking.costs)


@pytest.mark.parametrize(("width", "counts"), [(1, [23, 17, 16, 4, 1]), (3, [7, 5, 1]), (1, [])])
def test_elimination_stops_at_every_count_with_the_refit_of_what_is_left(width, counts):
    weight, gram = problem(24, seed=2)
    damping, seen, before = 0.03, [], set(range(24 // width))
    damped = gram + damping * gram.diagonal().diag()
    for state in eliminate(weight, gram.clone(), width, damping, counts):
        alive = state.alive.tolist()
        assert alive == sorted(alive)
        assert sorted([*alive, *state.gone.tolist()]) == sorted(before)
        before = set(alive)
        kept = [unit * width + i for unit in alive for i in range(width)]
        gone = [i for i in range(24) if i not in kept]
        refit = weight[:, kept] + weight[:, gone] @ gram[gone][:, kept] @ torch.linalg.inv(damped[kept][:, kept])
        assert torch.allclose(state.columns, refit, rtol=1e-8, atol=1e-10)
        seen.append(len(alive))
    assert seen == counts


def test_ranking_keeps_the_last_units_in_ascending_order():
    ranking = Ranking.from_scores(torch.tensor([0.5, 3.0, 1.0, 2.0, 1.0]))
    assert ranking.order == (0, 2, 4, 3, 1)
    assert ranking.kept(3) == (1, 3, 4)
    assert ranking.kept(0) == ()
    assert ranking.kept(5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_simple_scores_equal_their_definitions(family, kind):
    component = getattr(layers_of(make_model(family))[1], kind)
    width, weight = component.width, component.writer.weight.detach()
    gram = torch.randn(weight.shape[1], 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = gram @ gram.T
    power = gram.diagonal()
    for unit in range(component.units):
        columns = slice(unit * width, (unit + 1) * width)
        assert activation_scores(component, gram)[unit] == pytest.approx(power[columns].sum().sqrt())
        expected = (weight[:, columns].abs().double() * power[columns].sqrt()).sum()
        assert wanda_scores(component, gram)[unit] == pytest.approx(expected.item())


def test_magnitude_counts_every_weight_of_the_component_once(family):
    for component in layers_of(make_model(family))[0].components:
        linears = {id(r.linear): r.linear for r in component.readers}.values()
        total = sum(m.weight.double().square().sum().item() for m in itertools.chain(linears, [component.writer]))
        assert magnitude_scores(component).square().sum().item() == pytest.approx(total)
