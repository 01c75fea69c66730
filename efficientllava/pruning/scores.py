"""Score: calibration batches to statistics, statistics to the removal order of every component of every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, Layer, layers_of
from ..models.forward import Batch, FeatureCache
from ..models.offload import Offload
from ..schema import TAYLOR, PruneConfig
from .importance import Ranking, activation_scores, magnitude_scores, obs_ranking, random_scores, wanda_scores
from .statistics import CalibrationStream, Gram, Reduce, no_reduce, square_sum
from .taylor import TaylorScores

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
    """

    batches: Sequence[Batch]
    features: FeatureCache | None = None
    reduce: Reduce = no_reduce
    storage: torch.device | str | None = None
    offload: Offload | None = None
    tick: Tick = silent

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
        model, calibration.batches, config.tokens, calibration.features, calibration.storage, calibration.offload
    )
    stream.require_counted(config.tokens, calibration.reduce)
    return stream


@dataclass
class LayerScores:
    """Removal orders of one layer, with costs relative to the power of the residual stream where a cost is an error."""

    attention: Ranking
    mlp: Ranking

    @property
    def pair(self) -> tuple[Ranking, Ranking]:
        """Attention and MLP."""
        return self.attention, self.mlp


def rank_units(
    model: nn.Module, calibration: Calibration, config: PruneConfig, seed: int = 0
) -> tuple[list[LayerScores], CalibrationStream]:
    """Score every KV group and channel of every layer on the dense prefix.

    Args:
        model: The model in eval mode.
        calibration: Batches and how to run them.
        config: ``importance``, ``damping``, ``tokens``, ``taylor_mean``.
        seed: Seed of random importance.

    Returns:
        Rankings of all layers, and the calibration stream for reuse.
    """
    layers = layers_of(model)
    stream = open_stream(model, calibration, config)
    if config.importance in TAYLOR:
        scores = TaylorScores(stream, config.importance, config.taylor_mean).run(calibration.reduce)
        return [LayerScores(Ranking.from_scores(a), Ranking.from_scores(m)) for a, m in scores], stream
    looks = config.importance not in ("magnitude", "random")
    generator = torch.Generator().manual_seed(seed)
    ranked, hidden = [], stream.start() if looks else []
    for index, layer in enumerate(layers):
        with stream.on_device(layer.module):
            if looks:
                grams, power = layer_statistics(stream, layer, index, hidden, calibration.reduce)
                ranked.append(LayerScores(*(_rank(c, grams.pop(0), power, config) for c in layer.components)))
            else:
                simple = (
                    magnitude_scores
                    if config.importance == "magnitude"
                    else partial(random_scores, generator=generator)
                )
                ranked.append(LayerScores(*(_levelled(c, simple(c)) for c in layer.components)))
        calibration.tick("score units", index + 1, len(layers))
    return ranked, stream


@torch.no_grad()
def layer_statistics(
    stream: CalibrationStream,
    layer: Layer,
    index: int,
    hidden: list[Tensor],
    reduce: Reduce = no_reduce,
    linears: Sequence[nn.Linear] | None = None,
) -> tuple[list[Tensor], float]:
    """Look at what a whole layer reads and writes on the dense prefix.

    Args:
        stream: The calibration stream.
        layer: The layer.
        index: Its index in the decoder.
        hidden: Layer inputs by batch; become the layer's outputs.
        reduce: Sums over processes.
        linears: Linear layers whose inputs are looked at; None: the writers of attention and MLP.

    Returns:
        Gram matrices ``E[x x^T]`` of the inputs, and the mean square of the layer's output, per position.
    """
    linears = [c.writer for c in layer.components] if linears is None else linears
    grams = [Gram(linear.in_features, linear.weight.device) for linear in linears]
    captured: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured[linear] = args[0]

    handles = [linear.register_forward_pre_hook(note) for linear in linears]
    power = torch.zeros(2, dtype=torch.float64)
    try:
        for batch, _, outputs in stream.run(layer.module, index, hidden):
            counted = stream.counted[batch]
            for linear, gram in zip(linears, grams, strict=True):
                gram.add(captured[linear][counted])
            power += torch.tensor([square_sum(outputs[counted]), float(counted.sum())], dtype=torch.float64)
    finally:
        for handle in handles:
            handle.remove()
    power = reduce(power)
    return [gram.mean(reduce) for gram in grams], float(power[0] / power[1].clamp(min=1))


def _rank(component: Component, gram: Tensor, power: float, config: PruneConfig) -> Ranking:
    if config.importance == "obs":
        ranking = obs_ranking(component.writer.weight, gram, component.width, config.damping)
        return replace(ranking, costs=tuple(cost / max(power, 1e-30) for cost in ranking.costs))
    scores = activation_scores if config.importance == "activation" else wanda_scores
    return _levelled(component, scores(component, gram))


def _levelled(component: Component, scores: Tensor) -> Ranking:
    """Rank by scores that have no common unit: a parameter costs 1 on average in every component of every layer."""
    ranking = Ranking.from_scores(scores)
    scale = component.unit_parameters * len(ranking.costs) / (sum(ranking.costs) or 1.0)
    return replace(ranking, costs=tuple(cost * scale for cost in ranking.costs))
