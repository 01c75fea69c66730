"""The pruner: scores to a plan, and a plan to a smaller model.

Candidates are compared on records that none of them was fitted to. The loss on the records that a candidate was
refitted on is biased: the more freedom it has to fit them, the better it looks (the generalization gap of arXiv
2503.15369). What counts is therefore their divergence from the dense model on other records, record by record, since
most of the spread between records is common to all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
from .importance import rank_units
from .outline import blocks_to_drop, candidate_shapes, prune_space
from .plan import LayerPlan, PruningPlan, Ranking, plan_for, ranked_plan, whole_layers
from .refit import SequentialPruner
from .selection import Space, global_counts, imbalance
from .solution import LayerError
from .statistics import BlockInfluence
from .stream import CHOSEN, Calibration, CalibrationStream, written_weight
from .surgery import check_plan, cut, rebuild
from .two_stage import two_stage_plan

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
    stream = CalibrationStream(model, calibration, config.tokens)
    hidden, report.errors = SequentialPruner(stream, config).run(plan.layers, commit=True)
    report.loss_pruned = stream.answer_loss(hidden)
    del hidden
    smaller = rebuild(model, plan.kept_layers)
    achieved = 1.0 - language_parameters(smaller) / before
    if abs(achieved - plan.achieved) > 1e-9:
        raise RuntimeError(f"plan says {plan.achieved:.6f} removed, the model says {achieved:.6f}")
    return smaller, report


@torch.no_grad()
def block_influences(stream: CalibrationStream, kept: Sequence[int], config: PruneConfig) -> list[float]:
    """Block influence of the kept layers, measured on the model that consists of them.

    Args:
        stream: The calibration stream.
        kept: Original indices of the layers.
        config: ``block_influence``: mean or sum over positions; ``final_norm``: whether the last block's output is
            compared after the final norm, as published.

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
        scores.append(influence.value(config.block_influence, stream.reduce))
    return scores


def _layerwise(
    model: nn.Module, calibration: Calibration, config: PruneConfig, report: PruneReport
) -> tuple[LayerPlan, ...]:
    whole = whole_layers(model)
    count = blocks_to_drop(model, config)
    stream = CalibrationStream(model, calibration, config.tokens)
    report.loss_dense = stream.answer_loss(stream.end())
    kept = list(range(len(whole)))
    report.block_influence = scores = block_influences(stream, kept, config)
    for step in range(count):
        if config.iterative and step:
            scores = block_influences(stream, kept, config)
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
    chooses = len(shapes) > 1 and calibration.compares
    counts = space.counts(*shapes[0]) if len(shapes) == 1 else ()
    outside = calibration.compared if chooses else ()
    if not shapes:
        calibration = replace(calibration, written_share=CHOSEN)
    stream = CalibrationStream(model, calibration, config.tokens)
    if config.importance != "obs":  # published scores know no text that the model has written
        outside = {*outside, *calibration.written}
    rankings, dense = rank_units(stream, config, seed, outside, counts)
    dense = dense or stream.end()
    report.loss_dense = stream.answer_loss(dense)
    if config.selection == "two_stage" and not shapes:
        return two_stage_plan(stream, space, config, rankings)
    if not shapes:
        costs = [(attention.costs, mlp.costs) for attention, mlp in rankings]
        return ranked_plan(global_counts(space, config.ratio or 0.0, costs), rankings)
    if config.importance == "obs":
        shapes = promising(shapes, space, rankings)
    best = min(range(len(shapes)), key=lambda i: imbalance(space, shapes[i]))
    if chooses and len(shapes) > 1:
        comparison = Comparison(stream, dense)
        del dense
        pruner = SequentialPruner(stream, config, trial=True)
        verdicts: dict[tuple[int, int], Verdict] = {}

        def divergence(shape: tuple[int, int]) -> float:
            verdicts[shape] = comparison(pruner.run(ranked_plan(space.counts(*shape), rankings), commit=False)[0])
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
        report.loss_compared_dense = comparison.dense.loss
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


@dataclass(frozen=True)
class Verdict:
    """A candidate on the records that are compared on.

    Args:
        kl: Divergence of each record's answers from the dense model's, in nats per supervised token.
        tokens: Supervised tokens of each record; of written text as many as give it a share of `CHOSEN`.
        loss: Cross-entropy of all supervised tokens, in nats per token.
    """

    kl: Tensor
    tokens: Tensor
    loss: float

    @property
    def mean(self) -> float:
        """Divergence per supervised token of all records."""
        return float((self.kl * self.tokens).sum() / self.tokens.sum())

    def excess(self, other: Verdict) -> tuple[float, float]:
        """How much more this candidate diverges than another, and the standard error of that over records."""
        shares = self.tokens / self.tokens.sum()
        steps = shares * (self.kl - other.kl)
        mean, count = float(steps.sum()), len(steps)
        spread = (steps - shares * mean).square().sum() * count / max(count - 1, 1)
        return mean, float(spread.sqrt())


class Comparison:
    """Measures candidates against the dense model on the batches of a stream that are compared on.

    Args:
        stream: The calibration stream.
        dense: The dense model's hidden states behind its last layer, by batch.

    Attributes:
        dense: What the dense model itself is found to be.

    Raises:
        UserError: The dense model's own numbers are not finite.
    """

    def __init__(self, stream: CalibrationStream, dense: Sequence[Tensor]) -> None:
        self._stream = stream
        self._dense = {batch: stream.supervised(batch, dense[batch])[0] for batch in stream.calibration.compared}
        self.dense = self(dense)

    @torch.no_grad()
    def __call__(self, hidden: Sequence[Tensor]) -> Verdict:
        """Judge a candidate from its hidden states behind the last layer, by batch; the same on all processes."""
        mine: list[list[float]] = []
        for batch, reference in self._dense.items():
            rows, targets, mask = self._stream.supervised(batch, hidden[batch])
            values = torch.zeros(len(hidden[batch]), 3, dtype=torch.float64, device=rows.device)
            parts = (self._stream.logits(rows, targets, mask.nonzero()[:, 0]), self._stream.logits(reference))
            for (_, logits, wanted, owner), (_, dense) in zip(*parts, strict=True):
                found, known = logits.log_softmax(-1), dense.log_softmax(-1)
                kl = (known.exp() * (known - found)).sum(-1)
                loss = nn.functional.nll_loss(found, wanted, reduction="none")
                values.index_add_(0, owner, torch.stack([kl, loss, torch.ones_like(kl)], 1).double())
            written = float(batch in self._stream.calibration.written)
            mine += [[*row, written] for row in values.tolist() if row[2]]
        everywhere = [row for part in gather(mine) for row in part]
        kl, loss, tokens, written = torch.tensor(everywhere, dtype=torch.float64).view(-1, 4).unbind(1)
        made = float((tokens * written).sum())
        weights = torch.where(written > 0, written_weight(CHOSEN, float(tokens.sum()) - made, made), 1.0)
        if not bool(torch.isfinite(kl).all() and torch.isfinite(loss).all()):
            raise UserError("calibration: a candidate's loss on the records that are compared on is not finite")
        return Verdict(kl / tokens, tokens * weights, float((loss * weights).sum() / (tokens * weights).sum()))


def simplest(verdicts: Sequence[Verdict], simplicity: Sequence[float]) -> int:
    """The simplest candidate within one standard error of the best one.

    Args:
        verdicts: One per candidate, on the same records.
        simplicity: Distance from the simplest candidate imaginable, one per candidate.

    Returns:
        Index of the chosen candidate.
    """
    best = min(range(len(verdicts)), key=lambda i: verdicts[i].mean)
    excesses = [verdict.excess(verdicts[best]) for verdict in verdicts]
    near = [i for i, (mean, error) in enumerate(excesses) if mean <= error]
    return min({*near, best}, key=lambda i: (simplicity[i], verdicts[i].mean))
