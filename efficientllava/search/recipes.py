"""What a level is: how much of an attention or MLP goes, and what makes up for it, from statistics of the dense prefix.

*Structured* levels cut off KV groups and MLP channels, in the order and with the refit of one OBS elimination.

*Mask* levels: single weights, or 2 of every 4, become zero, and the rest of their rows makes up for it. The method is
SparseGPT (arXiv 2301.00774, algorithm 1) on all linear layers of a gene. With ``H = E[x x^T] + lambda I`` of a layer's
input and ``U`` the upper factor of ``H^-1 = U^T U``, the columns of ``W`` go by from left to right: where ``w_rc`` is
to go, ``e_rc = w_rc / U_cc`` and ``W_r,c: <- W_r,c: - e_rc U_c,c:``, the optimal update of all weights not yet passed
(Optimal Brain Surgeon, Hassibi and Stork 1993). ``e_rc^2`` is the rise of the output error and chooses the weights: the
lowest of 128 columns and all rows at once, or of every 4 columns in each row.

All mask levels of a gene go through one sweep, side by side. Inside a block, columns are treated in halves of halves,
so that nearly all work is matrix products over all levels and all layers that read the same input.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, reader_rows
from ..pruning.obs import damping_of, eliminate, factorise
from ..pruning.surgery import cut_component
from ..settings.schema import MASKED

TINY = 1e-30


@dataclass(frozen=True)
class LinearNorms:
    """Norms of one linear of a gene at one level; fused projections are one linear.

    Args:
        weights: Number of weights ``n``.
        dense: ``||W||^2`` of the dense weights.
        masked: ``||W * M||^2`` of the dense weights that the level keeps.
        change: ``||What - W||^2``, what the level changes, compensation included; removed weights count as zeros.
    """

    weights: int
    dense: float
    masked: float
    change: float

    @property
    def kept(self) -> float:
        """``||W * M|| / ||W||``, [0, 1]."""
        return math.sqrt(self.masked / max(self.dense, TINY))

    @property
    def distance(self) -> float:
        """``||What - W||^2 / ||W||^2``, >= 0."""
        return self.change / max(self.dense, TINY)


@dataclass(frozen=True)
class Level:
    """One level of one gene, as a recipe makes it.

    Args:
        removed: Parameters cut off (structured) or weights set to zero (masks).
        norms: Norms of every linear layer of the gene, readers first.
        tensors: What ``assemble`` of the recipe needs, by name; empty where nothing is removed.
        error: Rise of the divergence from the dense model by what the gene writes, up to a common factor; None where
            the recipe does not know it.
    """

    removed: int
    norms: tuple[LinearNorms, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    error: float | None = None


def squares(weight: Tensor, dim: int | None = None) -> Tensor:
    """Sum of squares in float64, of a whole matrix or along one dimension."""
    return torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=torch.float64).square()


STEPS = 20  # one MLP level per 5 % of the channels, and no round of the elimination takes more


@dataclass(frozen=True)
class Structured:
    """Every number of KV groups, and MLP channels in steps of 5 %, down to none; level 0 is whole.

    The kept sets of a gene are nested. The kept columns of the writer are solved again for its own dense output, by the
    elimination that also gives the order (`efficientllava.pruning.obs.eliminate`).

    Args:
        damping: Share of each channel's own power that is added to Gram matrices, > 0.
        tokens: Positions that count, see `efficientllava.pruning.stream.counted_positions`.
        round_to: Kept channels are a multiple of this, or all, >= 1.
        channels: Kept channels of each MLP level below the whole, descending; None: the steps of 5 %. Given for shapes
            that all layers share, which are never without heads.
    """

    damping: float = 0.3
    tokens: str = "all"
    round_to: int = 1
    channels: tuple[int, ...] | None = None

    @property
    def granularity(self) -> str:
        """``structured``."""
        return "structured"

    def counts(self, component: Component) -> tuple[int, ...]:
        """Kept units of each level, descending."""
        units, unit = component.units, self.round_to
        if component.kind == "attention":
            return tuple(range(units, -(self.channels is None), -1))
        if self.channels is not None:
            return (units, *(count for count in self.channels if count < units))
        rounded = {unit * round(units * (STEPS - step) / STEPS / unit) for step in range(STEPS + 1)}
        return (units, *sorted((count for count in rounded if count < units), reverse=True))

    def amounts(self, component: Component) -> tuple[float, ...]:
        """Share of units removed by each level, ascending."""
        return tuple(1 - count / component.units for count in self.counts(component))

    def inputs(self, component: Component) -> list[nn.Linear]:
        """The writer, which is what a lost unit is compensated in."""
        return [component.writer]

    def levels(self, component: Component, grams: list[Tensor], felt: Tensor | None = None) -> Iterator[Level]:
        """Make all levels in order.

        Args:
            component: A whole component.
            grams: Gram matrix of the writer's input; used up.
            felt: Weight of each output's error; None: all the same.

        Yields:
            Levels with ``units``, the kept ones, ascending, and ``columns``, the writer's ``(out_features, kept)``.
        """
        weight, whole = component.writer.weight.detach(), range(component.units)
        powers = [squares(linear.weight, 1) for linear, _ in reader_rows(component, whole)]
        powers.append(squares(weight, 0))
        yield Level(0, _norms(component, powers, whole, weight), error=0.0)
        counts, error, gram = self.counts(component), 0.0, grams.pop()
        felt = torch.ones(len(weight)) if felt is None else felt
        # Rows are compensated independently of each other, so that their weights only change costs and order.
        scale = felt.to(gram).clamp(min=1e-6 * float(felt.mean())).sqrt().unsqueeze(1)
        for state in eliminate(weight.to(gram.dtype) * scale, gram, component.width, self.damping, _rounds(counts)):
            units = state.alive.tolist()
            error += float(state.costs.sum())
            if len(units) not in counts:
                continue
            columns = state.columns / scale
            yield Level(
                (component.units - len(units)) * component.unit_price(),
                _norms(component, powers, units, columns),
                {"units": state.alive.int(), "columns": columns.to(weight.dtype)},
                error,
            )

    def assemble(self, twin: Component, tensors: Mapping[str, Tensor]) -> None:
        """Cut a component down to a level.

        Args:
            twin: A whole component with its own modules; changed.
            tensors: As `levels` gave them.
        """
        cut_component(twin, tensors["units"].tolist(), tensors["columns"])


def _rounds(counts: Sequence[int]) -> Iterator[int]:
    """The counts below the first one, with more in between where a round would take more than a step of the units."""
    step = math.ceil(counts[0] / STEPS)
    for high, low in itertools.pairwise(counts):
        parts = math.ceil((high - low) / step)
        yield from (high - (high - low) * part // parts for part in range(1, parts + 1))


def _norms(
    component: Component, powers: Sequence[Tensor], units: Sequence[int], columns: Tensor
) -> tuple[LinearNorms, ...]:
    """Norms at a level, from squared rows of the readers, squared columns of the writer, and its new columns."""
    weight = component.writer.weight.detach()
    kept = component.columns(units).to(weight.device)
    places = [*reader_rows(component, units), (component.writer, kept)]
    changes = [0.0] * (len(places) - 1) + [float(squares(columns - weight[:, kept]))]
    result = []
    for power, change, (linear, index) in zip(powers, changes, places, strict=True):
        dense, masked = float(power.sum()), float(power[index.to(power.device)].sum())
        result.append(LinearNorms(linear.weight.numel(), dense, masked, dense - masked + change))
    return tuple(result)


BLOCK = 128  # columns for which unstructured masks are chosen together

GROUP = 4  # columns of a 2:4 group, and the narrowest part of a sweep

SPREAD, STEP = 4, 0.05  # levels on either side of the budget, and their distance


@dataclass(frozen=True)
class Masks:
    """Weight masks with compensation; shapes and parameter counts do not change.

    Args:
        ratio: Levels are ``ratio - 0.20 ... ratio + 0.20`` in steps of 0.05 within [0, 0.95]; None: level 0 is whole,
            level 1 has zeros in 2 of every 4 neighbouring weights of a row.
        damping: Share of each channel's own power that is added to Gram matrices, > 0.
        tokens: Positions that count, see `efficientllava.pruning.stream.counted_positions`.
    """

    ratio: float | None
    damping: float = 0.01
    tokens: str = "all"

    @property
    def granularity(self) -> str:
        """``unstructured`` or ``2:4``."""
        return "2:4" if self.ratio is None else "unstructured"

    def amounts(self, component: Component) -> tuple[float, ...]:
        """Share of weights that each level sets to zero, ascending; the same for every gene."""
        if self.ratio is None:
            return 0.0, 0.5
        wished = (self.ratio + STEP * step for step in range(-SPREAD, SPREAD + 1))
        return tuple(sorted({round(min(max(share, 0.0), MASKED["unstructured"]), 9) for share in wished}))

    def inputs(self, component: Component) -> list[nn.Linear]:
        """One of the readers, which share their input, and the writer."""
        return [component.readers[0].linear, component.writer]

    def levels(self, component: Component, grams: list[Tensor], felt: Tensor | None = None) -> Iterator[Level]:
        """Make all levels in order.

        Args:
            component: A whole component.
            grams: Gram matrices of the readers' and the writer's input; used up.
            felt: Not used.

        Yields:
            Levels with ``<i>.values``, the kept weights of the i-th linear layer, row by row, and ``<i>.mask``, where
            they are, 8 to a byte; readers first.
        """
        amounts = self.amounts(component)
        shares = [share for share in amounts if share]
        made: list[list[tuple[LinearNorms, dict[str, Tensor]]]] = [[] for _ in shares]
        readers = list(dict.fromkeys(reader.linear for reader in component.readers))
        for linears in (readers, [component.writer]):
            for level, sparse in zip(made, self._masked(linears, grams.pop(0), shares), strict=True):
                level += sparse
        if len(shares) < len(amounts):
            norms = [float(squares(linear.weight)) for linear in (*readers, component.writer)]
            sizes = [linear.weight.numel() for linear in (*readers, component.writer)]
            yield Level(0, tuple(LinearNorms(n, d, d, 0.0) for n, d in zip(sizes, norms, strict=True)))
        for level in made:
            tensors = {f"{i}.{name}": tensor for i, (_, stored) in enumerate(level) for name, tensor in stored.items()}
            zeros = sum(norms.weights - len(stored["values"]) for norms, stored in level)
            yield Level(zeros, tuple(norms for norms, _ in level), tensors)

    def assemble(self, twin: Component, tensors: Mapping[str, Tensor]) -> None:
        """Give a component the weights of a level.

        Args:
            twin: A whole component with its own modules; changed.
            tensors: As `levels` gave them.
        """
        linears = [*dict.fromkeys(reader.linear for reader in twin.readers), twin.writer]
        for i, linear in enumerate(linears):
            weight = torch.zeros_like(linear.weight)
            weight.masked_scatter_(_unpacked(tensors[f"{i}.mask"], weight.shape), tensors[f"{i}.values"])
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def _masked(
        self, linears: Sequence[nn.Linear], gram: Tensor, shares: Sequence[float]
    ) -> Iterator[list[tuple[LinearNorms, dict[str, Tensor]]]]:
        """Norms of linear layers with one input at every share, and what is stored of them."""
        weights = [linear.weight.detach() for linear in linears]
        pruned, kept = sparsify(weights, gram, shares, self.damping, self.ratio is None)
        rows = [len(weight) for weight in weights]
        for level in range(len(shares)):
            parts = zip(weights, pruned[:, level].split(rows, 1), kept[:, level].split(rows, 1), strict=True)
            yield [_sparse(weight, new.T, mask.T) for weight, new, mask in parts]


def _sparse(weight: Tensor, pruned: Tensor, kept: Tensor) -> tuple[LinearNorms, dict[str, Tensor]]:
    """Norms of a linear layer at a level, and what is stored of it."""
    norms = (float(squares(matrix)) for matrix in (weight, weight * kept, pruned - weight))
    return LinearNorms(weight.numel(), *norms), {"values": pruned[kept].to(weight.dtype), "mask": _packed(kept)}


@torch.no_grad()
def sparsify(
    weights: Sequence[Tensor], gram: Tensor, shares: Sequence[float], damping: float, two_of_four: bool = False
) -> tuple[Tensor, Tensor]:
    """Prune linear layers that read the same input, at several shares.

    Args:
        weights: ``(rows, columns)`` each.
        gram: ``E[x x^T]`` of the input, ``(columns, columns)``; used up.
        shares: Share of each layer's weights to set to zero, met up to rounding; ignored with ``two_of_four``.
        damping: Share of each channel's own power that is added to ``gram``, > 0.
        two_of_four: Exactly 2 zeros in every 4 neighbouring weights of a row; columns beyond the last 4 stay whole.

    Returns:
        New weights in float32 (float64 if they are), transposed: ``(columns, shares, all rows)``, and which are kept.
    """
    rows = [len(weight) for weight in weights]
    columns, dtype = len(gram), torch.promote_types(weights[0].dtype, torch.float32)
    # H = V V^T with V upper triangular, from the factor of H with both orders reversed; then U = V^-1.
    lower = factorise(gram.flip(0, 1), damping_of(gram, damping).flip(0), "linear layer")
    unit = torch.eye(columns, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True).to(dtype)
    whole = torch.cat([weight.T for weight in weights], 1).to(dtype)
    work = whole.unsqueeze(1).repeat(1, len(shares), 1)
    gone = torch.zeros_like(work, dtype=torch.bool)
    flat, flat_gone = work.flatten(1), gone.flatten(1)
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        corner = factor[block, block]
        if not two_of_four:
            scores = (work[block] / corner.diagonal()[:, None, None]).square()
            _choose(scores, gone[block], rows, shares, start)
        errors = torch.empty_like(flat[block])
        _sweep(flat[block], corner, flat_gone[block], errors, two_of_four)
        flat[block.stop :].addmm_(factor[block, block.stop :].T, errors, alpha=-1)
    return work.masked_fill_(gone, 0), ~gone


def _choose(scores: Tensor, gone: Tensor, rows: Sequence[int], shares: Sequence[float], start: int) -> None:
    """Mark the lowest scores ``(block, shares, all rows)`` of each layer and level.

    Counts are rounded so that those of all blocks so far add up to the share.
    """
    stop = start + len(scores)
    for level, share in enumerate(shares):
        parts = zip(rows, scores[:, level].split(list(rows), 1), gone[:, level].split(list(rows), 1), strict=True)
        for count, part, marks in parts:
            marks.copy_(lowest(part, round(share * count * stop) - round(share * count * start)))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of exactly ``count`` lowest scores; among equal ones the first in memory order go."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.flatten().kthvalue(count).values
    below, equal = scores < bound, scores == bound
    return below | (equal & (equal.flatten().cumsum(0).view_as(equal) <= count - below.sum()))


def _sweep(weights: Tensor, factor: Tensor, gone: Tensor, errors: Tensor, two_of_four: bool) -> None:
    """Pass columns from left to right.

    Args:
        weights: ``(columns, levels x rows)``; compensated in place, what goes keeps the value it went with.
        factor: The part of ``U`` that belongs to these columns.
        gone: Which weights go; filled here for 2:4.
        errors: Receives ``e``, 0 where a weight stays.
        two_of_four: Whether the mask is chosen here, group by group.
    """
    width = len(weights)
    if width > GROUP:
        half = 1 << ((width - 1).bit_length() - 1)  # a power of two, so that no group is split
        _sweep(weights[:half], factor[:half, :half], gone[:half], errors[:half], two_of_four)
        weights[half:].addmm_(factor[:half, half:].T, errors[:half], alpha=-1)
        _sweep(weights[half:], factor[half:, half:], gone[half:], errors[half:], two_of_four)
        return
    pivots = factor.diagonal()
    if two_of_four and width == GROUP:
        scores = (weights / pivots.unsqueeze(1)).abs()
        gone.scatter_(0, scores.topk(GROUP // 2, dim=0, largest=False).indices, True)
    scaled = gone / pivots.unsqueeze(1)
    for column in range(width):
        torch.mul(weights[column], scaled[column], out=errors[column])
        weights[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)


def _packed(mask: Tensor) -> Tensor:
    """A boolean tensor, 8 to a byte."""
    bits = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: shape.numel()].bool().view(shape)


Recipe = Structured | Masks
