"""What a search changes in the model: its projector between two rounds, and everything in the end.

*Projector evolution*: the vision projector is trained, so that the space of policies gets better. EfficientLLaVA
alternates policy search with an optimisation of the projector (arXiv 2503.15369, abstract); its loss is not public.
Ours follows the supernet view of the same group (quality of a space = best and mean of its policies):

    L(theta) = Q(theta) + mu KL(dense(theta0) || pruned_s(theta)) + rho ||theta - theta0||^2 / ||theta0||^2

``Q`` is the answer loss of the best policies found so far and of as many random feasible ones, one policy per step.

*The end*: the chosen policy becomes a smaller model, with statistics of the pruned prefix, not those of the search.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, layers_of, projector_of
from ..models.forward import (
    Batch,
    FeatureCache,
    forward_hidden,
    supervised_positions,
)
from ..pruning.plan import PruningPlan, plan_for
from ..pruning.pruner import Comparison, PruneReport, simplest
from ..pruning.refit import SequentialPruner
from ..pruning.statistics import layer_statistics
from ..pruning.stream import Calibration, CalibrationStream, silent
from ..runtime.console import Tick
from ..settings.schema import PruneConfig, SearchConfig
from .evaluator import Evaluator
from .levels import LevelTable
from .recipes import Recipe
from .space import Policy

HELD_OUT = 4  # every fourth batch is not trained on; it decides whether the new projector is kept


@contextlib.contextmanager
def assembled(model: nn.Module, table: LevelTable, policy: Policy) -> Iterator[None]:
    """Let a model run with the components of a policy; its own come back at the end.

    Args:
        model: The dense model.
        table: A level table of the model.
        policy: One level per gene.
    """
    layers = decoder_of(model).layers
    own = [(layer.self_attn, layer.mlp) for layer in layers]
    for position, gene in enumerate(table.genes):
        name = "self_attn" if gene.kind == "attention" else "mlp"
        setattr(layers[gene.layer], name, table.module(position, policy[position]))
    try:
        yield
    finally:
        for layer, (attention, mlp) in zip(layers, own, strict=True):
            layer.self_attn, layer.mlp = attention, mlp


def evolve_projector(
    model: nn.Module,
    table: LevelTable,
    evaluator: Evaluator,
    batches: Sequence[Batch],
    features: FeatureCache,
    policies: Sequence[Policy],
    config: SearchConfig,
    seed: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Train the projector of a model on good and random policies; everything else stays frozen.

    Args:
        model: The dense model in eval mode; only its projector changes.
        table: Its level table.
        evaluator: Evaluates policies on ``batches``, and knows the dense model's answers with the original projector.
        batches: The search samples.
        features: Vision features by image.
        policies: The best ones so far, at least one, and then as many random feasible ones.
        config: ``projector_lr``, ``projector_pull`` (``mu``) and ``projector_anchor`` (``rho``).
        seed: Seed of the order of steps.
        tick: Progress.

    Returns:
        What happened, for the record: ``kept``, whether the new projector stays, which it does where the best policies
        lose less on the held-out batches; ``before`` and ``after``, their mean answer loss there in nats per token;
        ``moved``, ``||theta - theta0|| / ||theta0||`` before the last step; and ``steps`` of the optimiser.
    """
    seen = [i for i in range(len(batches)) if (i + 1) % HELD_OUT] or list(range(len(batches)))
    held = [i for i in range(len(batches)) if i not in seen] or seen

    def loss() -> float:
        return statistics.fmean(risk.loss for risk in evaluator.evaluate(policies[: len(policies) // 2], held))

    before, projector = loss(), projector_of(model)
    start = {name: p.detach().clone() for name, p in projector.named_parameters()}
    order = [(policy, i) for policy in policies for i in seen]
    random.Random(seed).shuffle(order)
    flags = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        moved = _train(model, table, evaluator, batches, features, order, start, config, tick)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    evaluator.restart()
    after = loss()
    if not after < before:
        with torch.no_grad():
            for name, parameter in projector.named_parameters():
                parameter.copy_(start[name])
        evaluator.restart()
    return {"kept": after < before, "before": before, "after": after, "moved": moved, "steps": len(order)}


@torch.enable_grad()
def _train(
    model: nn.Module,
    table: LevelTable,
    evaluator: Evaluator,
    batches: Sequence[Batch],
    features: FeatureCache,
    order: Sequence[tuple[Policy, int]],
    start: dict[str, Tensor],
    config: SearchConfig,
    tick: Tick,
) -> float:
    """Train step by step; how far the weights were from the start before the last one, in units of the start's norm."""
    projector = projector_of(model)
    stored, device = next(projector.parameters()).dtype, next(projector.parameters()).device
    # Half-precision weights would lose updates this small.
    projector.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=config.projector_lr, weight_decay=0.0)
    power = sum(float(old.float().square().sum()) for old in start.values())
    distance = torch.zeros(())
    for done, (policy, index) in enumerate(order):
        batch, dense = batches[index], evaluator.answers[index].dense.to(device)
        mask, targets = supervised_positions(batch["labels"])
        half = torch.autocast(device.type, dtype=stored, enabled=stored != torch.float32)
        with assembled(model, table, policy), half:
            logits = model.lm_head(forward_hidden(model, batch, features(batch))[mask])  # pyright: ignore[reportCallIssue]
        found = logits.float().log_softmax(-1)
        distance = torch.stack([(p.float() - start[n].float()).square().sum() for n, p in projector.named_parameters()])
        distance = distance.sum() / power
        loss = nn.functional.nll_loss(found, targets) + config.projector_anchor * distance
        loss = loss + config.projector_pull * nn.functional.kl_div(found, dense, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick("evolve the projector", done + 1, len(order))
    projector.to(stored)
    return float(distance.detach().sqrt())


def plan_of(model: nn.Module, table: LevelTable, policy: Policy, requested: float | None) -> PruningPlan:
    """The plan of a policy; masks keep every unit, and note the share of zeros in ``details``.

    Args:
        model: The dense model.
        table: Its level table.
        policy: One level per gene.
        requested: Requested share of language-model parameters; None where something else was asked for.
    """
    kept, details = table.plan(policy), None
    if table.recipe.granularity != "structured":
        linears = sum(norms.weights for gene in range(len(policy)) for norms in table.norms(gene, 0))
        zeros = sum(table.removed(gene, level) for gene, level in enumerate(policy))
        details = {"sparsity": zeros / linears}
    return plan_for(model, "auto", kept, None if details else requested, details=details)


def choose(
    model: nn.Module,
    table: LevelTable,
    policies: Sequence[Policy],
    distances: Sequence[float],
    calibration: Calibration,
    config: PruneConfig,
) -> tuple[int, PruneReport, list[dict[str, Any]]]:
    """Try policies as they would be cut, and choose one; the model stays as it is.

    A search sees every component refitted to the dense prefix, a cut model is refitted layer after layer on what the
    pruned prefix gives it: the best policy of the one need not be the best of the other.

    Args:
        model: The dense model.
        table: Its level table, of structured levels.
        policies: One level per gene each.
        distances: Of each policy from the simplest one.
        calibration: This process's samples, with those that are compared on; without any, the least loss on all wins.
        config: Refit settings.

    Returns:
        Index of the chosen policy, losses of it and of the dense model, and what is recorded of all that were tried.
    """
    stream = CalibrationStream(model, calibration, config.tokens)
    pruner, dense = SequentialPruner(stream, config, trial=True), stream.end()
    comparison = Comparison(stream, dense) if calibration.compares else None
    report, losses, verdicts = PruneReport(loss_dense=stream.answer_loss(dense)), [], []
    del dense
    for policy in policies:
        hidden, _ = pruner.run(table.plan(policy), commit=False)
        losses.append(stream.answer_loss(hidden))
        verdicts.append(comparison and comparison(hidden))
        stream.tick("try the best policies", len(losses), len(policies))
    tried = [
        {"policy": list(policy), "loss_pruned": loss, "kl": verdict and verdict.mean}
        for policy, loss, verdict in zip(policies, losses, verdicts, strict=True)
    ]
    if comparison is None:
        return min(range(len(losses)), key=losses.__getitem__), report, tried
    best = simplest(verdicts, distances)
    compared = {"loss_compared": verdicts[best].loss, "loss_compared_dense": comparison.dense.loss}
    return best, replace(report, **compared), tried


@torch.no_grad()
def mask(
    model: nn.Module, recipe: Recipe, policy: Policy, calibration: Calibration, config: PruneConfig
) -> tuple[nn.Module, PruneReport]:
    """Set the weights of a policy to zero, component by component on the pruned prefix (arXiv 2301.00774).

    Args:
        model: Changed in place.
        recipe: A mask recipe.
        policy: One level per gene.
        calibration: This process's samples.
        config: ``tokens``.

    Returns:
        The model, and a report.
    """
    stream = CalibrationStream(model, calibration, config.tokens)
    layers, hidden = layers_of(model), stream.start()
    for index, layer in enumerate(layers):
        for component, level in zip(layer.components, policy[2 * index : 2 * index + 2], strict=True):
            inputs = recipe.inputs(component)
            grams = layer_statistics(stream, layer, index, list(hidden), inputs)
            made = list(recipe.levels(component, grams))[level]
            if made.removed:
                recipe.assemble(component, made.tensors)
        stream.advance(layer.module, index, hidden)
        stream.tick("mask and compensate", index + 1, len(layers))
    return model, PruneReport(loss_pruned=stream.answer_loss(hidden))
