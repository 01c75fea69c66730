"""The pruner: scores to a plan, and a plan to a smaller model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import (
    decoder_of,
    final_norm_of,
    language_parameters,
    layers_of,
    pinned_layers,
)
from ..runtime.errors import UserError
from ..runtime.processes import gather
from ..settings.schema import PruneConfig
from .comparison import Comparison, Verdict, simplest
from .outline import blocks_to_drop, candidate_shapes, prune_space
from .plan import LayerPlan, PruningPlan
from .ranking import Ranking
from .refit import SequentialPruner
from .scores import Calibration, open_stream, rank_units
from .selection import (
    Space,
    global_counts,
    imbalance,
    ranked_plan,
)
from .solution import LayerError
from .statistics import BlockInfluence, CalibrationStream, Reduce
from .surgery import (
    achieved_ratio,
    check_plan,
    cut,
    kept_units,
    rebuild,
)

log = logging.getLogger(__name__)

WORTH = 1.9  # a shape whose units cost more than this times the cheapest one's is not tried
FEW = 4  # KV groups of a layer below which the loss of one everywhere is told
COARSE = 6  # splits between heads and channels that are tried before the best one's neighbours


@dataclass
class PruneReport:
    """What happened besides the plan; plain values for results.json and the console.

    Args:
        loss_dense: Answer loss of the dense model on the calibration batches, in nats per token.
        loss_searched: The same of the chosen policy, as the search saw it (``auto``).
        loss_pruned: The same after cut and refit.
        errors: Relative output error of every refitted writer, before and after the refit.
        block_influence: Score of every block (layerwise).
        loss_compared: Answer loss of the chosen candidate on the records that candidates were compared on, fitted to
            the others; None where nothing was chosen.
        loss_compared_dense: The same of the dense model.
        candidates: Tried shapes with their divergence from the dense model and their answer loss on these records.
    """

    loss_dense: float | None = None
    loss_searched: float | None = None
    loss_pruned: float | None = None
    loss_compared: float | None = None
    loss_compared_dense: float | None = None
    errors: list[LayerError] = field(default_factory=list)
    block_influence: list[float] = field(default_factory=list)
    candidates: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def make_plan(
    model: nn.Module, calibration: Calibration, config: PruneConfig, seed: int = 0
) -> tuple[PruningPlan, PruneReport]:
    """Score and select: decide what a checkpoint keeps. The model is unchanged.

    Args:
        model: An image-text-to-text model in eval mode.
        calibration: Batches and how to run them.
        config: Method, ratio, importance, selection.
        seed: Seed of random importance.

    Returns:
        The plan, and the scores behind it.

    Raises:
        UserError: The ratio is infeasible, or no calibration token is of the kind that ``config.tokens`` names.
    """
    report = PruneReport()
    if config.method == "layerwise":
        layers = _layerwise(model, calibration, config, report)
    elif config.ratio == 0 and config.share is None:
        layers = whole_layers(model)
    else:
        layers = _widthwise(model, calibration, config, seed, report)
    requested = None if config.nominal else config.ratio
    more = {"calibration_ids": calibration.ids, "details": config.nominal or None}
    plan = plan_for(model, config.method, layers, requested, config.biased, **more)
    return plan, report


def plan_for(
    model: nn.Module,
    method: str,
    layers: Sequence[LayerPlan],
    requested: float | None,
    biased: bool = False,
    **more: Any,
) -> PruningPlan:
    """The plan that keeps given units, with the sizes of the model that it is for.

    Args:
        model: The checkpoint before pruning.
        method: ``layerwise``, ``widthwise`` or ``auto``.
        layers: Kept layers in ascending order.
        requested: Requested share of language-model parameters to remove; None where no share was asked for.
        biased: Whether all linear layers of the cut model will have biases.
        **more: Further fields of `PruningPlan`.
    """
    found = layers_of(model)
    return PruningPlan(
        method=method,
        layers=tuple(layers),
        source_layers=len(found),
        heads_per_group=found[0].heads_per_group,
        requested=requested,
        achieved=plan_ratio(model, layers, biased),
        source_units=tuple((layer.attention.units, layer.mlp.units) for layer in found),
        **more,
    )


def whole_layers(model: nn.Module) -> tuple[LayerPlan, ...]:
    """The plan that keeps everything."""
    return tuple(
        LayerPlan(i, tuple(range(layer.attention.units)), tuple(range(layer.mlp.units)))
        for i, layer in enumerate(layers_of(model))
    )


def plan_ratio(model: nn.Module, plans: Sequence[LayerPlan], biased: bool = False) -> float:
    """Share of language-model parameters that a plan removes, biases that it adds subtracted; without cutting."""
    layers = layers_of(model)
    by_index = {plan.index: plan for plan in plans}
    removed = 0
    for index, layer in enumerate(layers):
        plan = by_index.get(index)
        if plan is None:
            removed += sum(p.numel() for p in layer.module.parameters())
            continue
        for component, kept in kept_units(layer.module, decoder_of(model).config, plan):
            removed += (component.units - len(kept)) * component.unit_price(biased)
        removed -= sum(component.added_biases(component.units) for component in layer.components) if biased else 0
    return removed / language_parameters(model)


@torch.no_grad()
def apply_plan(
    model: nn.Module, plan: PruningPlan, calibration: Calibration | None, config: PruneConfig
) -> tuple[nn.Module, PruneReport]:
    """Refit and cut: turn a plan into a smaller model.

    Args:
        model: The checkpoint that the plan was made for; consumed.
        plan: What is kept.
        calibration: Batches for the refit and for the loss afterwards; None cuts without looking at data.
        config: Refit settings.

    Returns:
        The smaller model, an instance of the class that loads its checkpoint, and a report.

    Raises:
        UserError: A refit is asked for without calibration batches.
        ValueError: The plan was made for other sizes.
    """
    check_plan(model, plan)
    report = PruneReport()
    before = language_parameters(model)
    if calibration is None:
        if config.refit or config.biased:
            key = "refit" if config.refit else "bias"
            raise UserError(f"prune.{key}=true needs calibration batches; pass some, or set prune.{key}=false")
        return cut(model, plan), report
    stream = open_stream(model, calibration, config)
    pruner = sequential_pruner(stream, calibration, config, trial=False)
    depth = plan.source_layers
    what = "refit and cut" if config.refit else "cut"
    outcome = pruner.run(plan.layers, True, lambda layer: calibration.tick(what, layer + 1, depth))
    report.loss_pruned, report.errors = outcome.loss, outcome.errors
    smaller = rebuild(model, plan.kept_layers)
    if abs(achieved_ratio(before, smaller) - plan.achieved) > 1e-9:
        raise RuntimeError(
            f"plan says {plan.achieved:.6f} removed, the model says {achieved_ratio(before, smaller):.6f}"
        )
    return smaller, report


def sequential_pruner(
    stream: CalibrationStream, calibration: Calibration, config: PruneConfig, trial: bool
) -> SequentialPruner:
    """A pruner with the refit that a configuration asks for.

    Args:
        stream: The calibration stream.
        calibration: Which batches are compared on, held back and validated on.
        config: Refit settings.
        trial: Whether candidates are compared afterwards: what that is done on is then not fitted to.
    """
    how = (config.refit, config.refit_target, config.damping, calibration.reduce)
    if not trial:
        return SequentialPruner(stream, *how, held=calibration.validated, bias=config.biased)
    outside = {*calibration.compared, *calibration.held}
    fitted = [batch for batch in range(len(calibration.batches)) if batch not in outside]
    return SequentialPruner(stream, *how, fitted, calibration.held, config.biased)


def dense_outputs(stream: CalibrationStream) -> list[Tensor]:
    """The dense model's outputs of the last layer, by batch."""
    hidden = stream.start()
    for index, layer in enumerate(decoder_of(stream.model).layers):
        stream.advance(layer, index, hidden)
    return hidden


@torch.no_grad()
def block_influences(
    stream: CalibrationStream, kept: Sequence[int], config: PruneConfig, reduce: Reduce
) -> list[float]:
    """Block influence of the kept layers, measured on the model that consists of them.

    Args:
        stream: The calibration stream.
        kept: Original indices of the layers.
        config: ``block_influence``: mean or sum over positions; ``final_norm``: whether the last block's output is
            compared after the final norm, as published.
        reduce: Sums over processes.

    Returns:
        One score per kept layer.
    """
    layers, norm = decoder_of(stream.model).layers, final_norm_of(stream.model)
    hidden, scores = stream.start(), []
    for index in kept:
        influence = BlockInfluence()
        for batch, inputs, outputs in stream.run(layers[index], index, hidden):
            with stream.on_device(norm):
                compared = norm(outputs) if config.final_norm and index == kept[-1] else outputs
            influence.add(inputs, compared, stream.counted[batch])
        scores.append(influence.value(config.block_influence, reduce))
    return scores


def _layerwise(
    model: nn.Module, calibration: Calibration, config: PruneConfig, report: PruneReport
) -> tuple[LayerPlan, ...]:
    whole = whole_layers(model)
    count = blocks_to_drop(model, config)
    stream = open_stream(model, calibration, config)
    report.loss_dense = stream.answer_loss(dense_outputs(stream), calibration.reduce)
    kept = list(range(len(whole)))
    scores = block_influences(stream, kept, config, calibration.reduce)
    report.block_influence = scores
    for step in range(count):
        if config.iterative and step:
            scores = block_influences(stream, kept, config, calibration.reduce)
        lowest = min(range(pinned_layers(model), len(kept)), key=lambda position: scores[position])
        kept.pop(lowest)
        scores = scores[:lowest] + scores[lowest + 1 :]
        calibration.tick("score blocks", step + 1, count)
    return tuple(whole[index] for index in kept)


def _widthwise(
    model: nn.Module, calibration: Calibration, config: PruneConfig, seed: int, report: PruneReport
) -> tuple[LayerPlan, ...]:
    space = prune_space(model, config)
    first = layers_of(model, config.heads)[0]
    shapes = candidate_shapes(space, first, config)
    chooses = len(shapes) > 1 and any(gather(len(calibration.compared)))
    counts = space.counts(*shapes[0]) if len(shapes) == 1 else ()
    outside = calibration.compared if chooses else ()
    scores, stream, dense = rank_units(model, calibration, config, seed, outside, counts)
    dense = dense or dense_outputs(stream)
    report.loss_dense = stream.answer_loss(dense, calibration.reduce)
    rankings = [s.pair for s in scores]
    if not shapes:
        costs = [(attention.costs, mlp.costs) for attention, mlp in rankings]
        return ranked_plan(global_counts(space, config.ratio or 0.0, costs), rankings)
    if config.importance == "obs":
        shapes = promising(shapes, space, rankings)
    best = min(range(len(shapes)), key=lambda i: imbalance(space, shapes[i]))
    if chooses and len(shapes) > 1:
        comparison = Comparison(stream, calibration.compared, dense)
        del dense
        pruner = sequential_pruner(stream, calibration, config, trial=True)
        verdicts: dict[tuple[int, int], Verdict] = {}

        def divergence(shape: tuple[int, int]) -> float:
            found = pruner.run(ranked_plan(space.counts(*shape), rankings), commit=False)
            verdicts[shape] = comparison(found.hidden)
            calibration.tick("choose heads against channels", len(verdicts), search_length(len(shapes)))
            return verdicts[shape].mean

        lowest(shapes, divergence)
        tried = sorted(verdicts, key=shapes.index)
        best = shapes.index(tried[simplest([verdicts[s] for s in tried], [imbalance(space, s) for s in tried])])
        report.candidates = [
            {
                "heads" if first.attention.groups else "groups": g,
                "channels": c,
                "kl": verdicts[g, c].mean,
                "loss": verdicts[g, c].loss,
            }
            for g, c in tried
        ]
        report.loss_compared = verdicts[shapes[best]].loss
        report.loss_compared_dense = comparison.dense_loss
    groups, whole = shapes[best][0], max(space.groups)
    if groups < whole <= FEW and first.attention.groups is None and not space.whole_attention:
        log.warning(
            "prune: every layer loses %d of its %d KV groups, and all query heads with them, %.0f %% of its attention; "
            "with so few that costs much (2.8 nats for one of three on SmolLM2-135M, before the refit); "
            "prune.selection=global decides it layer by layer, prune.heads=query keeps all groups",
            whole - groups,
            whole,
            100 * (1 - groups / whole),
        )
    return ranked_plan(space.counts(*shapes[best]), rankings)


def promising(
    shapes: Sequence[tuple[int, int]], space: Space, rankings: Sequence[tuple[Ranking, Ranking]]
) -> list[tuple[int, int]]:
    """Shapes worth a trial: the one whose units cost least, and those of more heads at up to `WORTH` times its cost.

    Costs are errors of single layers, and those of attentions spread further: of 21 shapes with fewer heads than the
    cheapest one that were tried on three tiny decoders and SmolLM2-135M, at 20 to 60 %, not one was the better.

    Args:
        shapes: Kept groups and channels of every unprotected layer.
        space: What can be removed.
        rankings: Removal orders, with costs in one unit.
    """

    def cost(shape: tuple[int, int]) -> float:
        pairs = zip(space.counts(*shape), rankings, strict=True)
        return sum(sum(r.costs[: len(r.costs) - n]) for kept, pair in pairs for n, r in zip(kept, pair, strict=True))

    costs = {shape: cost(shape) for shape in shapes}
    cheapest = min(shapes, key=costs.__getitem__)
    return [shape for shape in shapes if shape[0] >= cheapest[0] and costs[shape] <= WORTH * costs[cheapest]]


def lowest(candidates: Sequence[tuple[int, int]], loss: Callable[[tuple[int, int]], float]) -> tuple[int, int]:
    """Find the candidate with the lowest loss: a coarse grid, refined around its best.

    Args:
        candidates: Shapes in order, so that neighbours are similar; the loss is taken to have one minimum along them.
        loss: Costly objective.

    Returns:
        The best candidate that was tried.
    """
    known: dict[int, float] = {}
    step = -(-len(candidates) // COARSE)
    tried = range(0, len(candidates), step)
    while True:
        for position in tried:
            if position not in known:
                known[position] = loss(candidates[position])
        best = min(known, key=lambda position: (known[position], position))
        if step == 1:
            return candidates[best]
        step = -(-step // 2)
        tried = [p for p in (best - step, best + step) if 0 <= p < len(candidates)]


def search_length(candidates: int) -> int:
    """Most evaluations that `lowest` makes for a number of candidates."""
    step = -(-candidates // COARSE)
    length = len(range(0, candidates, step))
    while step > 1:
        step = -(-step // 2)
        length += 2
    return min(length, candidates)
