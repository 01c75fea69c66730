"""Cut a model layer by layer, so that each layer's writers are refitted to what the pruned prefix gives them.

How a writer's columns are solved, and how far they repair earlier losses, stands in `efficientllava.pruning.solution`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import (
    Component,
    decoder_of,
    describe_layer,
    names_of,
)
from ..runtime.errors import require_finite
from ..runtime.processes import gather
from .fluctuation import layer_moments, mean_written
from .plan import LayerPlan
from .solution import DAMPINGS, LayerError, Moments, plain_error, solve, validate
from .spd import DAMPING
from .statistics import (
    POSITIONS,
    CalibrationStream,
    Gram,
    Reduce,
    Write,
    add_product,
    forwarded,
    narrowed,
    no_reduce,
    total_weight,
)
from .surgery import add_bias, cut_component, kept_units

TARGETS = {"layer": 0.0, "residual": 1.0, "adaptive": None}  # how far earlier losses are repaired; None: as validated


@dataclass
class RefitResult:
    """What a sequential pass leaves behind.

    Args:
        loss: Answer loss on the calibration batches after the cut, in nats per token.
        errors: Error of every refitted writer.
        hidden: Outputs of the last layer, by batch.
    """

    loss: float
    errors: list[LayerError] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list, compare=False, repr=False)


@dataclass
class _Flow:
    """Hidden states of all batches at one layer boundary.

    Args:
        pruned: Of the pruned prefix.
        dense: Of the dense model; None where the refit does not look at it.
        whole: The same for the biases; None where there are none.
        touched: Whether the two differ.
    """

    pruned: list[Tensor]
    dense: list[Tensor] | None
    whole: list[Tensor] | None = None
    touched: bool = False


class SequentialPruner:
    """Cuts a model layer by layer on the calibration stream, so that later layers are fitted on pruned inputs.

    Held between layers: the hidden states of the pruned prefix, for the target ``residual`` those of the dense model as
    well, and inside a layer the kept inputs of the attention's writer, so that no attention is computed twice.

    Args:
        stream: The calibration stream.
        refit: Whether writers are refitted.
        target: ``layer``: the layer's own output on the pruned prefix. ``residual``: the dense model's residual
            stream behind the component, so that a layer also repairs what earlier layers lost. ``adaptive``: between
            the two, see `validate`.
        damping: See `solve`; None: see `validate`.
        bias: Whether what the removed columns write on average in the dense model goes into the writers' biases.
        reduce: Sums over processes.
        fitted: Batches that are fitted to; None: all.
        held: Batches that damping and repair are chosen on before all of both are fitted to. Those that are in neither
            pass through only.
    """

    def __init__(
        self,
        stream: CalibrationStream,
        refit: bool = True,
        target: str = "adaptive",
        damping: float | None = None,
        reduce: Reduce = no_reduce,
        fitted: Collection[int] | None = None,
        held: Collection[int] = (),
        bias: bool = False,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"target must be one of {tuple(TARGETS)}, got {target!r}")
        self._stream, self._refit, self._damping, self._reduce = stream, refit, damping, reduce
        self._bias = bias
        self._held, self._validated = held, any(gather(len(held)))
        self._repair = TARGETS[target] if self._validated or target != "adaptive" else 0.0
        # A norm after the writer hides the residual stream from it; the layer's own output is the target then.
        self._to_residual = refit and self._repair != 0 and not names_of(stream.model).post_norms
        self._config = decoder_of(stream.model).config
        self._fitted = set(range(len(stream.batches))) - set(held) if fitted is None else fitted
        self._near: dict[str, float] = dict.fromkeys(
            ("attention", "mlp"), DAMPING
        )  # neighbouring layers want like dampings

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
        flow = _Flow(start, list(start) if self._to_residual else None, list(start) if self._bias else None)
        result = RefitResult(0.0)
        for index, original in enumerate(decoder_of(self._stream.model).layers):
            plan = by_index.get(index)
            if plan is not None:
                with self._stream.on_device(original):
                    self._cut_layer(original, plan, flow, result.errors, commit)
            else:
                flow.touched = True
                for dense in (flow.dense, flow.whole):
                    if dense is not None:
                        self._stream.advance(original, index, dense)
            if on_layer:
                on_layer(index)
        result.loss = self._stream.answer_loss(flow.pruned, self._reduce)
        result.hidden = flow.pruned
        return result

    def _cut_layer(
        self, layer: nn.Module, plan: LayerPlan, flow: _Flow, errors: list[LayerError], commit: bool
    ) -> None:
        (attention, heads), _ = kept_units(layer, self._config, plan)
        biases = self._biases(layer, plan, flow)
        moments = self._moments(attention, heads, flow.touched)
        kept_inputs = self._run_attention(layer, plan.index, attention, heads, flow, moments)
        write = self._write(attention, heads, plan.index, moments, errors, commit, biases[0])
        flow.touched |= len(heads) < attention.units
        with contextlib.ExitStack() as trial:
            trial.enter_context(_replayed(attention.module, write, kept_inputs))
            mlp = describe_layer(layer, self._config).mlp
            moments = self._moments(mlp, plan.channels, flow.touched)
            if moments is not None:
                self._run_mlp(layer, plan.index, mlp, flow, moments)
            write = self._write(mlp, plan.channels, plan.index, moments, errors, commit, biases[1])
            del moments  # its matrices would stay through the pass below
            if not commit:
                trial.enter_context(narrowed(mlp.writer, mlp.columns(plan.channels), write))
            flow.touched |= len(plan.channels) < mlp.units
            if flow.touched or flow.dense is None:
                self._stream.advance(layer, plan.index, flow.pruned)
            else:
                flow.pruned = list(flow.dense)

    def _biases(self, layer: nn.Module, plan: LayerPlan, flow: _Flow) -> tuple[Tensor | None, Tensor | None]:
        """What the writers of a whole layer lose on average; moves the dense stream through it."""
        if flow.whole is None:
            return None, None
        whole = describe_layer(layer, self._config)
        means = [moments.close()[0].mean(0) for moments in layer_moments(self._stream, whole, plan.index, flow.whole)]
        attention, mlp = kept_units(layer, self._config, plan)
        return mean_written(*attention, means[0]), mean_written(*mlp, means[1])

    def _moments(self, component: Component, units: Sequence[int], touched: bool) -> tuple[_Sums, _Sums] | None:
        """Sums of what is fitted and of what is held back; None where there is nothing to solve."""
        whole = len(units) == component.units
        if not self._refit or (whole and not (touched and self._to_residual)):
            return None
        columns = component.columns(units)
        places = (component.writer.weight.device, self._stream.storage)
        fitted, held = (_Sums(component.writer, columns, self._to_residual, place) for place in places)
        return fitted, held

    def _add(
        self,
        moments: tuple[_Sums, _Sums],
        batch: int,
        rows: Tensor,
        own: Tensor,
        wanted: Tensor | None,
        residual: Tensor,
    ) -> None:
        """Add a batch to the sums that it belongs to: all of ``(batch, seq, width)``."""
        if batch in self._fitted or batch in self._held:
            counted = self._stream.counted[batch]
            parts = (rows[counted], own[counted], None if wanted is None else wanted[counted])
            moments[batch in self._held].add(*parts, self._stream.weights(batch, residual))

    def _run_attention(
        self,
        layer: nn.Module,
        index: int,
        attention: Component,
        heads: Sequence[int],
        flow: _Flow,
        moments: tuple[_Sums, _Sums] | None,
    ) -> list[Tensor]:
        """Move the dense stream through the layer, which is still whole; return what the kept heads write from."""
        stream, result = self._stream, []
        kept = attention.columns(heads).to(attention.writer.weight.device)
        for batch, stored in enumerate(flow.pruned):
            inputs, wanted = stream.load(stored), None
            seen = _Seen()
            if flow.dense is not None:
                start = stream.load(flow.dense[batch])
                with _captured(attention.writer, seen):
                    after = stream.call(layer, index, batch, start)
                flow.dense[batch] = stream.store(after)
                # What the attention would have to write for the residual stream to equal the dense model's.
                wanted = start + seen.output - inputs
            if flow.dense is None or flow.touched:
                with _captured(attention.writer, seen, stop=True):
                    stream.call(layer, index, batch, inputs)
            if moments is not None:
                self._add(moments, batch, seen.inputs, seen.output, wanted, inputs + seen.output)
            result.append(stream.store(seen.inputs[..., kept]))
        return result

    def _run_mlp(self, layer: nn.Module, index: int, mlp: Component, flow: _Flow, moments: tuple[_Sums, _Sums]) -> None:
        stream = self._stream
        for batch, stored in enumerate(flow.pruned):
            seen = _Seen()
            with _captured(mlp.writer, seen):
                output = stream.call(layer, index, batch, stream.load(stored))
            wanted = None
            if flow.dense is not None:
                wanted = stream.load(flow.dense[batch]) - (output - seen.output)
            self._add(moments, batch, seen.inputs, seen.output, wanted, output)

    def _solve(
        self, component: Component, index: int, fitted: _Sums, held: _Sums, errors: list[LayerError]
    ) -> Tensor | None:
        """The refitted columns of a writer; None where no solution beats the plain slice on what is held back."""
        what, weight, kept = f"layer {index}, {component.kind}", component.writer.weight.detach(), fitted.kept
        moments, damping, repair = fitted.close(self._reduce), self._damping or DAMPING, self._repair or 0.0
        if self._validated:
            other = held.close(self._reduce)
            fixed, near = (self._damping, self._repair), self._near[component.kind]
            damping, repair = validate(weight, kept, moments, other, *fixed, what, near)
            self._near[component.kind] = damping if damping in DAMPINGS else near
            moments.add(other)
        target = moments.target(repair)
        require_finite(target.cross, f"{what}: statistics of the calibration records")
        scale = max(target.power, torch.finfo(torch.float32).tiny)
        if math.isinf(damping):
            error = plain_error(weight, kept, moments.gram, target) / scale
            errors.append(LayerError(index, component.kind, error, error))
            return None
        columns, before, after = solve(weight, kept, moments.gram, target, damping, what)
        errors.append(LayerError(index, component.kind, before / scale, after / scale, damping, repair))
        return columns

    def _write(
        self,
        component: Component,
        units: Sequence[int],
        index: int,
        moments: tuple[_Sums, _Sums] | None,
        errors: list[LayerError],
        commit: bool,
        added: Tensor | None,
    ) -> Write:
        """Refit and cut a component; return how it writes from its kept inputs."""
        weight, writer = None, component.writer
        if moments is not None:
            weight = self._solve(component, index, *moments, errors)
        if commit:
            if added is not None:
                add_bias(component, added)
            if weight is not None or len(units) < component.units:
                cut_component(component, units, weight)
            return writer
        if weight is None:
            weight = writer.weight.detach()[:, component.columns(units).to(writer.weight.device)]
        bias = writer.bias
        if added is not None:
            bias = added.to(writer.weight) + (0 if bias is None else bias)
        return partial(nn.functional.linear, weight=weight.to(writer.weight.dtype), bias=bias)


class _Sums:
    """Weighted sums over counted positions on ``device``, which `close` turns into `Moments` beside the weights."""

    def __init__(self, writer: nn.Linear, kept: Tensor, repairs: bool, device: torch.device | str) -> None:
        self.kept = kept.to(writer.weight.device)
        self._gram = Gram(len(kept), device)
        self._bias = writer.bias
        shape, dtype = (writer.out_features, len(kept)), self._gram.matrix.dtype
        self._crosses = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(1 + repairs)]
        self._powers = torch.zeros(3, dtype=torch.float64)

    def add(self, rows: Tensor, own: Tensor, wanted: Tensor | None, weights: Tensor) -> None:
        """Add a writer's inputs, ``(positions, in_features)``, what it writes and should write, and the weights."""
        rows = rows[:, self.kept]
        targets = [
            target if self._bias is None else target - self._bias for target in (own, wanted) if target is not None
        ]
        self._gram.add(rows, weights)
        for cross, target in zip(self._crosses, targets, strict=True):
            add_product(cross, target, rows, weights)
        first, last = (target.split(POSITIONS) for target in (targets[0], targets[-1]))
        for mine, repaired, share in zip(first, last, weights.split(POSITIONS), strict=True):
            own, wanted = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (mine, repaired))
            rows = torch.stack([(a * b).sum(1) for a, b in ((own, own), (own, wanted), (wanted, wanted))])
            self._powers += (rows.double() @ share.double()).cpu()

    def close(self, reduce: Reduce) -> Moments:
        """Close the sums over all processes; takes their memory."""
        weight = total_weight(self._gram.weight, reduce)
        own, *repaired = (reduce(cross).div_(weight).to(self.kept.device) for cross in self._crosses)
        powers = (reduce(self._powers) / weight).tolist()
        return Moments(
            self._gram.mean(reduce).to(self.kept.device), own, repaired[0] if repaired else None, tuple(powers), weight
        )


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

    with forwarded(attention, forward):
        yield
