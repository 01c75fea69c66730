"""Score: one number per unit (KV group, MLP channel), and the order in which units should go.

A `Ranking` is what every importance ends in: units of one component in removal order, with the marginal cost of each
removal. Scores are never compared between components without dividing by the parameters a unit carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.anatomy import Component
from .statistics import factorise

OBS_ROUNDS = 20  # a round removes 5 % of the channels; finer rounds gain nothing (shared measurement, 25-50 % removed)


@dataclass(frozen=True)
class Ranking:
    """Removal order of one component.

    Args:
        order: All units, first to go first.
        costs: Marginal cost of each removal, in this order, >= 0.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def kept(self, count: int) -> tuple[int, ...]:
        """The ``count`` units that go last, ascending."""
        return tuple(sorted(self.order[len(self.order) - count :]))

    @classmethod
    def from_scores(cls, scores: Tensor) -> Ranking:
        """Rank by score, lowest first; ties go by index.

        Args:
            scores: ``(units,)``.
        """
        order = torch.sort(scores.double().cpu(), stable=True)
        return cls(tuple(order.indices.tolist()), tuple(order.values.clamp(min=0).tolist()))


def activation_scores(component: Component, gram: Tensor) -> Tensor:
    """Root mean square of a unit's input to the writer.

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    return component.reduce_columns(gram.diagonal().clamp(min=0)).sqrt()


def wanda_scores(component: Component, gram: Tensor) -> Tensor:
    """Sum of ``|W_ij| sqrt(H_jj)`` over a unit's writer columns.

    Source: arXiv 2306.11695, eq. 1, summed over rows for structured removal (arXiv 2312.11983, Wanda-sp).

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    columns = component.writer.weight.detach().to(gram.dtype).abs().sum(0)
    return component.reduce_columns(columns * gram.diagonal().clamp(min=0).sqrt())


def magnitude_scores(component: Component) -> Tensor:
    """L2 norm of all weights of a unit, readers and writer.

    Args:
        component: Attention or MLP.

    Returns:
        ``(units,)``.
    """
    total = component.reduce_columns(component.writer.weight.detach().double().square().sum(0))
    for reader in component.readers:
        total = total + component.reduce_rows(reader, reader.linear.weight.detach().double().square().sum(1))
    return total.sqrt()


def random_scores(component: Component, generator: torch.Generator) -> Tensor:
    """Uniform scores, ``(units,)``."""
    return torch.rand(component.units, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Elimination:
    """What one round of OBS elimination leaves.

    Args:
        gone: Units of this round, first to go first.
        costs: Rise of the mean square output error by each of them.
        alive: Units that are left, ascending.
        columns: The whole writer with all compensation so far, removed columns near 0; valid until the next round.
    """

    gone: Tensor
    costs: Tensor
    alive: Tensor
    columns: Tensor


def eliminate(weight: Tensor, gram: Tensor, width: int, damping: float, counts: Iterable[int]) -> Iterator[Elimination]:
    """Remove units down to each of some counts, one round per count, always those that cost least.

    A unit ``B`` (one column, or the ``width`` columns of a KV group) costs ``tr(W_B (R_BB)^-1 W_B^T)`` with
    ``R = (H + lambda I)^-1``; after each round ``W`` and ``R`` are downdated by block elimination, so that the next
    costs take the compensation of all earlier removals into account. The columns ``S`` of what is left are then the
    closed-form refit ``W_S + W_P H_PS (H_SS + lambda I)^-1`` for the writer's own output, with ``P`` all that is gone.

    Source: structured OBS, arXiv 2302.04089 eq. 4-5; batched greedy removal after arXiv 2403.12983.

    Args:
        weight: Writer ``(out_features, units * width)``.
        gram: ``E[x x^T]``, ``(units * width, units * width)``; used up: its inverse takes its memory.
        width: Columns per unit.
        damping: Multiple of the mean diagonal added to ``gram``.
        counts: Units to keep after each round, descending.

    Yields:
        The state after each round.
    """
    columns = weight.detach().to(gram.dtype, copy=True)
    lower, _ = factorise(gram, damping)
    inverse = torch.cholesky_inverse(lower, out=lower)
    alive = torch.arange(len(gram) // width, device=gram.device)
    for count in counts:
        scores = _block_scores(columns, inverse, alive, width)
        lowest = torch.argsort(scores, stable=True)[: len(alive) - count]
        gone = alive[lowest]
        # Block elimination: W <- W - W_B R_BB^-1 R_B,  R <- R - R_B^T R_BB^-1 R_B; removed rows and columns become 0.
        places = _expand(gone, width)
        rows = inverse[places]
        solved = torch.linalg.solve(rows[:, places], rows)
        columns.addmm_(columns[:, places], solved, alpha=-1)
        inverse.addmm_(rows.T, solved, alpha=-1)
        stay = torch.ones(len(alive), dtype=torch.bool, device=gram.device)
        stay[lowest] = False
        alive = alive[stay]
        yield Elimination(gone, scores[lowest].clamp(min=0), alive, columns)


def obs_ranking(weight: Tensor, gram: Tensor, width: int, damping: float, rounds: int = OBS_ROUNDS) -> Ranking:
    """Rank units by the exact rise of the output error after optimal compensation, greedily.

    Channels go in rounds of equal size, KV groups one by one.

    Args:
        weight: See `eliminate`, like all others.
        gram: Used up.
        width: Columns per unit.
        damping: Multiple of the mean diagonal added to ``gram``.
        rounds: Rounds in which all channels would go.

    Returns:
        Removal order of all units; costs are rises of the mean square output error.
    """
    units = len(gram) // width
    step = 1 if width > 1 else max(1, units // rounds)
    order: list[int] = []
    costs: list[float] = []
    for state in eliminate(weight, gram, width, damping, [*range(units - step, 0, -step), 0]):
        order += state.gone.tolist()
        costs += state.costs.tolist()
    return Ranking(tuple(order), tuple(costs))


def _expand(units: Tensor, width: int) -> Tensor:
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def _block_scores(columns: Tensor, inverse: Tensor, alive: Tensor, width: int) -> Tensor:
    if width == 1:
        return torch.linalg.vector_norm(columns, dim=0).square()[alive] / inverse.diagonal()[alive]
    places = _expand(alive, width).view(-1, width)
    blocks = columns[:, places].permute(1, 2, 0)  # (alive, width, out)
    corners = inverse[places.unsqueeze(2), places.unsqueeze(1)]
    return (blocks * torch.linalg.solve(corners, blocks)).sum((1, 2))
