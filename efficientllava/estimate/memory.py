"""Memory that a run needs, by arithmetic on shapes: what is certain, and a worst case under stated assumptions.

``dry_run`` shows the worst case. A real run refuses what is certain not to fit before it loads anything, and pruning
that may not fit once the lengths of its records are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint.folder import compute_dtype
from ..deploy.export import compared
from ..models.anatomy import (
    Layer,
    decoder_of,
    layers_of,
    projector_of,
)
from ..pruning.memory import (
    CalibrationSize,
    micro_batch,
    pruning_memory,
    store_on_host,
    vision_bytes,
)
from ..pruning.self_text import sequences, writing_bytes
from ..runtime import UserError
from ..runtime.limits import free_memory
from . import Forecast, context_of, weight_bytes

ASSUMPTIONS = (
    "assumed: records of {tokens} tokens with {images}",
    "all intermediate results of a layer are alive at once; in training without recover.gradient_checkpointing those "
    "of all layers",
    "what the libraries themselves take, fragmentation, and weights that stay mapped from their files, are not counted",
)
LONGEST = 2048  # tokens of a record where neither data.max_length nor a shorter context says so


class StageMemory(NamedTuple):
    """What each process holds on its device at the peak of a stage.

    Args:
        parts: Bytes by what they are.
        certain: Those of the parts that no run can do without.
        fix: What makes them smaller.
        host: Bytes in host memory beside a GPU, where weights or hidden states are kept there.
    """

    parts: Mapping[str, int]
    certain: tuple[str, ...]
    fix: str
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes in the worst case."""
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """Bytes that are certain."""
        return sum(self.parts[name] for name in self.certain)


class _Record(NamedTuple):
    """Assumed size of a record."""

    tokens: int
    images: int


def stage_memory(plan: Forecast, tokens: int | None = None, written: int | None = None) -> dict[str, StageMemory]:
    """Memory of every stage of a run, in their order.

    Args:
        plan: What the run makes.
        tokens: Tokens of the longest record; None: as many as are allowed.
        written: Sequences that the dense model writes for the statistics; None: as many as it may be.

    Raises:
        UserError: The recovery cannot be set up.
    """
    settings, record = plan.settings, _record(plan, tokens)
    read = 0 if _stays_mapped(plan, settings.model.dtype) else 1
    base, pruned = read * weight_bytes(plan.base), read * weight_bytes(plan.pruned)
    stages, held = {}, {"base": base}
    if settings.evaluate.tasks:
        parts = {"base": base, **_answering(plan, plan.base, record, settings.evaluate.batch_size)}
        stages["evaluate"] = StageMemory(parts, ("base",), "set model.dtype=bfloat16, or evaluate=none")
    if settings.prune.method != "none":
        stages["prune"] = _pruning(plan, record, written, measured=tokens is not None)
        held["pruned"] = pruned
    if settings.recover.name != "none":
        stages |= _recovering(plan, record)
        held["recovered"] = pruned
    if settings.evaluate.efficiency:
        # With offload one model at a time is on the device.
        held = {"base": base} if settings.prune.offload else held
        parts = {**held, **_answering(plan, plan.base, record, max([1, *settings.evaluate.speed_batches]))}
        stages["measure speed"] = StageMemory(parts, tuple(held), "set evaluate.efficiency=false")
    if settings.deploy.name != "none":
        stages["deploy"] = _deploying(plan)
    return stages


def _record(plan: Forecast, tokens: int | None = None) -> _Record:
    config: Any = plan.base.config
    tokens = tokens or plan.settings.data.max_length or min(LONGEST, context_of(plan.base))
    # Models that cut an image into tiles may fill a record with them.
    images = max(1, tokens // config.image_seq_length) if config.model_type == "internvl" else 1
    return _Record(tokens, images)


def describe(plan: Forecast) -> list[str]:
    """What the worst case assumes."""
    record = _record(plan)
    images = "an image" if record.images == 1 else f"{record.images} images or tiles"
    return [line.format(tokens=record.tokens, images=images) for line in ASSUMPTIONS]


# ---- stages ---------------------------------------------------------------------------------------------------------


def _answering(plan: Forecast, model: nn.Module, record: _Record, rows: int) -> dict[str, int]:
    """Generation: key-value cache of all layers, and one layer's results."""
    config, size = plan.settings.evaluate, plan.dtype.itemsize
    layers = layers_of(model)
    width = sum(2 * layer.attention.units * layer.head_dim for layer in layers)
    cache = rows * (record.tokens + max(config.max_new_tokens or 0, config.new_tokens)) * width * size
    return {"key-value cache": cache, "activations": _forward(plan, layers, rows, record)}


def _pruning(plan: Forecast, record: _Record, written: int | None, measured: bool) -> StageMemory:
    """See `efficientllava.pruning.memory`; a search counts as scoring and refit, its table is on disk.

    Unless the records are measured, the weights alone are certain, which fewer or shorter records leave as they are.
    """
    config, calibration = plan.settings.prune, plan.settings.calibration
    config = replace(config, method="widthwise") if config.method == "auto" else config
    samples = -(-calibration.samples // plan.processes)
    rows = micro_batch(config, calibration.batch_size)
    if written is None:
        positions = calibration.samples * record.tokens
        known = (positions, plan.base, context_of(plan.base))
        written = sequences(calibration, plan.settings.prune, *known, images=False)
    written = -(-written // plan.processes)
    size = CalibrationSize(samples, record.tokens, rows, record.images).joined(written * calibration.generate_length)
    stored = config.offload is True or (plan.device == "cuda" and store_on_host(plan.base, config, size))
    memory = pruning_memory(plan.base, config, size, stored)
    weights = 0 if config.offload else weight_bytes(plan.base)
    writing = writing_bytes(plan.base, written, calibration.generate_length, plan.device) if written else 0
    mapped = _stays_mapped(plan, plan.settings.model.dtype)
    layers = sum(weight_bytes(layer.module) for layer in layers_of(plan.base))
    # All but the layers waits in a file once it is loaded.
    aside = weights - layers if plan.device == "cpu" and weights and not mapped else 0
    parts = {"base": weights, "working set": max(memory.peak - weights - aside, writing - aside, 0)}
    if weights and mapped:
        cut = layers_of(plan.pruned) if config.refit or config.method != "layerwise" else []
        parts |= {"base": 0, "pruned": sum(weight_bytes(layer.module) for layer in cut)}
    whole = not config.offload and plan.settings.prune.method != "auto"
    ways = {
        "prune.offload=disk": whole and plan.device == "cpu",
        "prune.offload=true": whole and plan.device == "cuda",
        "model.dtype=bfloat16": plan.dtype.itemsize > 2,
    }
    smaller = "lower calibration.samples, calibration.batch_size or data.max_length"
    larger = _set(ways)
    fix = (f"{larger}, or {smaller}" if larger else smaller) if measured else larger or "choose another device"
    return StageMemory(parts, tuple(name for name in parts if name != "working set"), fix, memory.host)


def _stays_mapped(plan: Forecast, dtype: str) -> bool:
    """Whether weights are what the files have: the system drops them when it wants to, and reads them again."""
    return plan.device == "cpu" and compute_dtype(dtype, plan.storage, plan.device) == plan.storage


def _recovering(plan: Forecast, record: _Record) -> dict[str, StageMemory]:
    """Student, what training adds to it, teacher, and the activations of a micro-batch."""
    student = weight_bytes(plan.pruned)  # counts also where it was mapped: adapters are merged into it
    config, size, layers = plan.settings.recover, plan.dtype.itemsize, layers_of(plan.pruned)
    rows, stages = plan.settings.data.batch_size, {}
    parts = {"student": student, "training state": plan.training[1]}
    # A student that is shared out is whole only before it trains.
    certain = ["student"] if plan.sharded else ["student", "training state"]
    if config.taught:
        if config.teacher.source == "cached":
            # The student's layers make room for it.
            rest = student - sum(weight_bytes(layer.module) for layer in layers)
            loaded = _teacher_bytes(plan, whole=True)
            asking = {"student": rest, "teacher": loaded, "activations": _forward(plan, layers, rows, record)}
            host = student - rest if plan.device == "cuda" else 0
            # Answers that are there are not asked for again.
            stages["teacher targets"] = StageMemory(asking, ("student",), "set recover.teacher.dtype=bfloat16", host)
        else:
            parts["teacher"] = _teacher_bytes(plan)
            certain.append("teacher")
    tokens, vocabulary = rows * record.tokens, decoder_of(plan.pruned).config.vocab_size
    inner = [_layer_bytes(layer, _hidden(plan.pruned), size, config) for layer in layers]
    boundaries = len(layers) * _hidden(plan.pruned) * size
    alive = boundaries + max(inner) if config.gradient_checkpointing else sum(inner)
    parts["activations"] = tokens * alive + vision_bytes(plan.base, rows * record.images, size)
    if config.looks("logits"):
        # Logits in the type that computes and in fp32, their logarithms and gradients; of both models in distillation.
        parts["logits"] = min(config.chunk, tokens) * vocabulary * (36 if config.looks("logits", "teacher") else 16)
    return {**stages, "recover": StageMemory(parts, tuple(certain), _less(plan, "teacher" in parts))}


def _deploying(plan: Forecast) -> StageMemory:
    """What is exported and, while speeds are measured, the dense model, both in fp32 on the host of one process."""
    wide = 0 if plan.storage == torch.float32 else 1  # the files' own type stays mapped
    parts = {"exported": wide * weight_bytes(plan.pruned, torch.float32)}
    if compared(plan.settings):
        parts["dense"] = wide * weight_bytes(plan.base, torch.float32)
    fix = "set deploy=none, and export the run's folder on a larger machine with python -m efficientllava.deploy"
    if plan.device == "cuda":
        return StageMemory({}, (), fix, sum(parts.values()))
    return StageMemory(parts, tuple(parts), fix)


def _less(plan: Forecast, live: bool) -> str:
    """What makes a recovery smaller that is not so already."""
    config = plan.settings.recover
    wide = compute_dtype(config.teacher.dtype, plan.storage, plan.device).itemsize > 2
    ways = {
        "recover.train=lora": config.train == "full",
        "recover.train=projector": config.train != "projector",
        "recover.teacher.source=cached": live,
        "recover.teacher.offload=true": live and plan.device == "cuda" and not config.teacher.offload,
        "recover.teacher.dtype=bfloat16": live and wide,
        "model.dtype=bfloat16": plan.dtype.itemsize > 2,
    }
    return _set(ways) or "choose another device"


def _set(ways: Mapping[str, bool]) -> str:
    """The options that help, in a phrase; empty where none does."""
    useful = [way for way, helps in ways.items() if helps]
    return f"set {' or '.join(useful)}" if useful else ""


def _teacher_bytes(plan: Forecast, whole: bool = False) -> int:
    """Weights of the teacher; a vision tower of the student's type is the student's once all of it is loaded."""
    config = plan.settings.recover.teacher
    if _stays_mapped(plan, config.dtype):
        return 0
    dtype = compute_dtype(config.dtype, plan.storage, plan.device)
    decoder, weights = decoder_of(plan.base), weight_bytes(plan.base, dtype)
    if dtype == plan.dtype and not whole:
        others = (decoder, projector_of(plan.base), plan.base.lm_head)
        weights = weight_bytes(nn.ModuleList(others), dtype)  # pyright: ignore[reportArgumentType]
    if not config.offload:
        return weights
    layers = [weight_bytes(layer, dtype) for layer in decoder.layers]
    return weights - sum(layers) + max(layers)


# ---- activations ----------------------------------------------------------------------------------------------------


def _hidden(model: nn.Module) -> int:
    return int(decoder_of(model).config.hidden_size)


def _layer_bytes(layer: Layer, hidden: int, size: int, recover: Any = None) -> int:
    """Bytes per token of all intermediate results of a layer: norms in fp32, rotated heads, both sides of the gate."""
    queries = layer.attention.units * layer.attention.width
    keys = layer.attention.units * layer.head_dim
    plain = 16 * hidden + size * (4 * hidden + 5 * (queries + keys) + 4 * layer.mlp.units)
    if recover is None or recover.train != "lora":
        return plain
    # Every adapter reads its input in fp32, and keeps it once more with its mask where there is dropout.
    read = 5 * hidden + queries + layer.mlp.units
    return plain + read * (4 + (5 if recover.lora.dropout else 0))


def _forward(plan: Forecast, layers: list[Layer], rows: int, record: _Record) -> int:
    """A pass without gradients: one layer's results, or those of the tower before it."""
    hidden, size = _hidden(plan.base), plan.dtype.itemsize
    language = max(_layer_bytes(layer, hidden, size) for layer in layers) * rows * record.tokens
    return max(language, vision_bytes(plan.base, rows * record.images, size))


# ---- the machine ----------------------------------------------------------------------------------------------------


def available(device: str) -> int:
    """Free memory in bytes: of a GPU such as ``cuda:0``, or of the host."""
    return free_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0]


def require_memory(plan: Forecast, device: str, tokens: int | None = None, written: int | None = None) -> None:
    """Refuse a run that does not fit.

    Args:
        plan: What the run makes.
        device: Where it runs, ``cpu`` or a GPU such as ``cuda:0``.
        tokens: Tokens of the longest calibration record, where they are known and the base is loaded: then all that
            pruning may hold counts. None: what is certain, in every stage; activations, which depend on the data, are
            given the benefit of the doubt.
        written: See `stage_memory`.

    Raises:
        UserError: Names the stage, what it needs and what there is.
    """
    stages, found = stage_memory(plan, tokens, written), available(device)
    shares = plan.processes if device == "cpu" else 1
    if tokens is not None:
        prune = stages["prune"]
        stages = {"prune": prune._replace(certain=tuple(prune.parts))}
        found += shares * prune.parts["base"]
        if device != "cpu":
            _require(prune.host * plan.processes, available("cpu"), "prune keeps up to", "", "the host", prune.fix)
    elif device != "cpu" and (deploy := stages.get("deploy")):
        _require(deploy.host, available("cpu"), "deploy holds at least", "", "the host", deploy.fix)
    for name, stage in stages.items():
        verb = "holds at least" if tokens is None else "holds up to"
        parts = " + ".join(f"{part} {stage.parts[part] / 1e9:.1f}" for part in stage.certain)
        where = "this machine" if device == "cpu" else "the GPU"
        together = 1 if name == "deploy" else shares  # one process deploys
        _require(stage.least * together, found, f"{name} {verb}", f" ({parts})", where, stage.fix)


def _require(needed: int, found: int, what: str, parts: str, where: str, fix: str) -> None:
    if needed > found:
        raise UserError(
            f"memory: {what} {needed / 1e9:.1f} GB{parts}, {where} has {found / 1e9:.1f} GB left for it; {fix}; "
            "dry_run=true shows all stages"
        )
