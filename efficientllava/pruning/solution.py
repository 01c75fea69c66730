"""Refit: the kept columns of a writer are solved again, so that its output survives the loss of the others.

With ``x`` the writer's input on the pruned prefix, ``S`` the kept columns and ``y`` the target output, the refitted
columns minimise ``E ||y - W* x_S||^2 + ||(W* - W_S) Lambda^(1/2)||^2``:

    W* = W_S + R (H_SS + Lambda)^-1,    R = E[y x_S^T] - W_S H_SS,    H = E[x x^T],    Lambda = lambda diag(H_SS)

For the target ``y = W x`` this is ``W_S + W_P H_PS (H_SS + Lambda)^-1`` with ``P`` the pruned columns, the optimal
compensation of OBS (Hassibi and Stork 1993; per-column form in arXiv 2203.07259 and 2403.12983). The damping pulls
towards the plain slice, so that the error on the calibration data can never exceed the plain slice's.

A layer may also repair what earlier layers lost, ``y = W x + alpha (r - W x)`` with ``r`` what it would have to write
for the residual stream to be the dense model's; how far that generalises differs from writer to writer (arXiv
2504.02692, 2504.09629). ``alpha`` and ``lambda`` are what is best on records that the columns were not fitted to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .obs import DAMPING, damping_of, divide, factorise
from .statistics import STRIP

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # among these the validated one is chosen
TRIED = 4  # of them are tried, about


@dataclass(frozen=True)
class LayerError:
    """Error of one writer on the calibration data, relative to its target's mean square.

    Args:
        layer: Index of the layer.
        component: ``attention`` or ``mlp``.
        before: Error of the plain slice.
        after: Error of the refitted columns; never above ``before``.
        damping: Damping of the Gram matrix, as a share of each channel's power; None where the slice stayed plain.
        repair: How far the target repairs what earlier layers lost, [0, 1].
    """

    layer: int
    component: str
    before: float
    after: float
    damping: float | None = None
    repair: float = 0.0


class Target(NamedTuple):
    """Moments of a writer's target ``y`` with its kept inputs.

    Args:
        cross: ``E[y x_S^T]``, ``(out_features, kept)``.
        power: ``E ||y||^2``.
    """

    cross: Tensor
    power: float


@dataclass
class Moments:
    """Mean moments of a writer's kept inputs ``x_S``, its own output ``y = W x``, and what repairs the stream, ``r``.

    Args:
        gram: ``E[x_S x_S^T]``.
        own: ``E[y x_S^T]``, ``(out_features, kept)``.
        repaired: ``E[r x_S^T]``; None where the residual stream is not looked at.
        powers: ``E ||y||^2``, ``E <y, r>``, ``E ||r||^2``.
        weight: Sum of the weights of the positions.
    """

    gram: Tensor
    own: Tensor
    repaired: Tensor | None
    powers: tuple[float, float, float]
    weight: float

    def add(self, other: Moments) -> None:
        """Become the moments of both; ``other`` is used up."""
        mine, theirs = (each.weight / (self.weight + other.weight) for each in (self, other))
        for name in ("gram", "own", "repaired"):
            if (matrix := getattr(self, name)) is not None:
                matrix.mul_(mine).add_(getattr(other, name).mul_(theirs))
        self.powers = tuple(mine * a + theirs * b for a, b in zip(self.powers, other.powers, strict=True))  # pyright: ignore
        self.weight += other.weight

    def target(self, repair: float) -> Target:
        """Moments of ``y + repair (r - y)``; takes the memory of these."""
        own, both, wanted = self.powers
        power = (1 - repair) ** 2 * own + 2 * repair * (1 - repair) * both + repair**2 * wanted
        return Target(self.own if self.repaired is None else self.own.lerp_(self.repaired, repair), power)


def validate(
    weight: Tensor,
    kept: Tensor,
    fitted: Moments,
    held: Moments,
    damping: float | None,
    repair: float | None,
    what: str,
    near: float = DAMPING,
) -> tuple[float, float]:
    """Choose damping and repair by the error on records that the columns are not fitted to.

    The solution is linear in ``repair``, so that its best value is known in closed form for each damping. Dampings are
    tried from one that is likely good downhill, in float32: the choice needs no more.

    Args:
        weight: The whole writer, ``(out_features, in_features)``.
        kept: Indices of the kept columns.
        fitted: Moments that columns are solved from.
        held: Moments of other records.
        damping: Fixed, or None.
        repair: Fixed, or None.
        what: Layer and component, for errors.
        near: One of `DAMPINGS`, where the search begins.

    Returns:
        Damping, infinite where no solution beats the plain slice, and repair.
    """
    gram, seen_gram = (moments.gram.float() for moments in (fitted, held))
    wanted = held.own if held.repaired is None else held.repaired

    def error(candidate: float) -> tuple[float, float]:
        """Error beside that of the plain slice, and the repair that it is reached with."""
        lower = factorise(gram.clone(), damping_of(gram, candidate), what)
        # With D the change at repair 0, V its slope, W_S the slice and R = E[r x^T] - W_S H, all of held records:
        #   error(a) - error of the slice = -2 <D + a V, R> + ||(D + a V) H^(1/2)||^2
        flat = slope = both = curve = 0.0
        for rows in range(0, len(weight), STRIP * 4):
            part = slice(rows, rows + STRIP * 4)
            plain = weight[part, kept].float()
            change = fitted.own[part].float() - plain @ gram
            divide(change, lower, what)
            rest = wanted[part].float() - plain @ seen_gram
            seen = change @ seen_gram
            flat += _inner(change, seen) - 2 * _inner(change, rest)
            if fitted.repaired is not None and repair != 0:
                more = (fitted.repaired[part] - fitted.own[part]).float()
                divide(more, lower, what)
                slope += _inner(more, rest)
                both += _inner(more, seen)
                curve += _inner(more, more @ seen_gram)
        step = min(max((slope - both) / curve, 0.0), 1.0) if curve > 0 else 0.0
        step = step if repair is None else repair
        return flat - 2 * step * (slope - both) + step**2 * curve, step

    if damping is not None:
        return damping, error(damping)[1]
    known, place = dict[int, tuple[float, float]](), DAMPINGS.index(near)
    while True:
        for index in range(max(place - 1, 0), min(place + 2, len(DAMPINGS))):
            known[index] = known.get(index) or error(DAMPINGS[index])
        best = min(known, key=lambda index: known[index][0])
        if best == place:
            break
        place = best
    return (DAMPINGS[best], known[best][1]) if known[best][0] < 0 else (math.inf, repair or 0.0)


def solve(
    weight: Tensor, kept: Tensor, gram: Tensor, target: Target, damping: float, what: str = "writer"
) -> tuple[Tensor, float, float]:
    """Refit kept columns in closed form.

    Args:
        weight: The whole writer, ``(out_features, in_features)``.
        kept: Indices of the kept columns ``W_S``.
        gram: ``H_SS``, ``(kept, kept)``; used up.
        target: Moments of the target with the kept inputs; their memory becomes the result.
        damping: Share of each kept column's own power that is added to ``gram``, > 0.
        what: Layer and component, for errors.

    Returns:
        Refitted columns in the type of ``gram``, and the mean square error before and after.

    Raises:
        UnsolvedError: The system has no trustworthy solution.
    """
    # With W the plain slice, D the change and R = E[y x^T] - W H:
    #   E||y - W x||^2     = E||y||^2 - <W, E[y x^T]> - <W, R>
    #   E||y - (W+D) x||^2 = the same - <D, R> - <D, D Lambda>,    Lambda the damping, D = R (H + Lambda)^-1
    step, before = target.cross, plain_error(weight, kept, gram, target)
    shift = damping_of(gram, damping)
    gain = divide(step, factorise(gram, shift, what), what)
    gain += float((step.square().sum(0) * shift).sum())
    for rows, whole in zip(step.split(STRIP), weight.split(STRIP), strict=True):
        rows.add_(whole[:, kept])
    return step, before, max(before - gain, 0.0)


def plain_error(weight: Tensor, kept: Tensor, gram: Tensor, target: Target) -> float:
    """Mean square error of the plain slice; leaves ``R = E[y x_S^T] - W_S H_SS`` in the memory of ``target.cross``."""
    error = target.power
    for rows, whole in zip(target.cross.split(STRIP), weight.split(STRIP), strict=True):
        plain = whole[:, kept].to(gram.dtype)
        error -= _inner(plain, rows) + _inner(plain, rows.addmm_(plain, gram, alpha=-1))
    return max(error, 0.0)


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))
