"""Score: one number per unit (KV group, MLP channel), and the order in which units should go.

A `Ranking` is what every importance ends in: units of one component in removal order, with the marginal cost of each
removal. Scores are never compared between components without dividing by the parameters a unit carries.

A new importance is one function ``(component, seen, how) -> Ranking`` and its row in `IMPORTANCES`, which says what it
has to see: scoring, its memory and its cost follow from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.anatomy import Component, layers_of
from ..runtime.errors import UserError
from ..settings.schema import TAYLOR, PruneConfig
from .gradients import sensitivity, taylor_scores
from .obs import DAMPING, obs_ranking
from .plan import Ranking
from .statistics import STRIP, fluctuation, layer_moments, layer_statistics
from .stream import CalibrationStream, narrowed


def activation_scores(component: Component, gram: Tensor) -> Tensor:
    """Root mean square of a unit's input to the writer.

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    return component.reduce_columns(gram.diagonal().clamp(min=0)).sqrt()


def wanda_scores(component: Component, gram: Tensor) -> Tensor:
    """Sum of ``|W_ij| sqrt(H_jj)`` over a unit's writer columns.

    Source: arXiv 2306.11695, eq. 1, summed over rows for structured removal (arXiv 2312.11983, Wanda-sp).

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    columns = component.writer.weight.detach().to(gram.dtype).abs().sum(0)
    return component.reduce_columns(columns * gram.diagonal().clamp(min=0).sqrt())


def norm_scores(component: Component, squares: Tensor) -> Tensor:
    """Mean over records of the L2 norm of a unit's input to the writer, over positions; all records count as long.

    Source: arXiv 2501.17771, section 3.1.

    Args:
        component: Attention or MLP.
        squares: Mean squares of the writer's input by record, ``(records, units * width)``.

    Returns:
        ``(units,)``.
    """
    return component.reduce_columns(squares.sqrt().mean(0))


def magnitude_scores(component: Component) -> Tensor:
    """L2 norm of all weights of a unit, readers and writer.

    Args:
        component: Attention or MLP.

    Returns:
        ``(units,)``.
    """
    axes = component.axes.items()
    return component.reduce({w: w.detach().double().square().sum(1 - axis) for w, axis in axes}).sqrt()


def weighted_variance(component: Component, fluctuations: Tensor) -> Tensor:
    """WIFV of FLAP: fluctuation of a column times its squared norm, ``(units * width,)``."""
    return fluctuations * _column_sums(component, 2)


def weighted_norm(component: Component, squares: Tensor) -> Tensor:
    """WIFN of FLAP: mean absolute weight of a column times the norm of what it reads, ``(units * width,)``."""
    return squares.mean(0).sqrt() * _column_sums(component, 1) / component.writer.out_features


def _column_sums(component: Component, power: int) -> Tensor:
    rows = component.writer.weight.detach().split(STRIP)
    return torch.stack([part.double().abs().pow(power).sum(0) for part in rows]).sum(0).cpu()


def flap_ranking(component: Component, scores: Tensor, biased: bool) -> Ranking:
    """Rank units by scores that are standardised within the component, so that all layers can be ranked together.

    Scores of columns are squared in the attention; a unit's is the mean of its columns. With grouped queries the
    published head becomes a KV group with all its query heads. Source: arXiv 2312.11983.

    Args:
        component: Attention or MLP.
        scores: Of the writer's columns, ``(units * width,)``.
        biased: Whether the cut model has biases: costs are scores times the parameters that a unit then takes with it.

    Returns:
        Removal order; costs may be negative.
    """
    if component.kind == "attention":
        scores = scores.square()
    spread = scores.std().clamp(min=torch.finfo(torch.float64).tiny)
    standard = component.reduce_columns((scores - scores.mean()) / spread) / component.width
    return Ranking.from_scores(standard * component.unit_price(biased), component.groups)


# What an importance sees of a component: its weights alone, the Gram matrix of what its writer reads, the moments of
# that record by record, or scores made of the gradients of the answer loss, ``(units,)``.
WEIGHTS, INPUTS, RECORDS, GRADIENTS = "weights", "inputs", "records", "gradients"


class How(NamedTuple):
    """What else a ranking may depend on.

    Args:
        config: The pruning node.
        what: Layer and component, for errors.
        generator: Source of randomness.
        felt: How much the answers feel an error of each output of the writer; None: not known.
    """

    config: PruneConfig
    what: str
    generator: torch.Generator
    felt: Tensor | None = None


class Importance(NamedTuple):
    """How units are ranked.

    Args:
        sees: `WEIGHTS`, `INPUTS`, `RECORDS` or `GRADIENTS`.
        rank: Given a component, what is seen of it, and how, the order in which its units should go.
    """

    sees: str
    rank: Callable[[Component, Any, How], Ranking]


def importance_of(name: str) -> Importance:
    """An importance by its name.

    Raises:
        UserError: There is no such importance.
    """
    if name not in IMPORTANCES:
        raise UserError(f"prune.importance={name}: unknown; choose one of {', '.join(IMPORTANCES)}")
    return IMPORTANCES[name]


def _levelled(component: Component, scores: Tensor) -> Ranking:
    """Rank by scores that have no common unit: a parameter costs 1 on average in every component of every layer."""
    ranking = Ranking.from_scores(scores, component.groups)
    scale = component.unit_price() * component.units / (sum(ranking.costs) or 1.0)
    return replace(ranking, costs=tuple(cost * scale for cost in ranking.costs))


def _obs(component: Component, gram: Tensor, how: How) -> Ranking:
    weight = component.writer.weight.detach()
    if how.felt is not None:
        weight = weight.to(gram.dtype) * how.felt.to(gram).sqrt().unsqueeze(1)
    damping = how.config.damping or DAMPING
    return obs_ranking(weight, gram, component.width, damping, what=how.what, groups=component.groups)


IMPORTANCES = {
    "obs": Importance(INPUTS, _obs),
    **dict.fromkeys(TAYLOR, Importance(GRADIENTS, lambda unit, scores, _: Ranking.from_scores(scores, unit.groups))),
    "activation": Importance(INPUTS, lambda unit, gram, _: _levelled(unit, activation_scores(unit, gram))),
    "wanda": Importance(INPUTS, lambda unit, gram, _: _levelled(unit, wanda_scores(unit, gram))),
    "flap": Importance(
        RECORDS,
        lambda unit, seen, how: flap_ranking(unit, weighted_variance(unit, fluctuation(*seen)), how.config.biased),
    ),
    "flap_wifn": Importance(
        RECORDS, lambda unit, seen, how: flap_ranking(unit, weighted_norm(unit, seen[1]), how.config.biased)
    ),
    "norm": Importance(RECORDS, lambda unit, seen, _: _levelled(unit, norm_scores(unit, seen[1]))),
    "magnitude": Importance(WEIGHTS, lambda unit, _seen, _how: _levelled(unit, magnitude_scores(unit))),
    "random": Importance(
        WEIGHTS,
        lambda unit, _seen, how: _levelled(unit, torch.rand(unit.units, generator=how.generator, dtype=torch.float64)),
    ),
}


Pair = tuple[Ranking, Ranking]  # removal orders of the attention and of the MLP of a layer


def rank_units(
    stream: CalibrationStream,
    config: PruneConfig,
    seed: int = 0,
    without: Collection[int] = (),
    counts: Sequence[tuple[int, int]] = (),
) -> tuple[list[Pair], list[Tensor]]:
    """Score every unit of the attention and every channel of every layer.

    Args:
        stream: The calibration stream.
        config: ``importance``, ``heads``, ``damping``, ``taylor_mean``; ``prefix``: whether a layer reads what the
            dense model gives it, or what the layers before leave that keep their best units only.
        seed: Seed of random importance.
        without: Batches that stay outside the statistics.
        counts: Units that every layer will keep; needed for ``prefix=pruned``.

    Returns:
        Rankings of all layers; costs of `obs` are errors relative to the power of the residual stream. And the dense
        model's outputs of the last layer by batch where the scores needed them (else empty).
    """
    layers, importance = layers_of(stream.model, config.heads), importance_of(config.importance)
    generator = torch.Generator().manual_seed(seed)

    def ranked_by(index: int, seen: Sequence[Any], felt: Sequence[Tensor | None] = (None, None)) -> Pair:
        first, second = (
            importance.rank(component, what, How(config, f"layer {index}, {component.kind}", generator, outputs))
            if component.units
            else Ranking((), (), component.groups)
            for component, what, outputs in zip(layers[index].components, seen, felt, strict=True)
        )
        return first, second

    if importance.sees == GRADIENTS:
        scores = taylor_scores(stream, config.importance, config.taylor_mean, config.heads, without)
        return [ranked_by(index, pair) for index, pair in enumerate(scores)], []
    looks, felt, weigh = importance.sees != WEIGHTS, None, None
    if config.importance != "obs":  # published scores take all positions alike
        weigh = lambda batch: [torch.ones(int(stream.counted[batch].sum()), device=stream.device)] * 2  # noqa: E731
    elif config.method == "widthwise" and config.selection == "global":
        felt = sensitivity(stream, seed)
    ranked, hidden = [], stream.start() if looks else []
    sequential = looks and config.prefix == "pruned"
    for index, layer in enumerate(layers):
        before = list(hidden) if sequential else []
        with stream.on_device(layer.module):
            seen: Sequence[Any] = (None, None)
            if importance.sees == RECORDS:
                seen = layer_moments(stream, layer, index, hidden, without)
            elif looks:
                weigh = felt.weigh(stream, index) if felt else weigh
                seen = layer_statistics(stream, layer, index, hidden, None, weigh, without)
            ranked.append(ranked_by(index, seen, felt.outputs[index] if felt else (None, None)))
            if sequential:
                hidden = before
                with contextlib.ExitStack() as cuts:
                    for component, ranking, count in zip(layer.components, ranked[-1], counts[index], strict=True):
                        cuts.enter_context(narrowed(component.writer, component.columns(ranking.kept(count))))
                    stream.advance(layer.module, index, hidden)
        stream.tick("score units", index + 1, len(layers))
    return ranked, [] if sequential else hidden
