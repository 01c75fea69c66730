"""What a run will make, from shapes alone: no weights, no data, no hub. The pruner's own code decides the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..checkpoint.folder import compute_dtype, stock_config
from ..models.anatomy import decoder_of, layers_of
from ..models.pruned import is_per_layer
from ..pruning.outline import Outline, outline
from ..pruning.surgery import pruned_config
from ..recovery.student import prepare, trainable
from ..runtime import UserError, processes
from ..search.budget import asked_share
from ..search.recipes import Structured
from ..settings.schema import RunConfig
from ..stages.run import Expected

_MODELS: dict[tuple[str, torch.dtype], nn.Module] = {}  # what jobs of a sweep have in common
OPTIMISER = {"adamw": 8, "sgd": 0}  # bytes of state per trained parameter


@dataclass(frozen=True)
class Forecast:
    """The models of a run on the meta device.

    Args:
        settings: The checked configuration.
        base: The checkpoint's model, in the type that it computes in.
        plan: Sizes of the pruning plan.
        storage: Type that checkpoints are stored in.
        device: ``cuda`` or ``cpu``.
        processes: Number of processes on this machine.
    """

    settings: RunConfig
    base: nn.Module
    plan: Outline
    storage: torch.dtype
    device: str
    processes: int

    @property
    def dtype(self) -> torch.dtype:
        """Type that models compute in."""
        return compute_dtype(self.settings.model.dtype, self.storage, self.device)

    @property
    def sharded(self) -> bool:
        """Whether the recovery shares the student out over the processes."""
        return processes.sharded(self.settings.trainer)

    @cached_property
    def configs(self) -> list[Any]:
        """Configurations of the models that the plan may lead to; the first one is typical."""
        prune = self.settings.prune
        return [
            pruned_config(self.base, range(len(option)), option, prune.biased, prune.heads)
            for option in self.plan.options
        ]

    @cached_property
    def pruned(self) -> nn.Module:
        """The model that the plan leads to, or a typical one where the data have a say."""
        key = (str(self.configs[0]), self.dtype)
        if key not in _MODELS:
            _MODELS[key] = meta_model(self.configs[0]).to(self.dtype)
        return _MODELS[key]

    @property
    def requested(self) -> float | None:
        """Share of language-model parameters that is asked for; None where something else is."""
        prune, search = self.settings.prune, self.settings.search
        if prune.method == "none":
            return 0.0
        if prune.method == "auto":
            counted = search.granularity == "structured" and search.budget.resource == "params"
            return asked_share(prune, search)[0] if counted else None
        return None if prune.nominal else prune.ratio

    @property
    def sparsity(self) -> float | None:
        """Share of the decoder's linear weights that a search sets to zero; None where it cuts."""
        return asked_share(self.settings.prune, self.settings.search)[0] if self.settings.masks else None

    @property
    def stock(self) -> bool | None:
        """Whether stock transformers loads what the run makes; None where the data decide."""
        if self.plan.free:
            return False
        answers = {not is_per_layer(config.get_text_config()) for config in self.configs}
        return answers.pop() if len(answers) == 1 else None

    @cached_property
    def training(self) -> tuple[int, int]:
        """Parameters that the recovery trains; bytes that it adds to the student's weights.

        Added are fp32 values, adapters, gradients, and the state of the optimizer; with trainer=fsdp a process has its
        share of them. The recovery's own set-up counts.
        """
        config = self.settings.recover
        student = meta_model(self.configs[0]).to(self.dtype)
        before = weight_bytes(student)
        prepare(student, replace(config, gradient_checkpointing=False))
        count = sum(parameter.numel() for parameter in trainable(student))
        shares = self.processes if self.sharded else 1
        buckets = 4 if self.processes > shares else 0  # in which gradients are summed over processes
        added = weight_bytes(student) - before + count * (4 + OPTIMISER[config.optimizer] + buckets)
        return count, -(-added // shares)


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of a model's parameters, in a type or as they are; tied weights once."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


def expected(plan: Forecast) -> Expected:
    """What the stages of a run have to know of it."""
    recover = plan.settings.recover
    # A killed training goes on from trained parameters in fp32, and the state of the optimizer.
    resume = 0 if recover.name == "none" else plan.training[0] * (4 + OPTIMISER[recover.optimizer])
    return Expected(weight_bytes(plan.pruned, plan.storage), resume, plan.plan.options)


def forecast(settings: RunConfig) -> Forecast:
    """Build the models of a run on the meta device.

    Args:
        settings: The checked configuration.

    Raises:
        UserError: The checkpoint has no readable configuration, no plan meets the ratio, or records may be longer than
            the context.
    """
    config = stock_config(settings.model, complete=not settings.dry_run)
    base = meta_model(config)
    if (longest := settings.data.max_length or 0) > (context := context_of(base)):
        raise UserError(
            f"data.max_length={longest}: the model's context holds {context} tokens; lower it, or leave it out"
        )
    device = "cuda" if processes.on_gpu(settings.trainer, planned=settings.dry_run) else "cpu"
    storage = getattr(config, "dtype", None) or torch.float32
    return Forecast(
        settings,
        base.to(compute_dtype(settings.model.dtype, storage, device)),
        plan_outline(base, settings),
        storage,
        device,
        max(1, processes.wanted(settings.trainer, planned=settings.dry_run)),
    )


def meta_model(config: Any) -> nn.Module:
    """The model of a configuration on the meta device: every shape, no memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def plan_outline(model: nn.Module, settings: RunConfig) -> Outline:
    """Sizes of the plan that a run will make, searched ones included.

    Args:
        model: The model, also on the meta device.
        settings: ``prune`` and ``search``.

    Raises:
        UserError: Names the feasible range.
    """
    prune, search = settings.prune, settings.search
    if prune.method != "auto":
        return outline(model, prune)
    whole = outline(model, replace(prune, method="none"))
    if search.granularity != "structured":
        return whole
    target, asked = asked_share(prune, search)
    selection = "shape" if search.uniform else "global"
    plain = replace(prune, method="widthwise", selection=selection, share=None, protect=[], protect_scaled=False)
    if not search.uniform:
        largest = _largest_policy(model, prune.round_to) / whole.total
        if search.budget.resource != "params":
            # What has to go for a saving of FLOPs or of time is found by measuring.
            return replace(whole, removed=(0, int(largest * whole.total)), largest=largest, free=True)
        if target <= largest:
            return replace(outline(model, replace(plain, ratio=target)), largest=largest)
        raise UserError(f"{asked}: a searched policy removes at most {largest:.3f} here; lower it")
    return outline(model, replace(plain, ratio=target))


def _largest_policy(model: nn.Module, round_to: int) -> int:
    """Parameters that go at the last level of every component."""
    recipe = Structured(round_to=round_to)
    components = [component for layer in layers_of(model) for component in layer.components]
    return sum((c.units - recipe.counts(c)[-1]) * c.unit_price() for c in components)


def shape_of(model: nn.Module) -> list[list[int]]:
    """Query heads, KV groups and MLP channels of every decoder layer."""
    return [
        [layer.attention.units * layer.heads_per_group, layer.attention.units, layer.mlp.units]
        for layer in layers_of(model)
    ]


def context_of(model: nn.Module) -> int:
    """Tokens that fit into a decoder's context."""
    return int(getattr(decoder_of(model).config, "max_position_embeddings", 2048))
