"""The order in which the units of a component go, and the one that OBS elimination finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .spd import UnsolvedError, damping_of, divide, factorise, invert, inverts

OBS_ROUNDS = 20  # a round removes 5 % of the channels; finer rounds gain nothing (shared measurement, 25-50 % removed)


@dataclass(frozen=True)
class Ranking:
    """Removal order of one component.

    Args:
        order: All units, first to go first.
        costs: Marginal cost of each removal, in this order.
        groups: See `efficientllava.models.anatomy.Component`: so many units go at a removal. None: one.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]
    groups: int | None = None

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that the last ``count`` removals take, ascending."""
        return tuple(sorted(self.order[len(self.order) - count * (self.groups or 1) :]))

    @classmethod
    def from_scores(cls, scores: Tensor, groups: int | None = None) -> Ranking:
        """Rank by score, lowest first; ties go by index.

        Args:
            scores: ``(units,)``.
            groups: See the class; units are ranked within their group.
        """
        by_group = scores.double().cpu().view(groups or 1, -1)
        order = torch.sort(by_group, stable=True)
        first = torch.arange(len(by_group)).unsqueeze(1) * by_group.shape[1]
        units = (order.indices + first).T.flatten()
        return cls(tuple(units.tolist()), tuple(order.values.sum(0).tolist()), groups)


@dataclass(frozen=True)
class Elimination:
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
    inverse = invert(factorise(gram.clone(), shift, what), what)
    alive = torch.arange(len(gram) // width, device=gram.device)
    for count in counts:
        scores = _block_scores(columns, inverse, width)
        lowest = torch.argsort(_eligible(scores, alive, len(gram) // width, groups), stable=True)[: len(alive) - count]
        stay = torch.ones(len(alive), dtype=torch.bool, device=gram.device)
        stay[lowest] = False
        gone, alive = alive[lowest], alive[stay]
        out, kept, places = _expand(lowest, width), _expand(stay.nonzero().squeeze(1), width), _expand(alive, width)
        # Block elimination: W <- W - W_B R_BB^-1 R_B,  R <- R - R_B^T R_BB^-1 R_B.
        corner, rows = inverse[out.unsqueeze(1), out], inverse[out.unsqueeze(1), kept]
        try:
            solved = rows.T.clone()
            divide(solved, factorise(corner, shift.new_zeros(len(out)), what), what)
            columns = columns[:, kept].addmm_(columns[:, out], solved.T, alpha=-1)
            inverse = inverse[kept.unsqueeze(1), kept].addmm_(rows.T, solved.T, alpha=-1)
            sound = inverts(inverse, gram, shift, places)
        except UnsolvedError:
            sound = False
        if not sound:
            part = gram[places.unsqueeze(1), places]
            inverse = invert(factorise(part.clone(), shift[places], what), what)
            plain = whole[:, places]
            columns = plain + (whole @ gram[:, places] - plain @ part) @ inverse
        yield Elimination(gone, scores[lowest].clamp(min=0), alive, columns)


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


def _expand(units: Tensor, width: int) -> Tensor:
    """Columns of units, ``(len(units) * width,)``."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def _block_scores(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Costs of all units that are left, ``(units,)``."""
    if width == 1:
        return torch.linalg.vector_norm(columns, dim=0).square() / inverse.diagonal()
    places = torch.arange(len(inverse), device=inverse.device).view(-1, width)
    blocks = columns[:, places].permute(1, 2, 0)  # (units, width, out)
    lower = torch.linalg.cholesky(inverse[places.unsqueeze(2), places.unsqueeze(1)])
    return torch.linalg.solve_triangular(lower, blocks, upper=False).square().sum((1, 2))
