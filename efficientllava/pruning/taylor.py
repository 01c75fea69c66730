"""Taylor importance: how much the answer loss would move if a unit's weights went to zero.

The backward pass goes layer by layer: the forward pass keeps what every layer was called with, then each layer, the
last one first, runs again and hands its input's gradient on. A layer's weight gradients are reduced to per-row or
per-column sums before the next layer is looked at, so that never more than one layer's gradients exist.

Source: arXiv 2604.24380, section 3.2, and arXiv 2305.11627, eq. 4-6. With ``s = w * g`` and ``G`` the mean of squared
per-sample gradients: ``param_first`` sums ``|s|`` over a unit's rows and columns, ``vectorize`` sums ``|sum s|`` per
row or column, ``param_second`` sums ``w^2 G``, ``param_mix`` sums ``|s - w^2 G / 2|``. Biases are not scored.

A sample is a batch of the stream: in a run one record, so that scores do not depend on how records are put together,
and no more than one record's graph of one layer exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, final_norm_of, layers_of
from ..models.forward import supervised_positions
from ..runtime.errors import UserError
from ..settings.schema import TAYLOR
from .statistics import (
    ANSWERS,
    CalibrationStream,
    Reduce,
    no_reduce,
)


class TaylorScores:
    """Scores the units of all layers.

    Args:
        stream: The calibration stream.
        variant: ``param_first``, ``param_second``, ``param_mix`` or ``vectorize``.
        mean: ``sample``: scores of every batch's own gradient, averaged; the layer inputs of one batch are
            kept. ``batch``: the score of the gradient of the one loss over all batches, as published; those of all are.
        heads: Units of attentions, see `efficientllava.models.anatomy.describe_layer`.

    Raises:
        ValueError: Unknown variant or mean.
    """

    def __init__(
        self,
        stream: CalibrationStream,
        variant: str = "param_first",
        mean: str = "sample",
        heads: str = "group",
    ) -> None:
        if variant not in TAYLOR:
            raise ValueError(f"variant must be one of {TAYLOR}, got {variant!r}")
        if mean not in ("sample", "batch"):
            raise ValueError(f"mean must be sample or batch, got {mean!r}")
        self._stream, self._variant, self._mean = stream, variant, mean
        self._layers = layers_of(stream.model, heads)
        self._scores: dict[Tensor, Tensor] = {}

    def run(self, reduce: Reduce = no_reduce) -> list[tuple[Tensor, Tensor]]:
        """Score all units.

        Args:
            reduce: Sums over processes.

        Returns:
            Per layer, scores of its attention's units and of its channels.

        Raises:
            UserError: No batch has a supervised token.
        """
        tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in self._stream.batches]
        answered = [batch for batch, count in enumerate(tokens) if count]
        sums = torch.tensor([sum(tokens), float(len(answered))], dtype=torch.float64)
        total, batches = reduce(sums).tolist()
        if not total:
            raise UserError(
                f"prune.importance={self._variant}: the calibration records have no answer to take a loss of"
            )
        start = self._stream.start()
        if self._mean == "sample":
            for batch in answered:
                self._score({batch: start[batch]}, {batch: 1.0}, no_reduce, 1.0)
            return self._units(lambda scores: reduce(scores) / batches)
        self._score({b: start[b] for b in answered}, {b: tokens[b] / total for b in answered}, reduce, batches)
        return self._units(no_reduce)

    @torch.no_grad()
    def _score(self, hidden: dict[int, Tensor], shares: dict[int, float], reduce: Reduce, batches: float) -> None:
        """Add the scores of the gradient of one loss.

        Args:
            hidden: Inputs of the first layer by batch.
            shares: What each batch's mean loss counts for.
            reduce: Sums gradients over processes.
            batches: Number of batches of all processes.
        """
        stream, inputs = self._stream, [hidden]
        for index, layer in enumerate(self._layers):
            with stream.on_device(layer.module):
                entered = inputs[-1].items()
                inputs.append(
                    {b: stream.store(stream.call(layer.module, index, b, stream.load(x))) for b, x in entered}
                )
        flowing = {batch: self._loss_gradient(batch, output) for batch, output in inputs.pop().items()}
        for index, layer in reversed(list(enumerate(self._layers))):
            with stream.on_device(layer.module), _requiring_gradients(list(_scored(layer))) as weights:
                moments = _Moments(weights, self._variant)
                for batch, stored in inputs.pop().items():
                    flowing[batch], gradients = self._backward(layer, index, batch, stored, flowing[batch])
                    moments.add(gradients, shares[batch])
                for weight, axis in _scored(layer).items():
                    found = self._reduce(weight, axis, *moments.take(weight, reduce, batches))
                    self._scores[weight] = self._scores[weight].add_(found) if weight in self._scores else found

    @torch.enable_grad()
    def _loss_gradient(self, batch: int, output: Tensor) -> Tensor:
        """Gradient of a batch's mean answer loss by the last layer's output, where that is stored."""
        stream = self._stream
        norm, head = final_norm_of(stream.model), stream.model.lm_head
        mask, targets = supervised_positions(stream.batches[batch]["labels"].to(stream.device))
        result = torch.zeros_like(output, device=stream.device)
        rows = stream.load(output)[mask]
        with stream.on_device(norm, head):  # pyright: ignore[reportArgumentType]
            found = []
            for part, wanted in zip(rows.split(ANSWERS), targets.split(ANSWERS), strict=True):
                part = part.detach().requires_grad_()
                logits = head(norm(part)).float()  # pyright: ignore[reportCallIssue]
                loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") / len(targets)
                found += torch.autograd.grad(loss, part)
        result[mask] = torch.cat(found)
        return stream.store(result)

    @torch.enable_grad()
    def _backward(
        self, layer: Layer, index: int, batch: int, stored: Tensor, gradient: Tensor
    ) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Run a layer again; return the gradients by its input, and by its scored weights."""
        stream, weights = self._stream, list(_scored(layer))
        inputs = stream.load(stored).detach().requires_grad_()
        output = stream.call(layer.module, index, batch, inputs)
        before, *gradients = torch.autograd.grad(output, [inputs, *weights], stream.load(gradient))
        return stream.store(before), dict(zip(weights, gradients, strict=True))

    def _reduce(self, weight: Tensor, axis: int, gradient: Tensor, rms: Tensor) -> Tensor:
        """Reduce elementwise scores to a weight's scored axis: rows of a reader, columns of a writer.

        Args:
            weight: A scored weight.
            axis: The axis that belongs to units.
            gradient: Its mean gradient; used up.
            rms: The root of its mean squared gradient; used up.
        """
        wide, other = weight.detach().float(), 1 - axis
        if self._variant == "param_first":
            return gradient.mul_(wide).abs_().sum(other).double()
        if self._variant == "vectorize":
            return gradient.mul_(wide).sum(other).abs_().double()
        second = rms.mul_(wide).square_()
        if self._variant == "param_second":
            return second.sum(other).double()
        return second.mul_(-0.5).addcmul_(wide, gradient).abs_().sum(other).double()

    def _units(self, close: Reduce) -> list[tuple[Tensor, Tensor]]:
        result: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers:
            # A process without batches takes part in every reduction, with zeros.
            lines: dict[Tensor, Tensor] = {}
            for weight, axis in _scored(layer).items():
                none = torch.zeros(weight.shape[axis], dtype=torch.float64, device=self._stream.device)
                lines[weight] = close(self._scores.pop(weight, none))
            scores = []
            for component in layer.components:
                unit = component.reduce_columns(lines[component.writer.weight])
                for reader in component.readers:
                    unit = unit + component.reduce_rows(reader, lines[reader.linear.weight])
                scores.append(unit.cpu())
            result.append((scores[0], scores[1]))
        return result


class _Moments:
    """What a variant needs of the gradients of some weights, in float32: their sum, and the sum of their squares."""

    def __init__(self, weights: Sequence[Tensor], variant: str) -> None:
        def zeros() -> dict[Tensor, Tensor]:
            return {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}

        self._sum = zeros() if variant != "param_second" else {}
        self._squares = zeros() if variant in ("param_second", "param_mix") else {}

    def add(self, gradients: dict[Tensor, Tensor], share: float) -> None:
        """Add the gradients of one batch, used up; the sum takes a share of them, the squares are whole."""
        for weight in list(gradients):
            gradient = gradients.pop(weight)
            if self._sum:
                self._sum[weight].add_(gradient, alpha=share)
            if self._squares:
                self._squares[weight].add_(gradient.float().square_())

    def take(self, weight: Tensor, reduce: Reduce, batches: float) -> tuple[Tensor, Tensor]:
        """Gradient of all processes, and root of their mean square; what the variant does not need is empty."""
        gradient, square = (part.pop(weight, weight.new_empty(0)) for part in (self._sum, self._squares))
        if len(gradient):
            gradient = reduce(gradient)
        return gradient, reduce(square).div_(batches).sqrt_() if len(square) else square


@contextlib.contextmanager
def _requiring_gradients(weights: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def _scored(layer: Layer) -> dict[Tensor, int]:
    """Scored weights of a layer with the axis that belongs to units: 0 for readers, 1 for writers."""
    axes: dict[Tensor, int] = {}
    for component in layer.components:
        axes[component.writer.weight] = 1
        for reader in component.readers:
            axes[reader.linear.weight] = 0
    return axes
