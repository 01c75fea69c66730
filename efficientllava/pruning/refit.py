"""Cut a model layer by layer, so that each layer's writers are refitted to what the pruned prefix gives them.

How a writer's columns are solved, and how far they repair earlier losses, stands in `efficientllava.pruning.solution`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from ..settings.schema import PruneConfig
from .obs import DAMPING
from .plan import LayerPlan, kept_units
from .solution import DAMPINGS, LayerError, Moments, plain_error, solve, validate
from .statistics import POSITIONS, Gram, add_product, layer_moments, mean_written, total_weight
from .stream import CalibrationStream, Reduce, Write, captured, forwarded, narrowed
from .surgery import add_bias, cut_component

TARGETS = {"layer": 0.0, "residual": 1.0, "adaptive": None}  # how far earlier losses are repaired; None: as validated


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

    Where a trial is to be judged afterwards, what that is done on is not fitted to. Batches that damping and repair are
    chosen on are fitted to in the end.

    Args:
        stream: The calibration stream, which knows what is compared, held back and validated on.
        config: ``refit``: whether writers are refitted; ``refit_target``: ``layer``: to the layer's own output on the
            pruned prefix, ``residual``: to the dense model's residual stream behind the component, so that a layer also
            repairs what earlier layers lost, ``adaptive``: between the two, see `validate`; ``damping``: see `solve`,
            None: see `validate`; ``bias``: whether what the removed columns write on average in the dense model goes
            into the writers' biases.
        trial: Whether candidates are compared afterwards.
    """

    def __init__(self, stream: CalibrationStream, config: PruneConfig, trial: bool = False) -> None:
        known = stream.calibration
        self._stream, self._config, self._text = stream, config, decoder_of(stream.model).config
        self._held = {*(known.held if trial else known.validated)}
        self._fitted = {*range(len(stream.batches))} - self._held - {*(known.compared if trial else ())}
        self._validated = any(gather(sum(int(stream.counted[batch].sum()) for batch in self._held)))
        adaptive = config.refit_target == "adaptive"
        self._repair = TARGETS[config.refit_target] if self._validated or not adaptive else 0.0
        # A norm after the writer hides the residual stream from it; the layer's own output is the target then.
        self._to_residual = config.refit and self._repair != 0 and not names_of(stream.model).post_norms
        self._near = {"attention": DAMPING, "mlp": DAMPING}  # neighbouring layers want like dampings

    @torch.no_grad()
    def run(self, plans: Sequence[LayerPlan], commit: bool) -> tuple[list[Tensor], list[LayerError]]:
        """Cut the layers of a plan one after the other.

        Args:
            plans: Kept layers in ascending order.
            commit: Whether the model's own layers are cut in place; the caller then has to call
                `efficientllava.pruning.surgery.rebuild`, and the stream is used up. A trial only lets writers read
                less, and leaves the model as it is.

        Returns:
            Outputs of the last layer, by batch, and the error of every refitted writer.
        """
        by_index, stream = {plan.index: plan for plan in plans}, self._stream
        start, errors = stream.start(), []
        flow = _Flow(start, list(start) if self._to_residual else None, list(start) if self._config.biased else None)
        for index, original in enumerate(decoder_of(stream.model).layers):
            if (plan := by_index.get(index)) is not None:
                with stream.on_device(original):
                    self._cut_layer(original, plan, flow, errors, commit)
            else:
                flow.touched = True
                for dense in (flow.dense, flow.whole):
                    if dense is not None:
                        stream.advance(original, index, dense)
            if commit:
                stream.tick("refit and cut" if self._config.refit else "cut", index + 1, stream.depth)
        return flow.pruned, errors

    def _cut_layer(
        self, layer: nn.Module, plan: LayerPlan, flow: _Flow, errors: list[LayerError], commit: bool
    ) -> None:
        (attention, heads), _ = kept_units(layer, self._text, plan)
        biases = self._biases(layer, plan, flow)
        moments = self._moments(attention, heads, flow.touched)
        kept_inputs = self._run_attention(layer, plan.index, attention, heads, flow, moments)
        write = self._write(attention, heads, plan.index, moments, errors, commit, biases[0])
        flow.touched |= len(heads) < attention.units
        with contextlib.ExitStack() as trial:
            trial.enter_context(_replayed(attention.module, write, kept_inputs))
            mlp = describe_layer(layer, self._text).mlp
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
        whole = describe_layer(layer, self._text)
        means = [means.mean(0) for means, _ in layer_moments(self._stream, whole, plan.index, flow.whole)]
        attention, mlp = kept_units(layer, self._text, plan)
        return mean_written(*attention, means[0]), mean_written(*mlp, means[1])

    def _moments(self, component: Component, units: Sequence[int], touched: bool) -> tuple[_Sums, _Sums] | None:
        """Sums of what is fitted and of what is held back; None where there is nothing to solve."""
        whole = len(units) == component.units
        if not (self._config.refit and units) or (whole and not (touched and self._to_residual)):
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
            with captured(attention.writer) as seen:
                if flow.dense is not None:
                    start = stream.load(flow.dense[batch])
                    flow.dense[batch] = stream.store(stream.call(layer, index, batch, start))
                    # What the attention would have to write for the residual stream to equal the dense model's.
                    wanted = start + seen[attention.writer][1] - inputs
            if flow.dense is None or flow.touched:
                with captured(attention.writer, stop=True) as seen:
                    stream.call(layer, index, batch, inputs)
            read, written = seen[attention.writer]
            if moments is not None:
                self._add(moments, batch, read, written, wanted, inputs + written)
            result.append(stream.store(read[..., kept]))
        return result

    def _run_mlp(self, layer: nn.Module, index: int, mlp: Component, flow: _Flow, moments: tuple[_Sums, _Sums]) -> None:
        stream = self._stream
        for batch, stored in enumerate(flow.pruned):
            with captured(mlp.writer) as seen:
                output = stream.call(layer, index, batch, stream.load(stored))
            read, written = seen[mlp.writer]
            wanted = None if flow.dense is None else stream.load(flow.dense[batch]) - (output - written)
            self._add(moments, batch, read, written, wanted, output)

    def _solve(
        self, component: Component, index: int, fitted: _Sums, held: _Sums, errors: list[LayerError]
    ) -> Tensor | None:
        """The refitted columns of a writer; None where no solution beats the plain slice on what is held back."""
        what, weight, kept = f"layer {index}, {component.kind}", component.writer.weight.detach(), fitted.kept
        moments, damping, repair = (
            fitted.close(self._stream.reduce),
            self._config.damping or DAMPING,
            self._repair or 0.0,
        )
        if self._validated:
            other = held.close(self._stream.reduce)
            fixed, near = (self._config.damping, self._repair), self._near[component.kind]
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


def _replayed(attention: nn.Module, write: Write, kept_inputs: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Let an attention only write, from what its heads gave before; batches come in order, pass after pass."""
    turns = itertools.cycle(kept_inputs)
    device = next(attention.parameters()).device

    def forward(*_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        return write(next(turns).to(device)), None

    return forwarded(forward, attention)
