"""Refit: the kept columns of a writer are solved again, so that its output survives the loss of the others.

With ``x`` the writer's input on the pruned prefix, ``S`` the kept columns and ``y`` the target output, the refitted
columns minimise ``E ||y - W* x_S||^2 + ||(W* - W_S) Lambda^(1/2)||^2``:

    W* = W_S + R (H_SS + Lambda)^-1,    R = E[y x_S^T] - W_S H_SS,    H = E[x x^T],    Lambda = lambda diag(H_SS)

For the target ``y = W x`` this is ``W_S + W_P H_PS (H_SS + Lambda)^-1`` with ``P`` the pruned columns, the optimal
compensation of OBS (Hassibi and Stork 1993; per-column form in arXiv 2203.07259 and 2403.12983). The damping pulls
towards the plain slice, so that the error on the calibration data can never exceed the plain slice's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, decoder_of, describe_layer, names_of
from .plan import LayerPlan
from .spd import damping_of, divide, factorise
from .statistics import STRIP, CalibrationStream, Gram, Reduce, add_product, no_reduce, total_weight
from .surgery import cut_component

TARGETS = ("layer", "residual")
Write = Callable[[Tensor], Tensor]


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
    step, before = target.cross, target.power
    strips = list(zip(step.split(STRIP), weight.split(STRIP), strict=True))
    for rows, whole in strips:
        plain = whole[:, kept].to(gram.dtype)
        before -= _inner(plain, rows) + _inner(plain, rows.addmm_(plain, gram, alpha=-1))
    shift = damping_of(gram, damping)
    gain = divide(step, factorise(gram, shift, what), what)
    gain += float((step.square().sum(0) * shift).sum())
    before = max(before, 0.0)
    for rows, whole in strips:
        rows.add_(whole[:, kept])
    return step, before, max(before - gain, 0.0)


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))


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
class _Flow:
    """Hidden states of all batches at one layer boundary.

    Args:
        pruned: Of the pruned prefix.
        dense: Of the dense model; None where the refit does not look at it.
        touched: Whether the two differ.
    """

    pruned: list[Tensor]
    dense: list[Tensor] | None
    touched: bool = False


class SequentialPruner:
    """Cuts a model layer by layer on the calibration stream, so that later layers are fitted on pruned inputs.

    Held between layers: the hidden states of the pruned prefix, for the target ``residual`` those of the dense model as
    well, and inside a layer the kept inputs of the attention's writer, so that no attention is computed twice.

    Args:
        stream: The calibration stream.
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
        # A norm after the writer hides the residual stream from it; the layer's own output is the target then.
        self._to_residual = refit and target == "residual" and not names_of(stream.model).post_norms
        self._config = decoder_of(stream.model).config

    @torch.no_grad()
    def run(
        self, plans: Sequence[LayerPlan], commit: bool, on_layer: Callable[[int], None] | None = None
    ) -> RefitResult:
        """Cut the layers of a plan one after the other and measure the answer loss.

        Args:
            plans: Kept layers in ascending order.
            commit: Whether the model's own layers are cut in place; the caller then has to call
                `efficientllava.pruning.surgery.rebuild`, and the stream is used up. A trial only lets writers read
                less, and leaves the model as it is.
            on_layer: Called with the index of every finished layer.

        Returns:
            The loss and the errors.
        """
        by_index = {plan.index: plan for plan in plans}
        start = self._stream.start()
        flow = _Flow(start, list(start) if self._to_residual else None)
        result = RefitResult(0.0)
        for index, original in enumerate(decoder_of(self._stream.model).layers):
            plan = by_index.get(index)
            if plan is not None:
                with self._stream.on_device(original):
                    self._cut_layer(original, plan, flow, result.errors, commit)
            else:
                flow.touched = True
                if flow.dense is not None:
                    self._stream.advance(original, index, flow.dense)
            if on_layer:
                on_layer(index)
        result.loss = self._stream.answer_loss(flow.pruned, self._reduce)
        return result

    def _cut_layer(
        self, layer: nn.Module, plan: LayerPlan, flow: _Flow, errors: list[LayerError], commit: bool
    ) -> None:
        attention = describe_layer(layer, self._config).attention
        moments = self._moments(attention, plan.groups, flow.touched)
        kept_inputs = self._run_attention(layer, plan, attention, flow, moments)
        write = self._write(attention, plan.groups, plan.index, moments, errors, commit)
        flow.touched |= len(plan.groups) < attention.units
        with contextlib.ExitStack() as trial:
            trial.enter_context(_replayed(attention.module, write, kept_inputs))
            mlp = describe_layer(layer, self._config).mlp
            moments = self._moments(mlp, plan.channels, flow.touched)
            if moments is not None:
                self._run_mlp(layer, plan.index, mlp, flow, moments)
            write = self._write(mlp, plan.channels, plan.index, moments, errors, commit)
            del moments  # its matrices would stay through the pass below
            if not commit:
                trial.enter_context(_narrowed(mlp.writer, mlp.columns(plan.channels), write))
            flow.touched |= len(plan.channels) < mlp.units
            if flow.touched or flow.dense is None:
                self._stream.advance(layer, plan.index, flow.pruned)
            else:
                flow.pruned = list(flow.dense)

    def _moments(self, component: Component, units: Sequence[int], touched: bool) -> _Moments | None:
        whole = len(units) == component.units
        if not self._refit or (whole and not (touched and self._to_residual)):
            return None
        return _Moments(component.writer, component.columns(units))

    def _run_attention(
        self, layer: nn.Module, plan: LayerPlan, attention: Component, flow: _Flow, moments: _Moments | None
    ) -> list[Tensor]:
        """Move the dense stream through the layer, which is still whole; return what the kept heads write from."""
        stream, result = self._stream, []
        kept = attention.columns(plan.groups).to(attention.writer.weight.device)
        for batch, stored in enumerate(flow.pruned):
            inputs, wanted = stream.load(stored), None
            seen = _Seen()
            if flow.dense is not None:
                start = stream.load(flow.dense[batch])
                with _captured(attention.writer, seen):
                    after = stream.call(layer, plan.index, batch, start)
                flow.dense[batch] = stream.store(after)
                # What the attention would have to write for the residual stream to equal the dense model's.
                wanted = start + seen.output - inputs
            if flow.dense is None or flow.touched:
                with _captured(attention.writer, seen, stop=True):
                    stream.call(layer, plan.index, batch, inputs)
            if moments is not None:
                counted, weights = stream.counted[batch], stream.weights(batch, inputs + seen.output)
                moments.add(seen.inputs[counted], (seen.output if wanted is None else wanted)[counted], weights)
            result.append(stream.store(seen.inputs[..., kept]))
        return result

    def _run_mlp(self, layer: nn.Module, index: int, mlp: Component, flow: _Flow, moments: _Moments) -> None:
        stream = self._stream
        for batch, stored in enumerate(flow.pruned):
            seen = _Seen()
            with _captured(mlp.writer, seen):
                output = stream.call(layer, index, batch, stream.load(stored))
            wanted = seen.output
            if flow.dense is not None:
                wanted = stream.load(flow.dense[batch]) - (output - seen.output)
            counted = stream.counted[batch]
            moments.add(seen.inputs[counted], wanted[counted], stream.weights(batch, output))

    def _write(
        self,
        component: Component,
        units: Sequence[int],
        index: int,
        moments: _Moments | None,
        errors: list[LayerError],
        commit: bool,
    ) -> Write:
        """Refit and cut a component; return how it writes from its kept inputs."""
        weight, writer = None, component.writer
        if moments is not None:
            gram, target = moments.means(self._reduce)
            what = f"layer {index}, {component.kind}"
            weight, before, after = solve(writer.weight.detach(), moments.kept, gram, target, self._damping, what)
            scale = max(target.power, torch.finfo(torch.float32).tiny)
            errors.append(LayerError(index, component.kind, before / scale, after / scale))
        if commit:
            if weight is not None or len(units) < component.units:
                cut_component(component, units, weight)
            return writer
        if weight is None:
            weight = writer.weight.detach()[:, component.columns(units).to(writer.weight.device)]
        return partial(nn.functional.linear, weight=weight.to(writer.weight.dtype), bias=writer.bias)


class _Moments:
    """Weighted sums over counted positions: Gram matrix of a writer's kept inputs, and their moments with its target."""

    def __init__(self, writer: nn.Linear, kept: Tensor) -> None:
        device = writer.weight.device
        self.kept = kept.to(device)
        self._gram = Gram(len(kept), device)
        self._bias = writer.bias
        self._cross = torch.zeros(writer.out_features, len(kept), dtype=self._gram.matrix.dtype, device=device)
        self._power = torch.zeros(1, dtype=torch.float64)

    def add(self, rows: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Add a writer's whole inputs, ``(positions, in_features)``, what it should write, and the positions' weights."""
        rows = rows[:, self.kept]
        wanted = wanted if self._bias is None else wanted - self._bias
        self._gram.add(rows, weights)
        add_product(self._cross, wanted, rows, weights)
        self._power += float(wanted.double().square().sum(1) @ weights.double())

    def means(self, reduce: Reduce) -> tuple[Tensor, Target]:
        """Close the sums over all processes."""
        weight = total_weight(self._gram.weight, reduce)
        target = Target(reduce(self._cross).div_(weight), float(reduce(self._power)) / weight)
        return self._gram.mean(reduce), target


class _Reached(Exception):
    """Control flow, never an error a user sees."""


class _Seen:
    """What went into a writer and what it wrote, in its latest call."""

    inputs: Tensor
    output: Tensor


@contextlib.contextmanager
def _captured(writer: nn.Linear, seen: _Seen, stop: bool = False) -> Iterator[None]:
    """Note a writer's next call; with ``stop`` the rest of the block does not run."""

    def note(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs, seen.output = args[0], output
        if stop:
            raise _Reached

    handle = writer.register_forward_hook(note)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


@contextlib.contextmanager
def _replayed(attention: nn.Module, write: Write, kept_inputs: Sequence[Tensor]) -> Iterator[None]:
    """Let an attention only write, from what its heads gave before; batches come in order, pass after pass."""
    turns = itertools.cycle(kept_inputs)
    device = next(attention.parameters()).device

    def forward(*_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return write(next(turns).to(device)), None

    with _forward(attention, forward):
        yield


@contextlib.contextmanager
def _narrowed(writer: nn.Linear, kept: Tensor, write: Write) -> Iterator[None]:
    """Let a writer read only its kept columns."""
    kept = kept.to(writer.weight.device)
    with _forward(writer, lambda inputs: write(inputs[..., kept])):
        yield


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
