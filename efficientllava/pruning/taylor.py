"""Taylor importance: how much the answer loss would move if a unit's weights went to zero.

Gradients are consumed as they arrive: a hook reduces every parameter's gradient to per-row or per-column sums and frees
it before the backward pass reaches the next layer, so that no full gradient of the model ever exists (except for the
``batch`` mean, as published, which needs it).

Source: arXiv 2604.24380, section 3.2, and arXiv 2305.11627, eq. 4-6. With ``s = w * g`` and ``G`` the mean of squared
per-sample gradients: ``param_first`` sums ``|s|`` over a unit's rows and columns, ``vectorize`` sums ``|sum s|`` per
row or column, ``param_second`` sums ``w^2 G``, ``param_mix`` sums ``|s - w^2 G / 2|``. Biases are not scored.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..models.anatomy import Layer, layers_of
from ..models.forward import Batch, FeatureCache, answer_loss
from ..schema import TAYLOR
from .statistics import Reduce, no_reduce


class TaylorScores:
    """Accumulates Taylor scores over calibration batches.

    Args:
        model: An image-text-to-text model in eval mode.
        variant: ``param_first``, ``param_second``, ``param_mix`` or ``vectorize``.
        mean: ``sample``: scores of every micro-batch's own gradient, averaged. ``batch``: the score of the gradient of
            the one loss over all batches, as published; holds the gradients of all scored weights.

    Raises:
        ValueError: Unknown variant or mean.
    """

    def __init__(self, model: nn.Module, variant: str = "param_first", mean: str = "sample") -> None:
        if variant not in TAYLOR:
            raise ValueError(f"variant must be one of {TAYLOR}, got {variant!r}")
        if mean not in ("sample", "batch"):
            raise ValueError(f"mean must be sample or batch, got {mean!r}")
        self._model, self._variant, self._mean = model, variant, mean
        self._layers = layers_of(model)
        self._axes = _scored_weights(self._layers)
        self._scores: dict[Tensor, Tensor] = {}
        self._gradient: dict[Tensor, Tensor] = {}
        self._square: dict[Tensor, Tensor] = {}
        self._batches = 0
        self._share = 1.0

    def run(
        self,
        batches: Sequence[Batch],
        features: FeatureCache | None = None,
        reduce: Reduce = no_reduce,
    ) -> list[tuple[Tensor, Tensor]]:
        """Score all units.

        Args:
            batches: Collated micro-batches with labels, on the model's device.
            features: Vision features by image.
            reduce: Sums over processes.

        Returns:
            Per layer, scores of its KV groups and of its channels.

        Raises:
            UserError: No batch has a supervised token.
        """
        tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in batches]
        total = float(reduce(torch.tensor([sum(tokens)], dtype=torch.float64)))
        if not total:
            raise UserError(
                f"prune.importance={self._variant}: the calibration records have no answer to take a loss of"
            )
        flags = {p: p.requires_grad for p in self._model.parameters()}
        for parameter in flags:
            parameter.requires_grad_(parameter in self._axes)
        handles: list[Any] = [p.register_post_accumulate_grad_hook(self._consume) for p in self._axes]
        try:
            with torch.enable_grad(), checkpointed(self._layers):
                for batch, count in zip(batches, tokens, strict=True):
                    if not count:
                        continue
                    self._share = count / total
                    self._batches += 1
                    answer_loss(self._model, batch, features(batch) if features else None).backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
        return self._units(reduce)

    def _consume(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        gradient = gradient.float()
        if self._mean == "sample":
            _add(self._scores, parameter, self._reduce(parameter, gradient, gradient))
            return
        if self._variant != "param_second":
            _add(self._gradient, parameter, gradient * self._share)
        if self._variant in ("param_second", "param_mix"):
            _add(self._square, parameter, gradient.square_())

    def _reduce(self, parameter: Tensor, gradient: Tensor, rms: Tensor) -> Tensor:
        """Reduce elementwise scores to the parameter's scored axis: rows of a reader, columns of a writer.

        Args:
            parameter: A scored weight.
            gradient: Its mean gradient.
            rms: The root of its mean squared gradient.
        """
        weight = parameter.detach().float()
        other = 1 - self._axes[parameter]
        if self._variant == "param_first":
            return (weight * gradient).abs_().sum(other).double()
        if self._variant == "vectorize":
            return (weight * gradient).sum(other).abs_().double()
        second = (weight * rms).square_()
        if self._variant == "param_second":
            return second.sum(other).double()
        return second.mul_(-0.5).addcmul_(weight, gradient).abs_().sum(other).double()

    def _axis_scores(self, parameter: Tensor, batches: float, reduce: Reduce) -> Tensor:
        # A process without batches takes part in every reduction, with zeros.
        if self._mean == "sample":
            empty = parameter.new_zeros(parameter.shape[self._axes[parameter]], dtype=torch.float64)
            return reduce(self._scores.pop(parameter, empty)) / batches
        gradient = rms = torch.zeros_like(parameter, dtype=torch.float32)
        if self._variant != "param_second":
            gradient = reduce(self._gradient.pop(parameter, gradient))
        if self._variant in ("param_second", "param_mix"):
            rms = (reduce(self._square.pop(parameter, rms)) / batches).sqrt_()
        return self._reduce(parameter, gradient, rms)

    def _units(self, reduce: Reduce) -> list[tuple[Tensor, Tensor]]:
        batches = float(reduce(torch.tensor([float(self._batches)], dtype=torch.float64)))
        axes = {p: self._axis_scores(p, batches, reduce) for p in self._axes}
        result: list[tuple[Tensor, Tensor]] = []
        for layer in self._layers:
            scores = []
            for component in layer.components:
                unit = component.reduce_columns(axes[component.writer.weight])
                for reader in component.readers:
                    unit = unit + component.reduce_rows(reader, axes[reader.linear.weight])
                scores.append(unit.cpu())
            result.append((scores[0], scores[1]))
        return result


@contextlib.contextmanager
def checkpointed(layers: Sequence[Layer]) -> Iterator[None]:
    """Keep only layer boundaries in the graph and run every layer again in the backward pass.

    transformers' own switch works in training mode only, where dropout would disturb the scores.
    """
    for layer in layers:
        layer.module.forward = functools.partial(checkpoint, layer.module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward


def _add(store: dict[Tensor, Tensor], parameter: Tensor, value: Tensor) -> None:
    store[parameter] = store[parameter].add_(value) if parameter in store else value


def _scored_weights(layers: Sequence[Layer]) -> dict[Tensor, int]:
    """Scored weights with the axis that belongs to units: 0 for readers, 1 for writers."""
    axes: dict[Tensor, int] = {}
    for layer in layers:
        for component in layer.components:
            axes[component.writer.weight] = 1
            for reader in component.readers:
                axes[reader.linear.weight] = 0
    return axes
