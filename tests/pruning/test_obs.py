from __future__ import annotations

import pytest
import torch

from efficientllava.pruning import obs
from efficientllava.pruning.obs import (
    UnsolvedError,
    damping_of,
    divide,
    eliminate,
    factorise,
    invert,
    inverts,
    obs_ranking,
)


def gram(size: int, spread: float = 2.0, dtype: torch.dtype = torch.float64, rows: int | None = None) -> torch.Tensor:
    """Of inputs whose channels differ by ``10^spread`` in size; with few rows it has no full rank."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows or 2 * size, size, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, spread, size, dtype=torch.float64)
    return (x.T @ x / len(x)).to(dtype)


@pytest.fixture(autouse=True)
def two_threads():
    """Batched LU decomposition on the CPU is wrong from two threads on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 128, 160, 192, 576, 1536])
@pytest.mark.parametrize("rows", [None, 40])
def test_factor_inverse_and_solution_are_those_of_the_damped_matrix(size, rows):
    matrix = gram(size, rows=rows)
    shift = damping_of(matrix, 0.01)
    damped = matrix + shift.diag()
    lower = factorise(matrix.clone(), shift, "x")
    assert torch.allclose(lower @ lower.T, damped, rtol=1e-9, atol=1e-9 * float(damped.abs().max()))
    right = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solved = right.clone()
    inner = divide(solved, lower, "x")
    assert torch.allclose(solved @ damped, right, rtol=1e-6, atol=1e-6)
    assert inner == pytest.approx(float((solved * right).sum()), rel=1e-9)
    assert inverts(invert(lower, "x"), matrix, shift, torch.arange(size))


def test_the_damping_of_a_channel_knows_only_its_own_power():
    matrix = gram(6)
    louder = matrix.clone()
    louder[0] *= 1e3
    louder[:, 0] *= 1e3
    assert torch.equal(damping_of(matrix, 0.1)[1:], damping_of(louder, 0.1)[1:])
    assert (damping_of(torch.zeros(3, 3), 0.1) > 0).all()


@pytest.mark.parametrize(("width", "units"), [(160, 3), (192, 3), (256, 2)])
def test_costs_of_wide_units_are_rises_of_the_error(width, units):
    """Heads x width of 160 and more: what batched `torch.linalg.solve` gets wrong."""
    matrix = gram(width * units, 0.5)
    weight = torch.randn(8, width * units, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    damped = matrix + damping_of(matrix, 0.01).diag()
    ranking = obs_ranking(weight, matrix, width, 0.01)
    first = torch.arange(width) + ranking.order[0] * width
    kept = torch.tensor([i for i in range(width * units) if i not in set(first.tolist())])
    # The error of the best other columns: tr(W_B (R_BB)^-1 W_B^T) with the Schur complement of the rest.
    rest = (
        damped[first][:, first]
        - damped[first][:, kept] @ torch.linalg.inv(damped[kept][:, kept]) @ damped[kept][:, first]
    )
    assert ranking.costs[0] == pytest.approx(float(torch.trace(weight[:, first] @ rest @ weight[:, first].T)), rel=1e-6)


def test_an_inverse_that_lost_its_way_is_made_anew(monkeypatch):
    matrix = gram(60)
    weight = torch.randn(4, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = [state.columns.clone() for state in eliminate(weight, matrix, 1, 0.01, [50, 30, 10])]
    made = []

    def unsound(*args):
        made.append(args)
        return False

    monkeypatch.setattr("efficientllava.pruning.obs.inverts", unsound)
    again = [state.columns.clone() for state in eliminate(weight, matrix, 1, 0.01, [50, 30, 10])]
    assert len(made) == 3
    for one, two in zip(expected, again, strict=True):
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-10)


def test_what_cannot_be_solved_says_where(monkeypatch):
    broken = gram(5)
    broken[2, 2] = float("nan")
    with pytest.raises(UnsolvedError, match=r"layer 3, mlp: the statistics of its inputs are not finite") as caught:
        factorise(broken, torch.zeros(5), "layer 3, mlp")
    assert caught.value.exit_code == 1
    with pytest.raises(UnsolvedError, match=r"layer 0, attention: the damped Gram matrix .* not positive definite"):
        factorise(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2), "layer 0, attention")
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda lower, rows, upper, out: out.mul_(2))
    with pytest.raises(UnsolvedError, match="least-squares solution is wrong"):
        divide(torch.ones(2, 5, dtype=torch.float64), obs.factorise(gram(5), damping_of(gram(5), 1.0), "x"), "x")
