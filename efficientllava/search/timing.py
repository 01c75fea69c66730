"""How long every component takes at every level, inside whole forward passes on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import layers_of
from ..models.forward import (
    IMAGE_INPUTS,
    Batch,
    going_on,
    stock_inputs,
    to_device,
)
from .projector import assembled
from .space import Gene, Policy

NEW_TOKENS = 32
REPEATS = 7  # times that every level is timed, about; the median counts
WARM_UP = 2  # rounds that are run and not counted


class Modules(Protocol):
    """What a measurement needs of a level table."""

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Attention and MLP of every layer, in order."""
        ...

    def removed(self, gene: int, level: int) -> int:
        """Parameters that a level cuts off."""
        ...

    def module(self, gene: int, level: int) -> nn.Module:
        """The attention or MLP at a level."""
        ...


def first_prompt(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The first prompt that shows an image, or the first one: ``input_ids`` ``(1, T)``, ``pixel_values`` if it does."""
    image_token: int = model.config.image_token_id  # pyright: ignore
    seen = [
        (b, row) for b in batches for row in range(len(b["input_ids"])) if (b["input_ids"][row] == image_token).any()
    ]
    batch, row = seen[0] if seen else (batches[0], 0)
    real = batch["attention_mask"][row].bool()
    if batch.get("segment_ids") is not None:
        segments = batch["segment_ids"][row]
        real &= (segments == 0) | (segments == segments[real & (segments != 0)][:1])
    prompt = {"input_ids": batch["input_ids"][row][real].unsqueeze(0)}
    if seen:
        images = {key: batch[key][:1] for key in IMAGE_INPUTS if batch.get(key) is not None}
        prompt |= {**images, "pixel_values": batch["pixel_values"][: batch["image_tiles"][0]]}
    return to_device(stock_inputs(model, prompt), prompt["input_ids"].device, next(model.parameters()).dtype)


def _alike(model: nn.Module, table: Modules) -> list[list[int]]:
    """Genes by the sizes of their levels."""
    layers, groups = layers_of(model), {}
    for index, gene in enumerate(table.genes):
        component = layers[gene.layer].components[gene.kind == "mlp"]
        removed = tuple(table.removed(index, level) for level in range(gene.levels))
        groups.setdefault((gene.kind, component.units, component.unit_parameters, removed), []).append(index)
    return list(groups.values())


def _rounds(model: nn.Module, table: Modules) -> Iterator[tuple[bool, Policy]]:
    """Policies in which the levels of every group of like genes take turns; the first ones do not count."""
    groups = _alike(model, table)
    depth = [table.genes[group[0]].levels for group in groups]
    longest = max(-(-REPEATS * levels // len(group)) for group, levels in zip(groups, depth, strict=True))
    for turn in range(WARM_UP + longest):
        policy = [0] * len(table.genes)
        for group, levels in zip(groups, depth, strict=True):
            for place, gene in enumerate(group):
                # The shift by one per cycle lets every gene see every level where their numbers have a common factor.
                step = turn * len(group) + place
                policy[gene] = (step + step // max(levels, len(group))) % levels
        yield turn >= WARM_UP, tuple(policy)


@torch.no_grad()  # no inference mode: the table keeps modules, which the projector is later trained through
def measure(model: nn.Module, table: Modules, prompt: dict[str, Tensor]) -> tuple[float, list[list[float]]]:
    """Time a prompt from its pixels to the 32nd token, batch 1, and the share of every gene at every level in it.

    All genes are timed in the same forward passes, at levels that take turns, so that every level runs where caches and
    clocks are as they will be and drift hits all alike. Genes of equal sizes share their measurements.

    Args:
        model: The dense model in eval mode.
        table: A level table of it.
        prompt: Output of `first_prompt`.

    Returns:
        Median seconds of the dense model, and of every gene by level.
    """
    whole: list[float] = []
    samples: dict[tuple[int, int], list[float]] = {}
    groups = {gene: number for number, group in enumerate(_alike(model, table)) for gene in group}
    for counts, policy in _rounds(model, table):
        dense = _decode(model, prompt)
        with assembled(model, table, policy), _timed(table, policy, prompt["input_ids"].device) as marks:
            _decode(model, prompt)
        if counts:
            whole.append(dense)
            for gene, level in enumerate(policy):
                spent = sum(_seconds(*pair) for pair in zip(marks[gene][::2], marks[gene][1::2], strict=True))
                samples.setdefault((groups[gene], level), []).append(spent)
    times = [
        [statistics.median(samples[groups[index], level]) for level in range(gene.levels)]
        for index, gene in enumerate(table.genes)
    ]
    return statistics.median(whole), times


def _decode(model: Any, prompt: dict[str, Tensor]) -> float:
    """Greedy decoding without early stop; seconds."""
    device = prompt["input_ids"].device
    start = _mark(device)
    output = model(**prompt, use_cache=True, logits_to_keep=1)
    for _ in range(NEW_TOKENS - 1):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, **going_on(output), use_cache=True)
    return _seconds(start, _mark(device))


def _mark(device: torch.device) -> Any:
    """A point in time of the device: on accelerators an event, so that timing a part does not stall the rest."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def _timed(table: Modules, policy: Policy, device: torch.device) -> Iterator[list[list[Any]]]:
    """Note when the components of a policy start and end; yields these marks by gene."""
    marks: list[list[Any]] = [[] for _ in policy]
    handles = []
    for gene, level in enumerate(policy):

        def note(*_: Any, to: list[Any] = marks[gene]) -> None:
            to.append(_mark(device))

        module = table.module(gene, level)
        handles += [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()
