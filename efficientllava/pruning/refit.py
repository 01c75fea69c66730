"""Refit: the kept columns of a writer are solved again, so that its output survives the loss of the others.

With ``x`` the writer's input on the pruned prefix, ``S`` the kept columns and ``y`` the target output, the refitted
columns minimise ``E ||y - W* x_S||^2 + lambda ||W* - W_S||^2``:

    W* = W_S + (E[y x_S^T] - W_S H_SS) (H_SS + lambda I)^-1,    H = E[x x^T]

For the target ``y = W x`` this is ``W_S + W_P H_PS (H_SS + lambda I)^-1`` with ``P`` the pruned columns, the optimal
compensation of OBS (Hassibi and Stork 1993; per-column form in arXiv 2203.07259 and 2403.12983). The damping pulls
towards the plain slice, so that the error on the calibration data can never exceed the plain slice's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, decoder_of, describe_layer
from .plan import LayerPlan
from .statistics import CalibrationStream, Gram, Reduce, no_reduce
from .surgery import cut_component

TARGETS = ("layer", "residual")


@dataclass(frozen=True)
class LayerError:
    """Error of one writer on the calibration data, relative to its target's mean square.

    Args:
        layer: Index of the layer.
        component: ``attention`` or ``mlp``.
        before: Error of the plain slice.
        after: Error of the refitted columns; never above ``before``.
    """

    layer: int
    component: str
    before: float
    after: float


@dataclass
class Target:
    """Moments of a writer's target ``y`` with its kept inputs.

    Args:
        cross: ``E[y x_S^T]``, ``(out_features, kept)``.
        power: ``E ||y||^2``.
    """

    cross: Tensor
    power: float


def own_target(weight: Tensor, gram: Tensor) -> tuple[Tensor, float]:
    """Moments of the layer's own dense output ``y = W x``.

    Args:
        weight: ``(out_features, inputs)``.
        gram: ``E[x x^T]``, ``(inputs, inputs)``.

    Returns:
        ``E[y x^T]``, ``(out_features, inputs)``, and ``E ||y||^2``.
    """
    cross = weight.to(gram.dtype) @ gram
    return cross, float((cross * weight.to(gram.dtype)).sum())


def solve(weight: Tensor, gram: Tensor, target: Target, damping: float) -> tuple[Tensor, float, float]:
    """Refit kept columns in closed form.

    Args:
        weight: Kept columns ``W_S``, ``(out_features, kept)``.
        gram: ``H_SS``, ``(kept, kept)``.
        target: Moments of the target with the kept inputs.
        damping: Multiple of the mean diagonal of ``gram`` that is added to it, > 0.

    Returns:
        Refitted columns in the type of ``gram``, and the mean square error before and after.
    """
    plain = weight.to(gram.dtype)
    scale = float(gram.diagonal().mean())
    damped = gram + (damping * scale + torch.finfo(gram.dtype).tiny) * torch.eye(len(gram)).to(gram)
    residual = target.cross - plain @ gram
    refitted = plain + torch.cholesky_solve(residual.T, torch.linalg.cholesky(damped)).T
    return refitted, _error(plain, gram, target), _error(refitted, gram, target)


def _error(weight: Tensor, gram: Tensor, target: Target) -> float:
    # E||y - Wx||^2 = E||y||^2 - 2 <W, E[y x^T]> + <W H, W>
    value = target.power - 2.0 * float((weight * target.cross).sum()) + float(((weight @ gram) * weight).sum())
    return max(value, 0.0)


@dataclass
class RefitResult:
    """What a sequential pass leaves behind.

    Args:
        loss: Answer loss on the calibration batches after the cut, in nats per token.
        errors: Error of every refitted writer.
    """

    loss: float
    errors: list[LayerError] = field(default_factory=list)


@dataclass
class _Dense:
    """The dense model's residual stream behind the attention and behind the MLP of one layer, for all batches."""

    middle: list[Tensor]
    after: list[Tensor]


class SequentialPruner:
    """Cuts a model layer by layer on the calibration stream, so that later layers are fitted on pruned inputs.

    Args:
        stream: The calibration stream; its hidden states stay unchanged.
        refit: Whether writers are refitted.
        target: ``layer``: the layer's own output on the pruned prefix. ``residual``: the dense model's residual
            stream behind the component, so that a layer also repairs what earlier layers lost.
        damping: See `solve`.
        reduce: Sums over processes.
    """

    def __init__(
        self,
        stream: CalibrationStream,
        refit: bool = True,
        target: str = "residual",
        damping: float = 0.01,
        reduce: Reduce = no_reduce,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {target!r}")
        self._stream, self._refit, self._damping, self._reduce = stream, refit, damping, reduce
        self._to_residual = refit and target == "residual"
        self._config = decoder_of(stream.model).config

    def run(
        self, plans: Sequence[LayerPlan], commit: bool, on_layer: Callable[[int], None] | None = None
    ) -> RefitResult:
        """Cut the layers of a plan one after the other and measure the answer loss.

        Args:
            plans: Kept layers in ascending order.
            commit: Whether the model's own layers are cut in place; the caller then has to call
                `efficientllava.pruning.surgery.rebuild`. A trial cuts a copy of one layer at a time.
            on_layer: Called with the index of every finished layer.

        Returns:
            The loss and the errors.
        """
        by_index = {plan.index: plan for plan in plans}
        pruned = dense_hidden = list(self._stream.hidden)
        touched = False
        result = RefitResult(0.0)
        for index, original in enumerate(decoder_of(self._stream.model).layers):
            dense = self._run_dense(original, index, dense_hidden) if self._to_residual else None
            plan = by_index.get(index)
            if plan is None:
                touched = True
            else:
                layer = original if commit else copy.deepcopy(original)
                touched = self._cut_layer(layer, plan, dense, pruned, touched, result.errors)
                pruned = dense.after if dense and not touched else self._stream.advance(layer, index, pruned)
            if dense:
                dense_hidden = dense.after
            if on_layer:
                on_layer(index)
        result.loss = self._stream.answer_loss(pruned, self._reduce)
        return result

    def _run_dense(self, layer: nn.Module, index: int, hidden: Sequence[Tensor]) -> _Dense:
        writer = describe_layer(layer, self._config).attention.writer
        outputs: list[Tensor] = []
        dense = _Dense([], [])
        handle = writer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            for _, inputs, after in self._stream.run(layer, index, hidden):
                dense.middle.append(self._stream.store(inputs + outputs.pop()))
                dense.after.append(self._stream.store(after))
        finally:
            handle.remove()
        return dense

    def _cut_layer(
        self,
        layer: nn.Module,
        plan: LayerPlan,
        dense: _Dense | None,
        pruned: Sequence[Tensor],
        touched: bool,
        errors: list[LayerError],
    ) -> bool:
        for kind, units in (("attention", plan.groups), ("mlp", plan.channels)):
            component: Component = getattr(describe_layer(layer, self._config), kind)
            whole = len(units) == component.units
            if self._refit and (not whole or (touched and self._to_residual)):
                goal = None if dense is None else (dense.middle if kind == "attention" else dense.after)
                weight, error = self._refit_writer(layer, plan.index, component, units, goal, pruned)
                errors.append(error)
                cut_component(component, units, weight)
            elif not whole:
                cut_component(component, units)
            touched = touched or not whole
        return touched

    def _refit_writer(
        self,
        layer: nn.Module,
        index: int,
        component: Component,
        units: Sequence[int],
        goal: Sequence[Tensor] | None,
        pruned: Sequence[Tensor],
    ) -> tuple[Tensor, LayerError]:
        weight = component.writer.weight.detach()
        kept = component.columns(units).to(weight.device)
        moments = self._collect(layer, index, component, goal, pruned)
        gram = moments.gram.reduced(self._reduce)
        cross, power = moments.target(self._reduce) if goal is not None else own_target(weight, gram)
        refitted, before, after = solve(
            weight[:, kept], gram[kept][:, kept], Target(cross[:, kept], power), self._damping
        )
        scale = max(power, torch.finfo(torch.float32).tiny)
        return refitted, LayerError(index, component.kind, before / scale, after / scale)

    def _collect(
        self,
        layer: nn.Module,
        index: int,
        component: Component,
        goal: Sequence[Tensor] | None,
        pruned: Sequence[Tensor],
    ) -> _Moments:
        writer = component.writer
        moments = _Moments(writer)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = writer.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
        try:
            for batch, inputs, output in self._stream.run(layer, index, pruned):
                counted = self._stream.counted[batch]
                written_from, written = seen.pop()
                wanted = None
                if goal is not None:
                    # What the writer would have to write for the residual stream to equal the dense model's.
                    rest = inputs if component.kind == "attention" else output - written
                    wanted = (goal[batch].to(rest.device) - rest)[counted]
                moments.add(written_from[counted], wanted)
        finally:
            handle.remove()
        return moments


class _Moments:
    """Sums over counted positions: Gram matrix of a writer's inputs, and moments of its target."""

    def __init__(self, writer: nn.Linear) -> None:
        device = writer.weight.device
        self.gram = Gram(writer.in_features, device)
        self._bias = writer.bias
        self._cross = torch.zeros(writer.out_features, writer.in_features, dtype=self.gram.matrix.dtype, device=device)
        self._power = torch.zeros(1, dtype=torch.float64)

    def add(self, rows: Tensor, wanted: Tensor | None) -> None:
        self.gram.add(rows)
        if wanted is not None:
            wanted = (wanted if self._bias is None else wanted - self._bias).to(self._cross.dtype)
            self._cross.addmm_(wanted.T, rows.to(self._cross.dtype))
            self._power += wanted.double().square().sum().cpu()

    def target(self, reduce: Reduce) -> tuple[Tensor, float]:
        count = float(reduce(torch.tensor([float(self.gram.count)], dtype=torch.float64)).clamp(min=1))
        return reduce(self._cross) / count, float(reduce(self._power)) / count
