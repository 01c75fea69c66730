"""What every level of every gene saves: parameters, weights, FLOPs, or seconds measured on the machine at hand."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, language_parameters, layers_of
from ..models.forward import (
    IMAGE_INPUTS,
    Batch,
    going_on,
    stock_inputs,
    to_device,
)
from ..pruning.stream import CalibrationStream
from ..runtime import processes
from ..runtime.files import whole_file
from ..settings.schema import PruneConfig, SearchConfig
from .change import assembled
from .levels import LevelTable
from .space import Budget, Policy

Costs = tuple[tuple[float, ...], ...]
# Seconds of some layers for a prompt and an answer of so many tokens, in contexts in which the model is another one.
Clock = Callable[[Any, Sequence[int], tuple[int, int], Iterable[AbstractContextManager[Any]]], list[float]]
NEW_TOKENS = 32
PROBED = 8  # layers that another runtime is given at a time
REPEATS = 7  # times that every level is timed, about; the median counts
WARM_UP = 2  # rounds that are run and not counted


def budget_of(
    model: nn.Module,
    table: LevelTable,
    stream: CalibrationStream,
    prune: PruneConfig,
    search: SearchConfig,
    path: Path | None = None,
    clock: Clock | None = None,
) -> Budget:
    """The budget that a configuration asks for; the same on all processes.

    Args:
        model: The dense model in eval mode.
        table: Its level table.
        stream: The samples; their lengths decide FLOPs, the first prompt is what latency is measured on.
        prune: ``ratio``, the target where the search names none.
        search: ``granularity`` and ``budget``.
        path: File that keeps measured latencies, so that a resumed search counts with the same; None keeps none.
        clock: Of the runtime whose latency counts; None: of this process.
    """
    resource = search.budget.resource if search.granularity == "structured" else "weights"
    share, asked = asked_share(prune, search)
    if resource == "params":
        costs = removed_costs(table, language_parameters(model))
    elif resource == "weights":
        genes = range(len(table.genes))
        costs = removed_costs(table, sum(linear.weights for gene in genes for linear in table.norms(gene, 0)))
    elif resource == "flops":
        records = [batch for i, batch in enumerate(stream.batches) if i not in stream.calibration.written]
        costs = flops_costs(model, table, mean_length(records))
    else:
        prompt = first_prompt(model, stream.batches)
        costs = processes.from_first(None if processes.rank() else latency_costs(model, table, prompt, path, clock))
    return Budget(resource, share, costs, asked)


def asked_share(prune: PruneConfig, search: SearchConfig) -> tuple[float, str]:
    """Share of the resource that a policy has to remove, and the words for it in messages.

    Args:
        prune: ``ratio``, the share where the search names no target.
        search: ``budget``; a target from 1 on is a speed-up.
    """
    target = search.budget.target
    if target is None:
        return prune.ratio or 0.0, f"prune.ratio={prune.ratio:g}"
    asked = f"search.budget.target={target:g}"
    return (target, asked) if target < 1 else (1 - 1 / target, f"{asked} (a share of {1 - 1 / target:.3f})")


def removed_costs(table: LevelTable, whole: int) -> Costs:
    """Costs in parameters or weights, as shares of ``whole``."""
    return _shares(table, lambda gene, level: table.removed(gene, level), whole)


def _shares(table: LevelTable, removed: Callable[[int, int], float], whole: float) -> Costs:
    return tuple(tuple(removed(i, n) / whole for n in range(gene.levels)) for i, gene in enumerate(table.genes))


def mean_length(batches: Sequence[Batch]) -> float:
    """Mean number of tokens of a prompt with its answer; packed questions count one by one, with their image."""
    lengths: list[int] = []
    for batch in batches:
        segments = batch.get("segment_ids")
        segments = torch.zeros_like(batch["input_ids"]) if segments is None else segments
        for row, real in zip(segments, batch["attention_mask"].bool(), strict=True):
            found, counts = row[real].unique(return_counts=True)
            sizes = dict(zip(found.tolist(), counts.tolist(), strict=True))
            shared = sizes.pop(0, 0)
            lengths += [size + shared * (segment > 0) for segment, size in sizes.items()] or [shared]
    return statistics.fmean(lengths)


def flops_costs(model: nn.Module, table: LevelTable, tokens: float) -> Costs:
    """Costs in floating-point operations of the language model's prefill, head on the last position included.

    A multiplication and an addition are two; attention counts at its full square, norms and activations not at all, as
    in ``results.json``.

    Args:
        model: The dense model.
        table: A structured level table of it.
        tokens: Length of the prompt, > 0.

    Returns:
        ``costs[gene][level]``: share of the whole that goes.
    """
    layers = layers_of(model)
    components = [layer.components[gene.kind == "mlp"] for gene in table.genes for layer in [layers[gene.layer]]]
    # Per query head, scores and their product with the values take two operations per channel and pair of tokens each.
    pairs = [4 * tokens**2 * layer.head_dim * layer.heads_per_group for layer in layers]

    def per_unit(component: Component, layer: int) -> float:
        rows = sum(reader.width * reader.linear.in_features for reader in component.readers)
        weights = rows + component.width * component.writer.out_features
        return 2 * tokens * weights + (pairs[layer] if component.kind == "attention" else 0.0)

    head: Any = model.lm_head
    whole = 2 * head.weight.numel()
    whole += sum(per_unit(c, i) * c.units for i, layer in enumerate(layers) for c in layer.components)

    def removed(gene: int, level: int) -> float:
        units = table.removed(gene, level) / components[gene].unit_price()
        return units * per_unit(components[gene], table.genes[gene].layer)

    return _shares(table, removed, whole)


def latency_costs(
    model: nn.Module,
    table: LevelTable,
    prompt: dict[str, Tensor],
    path: Path | None = None,
    clock: Clock | None = None,
) -> Costs:
    """Costs in measured seconds, see `measure` and `measure_elsewhere`; no level is slower than a wider one.

    Args:
        model: The dense model in eval mode.
        table: A structured level table of it.
        prompt: Output of `first_prompt`.
        path: File that keeps the times; they are taken from there if it exists.
        clock: See `budget_of`.

    Returns:
        ``costs[gene][level]``: share of the dense model's time that goes.
    """
    from sklearn.isotonic import isotonic_regression  # takes a second

    if path is None or not path.exists():
        tokens = (prompt["input_ids"].shape[1], NEW_TOKENS)
        found = measure_elsewhere(model, table, tokens, clock) if clock else measure(model, table, prompt)
        whole, times = found
        if path is not None:
            with whole_file(path) as file:
                file.write_text(json.dumps([whole, times]), encoding="utf-8")
    else:
        whole, times = json.loads(path.read_text(encoding="utf-8"))
    smooth = [isotonic_regression(values, increasing=False).tolist() for values in times]
    return tuple(tuple((values[0] - value) / whole for value in values) for values in smooth)


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


def _alike(model: nn.Module, table: LevelTable) -> list[list[int]]:
    """Genes by the sizes of their levels."""
    layers, groups = layers_of(model), {}
    for index, gene in enumerate(table.genes):
        component = layers[gene.layer].components[gene.kind == "mlp"]
        removed = tuple(table.removed(index, level) for level in range(gene.levels))
        groups.setdefault((gene.kind, component.units, component.unit_price(), removed), []).append(index)
    return list(groups.values())


def _rounds(model: nn.Module, table: LevelTable) -> Iterator[tuple[bool, Policy]]:
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
def measure(model: nn.Module, table: LevelTable, prompt: dict[str, Tensor]) -> tuple[float, list[list[float]]]:
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


def measure_elsewhere(
    model: nn.Module, table: LevelTable, tokens: tuple[int, int], clock: Clock
) -> tuple[float, list[list[float]]]:
    """Time a prompt and an answer where the model will run.

    Of genes of equal sizes `PROBED` layers are timed at a time, every second one of which has the level in question.

    Args:
        model: The dense model in eval mode.
        table: A level table of it.
        tokens: Of the prompt, and of the answer.
        clock: Of the runtime.

    Returns:
        As `measure`.
    """
    times: list[list[float]] = [[]] * len(table.genes)
    for group in _alike(model, table):
        layers = [table.genes[gene].layer for gene in group[:PROBED]]
        changed = {*group[:PROBED:2]}
        levels = range(table.genes[group[0]].levels)
        policies = [tuple(level * (gene in changed) for gene in range(len(table.genes))) for level in levels]
        found = clock(model, layers, tokens, (assembled(model, table, policy) for policy in policies))
        for gene in group:
            times[gene] = [seconds / len(changed) for seconds in found]
    (whole,) = clock(model, range(len(layers_of(model))), tokens, [nullcontext()])
    return whole, times


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
def _timed(table: LevelTable, policy: Policy, device: torch.device) -> Iterator[list[list[Any]]]:
    """Note when the components of a policy start and end; yields these marks by gene."""
    marks: list[list[Any]] = [[] for _ in policy]
    with ExitStack() as hooks:
        for gene, level in enumerate(policy):

            def note(*_: Any, to: list[Any] = marks[gene]) -> None:
                to.append(_mark(device))

            module = table.module(gene, level)
            hooks.enter_context(module.register_forward_pre_hook(note))
            hooks.enter_context(module.register_forward_hook(note))
        yield marks
