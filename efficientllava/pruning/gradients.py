"""Scores made of gradients: the backward pass goes layer by layer, so that the graph of one layer exists at a time.

The forward pass keeps what every layer was called with, then each layer, the last one first, runs again and hands its
input's gradient on.

*Taylor importance*: how much the answer loss would move if a unit's weights went to zero. A layer's weight gradients
are reduced to per-row or per-column sums before the next layer is looked at. Source: arXiv 2604.24380, section 3.2, and
arXiv 2305.11627, eq. 4-6. With ``s = w * g`` and ``G`` the mean of squared per-sample gradients: ``param_first`` sums
``|s|`` over a unit's rows and columns, ``vectorize`` sums ``|sum s|`` per row or column, ``param_second`` sums ``w^2
G``, ``param_mix`` sums ``|s - w^2 G / 2|``. Biases are not scored. A sample is a batch of the stream: in a run one
record, so that scores do not depend on how records are put together, and no more than one record's graph of one layer
exists.

*Sensitivity*: how much the answers feel an error of each writer, by which costs of different layers are compared. With
``g_t`` the gradient of the answers' cross-entropy by what a writer writes at position ``t``, an error ``e_t`` there
raises the divergence from the dense model by about ``E[(g_t e_t)^2] / 2``, where answers are sampled from the model
itself (the Fisher information). Positions are weighed by ``|g_t|^2``, outputs by their mean ``g_t^2``, as in the usual
factorisation of the Fisher matrix (arXiv 1503.05671; for pruning 2312.17244, for Gram matrices 2505.07004).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, layers_of
from ..runtime.content import digest
from ..runtime.errors import UserError
from .stream import CalibrationStream, Reduce, captured, no_reduce

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and supervised tokens


@torch.enable_grad()
def _answer_gradient(stream: CalibrationStream, batch: int, output: Tensor, loss: Loss) -> Tensor:
    """Gradient of a loss, summed over the answers of a batch, by the last layer's output."""
    rows, targets, mask = stream.supervised(batch, output)
    result = torch.zeros_like(output, device=stream.device)
    parts = stream.logits(rows, targets)
    result[mask] = torch.cat([torch.autograd.grad(loss(logits, wanted), part)[0] for part, logits, wanted in parts])
    return result


@torch.enable_grad()
def _backward(
    stream: CalibrationStream,
    layer: Layer,
    index: int,
    batch: int,
    stored: Tensor,
    gradient: Tensor,
    weights: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Run a layer again; gradients by its input and then by some of its weights, or by what its writers write."""
    inputs, writers = stream.load(stored).detach().requires_grad_(), [c.writer for c in layer.components]
    with captured(*writers) as seen:
        output = stream.call(layer.module, index, batch, inputs)
    by = weights or [seen[writer][1] for writer in writers]
    return list(torch.autograd.grad(output, [inputs, *by], stream.load(gradient)))


def taylor_scores(
    stream: CalibrationStream,
    variant: str,
    mean: str = "sample",
    heads: str = "group",
    without: Collection[int] = (),
) -> list[tuple[Tensor, ...]]:
    """Score the units of all layers.

    Args:
        stream: The calibration stream.
        variant: ``param_first``, ``param_second``, ``param_mix`` or ``vectorize``.
        mean: ``sample``: scores of every batch's own gradient, averaged; the layer inputs of one batch are
            kept. ``batch``: the score of the gradient of the one loss over all batches, as published; those of all are.
        heads: Units of attentions, see `efficientllava.models.anatomy.describe_layer`.
        without: Batches that are left out.

    Returns:
        Per layer, scores of its attention's units and of its channels.

    Raises:
        UserError: No batch has a supervised token.
    """
    tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in stream.batches]
    answered = [batch for batch, count in enumerate(tokens) if count and batch not in without]
    here = [sum(tokens[batch] for batch in answered), float(len(answered))]
    total, batches = stream.reduce(torch.tensor(here, dtype=torch.float64)).tolist()
    if not total:
        raise UserError(f"prune.importance={variant}: the calibration records have no answer to take a loss of")
    taylor, start = _Taylor(stream, variant, heads, tokens), stream.start()
    if mean == "batch":
        shares = {batch: tokens[batch] / total for batch in answered}
        taylor.add({batch: start[batch] for batch in answered}, shares, stream.reduce, batches)
        return taylor.units(no_reduce)
    for batch in answered:
        taylor.add({batch: start[batch]}, {batch: 1.0}, no_reduce, 1.0)
    return taylor.units(lambda scores: stream.reduce(scores) / batches)


class _Taylor:
    """Taylor scores by weight; for the arguments see `taylor_scores`, ``tokens`` are the supervised ones by batch."""

    def __init__(self, stream: CalibrationStream, variant: str, heads: str, tokens: Sequence[float]) -> None:
        self._stream, self._variant, self._tokens = stream, variant, tokens
        self._layers = layers_of(stream.model, heads)
        self._scores: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def add(self, hidden: dict[int, Tensor], shares: dict[int, float], reduce: Reduce, batches: float) -> None:
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
        flowing = {batch: stream.store(self._loss_gradient(batch, output)) for batch, output in inputs.pop().items()}
        for index, layer in reversed(list(enumerate(self._layers))):
            weights = list(axes := _axes(layer))
            with stream.on_device(layer.module), _requiring_gradients(weights):
                moments = _Moments(weights, self._variant)
                for batch, stored in inputs.pop().items():
                    before, *found = _backward(stream, layer, index, batch, stored, flowing[batch], weights)
                    flowing[batch] = stream.store(before)
                    moments.add(weights, found, shares[batch])
                for weight, axis in axes.items():
                    found = self._reduced(weight, 1 - axis, *moments.take(weight, reduce, batches))
                    self._scores[weight] = self._scores[weight].add_(found) if weight in self._scores else found

    def _loss_gradient(self, batch: int, output: Tensor) -> Tensor:
        """Gradient of a batch's mean answer loss by the last layer's output."""
        summed = partial(nn.functional.cross_entropy, reduction="sum")
        return _answer_gradient(self._stream, batch, output, lambda *given: summed(*given) / self._tokens[batch])

    def _reduced(self, weight: Tensor, other: int, gradient: Tensor, rms: Tensor) -> Tensor:
        """Reduce elementwise scores to a weight's scored axis: rows of a reader, columns of a writer.

        Args:
            weight: A scored weight.
            other: The axis that does not belong to units.
            gradient: Its mean gradient; used up.
            rms: The root of its mean squared gradient; used up.
        """
        wide = weight.detach().float()
        if self._variant == "param_first":
            return gradient.mul_(wide).abs_().sum(other).double()
        if self._variant == "vectorize":
            return gradient.mul_(wide).sum(other).abs_().double()
        second = rms.mul_(wide).square_()
        if self._variant == "param_second":
            return second.sum(other).double()
        return second.mul_(-0.5).addcmul_(wide, gradient).abs_().sum(other).double()

    def units(self, close: Reduce) -> list[tuple[Tensor, ...]]:
        """Scores of units; a process without batches takes part in every reduction, with zeros."""
        result: list[tuple[Tensor, ...]] = []
        for layer in self._layers:
            lines: dict[Tensor, Tensor] = {}
            for weight, axis in _axes(layer).items():
                none = torch.zeros(weight.shape[axis], dtype=torch.float64, device=self._stream.device)
                lines[weight] = close(self._scores.pop(weight, none))
            result.append(tuple(c.reduce(lines).cpu() if c.units else torch.zeros(0) for c in layer.components))
        return result


class _Moments:
    """What a variant needs of the gradients of some weights, in float32: their sum, and the sum of their squares."""

    def __init__(self, weights: Sequence[Tensor], variant: str) -> None:
        def zeros() -> dict[Tensor, Tensor]:
            return {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}

        self._sum = zeros() if variant != "param_second" else {}
        self._squares = zeros() if variant in ("param_second", "param_mix") else {}

    def add(self, weights: Sequence[Tensor], gradients: list[Tensor], share: float) -> None:
        """Add the gradients of one batch, used up; the sum takes a share of them, the squares are whole."""
        for weight in weights:
            gradient = gradients.pop(0)
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


def _axes(layer: Layer) -> dict[Tensor, int]:
    """Scored weights of a layer, see `efficientllava.models.anatomy.Component.axes`."""
    return {weight: axis for c in layer.components if c.units for weight, axis in c.axes.items()}


@contextlib.contextmanager
def _requiring_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


class Sensitivity(NamedTuple):
    """Of the attention and the MLP of every layer.

    Args:
        positions: By layer, component and batch: ``|g_t|^2`` of the counted positions.
        outputs: By layer and component: mean ``g^2`` of each output over all counted positions, written text by its
            share, ``(out_features,)``.
    """

    positions: list[tuple[list[Tensor], list[Tensor]]]
    outputs: list[tuple[Tensor, ...]]

    def weigh(self, stream: CalibrationStream, index: int) -> Callable[[int], list[Tensor]]:
        """What the counted positions of a batch weigh in the Gram matrices of a layer's two writers."""
        return lambda batch: [stream.shares(batch) * by_batch[batch] for by_batch in self.positions[index]]


@torch.no_grad()
def sensitivity(stream: CalibrationStream, seed: int) -> Sensitivity:
    """Run every batch forwards and backwards once; the answers are drawn with a seed, for each batch by its records."""
    layers, generator = layers_of(stream.model), torch.Generator()
    positions: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    sums = [[torch.zeros(c.writer.out_features, dtype=torch.float64) for c in layer.components] for layer in layers]

    def loss(logits: Tensor, _wanted: Tensor) -> Tensor:
        cdf = logits.detach().softmax(-1).cumsum(-1)
        draws = torch.rand(len(logits), 1, generator=generator).to(cdf.device) * cdf[:, -1:]
        sampled = torch.searchsorted(cdf, draws).squeeze(1).clamp(max=cdf.shape[1] - 1)
        return nn.functional.cross_entropy(logits, sampled, reduction="sum")

    for batch, start in enumerate(stream.start()):
        generator.manual_seed(int(digest([seed, *stream.batches[batch]["ids"]]), 16))
        hidden, shares = [start], stream.shares(batch).double()
        for index, layer in enumerate(layers):
            with stream.on_device(layer.module):
                hidden.append(stream.store(stream.call(layer.module, index, batch, stream.load(hidden[-1]))))
        gradient = _answer_gradient(stream, batch, hidden.pop(), loss)
        for index, layer in reversed(list(enumerate(layers))):
            with stream.on_device(layer.module):
                gradient, *found = _backward(stream, layer, index, batch, hidden.pop(), gradient)
            for by_output, squared, total in zip(found, positions[index], sums[index], strict=True):
                squares = by_output[stream.counted[batch]].double().square()
                squared.append(squares.sum(1).float())
                total.add_((shares @ squares).cpu())
        stream.tick("score layers", batch + 1, len(stream.batches))
    count = sum(float(stream.shares(batch).sum()) for batch in range(len(stream.batches)))
    everywhere = max(float(stream.reduce(torch.tensor([count], dtype=torch.float64))), 1.0)
    return Sensitivity(positions, [tuple(stream.reduce(each) / everywhere for each in pair) for pair in sums])
