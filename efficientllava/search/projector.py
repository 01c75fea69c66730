"""Projector evolution: between two rounds the vision projector is trained, so that the space of policies gets better.

EfficientLLaVA alternates policy search with an optimisation of the projector (arXiv 2503.15369, abstract); its loss is
not public. Ours follows the supernet view of the same group (quality of a space = best and mean of its policies):

    L(theta) = Q(theta) + mu KL(dense(theta0) || pruned_s(theta)) + rho ||theta - theta0||^2 / ||theta0||^2

``Q`` is the answer loss of the best policies found so far and of as many random feasible ones, one policy per step.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, projector_of
from ..models.forward import (
    Batch,
    FeatureCache,
    forward_hidden,
    supervised_positions,
)
from ..pruning.scores import Tick, silent
from ..settings.schema import SearchConfig
from .evaluator import Components, Evaluator
from .space import Policy

HELD_OUT = 4  # every fourth batch is not trained on; it decides whether the new projector is kept


@dataclass(frozen=True)
class ProjectorStep:
    """What one evolution of the projector did.

    Args:
        kept: Whether the new projector stays.
        before: Mean answer loss of the best policies on the batches that training does not see, nats per token.
        after: The same with the trained projector.
        moved: ``||theta - theta0|| / ||theta0||`` before the last step, ``theta0`` as of the start of this evolution.
        steps: Optimiser steps.
    """

    kept: bool
    before: float
    after: float
    moved: float
    steps: int


@contextlib.contextmanager
def assembled(model: nn.Module, table: Components, policy: Policy) -> Iterator[None]:
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
    table: Components,
    evaluator: Evaluator,
    batches: Sequence[Batch],
    features: FeatureCache,
    best: Sequence[Policy],
    drawn: Sequence[Policy],
    config: SearchConfig,
    seed: int = 0,
    tick: Tick = silent,
) -> ProjectorStep:
    """Train the projector of a model on good and random policies; everything else stays frozen.

    Args:
        model: The dense model in eval mode; only its projector changes.
        table: Its level table.
        evaluator: Evaluates policies on ``batches``, and knows the dense model's answers with the original projector.
        batches: The search samples.
        features: Vision features by image.
        best: The best policies so far, at least one.
        drawn: Random feasible policies.
        config: ``projector_lr``, ``projector_pull`` (``mu``) and ``projector_anchor`` (``rho``).
        seed: Seed of the order of steps.
        tick: Progress.

    Returns:
        What happened. The projector is as before unless the best policies lose less on the held-out batches.
    """
    seen = [i for i in range(len(batches)) if (i + 1) % HELD_OUT] or list(range(len(batches)))
    held = [i for i in range(len(batches)) if i not in seen] or seen

    def loss() -> float:
        return statistics.fmean(risk.loss for risk in evaluator.evaluate(best, held))

    before, projector = loss(), projector_of(model)
    start = {name: p.detach().clone() for name, p in projector.named_parameters()}
    order = [(policy, i) for policy in [*best, *drawn] for i in seen]
    random.Random(seed).shuffle(order)
    moved, flags = 0.0, {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        for done, distance in enumerate(
            _steps(model, projector, table, evaluator, batches, features, order, start, config)
        ):
            moved = distance
            tick("evolve the projector", done + 1, len(order))
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
    return ProjectorStep(after < before, before, after, moved, len(order))


@torch.enable_grad()
def _steps(
    model: nn.Module,
    projector: nn.Module,
    table: Components,
    evaluator: Evaluator,
    batches: Sequence[Batch],
    features: FeatureCache,
    order: Sequence[tuple[Policy, int]],
    start: dict[str, Tensor],
    config: SearchConfig,
) -> Iterator[float]:
    """Train step by step; yields how far the weights are from the start, in units of the start's norm."""
    stored, device = next(projector.parameters()).dtype, next(projector.parameters()).device
    # Half-precision weights would lose updates this small.
    projector.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=config.projector_lr, weight_decay=0.0)
    power = sum(float(old.float().square().sum()) for old in start.values())
    for policy, index in order:
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
        yield float(distance.detach().sqrt())
    projector.to(stored)
