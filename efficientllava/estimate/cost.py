"""What a run or a sweep computes and leaves: floating-point operations, device hours and disk, from shapes alone.

Counted are the multiplications and additions (two operations) of weights: of the language model per token, of the
vision tower per image, and of the second moments that greedy scores and the refit collect. Stages that several jobs
share are counted once. Not counted: attention over the context, loading, saving and latency measurements, judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer

from ..data.splits import COMPARED, record_count
from ..evaluation.tasks import load
from ..models.anatomy import (
    Layer,
    decoder_of,
    language_parameters,
    layers_of,
)
from ..pruning.importance import GRADIENTS, INPUTS, WEIGHTS, importance_of
from ..pruning.memory import patches_of
from ..pruning.outline import prune_space
from ..pruning.pruner import search_length
from ..pruning.self_text import sequences
from ..pruning.solution import TRIED
from ..pruning.two_stage import SAMPLE, stages
from ..record import STAGES
from ..recovery.recover import accumulation, optimiser_steps
from ..runtime import digest
from ..runtime.keeping import chosen
from ..search.knapsack import evaluations
from ..stages import asked, checkpoint, inputs_of, places
from . import Forecast, context_of, weight_bytes
from .memory import LONGEST

TEXT = 256  # tokens of a record beside those of its image
ANSWER = 8  # generated tokens of an answer
# Dense peak of half-precision matrix products, FLOP/s, as in the vendor's data sheets; the first is assumed elsewhere.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12}
PEAKS |= {"L40S": 362e12, "A10": 125e12, "RTX 4090": 165e12, "RTX A6000": 155e12, "V100": 125e12, "T4": 65e12}
REACHED = 0.4  # share of the peak
SIDE = 512  # of the matrix by which a core is measured
SINGLE = 1 / 16  # peak of float32 on a GPU in these terms
# Published sizes of training files.
RECORDS = {"llava_665k": 665_298, "bunny_695k": 695_000, "internvl_sft": 1_110_107}


class Work(NamedTuple):
    """What one stage does.

    Args:
        stage: Its name.
        key: Digest of what it depends on; equal for jobs that share it.
        flops: Floating-point operations; None where the size of the data is unknown.
        bytes: Size of the checkpoint that it makes.
    """

    stage: str
    key: str
    flops: float | None
    bytes: int = 0


class Device(NamedTuple):
    """What computes.

    Args:
        name: Its name, or what is assumed.
        unit: Of hours, ``GPU`` or ``CPU``.
        rate: Operations per second that a run reaches on one of them.
    """

    name: str
    unit: str
    rate: float

    def hours(self, flops: float) -> float:
        """Device hours of an amount of work."""
        return flops / self.rate / 3600


def device_of(kind: str, dtype: torch.dtype) -> Device:
    """The device of a plan.

    Args:
        kind: ``cuda`` or ``cpu``; a GPU that is not here counts as the first of `PEAKS`.
        dtype: Type that models compute in.
    """
    if kind == "cpu":
        return Device("one core, as measured here", "CPU", REACHED * _core_rate(dtype))
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    name = max((name for name in PEAKS if name in found), key=len, default=next(iter(PEAKS)))
    peak = PEAKS[name] * (SINGLE if dtype == torch.float32 else 1)
    return Device(f"{name}, {peak / 1e12:.0f} TFLOP/s", "GPU", REACHED * peak)


def _core_rate(dtype: torch.dtype) -> float:
    """Operations per second of a matrix product on one core."""
    timer = Timer("one @ one", globals={"one": torch.ones(SIDE, SIDE, dtype=dtype)}, num_threads=1)
    return 2 * SIDE**3 / min(timer.timeit(1).median for _ in range(8))


def works(plan: Forecast) -> list[Work]:
    """The stages of a run, in their order.

    Args:
        plan: What the run makes.
    """
    settings, made = plan.settings, []

    def key_of(stage: str, model: Any, **content: Any) -> str:
        where = {"device": plan.device, "processes": plan.processes}
        return digest(inputs_of(stage, settings, model=model, **where, **content))

    def evaluate(stage: str, model: nn.Module) -> None:
        if settings.evaluate.tasks:
            work = key_of("evaluate", key, task=asked(settings))
            made.append(Work(f"evaluate {stage}", work, _answering(plan, model)))

    base = key = digest(checkpoint(settings))
    evaluate(STAGES[0], plan.base)
    if settings.prune.method != "none":
        key = key_of("prune", key, **places(settings, "prune"))
        made.append(Work("prune", key, _pruning(plan), weight_bytes(plan.pruned, plan.storage)))
        evaluate(STAGES[1], plan.pruned)
    if settings.recover.name != "none":
        trained = _records(plan)
        if settings.recover.taught and settings.recover.teacher.source == "cached":
            # Recoveries share the answers about records that both draw.
            drawn = [settings.data_frac, settings.seed, settings.data.images]
            asked_once = digest([key_of("targets", base, **places(settings, "targets")), drawn])
            flops = None if trained is None else trained[0] * _forward(plan, plan.base)
            made.append(Work("teacher targets", asked_once, flops))
        key = key_of("recover", key, **places(settings, "recover"))
        flops = None if trained is None else trained[1] * _training(plan)
        made.append(Work("recover", key, flops, weight_bytes(plan.pruned, plan.storage)))
        evaluate(STAGES[2], plan.pruned)
    return made


def tokens_of(plan: Forecast) -> int:
    """Assumed tokens of a record: its image, and `TEXT`."""
    image = int(getattr(plan.base.config, "image_seq_length", 0) or 0)
    return min(image + TEXT, plan.settings.data.max_length or LONGEST, context_of(plan.base))


def _image(model: nn.Module) -> float:
    """Operations of the vision tower on an image; its projector, which works on few tokens, is taken with it."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    return 2.0 * (whole - language_parameters(model)) * patches_of(model)


def _token(model: nn.Module) -> float:
    """Operations of the language model on a token, head included; embeddings are looked up."""
    embedding: Any = decoder_of(model).embed_tokens.weight
    head: Any = model.lm_head
    looked_up = 0 if embedding is head.weight else embedding.numel()
    return 2.0 * (language_parameters(model) - looked_up)


def _forward(plan: Forecast, model: nn.Module) -> float:
    """Operations on a record."""
    return _image(plan.base) + tokens_of(plan) * _token(model)


def _answering(plan: Forecast, model: nn.Module) -> float | None:
    config = plan.settings.evaluate
    counts = [load(name, plan.settings.data, config).questions for name in config.tasks]
    if None in counts:
        return None
    questions = sum(min(count, config.limit or count) for count in counts if count)
    return questions * (_forward(plan, model) + ANSWER * _token(model))


def _pruning(plan: Forecast) -> float:
    """Passes over the calibration records that score, that try shapes or policies, and the one that cuts."""
    settings, config, layers = plan.settings, plan.settings.prune, layers_of(plan.base)
    tokens, base = settings.calibration.samples * tokens_of(plan), _token(plan.base)
    known = (tokens, plan.base, context_of(plan.base))
    written = settings.calibration.generate_length * sequences(settings.calibration, config, *known)
    # Records are taken to show images: beside these a search judges its policies without what is written.
    looked = tokens + (0 if config.method == "auto" else written)
    sees = importance_of(config.importance).sees if config.method == "widthwise" else WEIGHTS
    looks, squares = sees != WEIGHTS, config.method == "auto" or sees in (INPUTS, GRADIENTS)
    passes: float = 1 + looks + config.biased  # the dense loss, what scores look at, and means for biases
    passes += config.prefix == "pruned"
    cuts = 1
    if config.method == "layerwise":
        passes += (len(layers) - len(layers_of(plan.pruned)) or 1) if config.iterative else 1
    elif config.method == "auto":
        search = settings.search
        if search.method == "knapsack":
            passes += 3 + evaluations(search, COMPARED * looked * base) * COMPARED  # with the costs' gradients
        else:
            passes += 1 + search.rounds * search.generations * search.population * sum(search.stages)
        cuts += search.finalists + 1 if search.finalists > 1 and search.granularity == "structured" else 0
    elif sees == GRADIENTS:
        passes += 3  # the forward pass again, layer by layer, and the gradients of inputs and weights
    if config.method == "widthwise" and config.selection == "two_stage":
        off, _ = stages(prune_space(plan.base, config), config.ratio or 0.0)
        passes += off * len(layers) * min(1.0, SAMPLE / looked)
    if config.method == "widthwise" and len(plan.plan.options) > 1:
        cuts += search_length(len(plan.plan.options))
    flops = settings.calibration.samples * _image(plan.base) + (looked * passes + written) * base
    if squares:
        flops += sum(_moments(looked, width, 0) for layer in layers for width in _widths(layer))
    return flops + cuts * _cutting(plan, tokens + written)


def _cutting(plan: Forecast, tokens: int) -> float:
    """Operations of a sequential pass: each layer cut, before that whole for the refit, and in the dense model."""
    config, refit = plan.settings.prune, plan.settings.prune.refit and plan.settings.prune.method != "layerwise"
    crosses = 1 if config.refit_target == "layer" else 2
    wholes = refit * crosses
    flops = tokens * (_token(plan.pruned) + wholes * _token(plan.base))
    for layer in layers_of(plan.pruned) if refit else ():
        out = layer.mlp.writer.out_features
        for width in _widths(layer):
            flops += _moments(tokens, width, crosses * out) + _validation(width, out, config.damping, crosses)
    return flops


def _widths(layer: Layer) -> tuple[int, int]:
    """Columns of the two writers."""
    return layer.attention.units * layer.attention.width, layer.mlp.units


def _validation(width: int, out: int, damping: float | None, crosses: int) -> float:
    """Solutions for each damping that is tried, and their errors on what is held back; none where all is fixed."""
    if damping is not None and crosses == 1:
        return 0.0
    tried = TRIED if damping is None else 1
    return tried * (width**3 / 3.0 + crosses * 4.0 * width**2 * out)


def _moments(tokens: int, width: int, targets: int) -> float:
    """Second moments of inputs with themselves and with targets, and what they are solved for or ranked by."""
    return 2.0 * tokens * width * (width + targets) + 3.0 * width**3 + 2.0 * width**2 * targets


def _records(plan: Forecast) -> tuple[int, int] | None:
    """Distinct records of the recovery, and how many it sees with repetition; None where the data's size is unknown."""
    settings, data = plan.settings, plan.settings.data
    drawn = record_count(data, settings.data_frac)
    if drawn is None and data.name in RECORDS:
        drawn = max(1, round(settings.data_frac * RECORDS[data.name]))
    size, steps = schedule(plan, drawn)
    if steps is None:
        return None
    seen = steps * size
    return seen if drawn is None else min(drawn, seen), seen


def schedule(plan: Forecast, drawn: int | None) -> tuple[int, int | None]:
    """Records of an optimiser step of the recovery, on all processes, and its number of steps.

    Args:
        plan: What the run makes.
        drawn: Records that it trains on; None: unknown, and so is the number of steps where the epochs decide it.
    """
    config, data = plan.settings.recover, plan.settings.data
    accumulate = accumulation(data.batch_size, data.global_batch_size, plan.processes)
    together, steps = data.batch_size * plan.processes, config.steps
    if drawn is not None:
        steps = optimiser_steps(config.steps, config.epochs, -(-drawn // together), accumulate)
    return accumulate * together, steps


def _training(plan: Forecast) -> float:
    """Operations on a training record: forward, gradients of activations and of trained weights, the live teacher."""
    config, token = plan.settings.recover, _token(plan.pruned)
    per_token = token * (3 if config.gradient_checkpointing else 2)
    if config.train == "full":
        per_token += token
    if config.taught and config.teacher.source == "live":
        per_token += _token(plan.base)
    return _image(plan.base) + tokens_of(plan) * per_token


class Job(NamedTuple):
    """A job of a sweep, as far as its cost goes.

    Args:
        works: Its stages.
        keep: Which of its checkpoints stay.
        finished: Whether its results are there.
    """

    works: tuple[Work, ...]
    keep: str
    finished: bool


def distinct(jobs: Sequence[Job]) -> dict[str, list[Work]]:
    """What is to be computed, by stage: shared works once, and none that a finished job has done."""
    done = {work.key for job in jobs if job.finished for work in job.works}
    found = {work.key: work for job in jobs for work in job.works if work.key not in done}
    stages = dict.fromkeys(work.stage for job in jobs for work in job.works)
    return {stage: [work for work in found.values() if work.stage == stage] for stage in stages}


def disk_of(jobs: Sequence[Job]) -> dict[str, int]:
    """Disk of a sweep; jobs share pruned checkpoints by links, and without ``keep=all`` these go in the end.

    Returns:
        Bytes of checkpoints: ``stays``, in the end; ``most``, on the way, where one job is at work at a time; ``each``,
        more for every further job at work.
    """
    sizes = {work.key: work.bytes for job in jobs for work in job.works if work.bytes}
    made = [[work.key for work in job.works if work.bytes] for job in jobs]
    staying = {key for job, keys in zip(jobs, made, strict=True) for key in chosen(keys, job.keep)}
    pruned = {work.key for job in jobs for work in job.works if work.stage == "prune"}
    passing = max((sizes[key] for keys in made for key in keys if key not in staying | pruned), default=0)
    stays, most = (sum(sizes[key] for key in keys) for keys in (staying, staying | pruned))
    return {"stays": stays, "most": most + passing, "each": passing}
