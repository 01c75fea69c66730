"""Mask levels: single weights, or 2 of every 4, become zero, and the rest of their rows makes up for it.

The method is SparseGPT (arXiv 2301.00774, algorithm 1) on all linear layers of a gene. With ``H = E[x x^T] + lambda I``
of a layer's input and ``U`` the upper factor of ``H^-1 = U^T U``, the columns of ``W`` go by from left to right: where
``w_rc`` is to go, ``e_rc = w_rc / U_cc`` and ``W_r,c: <- W_r,c: - e_rc U_c,c:``, the optimal update of all weights not
yet passed (Optimal Brain Surgeon, Hassibi and Stork 1993). ``e_rc^2`` is the rise of the output error and chooses the
weights: the lowest of 128 columns and all rows at once, or of every 4 columns in each row.

All levels of a gene go through one sweep, side by side. Inside a block, columns are treated in halves of halves, so
that nearly all work is matrix products over all levels and all layers that read the same input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import Component
from ..pruning.spd import damping_of, factorise
from ..settings.schema import MASKED
from .generalization import LinearNorms
from .levels import Level, squares

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
        tokens: Positions that count, see `efficientllava.pruning.statistics.counted_positions`.
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
        made: list[list[_Sparse]] = [[] for _ in shares]
        readers = list(dict.fromkeys(reader.linear for reader in component.readers))
        for linears in (readers, [component.writer]):
            for level, sparse in zip(made, self._masked(linears, grams.pop(0), shares), strict=True):
                level += sparse
        if len(shares) < len(amounts):
            norms = [float(squares(linear.weight)) for linear in (*readers, component.writer)]
            sizes = [linear.weight.numel() for linear in (*readers, component.writer)]
            yield Level(0, tuple(LinearNorms(n, d, d, 0.0) for n, d in zip(sizes, norms, strict=True)))
        for level in made:
            tensors = {f"{i}.values": sparse.values for i, sparse in enumerate(level)}
            tensors |= {f"{i}.mask": sparse.mask for i, sparse in enumerate(level)}
            yield Level(sum(sparse.zeros for sparse in level), tuple(sparse.norms for sparse in level), tensors)

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

    def _masked(self, linears: Sequence[nn.Linear], gram: Tensor, shares: Sequence[float]) -> Iterator[list[_Sparse]]:
        """Linear layers with one input at every share."""
        weights = [linear.weight.detach() for linear in linears]
        pruned, kept = sparsify(weights, gram, shares, self.damping, self.ratio is None)
        rows = [len(weight) for weight in weights]
        for level in range(len(shares)):
            parts = zip(weights, pruned[:, level].split(rows, 1), kept[:, level].split(rows, 1), strict=True)
            yield [_Sparse.of(weight, new.T, mask.T) for weight, new, mask in parts]


@dataclass(frozen=True)
class _Sparse:
    """One linear layer at one level."""

    norms: LinearNorms
    zeros: int
    values: Tensor
    mask: Tensor

    @classmethod
    def of(cls, weight: Tensor, pruned: Tensor, kept: Tensor) -> _Sparse:
        norms = LinearNorms(
            weight.numel(), *(float(squares(matrix)) for matrix in (weight, weight * kept, pruned - weight))
        )
        values = pruned[kept].to(weight.dtype)
        return cls(norms, weight.numel() - len(values), values, _packed(kept))


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
