"""The chosen policy becomes a smaller model: with statistics of the pruned prefix, not those of the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.anatomy import layers_of
from ..pruning.comparison import Comparison, Verdict
from ..pruning.plan import PruningPlan
from ..pruning.pruner import (
    PruneReport,
    apply_plan,
    dense_outputs,
    plan_for,
    sequential_pruner,
    whole_layers,
)
from ..pruning.scores import Calibration, layer_statistics, open_stream
from ..runtime.processes import gather
from ..settings.schema import PruneConfig
from .levels import LevelTable, Recipe
from .space import Policy


def plan_of(model: nn.Module, table: LevelTable, policy: Policy, requested: float | None) -> PruningPlan:
    """The plan of a policy; masks keep every unit, and note the share of zeros in ``details``.

    Args:
        model: The dense model.
        table: Its level table.
        policy: One level per gene.
        requested: Requested share of language-model parameters; None where something else was asked for.
    """
    kept, details = table.plan(policy), None
    if kept == whole_layers(model):
        linears = sum(norms.weights for gene in range(len(policy)) for norms in table.norms(gene, 0))
        zeros = sum(table.removed(gene, level) for gene, level in enumerate(policy))
        details = {"sparsity": zeros / linears}
    return plan_for(model, "auto", kept, None if details else requested, details=details)


@dataclass(frozen=True)
class Trial:
    """A policy as it would be cut.

    Args:
        loss: Answer loss on all samples, in nats per token.
        verdict: What the samples say that are compared on; None where there are none.
    """

    loss: float
    verdict: Verdict | None


def trials(
    model: nn.Module, table: LevelTable, policies: Sequence[Policy], calibration: Calibration, config: PruneConfig
) -> tuple[Trial, list[Trial]]:
    """Try policies as they would be cut; the model stays as it is.

    A search sees every component refitted to the dense prefix, a cut model is refitted layer after layer on what the
    pruned prefix gives it: the best policy of the one need not be the best of the other.

    Args:
        model: The dense model.
        table: Its level table, of structured levels.
        policies: One level per gene each.
        calibration: This process's samples, with those that are compared on.
        config: Refit settings.

    Returns:
        The dense model, and each policy.
    """
    stream = open_stream(model, calibration, config)
    pruner = sequential_pruner(stream, calibration, config, trial=True)
    compares = any(gather(len(calibration.compared)))
    dense = dense_outputs(stream)
    comparison = Comparison(stream, calibration.compared, dense) if compares else None
    whole = Trial(stream.answer_loss(dense, calibration.reduce), comparison(dense) if comparison else None)
    del dense
    tried: list[Trial] = []
    for policy in policies:
        found = pruner.run(table.plan(policy), commit=False)
        tried.append(Trial(found.loss, comparison(found.hidden) if comparison else None))
        calibration.tick("try the best policies", len(tried), len(policies))
    return whole, tried


def cut_policy(
    model: nn.Module, plan: PruningPlan, recipe: Recipe, policy: Policy, calibration: Calibration, config: PruneConfig
) -> tuple[nn.Module, PruneReport]:
    """Cut a policy, or mask it.

    Args:
        model: The dense model; consumed.
        plan: Output of `plan_of`.
        recipe: What a level is.
        policy: One level per gene.
        calibration: This process's samples.
        config: Refit settings.

    Returns:
        The smaller model, and a report.
    """
    if recipe.granularity == "structured":
        return apply_plan(model, plan, calibration, config)
    return model, PruneReport(loss_pruned=mask(model, recipe, policy, calibration, config))


@torch.no_grad()
def mask(model: nn.Module, recipe: Recipe, policy: Policy, calibration: Calibration, config: PruneConfig) -> float:
    """Set the weights of a policy to zero, component by component on the pruned prefix (arXiv 2301.00774).

    Args:
        model: Changed in place.
        recipe: A mask recipe.
        policy: One level per gene.
        calibration: This process's samples.
        config: ``tokens``.

    Returns:
        Answer loss on the samples afterwards, in nats per token.
    """
    stream = open_stream(model, calibration, config)
    layers, hidden = layers_of(model), stream.start()
    for index, layer in enumerate(layers):
        for component, level in zip(layer.components, policy[2 * index : 2 * index + 2], strict=True):
            inputs = recipe.inputs(component)
            grams = layer_statistics(stream, layer, index, list(hidden), calibration.reduce, inputs)
            made = list(recipe.levels(component, grams))[level]
            if made.removed:
                recipe.assemble(component, made.tensors)
        stream.advance(layer.module, index, hidden)
        calibration.tick("mask and compensate", index + 1, len(layers))
    return stream.answer_loss(hidden, calibration.reduce)
