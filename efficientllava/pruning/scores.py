"""Score: calibration batches to statistics, statistics to the removal order of every component of every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, layers_of
from ..models.forward import Batch, FeatureCache
from ..models.offload import Offload
from ..settings.schema import PruneConfig
from .fluctuation import layer_moments
from .importance import GRADIENTS, RECORDS, WEIGHTS, How, importance_of
from .ranking import Ranking
from .sensitivity import Sensitivity, sensitivity
from .statistics import (
    ALONE,
    Beginning,
    CalibrationStream,
    Gram,
    Reduce,
    narrowed,
    no_reduce,
)
from .taylor import TaylorScores

Weigh = Callable[[int], Sequence[Tensor]]  # weights of a batch's counted positions, of attention and MLP
Tick = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Calibration:
    """What scoring and refit look at.

    Args:
        batches: Collated batches, on any device.
        features: Vision features by image, shared with other stages.
        reduce: Sums over processes.
        storage: Device that keeps hidden states between layers; None is the compute device.
        offload: Brings weights to the device where they stay in host memory; None: the model computes where it is.
        tick: Progress.
        beginning: What all records begin with; it counts once.
        compared: Indices of the batches that candidates are compared on.
        held: Indices of the batches that a candidate's refit makes its own choices on; it is fitted to the remaining.
        validated: Indices of the batches that the last refit makes its own choices on, before it is fitted to all.
        shares: What a position of each batch counts for; None: 1.
    """

    batches: Sequence[Batch]
    features: FeatureCache | None = None
    reduce: Reduce = no_reduce
    storage: torch.device | str | None = None
    offload: Offload | None = None
    tick: Tick = silent
    beginning: Beginning = ALONE
    compared: Sequence[int] = ()
    held: Sequence[int] = ()
    validated: Sequence[int] = ()
    shares: Sequence[float] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the calibration records of this process, each once."""
        return tuple(dict.fromkeys(record for batch in self.batches for record in batch["ids"]))


class Counting(Protocol):
    """What says which positions count."""

    @property
    def tokens(self) -> str:
        """See `efficientllava.pruning.statistics.counted_positions`."""
        ...


def open_stream(model: nn.Module, calibration: Calibration, config: Counting) -> CalibrationStream:
    """Start a calibration stream at the first layer.

    Args:
        model: The model in eval mode.
        calibration: Batches and how to run them.
        config: ``tokens``: which positions count.

    Raises:
        UserError: No position counts.
    """
    stream = CalibrationStream(
        model,
        calibration.batches,
        config.tokens,
        calibration.features,
        calibration.storage,
        calibration.offload,
        calibration.beginning,
        calibration.shares,
    )
    stream.require_counted(config.tokens, calibration.reduce)
    return stream


@dataclass
class LayerScores:
    """Removal orders of one layer; a cost of `obs` is an error relative to the power of the residual stream."""

    attention: Ranking
    mlp: Ranking

    @property
    def pair(self) -> tuple[Ranking, Ranking]:
        """Attention and MLP."""
        return self.attention, self.mlp


def rank_units(
    model: nn.Module,
    calibration: Calibration,
    config: PruneConfig,
    seed: int = 0,
    without: Collection[int] = (),
    counts: Sequence[tuple[int, int]] = (),
) -> tuple[list[LayerScores], CalibrationStream, list[Tensor]]:
    """Score every unit of the attention and every channel of every layer.

    Args:
        model: The model in eval mode.
        calibration: Batches and how to run them.
        config: ``importance``, ``heads``, ``damping``, ``tokens``, ``taylor_mean``; ``prefix``: whether a layer reads
            what the dense model gives it, or what the layers before leave that keep their best units only.
        seed: Seed of random importance.
        without: Batches that stay outside the statistics.
        counts: Units that every layer will keep; needed for ``prefix=pruned``.

    Returns:
        Rankings of all layers, the calibration stream for reuse, and the dense model's outputs of the last layer by
        batch where the scores needed them (else empty).
    """
    layers, importance = layers_of(model, config.heads), importance_of(config.importance)
    stream, generator = open_stream(model, calibration, config), torch.Generator().manual_seed(seed)

    def ranked_by(index: int, seen: Sequence[Any], felt: Sequence[Tensor | None] = (None, None)) -> LayerScores:
        hows = [
            How(config, f"layer {index}, {component.kind}", generator, outputs)
            for component, outputs in zip(layers[index].components, felt, strict=True)
        ]
        return LayerScores(*map(importance.rank, layers[index].components, seen, hows))

    if importance.sees == GRADIENTS:
        scores = TaylorScores(stream, config.importance, config.taylor_mean, config.heads).run(calibration.reduce)
        return [ranked_by(index, pair) for index, pair in enumerate(scores)], stream, []
    looks, felt = importance.sees != WEIGHTS, None
    if config.importance == "obs" and config.method == "widthwise" and config.selection == "global":
        felt = sensitivity(stream, seed, calibration.reduce, calibration.tick)
    ranked, hidden = [], stream.start() if looks else []
    sequential = looks and config.prefix == "pruned"
    for index, layer in enumerate(layers):
        before = list(hidden) if sequential else []
        with stream.on_device(layer.module):
            seen: Sequence[Any] = (None, None)
            if importance.sees == RECORDS:
                seen = [moments.close() for moments in layer_moments(stream, layer, index, hidden)]
            elif looks:
                weigh = _weigher(stream, index, felt, config)
                seen = layer_statistics(stream, layer, index, hidden, calibration.reduce, None, weigh, without)
            ranked.append(ranked_by(index, seen, felt.outputs[index] if felt else (None, None)))
            if sequential:
                hidden = before
                with contextlib.ExitStack() as cuts:
                    for component, ranking, count in zip(layer.components, ranked[-1].pair, counts[index], strict=True):
                        cuts.enter_context(narrowed(component.writer, component.columns(ranking.kept(count))))
                    stream.advance(layer.module, index, hidden)
        calibration.tick("score units", index + 1, len(layers))
    return ranked, stream, [] if sequential else hidden


@torch.no_grad()
def layer_statistics(
    stream: CalibrationStream,
    layer: Layer,
    index: int,
    hidden: list[Tensor],
    reduce: Reduce = no_reduce,
    linears: Sequence[nn.Linear] | None = None,
    weigh: Weigh | None = None,
    without: Collection[int] = (),
) -> list[Tensor]:
    """Look at what the linear layers of a whole layer read on the dense prefix.

    Args:
        stream: The calibration stream.
        layer: The layer.
        index: Its index in the decoder.
        hidden: Layer inputs by batch; become the layer's outputs.
        reduce: Sums over processes.
        linears: Linear layers whose inputs are looked at; None: the writers of attention and MLP.
        weigh: What the counted positions of a batch weigh; None: as `CalibrationStream.weights` says for the residual
            stream behind attention and MLP.
        without: Batches that pass through only.

    Returns:
        Gram matrices ``E[x x^T]`` of the inputs.
    """
    linears = [c.writer for c in layer.components] if linears is None else linears
    grams = [Gram(linear.in_features, linear.weight.device) for linear in linears]
    attention = set(layer.attention.module.modules())
    captured: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        captured[linear] = args[0], output

    handles = [linear.register_forward_hook(note) for linear in {*linears, layer.attention.writer}]
    try:
        for batch, inputs, outputs in stream.run(layer.module, index, hidden):
            if batch in without:
                continue
            counted, (_, written) = stream.counted[batch], captured[layer.attention.writer]
            residuals = (inputs + written, outputs)
            weights = weigh(batch) if weigh else [stream.weights(batch, residual) for residual in residuals]
            for linear, gram in zip(linears, grams, strict=True):
                gram.add(captured[linear][0][counted], weights[linear not in attention])
    finally:
        for handle in handles:
            handle.remove()
    return [gram.mean(reduce) for gram in grams]


def _weigher(stream: CalibrationStream, index: int, felt: Sensitivity | None, config: PruneConfig) -> Weigh | None:
    """How positions weigh in a layer's statistics: as errors are felt, alike for published scores, or by default."""
    if felt is not None:
        return felt.weigh(stream, index)
    if config.importance != "obs":
        return lambda batch: [torch.ones(int(stream.counted[batch].sum()), device=stream.device)] * 2
    return None
