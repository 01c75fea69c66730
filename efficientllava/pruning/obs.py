"""OBS elimination of units, and the symmetric positive definite systems that it and the refit solve.

LU decomposition (`torch.linalg.solve`) plays no part: batched on the CPU it returns garbage from 160 unknowns on
(torch 2.13 with several threads). Factors are equilibrated Cholesky factors; every one of them and every inverse is
compared with the matrix that it came from on a random vector, so that a wrong one is an error and never a ranking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.anatomy import expand
from ..runtime.errors import UserError
from .plan import Ranking

DAMPING = 0.3  # where nothing says better; of 0.01 to 3 the best on SmolLM2-135M (experiments/real_weights)

# Largest relative error of what a factor gives back of a random vector.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


class UnsolvedError(UserError):
    """A system of equations of the calibration statistics has no trustworthy solution."""

    exit_code = 1


def damping_of(gram: Tensor, damping: float) -> Tensor:
    """What is added to the diagonal of a Gram matrix: a share of each channel's own power.

    One channel with a massive activation then does not decide how much the others are damped.

    Args:
        gram: ``E[x x^T]``, ``(n, n)``.
        damping: Share of the diagonal, > 0.

    Returns:
        ``(n,)``, > 0 also where a channel is dead.
    """
    diagonal = gram.diagonal()
    floor = max(float(diagonal.mean()) * 1e-6, torch.finfo(torch.float32).tiny)
    return damping * diagonal.clamp(min=floor)


def factorise(gram: Tensor, shift: Tensor, what: str) -> Tensor:
    """Cholesky factor of a damped Gram matrix, in the matrix's own memory.

    Args:
        gram: Symmetric ``(n, n)``; used up.
        shift: What is added to its diagonal, see `damping_of`.
        what: Layer and component, for the error.

    Returns:
        Lower factor ``L`` with ``L L^T = gram + diag(shift)``.

    Raises:
        UnsolvedError: The damped matrix is not finite or not positive definite.
    """
    gram.diagonal().add_(shift)
    probe = _probe(gram)
    image = gram @ probe
    # Equilibrated to a diagonal of ones: channels of very different power do not cost digits.
    scale = gram.diagonal().sqrt()
    if not bool(torch.isfinite(scale).all()):
        raise UnsolvedError(f"{what}: the statistics of its inputs are not finite")
    gram.div_(scale).div_(scale.unsqueeze(1))
    lower = gram.T  # symmetric; LAPACK works in place on column-major memory only
    try:
        lower = torch.linalg.cholesky(lower, out=lower)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UnsolvedError(
            f"{what}: the damped Gram matrix of its inputs is not positive definite; check that the calibration "
            "records are finite and differ from each other"
        ) from error
    lower.mul_(scale.unsqueeze(1))
    _require(lower @ (lower.T @ probe), image, f"{what}: Cholesky factor")
    return lower


def invert(lower: Tensor, what: str) -> Tensor:
    """Inverse of ``L L^T``, in the factor's own memory.

    Args:
        lower: Lower factor; used up.
        what: Layer and component, for the error.

    Raises:
        UnsolvedError: The inverse does not give a vector back.
    """
    probe = _probe(lower)
    image = lower @ (lower.T @ probe)
    inverse = torch.cholesky_inverse(lower, out=lower)
    _require(inverse @ image, probe, f"{what}: inverse")
    return inverse


def divide(rows: Tensor, lower: Tensor, what: str) -> float:
    """Turn ``rows`` into ``rows (L L^T)^-1``, in their own memory.

    Args:
        rows: ``(m, n)``; changed.
        lower: Lower factor ``L``, ``(n, n)``.
        what: Layer and component, for the error.

    Returns:
        Inner product of the result with what ``rows`` were.

    Raises:
        UnsolvedError: The solution does not solve the system.
    """
    probe = _probe(rows.T)
    wanted = probe @ rows
    torch.linalg.solve_triangular(lower, rows.T, upper=False, out=rows.T)
    inner = float(torch.linalg.vector_norm(rows)) ** 2
    torch.linalg.solve_triangular(lower.T, rows.T, upper=True, out=rows.T)
    _require(lower @ (lower.T @ (probe @ rows)), wanted, f"{what}: least-squares solution")
    return inner


def inverts(inverse: Tensor, gram: Tensor, shift: Tensor, places: Tensor) -> bool:
    """Whether a matrix is the inverse of ``(gram + diag(shift))`` restricted to ``places``.

    Args:
        inverse: ``(len(places), len(places))``.
        gram: ``(n, n)``.
        shift: ``(n,)``.
        places: Rows and columns of ``gram``.
    """
    if not len(places):
        return True
    probe = _probe(inverse)
    spread = gram.new_zeros(len(gram))
    spread[places] = probe
    image = (gram @ spread + shift * spread)[places]
    return _error(inverse @ image, probe) <= TOLERANCE[inverse.dtype]


def _probe(matrix: Tensor) -> Tensor:
    """A fixed random vector for the columns of a matrix."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrix.shape[1], generator=generator, dtype=torch.float64).to(matrix)


def _error(found: Tensor, wanted: Tensor) -> float:
    error = float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-30))
    return error if error == error else float("inf")


def _require(found: Tensor, wanted: Tensor, what: str) -> None:
    error = _error(found, wanted)
    if error > TOLERANCE[found.dtype]:
        raise UnsolvedError(f"{what} is wrong (relative residual {error:.1e}); report this with your torch version")


OBS_ROUNDS = 20  # a round removes 5 % of the channels; finer rounds gain nothing (shared measurement, 25-50 % removed)


class Elimination(NamedTuple):
    """What one round of OBS elimination leaves.

    Args:
        gone: Units of this round, first to go first.
        costs: Rise of the mean square output error by each of them.
        alive: Units that are left, ascending.
        columns: The writer's columns of what is left, with all compensation so far.
    """

    gone: Tensor
    costs: Tensor
    alive: Tensor
    columns: Tensor


def eliminate(
    weight: Tensor,
    gram: Tensor,
    width: int,
    damping: float,
    counts: Iterable[int],
    what: str = "writer",
    groups: int | None = None,
) -> Iterator[Elimination]:
    """Remove units down to each of some counts, one round per count, always those that cost least.

    A unit ``B`` (one column, or the ``width`` columns of a KV group) costs ``tr(W_B (R_BB)^-1 W_B^T)`` with
    ``R = (H + lambda diag(H))^-1``; after each round ``W`` and ``R`` are downdated by block elimination, so that the
    next costs take the compensation of all earlier removals into account. The columns ``S`` of what is left are then
    the closed-form refit ``W_S + W_P H_PS (H_SS + lambda diag(H_SS))^-1`` for the writer's own output, with ``P`` all
    that is gone. A downdated inverse that no longer inverts is made anew from ``H_SS``.

    Source: structured OBS, arXiv 2302.04089 eq. 4-5; batched greedy removal after arXiv 2403.12983.

    Args:
        weight: Writer ``(out_features, units * width)``.
        gram: ``E[x x^T]``, ``(units * width, units * width)``; unchanged.
        width: Columns per unit.
        damping: Share of each column's own power that is added to ``gram``, > 0.
        counts: Units to keep after each round, descending.
        what: Layer and component, for errors.
        groups: Units are in so many groups of successive ones, and never are two more left of one than of another;
            a round then takes one unit. None: any go.

    Yields:
        The state after each round.

    Raises:
        UnsolvedError: The damped Gram matrix has no inverse.
    """
    whole = columns = weight.detach().to(gram.dtype)
    shift = damping_of(gram, damping)
    inverse = invert(factorise(gram.clone(), shift, what), what).T.contiguous()  # symmetric, by rows: no copy
    spare = torch.empty_like(inverse)
    alive = torch.arange(len(gram) // width, device=gram.device)
    for count in counts:
        scores = _block_scores(columns, inverse, width)
        lowest = torch.argsort(_eligible(scores, alive, len(gram) // width, groups), stable=True)[: len(alive) - count]
        stay = torch.ones(len(alive), dtype=torch.bool, device=gram.device)
        stay[lowest] = False
        gone, alive = alive[lowest], alive[stay]
        out, kept, places = expand(lowest, width), expand(stay.nonzero().squeeze(1), width), expand(alive, width)
        # Block elimination: W <- W - W_B R_BB^-1 R_B,  R <- R - R_B^T R_BB^-1 R_B.
        corner, rows = inverse[out.unsqueeze(1), out], inverse[out.unsqueeze(1), kept]
        try:
            solved = rows.T.clone()
            divide(solved, factorise(corner, shift.new_zeros(len(out)), what), what)
            columns = columns.index_select(1, kept).addmm_(columns.index_select(1, out), solved.T, alpha=-1)
            inverse = _principal(inverse, kept, spare).addmm_(rows.T, solved.T, alpha=-1)
            sound = inverts(inverse, gram, shift, places)
        except UnsolvedError:
            sound = False
        if not sound:
            part = gram[places.unsqueeze(1), places]
            inverse = invert(factorise(part.clone(), shift[places], what), what).T.contiguous()
            plain = whole[:, places]
            columns = plain + (whole @ gram[:, places] - plain @ part) @ inverse
        yield Elimination(gone, scores[lowest].clamp(min=0), alive, columns)


def _principal(matrix: Tensor, kept: Tensor, spare: Tensor) -> Tensor:
    """Some rows and columns of a square matrix, in its own memory; fresh memory would cost more than the products.

    Args:
        matrix: ``(n, n)``, contiguous; used up.
        kept: Indices of the rows and columns.
        spare: As large as the matrix, or larger; changed.
    """
    n, k = len(matrix), len(kept)
    rows = torch.index_select(matrix, 0, kept, out=spare.view(-1)[: k * n].view(k, n))
    return torch.index_select(rows, 1, kept, out=matrix.view(-1)[: k * k].view(k, k))


def _eligible(scores: Tensor, alive: Tensor, units: int, groups: int | None) -> Tensor:
    """Scores, infinite for the units of groups that have lost one more than others."""
    if groups is None:
        return scores
    group = alive // (units // groups)
    left = torch.bincount(group, minlength=groups)
    return scores.masked_fill(left[group] < left.max(), torch.inf)


def obs_ranking(
    weight: Tensor,
    gram: Tensor,
    width: int,
    damping: float,
    rounds: int = OBS_ROUNDS,
    what: str = "writer",
    groups: int | None = None,
) -> Ranking:
    """Rank units by the exact rise of the output error after optimal compensation, greedily.

    Channels go in rounds of equal size, KV groups and query heads one by one.

    Args:
        weight: See `eliminate`, like all others.
        gram: See `eliminate`.
        width: See `eliminate`.
        damping: See `eliminate`.
        rounds: Rounds in which all channels would go.
        what: See `eliminate`.
        groups: See `eliminate`.

    Returns:
        Removal order of all units; costs are rises of the mean square output error.
    """
    units = len(gram) // width
    step = 1 if width > 1 else max(1, units // rounds)
    order: list[int] = []
    costs: list[float] = []
    for state in eliminate(weight, gram, width, damping, [*range(units - step, 0, -step), 0], what, groups):
        order += state.gone.tolist()
        costs += state.costs.tolist()
    together = groups or 1
    return Ranking(tuple(order), tuple(sum(costs[i : i + together]) for i in range(0, len(costs), together)), groups)


def _block_scores(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Costs of all units that are left, ``(units,)``."""
    if width == 1:
        return torch.linalg.vector_norm(columns, dim=0).square() / inverse.diagonal()
    places = torch.arange(len(inverse), device=inverse.device).view(-1, width)
    blocks = columns[:, places].permute(1, 2, 0)  # (units, width, out)
    lower = torch.linalg.cholesky(inverse[places.unsqueeze(2), places.unsqueeze(1)])
    return torch.linalg.solve_triangular(lower, blocks, upper=False).square().sum((1, 2))
