"""Everything that can be wrong with a configuration, found before any weight is read.

What each key may be, and when it has an effect: two tables that `efficientllava.settings.checks` applies.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from ..runtime.errors import ConfigError, UserError
from ..runtime.exit_codes import of_hydra
from ..runtime.places import is_elsewhere, is_hub_id, local_folder
from .compose import key_of
from .schema import (
    BLOCKS,
    GGUF_TYPES,
    IMPORTANCES,
    JUDGED,
    MASKED,
    TAYLOR,
    DeployConfig,
    JudgeConfig,
    PruneConfig,
    RecoverConfig,
    RunConfig,
    SearchConfig,
)

# Data whose images are published apart from their records -> what data.image_root must hold.
IMAGE_FOLDERS = {
    "llava_665k": "coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K, vg/VG_100K_2",
    "bunny_695k": "the unpacked images of finetune/ in BoyaWu10/Bunny-v1_0-data",
    "internvl_sft": "ai2d, chartqa, coco, docvqa, dvqa, geoqa+, gqa, llava, ocr_vqa, sam, share_textvqa, synthdog-en, "
    "textvqa, vg, web-celebrity, web-landmark, wikiart (playground/data in InternVL)",
}

Rule = tuple[Callable[[Any], bool], str]


def _one_of(*options: Any) -> Rule:
    shown = ", ".join("null" if option is None else str(option) for option in options)
    return (lambda value: value in options), f"one of {shown}"


def _number(low: float, high: float | None, *, open_low: bool = False, open_high: bool = True) -> Rule:
    def inside(value: Any) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value > low if open_low else value >= low
        return above and (value < math.inf if high is None else value < high if open_high else value <= high)

    left = "(" if open_low else "["
    right = "infinity)" if high is None else f"{high:g}{')' if open_high else ']'}"
    return inside, f"in {left}{low:g}, {right}"


POSITIVE = _number(0, None, open_low=True)
AT_LEAST_1 = _number(1, None)
SHARE = _number(0, 1)
DTYPE = _one_of("auto", "float32", "float16", "bfloat16")

# key -> (predicate, what is allowed); null passes where the schema allows it
RULES: dict[str, Rule] = {
    "data_frac": _number(0, 1, open_low=True, open_high=False),
    "seed": _number(0, 2**32),
    "threads": AT_LEAST_1,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda"),
    "trainer.precision": _one_of("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true"),
    "keep": _one_of("all", "recovered", "none"),
    "logger.mode": _one_of(None, "online", "offline", "disabled"),
    "model.dtype": DTYPE,
    "model.train": _one_of("lora", "full"),
    "model.protocol": _one_of(None, "vicuna_v1"),
    "model.system": (lambda text: bool(text.strip()), "a sentence"),
    "calibration.samples": AT_LEAST_1,
    "calibration.report": _number(0, None),
    "calibration.batch_size": AT_LEAST_1,
    "calibration.generate": _number(0, None),
    "calibration.generate_length": _number(2, None),
    "calibration.generate_share": _number(0, 1, open_low=True),
    "data.name": _one_of("digits_vqa", "conversations", *IMAGE_FOLDERS),
    "data.images": AT_LEAST_1,
    "data.test_questions": AT_LEAST_1,
    "data.max_length": AT_LEAST_1,
    "data.max_bad_fraction": SHARE,
    "data.batch_size": AT_LEAST_1,
    "data.global_batch_size": AT_LEAST_1,
    "data.num_workers": _number(0, None),
    "prune.method": _one_of("none", "layerwise", "widthwise", "auto"),
    "prune.ratio": SHARE,
    "prune.importance": _one_of(*IMPORTANCES),
    "prune.selection": _one_of("shape", "local", "floor", "global"),
    "prune.heads": _one_of("group", "query"),
    "prune.prefix": _one_of("dense", "pruned"),
    "prune.refit_target": _one_of("adaptive", "layer", "residual"),
    "prune.damping": POSITIVE,
    "prune.round_to": (
        lambda value: type(value) is int and value >= 1,
        f"in [1, infinity), or one of {', '.join(BLOCKS)}",
    ),
    "prune.tokens": _one_of("all", "image", "text", "answer"),
    "prune.block_influence": _one_of("mean", "sum"),
    "prune.taylor_mean": _one_of("sample", "batch"),
    "prune.share": SHARE,
    "prune.drop_layers": _number(0, None),
    "search.method": _one_of("evolution", "random", "knapsack"),
    "search.granularity": _one_of("structured", "unstructured", "2:4"),
    "search.budget.resource": _one_of("params", "flops", "latency"),
    "search.budget.target": POSITIVE,
    "search.risk": _one_of("loss", "kl", "error"),
    "search.gap": _one_of("fro", "fro_logprod", "dist", "held_out", "none"),
    "search.gap_weight": _number(0, None),
    "search.rounds": AT_LEAST_1,
    "search.generations": AT_LEAST_1,
    "search.population": _number(2, None),
    "search.parents": AT_LEAST_1,
    "search.mutants": _number(0, None),
    "search.crossovers": _number(0, None),
    "search.mutation": _number(0, 1, open_low=True, open_high=False),
    "search.exchange": _number(0, 1, open_high=False),
    "search.finalists": AT_LEAST_1,
    "search.projector_lr": POSITIVE,
    "search.projector_pull": _number(0, None),
    "search.projector_anchor": _number(0, None),
    "recover.name": _one_of("none", "projector", "sft", "kd_logit", "kd_hidden", "kd_both"),
    "recover.weights.sft": _number(0, None),
    "recover.weights.logit": _number(0, None),
    "recover.weights.hidden": _number(0, None),
    "recover.train": _one_of("projector", "lora", "full"),
    "recover.lr": POSITIVE,
    "recover.projector_lr": POSITIVE,
    "recover.steps": AT_LEAST_1,
    "recover.epochs": POSITIVE,
    "recover.optimizer": _one_of("adamw", "sgd"),
    "recover.weight_decay": _number(0, None),
    "recover.scheduler": _one_of("cosine", "linear", "constant"),
    "recover.warmup": SHARE,
    "recover.max_grad_norm": POSITIVE,
    "recover.lora.r": AT_LEAST_1,
    "recover.lora.alpha": POSITIVE,
    "recover.lora.dropout": SHARE,
    "recover.kl": _one_of("forward", "reverse"),
    "recover.temperature": POSITIVE,
    "recover.hidden_metric": _one_of("l2", "cosine"),
    "recover.parity": _one_of(None, "vlmcompression"),
    "recover.teacher.dtype": DTYPE,
    "recover.teacher.source": _one_of("live", "cached"),
    "recover.teacher.top_k": AT_LEAST_1,
    "recover.chunk": AT_LEAST_1,
    "recover.save_every": AT_LEAST_1,
    "evaluate.protocol": _one_of("llava", "lmms_eval"),
    "evaluate.limit": AT_LEAST_1,
    "evaluate.batch_size": AT_LEAST_1,
    "evaluate.num_workers": _number(0, None),
    "evaluate.max_new_tokens": AT_LEAST_1,
    "evaluate.repeats": AT_LEAST_1,
    "evaluate.new_tokens": _number(2, None),
    "evaluate.speed_batches": (
        (lambda sizes: len({*sizes}) == len(sizes) and min(sizes, default=1) >= 1),
        "distinct, >= 1",
    ),
    "evaluate.quantization": _one_of("none", "int8", "int4"),
    "deploy.name": _one_of("none", "gguf"),
    "deploy.types": (
        (lambda types: bool(types) and len({*types}) == len(types) and {*types} <= {*GGUF_TYPES}),
        f"distinct, of {', '.join(GGUF_TYPES)} (K-quants are made of the f16 file by llama.cpp's own program: "
        "llama-quantize <f16 file> <file> Q4_K_M)",
    ),
    "deploy.repeats": AT_LEAST_1,
    "evaluate.judge.runs": AT_LEAST_1,
    "evaluate.judge.attempts": AT_LEAST_1,
    "evaluate.judge.concurrency": AT_LEAST_1,
    "evaluate.judge.timeout": POSITIVE,
    "evaluate.judge.retries": _number(0, None),
}

# Arguments of Lightning's Trainer that are the user's; the others belong to the stages.
TRAINER = {
    *("_target_", "accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "deterministic"),
    *("benchmark", "log_every_n_steps", "enable_model_summary", "enable_progress_bar", "num_sanity_val_steps"),
}
LOOKING = ("obs", "activation", "wanda", "flap")  # importances that look at activations
OF_FILES = ("path", "group_by_modality_length")


def _reads_benchmarks(config: RunConfig) -> bool:
    return any(task != "digits_vqa" for task in config.evaluate.tasks)


# key -> the key of the same range whose value it takes where it is not typed
FOLLOWS = {"recover.teacher.dtype": "model.dtype"}

# (typed key or prefix, whether it has an effect, what would give it one)
EFFECTS: tuple[tuple[str, Callable[[RunConfig], bool], str], ...] = (
    (
        "logger.weights",
        lambda c: c.keep != "none" and (c.prune.method != "none" or c.recover.name != "none"),
        "no checkpoint stays; prune or recover, and set keep=all or keep=recovered",
    ),
    ("keep", lambda c: not c.pretrain, "it belongs to runs that prune or recover"),
    ("data_frac", lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover="),
    ("model.revision", lambda c: is_hub_id(c.model.path), "it belongs to a hub id as model.path"),
    (
        "data.images",
        lambda c: c.data.name == "digits_vqa" and c.recover.name != "none",
        "it is the size of the recovery pool of data=digits_vqa",
    ),
    ("data.test_questions", lambda c: c.data.name == "digits_vqa", "it belongs to data=digits_vqa"),
    (
        "data.image_root",
        lambda c: c.data.name != "digits_vqa",
        "choose data=conversations (the images of calibration.path start from calibration.image_root)",
    ),
    *((f"data.{key}", lambda c: c.data.name != "digits_vqa", "choose data=conversations") for key in OF_FILES),
    ("data.group_by_modality_length", lambda c: c.recover.name != "none", "choose a recovery with recover="),
    *(
        (f"data.{key}", lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover=")
        for key in ("batch_size", "global_batch_size", "num_workers")
    ),
    ("data.max_bad_fraction", lambda c: c.data.name != "digits_vqa", "choose data=conversations"),
    (
        "data.max_length",
        lambda c: c.prune.method != "none" or c.recover.name != "none",
        "choose a paradigm with prune= or a recovery with recover=",
    ),
    ("calibration", lambda c: c.prune.method != "none", "choose a paradigm with prune="),
    ("calibration.image_root", lambda c: c.calibration.path is not None, "set calibration.path"),
    (
        "calibration.batch_size",
        lambda c: c.prune.method != "widthwise" or c.prune.importance not in TAYLOR,
        "Taylor scores take one record at a time",
    ),
    (
        "calibration.generate",
        lambda c: c.prune.solves,
        "only a refit and its scores use written text; set prune.refit=true or prune.importance=obs",
    ),
    *(
        (f"calibration.generate_{key}", lambda c: c.calibration.generate != 0, "set calibration.generate above 0")
        for key in ("length", "share")
    ),
    ("prune.", lambda c: c.prune.method != "none", "choose a paradigm with prune="),
    (
        "prune.ratio",
        lambda c: c.prune.ratio is None or not bypassed(c),
        "prune.share, prune.drop_layers or search.budget.target says what goes",
    ),
    ("prune.importance", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.selection",
        lambda c: c.prune.method == "widthwise" and c.prune.share is None,
        "it belongs to prune=widthwise without prune.share",
    ),
    (
        "prune.round_to",
        lambda c: c.prune.method in ("widthwise", "auto") and _cuts(c),
        "it belongs to prune=widthwise or prune=auto without masks",
    ),
    *(
        (f"prune.{key}", lambda c: _cuts(c), "masks leave shapes alone; set search.granularity=structured")
        for key in ("refit", "refit_target", "reinitialise")
    ),
    ("prune.share", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    ("prune.protect", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.taylor_mean",
        lambda c: c.prune.method == "widthwise" and c.prune.importance in TAYLOR,
        f"it needs prune.importance={'|'.join(TAYLOR)}",
    ),
    (
        "prune.tokens",
        lambda c: c.prune.refit or c.prune.method != "widthwise" or c.prune.importance in LOOKING,
        "nothing looks at activations; set prune.refit=true or another prune.importance",
    ),
    (
        "prune.damping",
        lambda c: (
            c.prune.refit or c.prune.method == "auto" or (c.prune.method == "widthwise" and c.prune.importance == "obs")
        ),
        "set prune.refit=true or prune.importance=obs",
    ),
    ("prune.refit_target", lambda c: c.prune.refit, "set prune.refit=true"),
    ("prune.heads", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    ("prune.bias", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.prefix",
        lambda c: c.prune.method == "widthwise" and c.prune.importance in LOOKING,
        f"it belongs to prune=widthwise with prune.importance={'|'.join(LOOKING)}",
    ),
    ("prune.offload", lambda config: _on_gpu(config), "without a GPU all weights are in host memory anyway"),
    ("search", lambda c: c.prune.method == "auto", "set prune=auto"),
    *(
        (f"search.{key}", lambda c: c.search.method != "random", "set search.method=evolution")
        for key in ("mutants", "crossovers", "mutation", "exchange")
    ),
    (
        "search.projector",
        lambda c: not c.search.projector or c.search.rounds > 1,
        "it evolves between rounds; set search.rounds above 1",
    ),
    *(
        (
            f"search.projector_{key}",
            lambda c: c.search.projector and c.search.rounds > 1,
            "set search.projector=on and search.rounds above 1",
        )
        for key in ("lr", "pull", "anchor")
    ),
    (
        "search.finalists",
        lambda c: _cuts(c),
        "masks are not refitted; set search.granularity=structured",
    ),
    (
        "search.gap_weight",
        lambda c: c.search.gap not in ("none", "held_out"),
        "set search.gap to fro, fro_logprod or dist",
    ),
    ("prune.drop_layers", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.iterative", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.block_influence", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.final_norm", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("recover.", lambda c: c.recover.name != "none", "choose a recovery with recover="),
    (
        "recover.lr",
        lambda c: c.recover.train != "projector" or c.recover.projector_lr is None,
        "only the projector trains; set recover.projector_lr",
    ),
    ("recover.chunk", lambda c: c.recover.weights.sft + c.recover.weights.logit > 0, "no loss looks at logits"),
    ("recover.lora", lambda c: c.recover.train == "lora", "set recover.train=lora"),
    ("recover.kl", lambda c: c.recover.weights.logit > 0, "set recover.weights.logit above 0"),
    ("recover.temperature", lambda c: c.recover.weights.logit > 0, "set recover.weights.logit above 0"),
    ("recover.hidden_metric", lambda c: c.recover.weights.hidden > 0, "set recover.weights.hidden above 0"),
    ("recover.hidden_layers", lambda c: c.recover.weights.hidden > 0, "set recover.weights.hidden above 0"),
    (
        "recover.teacher",
        lambda c: c.recover.weights.logit + c.recover.weights.hidden > 0,
        "set recover.weights.logit or recover.weights.hidden above 0",
    ),
    ("deploy.", lambda c: c.deploy.name != "none", "set deploy=gguf"),
    ("deploy.repeats", lambda c: c.deploy.measure, "set deploy.measure=true"),
    ("evaluate.repeats", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.new_tokens", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.speed_batches", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    (
        "evaluate.quantization",
        lambda c: bool(c.evaluate.efficiency or c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "set evaluate.efficiency=true or choose a benchmark with evaluate=",
    ),
    (
        "evaluate.judge",
        lambda c: not {*JUDGED}.isdisjoint(c.evaluate.tasks),
        f"it belongs to evaluate.tasks={'|'.join(JUDGED)}",
    ),
    (
        "evaluate.lmms_eval.include_path",
        lambda c: bool(c.evaluate.lmms_eval.tasks),
        "it belongs to evaluate.lmms_eval.tasks",
    ),
    ("evaluate.judge.key_env", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.concurrency", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.timeout", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    ("evaluate.judge.retries", lambda c: c.evaluate.judge.base_url is not None, "set evaluate.judge.base_url"),
    (
        "recover.teacher.revision",
        lambda c: is_hub_id(c.recover.teacher.path or ""),
        "it belongs to a hub id as recover.teacher.path",
    ),
    (
        "recover.teacher.top_k",
        lambda c: c.recover.teacher.source == "cached" and c.recover.weights.logit > 0,
        "set recover.teacher.source=cached and recover.weights.logit above 0",
    ),
    (
        "recover.teacher.offload",
        lambda c: c.recover.teacher.source == "live" and _on_gpu(c),
        "it belongs to recover.teacher.source=live on a GPU",
    ),
    ("evaluate.root", _reads_benchmarks, "choose a published benchmark with evaluate="),
    (
        "evaluate.namespace",
        lambda c: _reads_benchmarks(c) and c.evaluate.root is None,
        "it belongs to published benchmarks without evaluate.root",
    ),
    ("evaluate.protocol", _reads_benchmarks, "choose a published benchmark with evaluate="),
    (
        "evaluate.limit",
        lambda c: bool(c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "choose a benchmark with evaluate=",
    ),
    (
        "evaluate.batch_size",
        lambda c: bool(c.evaluate.tasks or c.evaluate.lmms_eval.tasks),
        "choose a benchmark with evaluate=",
    ),
    ("evaluate.num_workers", lambda c: bool(c.evaluate.tasks), "choose a benchmark with evaluate="),
    ("evaluate.max_new_tokens", lambda c: bool(c.evaluate.tasks), "choose a benchmark with evaluate="),
)


def bypassed(config: RunConfig) -> bool:
    """Whether something takes the place of ``prune.ratio``."""
    return bool(config.prune.nominal) or (config.prune.method == "auto" and config.search.budget.target is not None)


def _cuts(config: RunConfig) -> bool:
    return config.prune.method != "auto" or config.search.granularity == "structured"


def _on_gpu(config: RunConfig) -> bool:
    from ..runtime.processes import on_gpu

    return on_gpu(config.trainer, planned=config.dry_run)


def check(config: RunConfig, overrides: Sequence[str] = ()) -> None:
    """Find every problem at once.

    Args:
        config: The typed configuration.
        overrides: What the user typed, such as ``prune.ratio=0.3``; a typed key must have an effect.

    Raises:
        ConfigError: One line per problem: key, value, what is allowed, the fix.
    """
    problems = [*_ranges(config), *_combinations(config), *_idle(config, overrides).values(), *_paths(config)]
    if problems:
        raise ConfigError(problems)


def check_sweep(jobs: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], RunConfig]) -> None:
    """Refuse what is typed for a sweep and has an effect in none of its jobs; in some of them it may have none.

    Args:
        jobs: Overrides of every job.
        compose: Makes a job's configuration; called until every key has had an effect.

    Raises:
        ConfigError: One line per key.
    """
    idle: dict[str, str] = {}
    pending = {key_of(override) for job in jobs for override in job}
    for job in jobs:
        own = {key_of(override) for override in job}
        if own.isdisjoint(pending):
            continue
        try:
            found = _idle(compose(job), job)
        except Exception as error:
            if not (isinstance(error, UserError) or of_hydra(error)):
                raise
            found = {}  # the job itself tells what is wrong with it
        pending -= own - {*found}
        idle |= found
    if pending:
        raise ConfigError([line for key, line in idle.items() if key in pending])


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        # Nodes of other libraries are dictionaries.
        config = (config or {}).get(part) if isinstance(config, dict | None) else getattr(config, part)
    return config


def _ranges(config: Any, node: str = "") -> Iterator[str]:
    for key, (allowed, description) in RULES.items():
        value = _value(config, key.removeprefix(node)) if key.startswith(node) else None
        followed = None if node else FOLLOWS.get(key)
        if followed and value == _value(config, followed):
            continue  # told where it comes from
        if value not in (None, MISSING) and not allowed(value):
            yield f"{key}={value}: must be {description}"


def require_valid(config: Any, node: str) -> None:
    """Refuse a configuration node of the Python interface, which does not come through `check`.

    Args:
        config: The node.
        node: Its key with a dot behind it, such as ``recover.``; empty for a `RunConfig`.

    Raises:
        ConfigError: One line per problem.
    """
    problems = [*_ranges(config, node), *(_recovery(config) if isinstance(config, RecoverConfig) else ())]
    problems += _judge(config) if isinstance(config, JudgeConfig) else ()
    if isinstance(config, RunConfig) and config.prune.method == "widthwise":
        problems += _widthwise(config.prune, config.calibration.samples)
    problems += _installed(config) if isinstance(config, DeployConfig) else ()
    if problems:
        raise ConfigError(problems)


def _combinations(config: RunConfig) -> Iterator[str]:
    prune, recover, search = config.prune, config.recover, config.search
    if prune.method != "none" and prune.ratio is None and not bypassed(config):
        yield (
            "prune.ratio=null: set it, in [0, 1), or prune.share (widthwise), prune.drop_layers (layerwise) or "
            "search.budget.target (auto)"
        )
    if prune.method == "auto" and prune.offload:
        yield (
            "prune.offload=true: a search runs whole candidates on the GPU; leave it out, or choose prune=widthwise or "
            "prune=layerwise"
        )
    if prune.method == "widthwise":
        yield from _widthwise(prune, config.calibration.samples)
    if prune.method == "auto":
        yield from _search(search, prune.ratio)
    yield from _trainer(config.trainer, config.dry_run)
    if recover.name != "none" and not config.pretrain:
        yield from _recovery(recover)
    kind = config.evaluate.quantization
    if kind != "none" and importlib.util.find_spec("torchao") is None:
        yield (
            f"evaluate.quantization={kind}: torchao is not installed; pip install -c constraints.txt '.[quantize]', or "
            "set evaluate.quantization=none"
        )
    yield from _judge(config.evaluate.judge)
    if config.evaluate.lmms_eval.tasks and not importlib.util.find_spec("lmms_eval"):
        yield "evaluate.lmms_eval.tasks: lmms-eval is not installed; pip install -c constraints.txt -e '.[lmms]'"
    yield from _tasks(config.evaluate.tasks)
    if config.deploy.name != "none" and not config.dry_run:
        if config.prune.method == "auto" and config.search.granularity != "structured":
            yield (
                f"search.granularity={config.search.granularity}: masks make no file for llama.cpp smaller; set "
                "search.granularity=structured or deploy=none"
            )
        yield from _installed(config.deploy)


def _widthwise(prune: PruneConfig, samples: int) -> Iterator[str]:
    if prune.bias and prune.refit:
        yield "prune.bias=true: a refit makes up for more than the mean; set prune.refit=false, or leave prune.bias out"
    if prune.prefix == "pruned" and prune.share is None and prune.selection not in ("local", "floor"):
        yield (
            f"prune.prefix=pruned: scores then depend on what earlier layers keep, which prune.selection="
            f"{prune.selection} decides by scores; set prune.selection=local or floor"
        )
    if prune.importance == "flap" and prune.prefix == "pruned":
        yield "prune.prefix=pruned: prune.importance=flap looks at the dense model; leave prune.prefix out"
    if prune.importance == "flap" and samples < 2:
        yield f"calibration.samples={samples}: one record has no fluctuation; prune.importance=flap needs 2 or more"


def _trainer(trainer: Mapping[str, Any], planned: bool) -> Iterator[str]:
    for key in sorted({*trainer} - TRAINER):
        yield (
            f"trainer.{key}: is decided by the stages; remove it and use recover.steps, recover.epochs, "
            "recover.max_grad_norm, data.global_batch_size, data_frac, evaluate.limit, logger=, callbacks= or debug="
        )
    devices = trainer.get("devices", 1)
    listed = isinstance(devices, list | tuple) and devices
    if not (listed or devices in ("auto", "-1", -1) or re.fullmatch("[1-9][0-9]*", str(devices))):
        yield f"trainer.devices={devices}: must be a number >= 1, a list of GPUs or auto"
    if trainer.get("precision") in ("16-mixed", "16-true"):
        from ..runtime.processes import on_gpu

        if not on_gpu(trainer, planned):
            yield f"trainer.precision={trainer['precision']}: needs a GPU; set trainer.precision=bf16-mixed"


def _search(search: SearchConfig, ratio: float | None) -> Iterator[str]:
    granularity, resource, target = search.granularity, search.budget.resource, search.budget.target
    if granularity != "structured" and resource != "params":
        yield (
            f"search.budget.resource={resource}: weight masks change no shape, so they save none; "
            "set search.granularity=structured, or leave search.budget.resource=params"
        )
    elif resource == "params" and (target or 0) >= 1:
        yield (
            f"search.budget.target={target:g}: a speed-up is no share of parameters; give a share below 1, or set "
            "search.budget.resource=flops or latency"
        )
    asked, share = ("prune.ratio", ratio) if target is None else ("search.budget.target", target)
    largest = MASKED.get(granularity, 1.0)
    if largest < (share or 0) < 1:
        yield f"{asked}={share:g}: search.granularity={granularity} removes at most {largest:g}; lower it"
    if search.uniform and (granularity, resource) != ("structured", "params"):
        yield "search.uniform=true: needs search.granularity=structured and search.budget.resource=params"
    if search.method != "random" and search.mutants + search.crossovers > search.population:
        yield (
            f"search.population={search.population}: is less than search.mutants={search.mutants} + "
            f"search.crossovers={search.crossovers}; raise it, or lower them"
        )
    stages = search.stages
    if not stages or stages != sorted({*stages, 1.0}) or stages[0] <= 0:
        yield f"search.stages={stages}: must be rising shares of the samples that end with 1, such as [0.25,1.0]"


def _judge(judge: JudgeConfig) -> Iterator[str]:
    """Never shows a value in which a key may hide."""
    if judge.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", judge.key_env, re.ASCII):
        yield "evaluate.judge.key_env: must be the name of an environment variable that holds the key, not the key"
    if judge.base_url is None:
        return
    if judge.model is None:
        yield "evaluate.judge.model: not set; give the judge's name at evaluate.judge.base_url"
    try:
        url = urlsplit(judge.base_url)
        plain = not (url.username or url.query or url.fragment)
        fits = url.scheme in ("http", "https") and bool(url.hostname) and plain and url.port != 0
    except ValueError:
        fits = False
    if not fits:
        yield "evaluate.judge.base_url: must be like https://host:port/v1; a key belongs into evaluate.judge.key_env"


def _installed(deploy: DeployConfig) -> Iterator[str]:
    runs = deploy.check or deploy.measure
    wanted = ("gguf", "xllamacpp") if runs else ("gguf",)
    if absent := [name for name in wanted if importlib.util.find_spec(name) is None]:
        yield (
            f"deploy=gguf: {' and '.join(absent)} not installed; pip install -c constraints.txt -e '.[gguf]', or set "
            "deploy=none"
        )


def _tasks(names: Sequence[str]) -> Iterator[str]:
    from ..evaluation.tasks import available

    for name in names:
        if name not in available():
            yield f"evaluate.tasks: {name!r} is not a benchmark; choose of {', '.join(available())}"
    if len(names) > len({*names}):
        yield f"evaluate.tasks=[{','.join(names)}]: names a benchmark more than once; leave one of them out"


def _recovery(recover: RecoverConfig) -> Iterator[str]:
    if not any((recover.weights.sft, recover.weights.logit, recover.weights.hidden)):
        yield "recover.weights: all are 0, nothing would be learnt; set one above 0 or choose recover=none"
    if (recover.steps is None) == (recover.epochs is None):
        yield (
            f"recover.steps={recover.steps}, recover.epochs={recover.epochs}: exactly one must be set; give one of "
            "them, as in recover.steps=100"
        )
    if recover.teacher.source == "cached" and recover.parity is not None:
        yield (
            f"recover.teacher.source=cached, recover.parity={recover.parity}: this parity compares padding too, which "
            "is no property of a record; set recover.teacher.source=live"
        )
    layers = recover.hidden_layers
    if layers not in ("last", "all") and not (
        isinstance(layers, list | tuple) and layers and all(type(v) is int for v in layers)
    ):
        yield f"recover.hidden_layers={layers}: must be last, all or a list of layer indices such as [3,7]"


def _idle(config: RunConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Typed keys without an effect, and what to tell of each."""
    found: dict[str, str] = {}
    for key in (key_of(override) for override in overrides if not override.startswith("~")):
        for prefix, has_effect, fix in EFFECTS:
            if (key == prefix or key.startswith(prefix if prefix.endswith(".") else prefix + ".")) and not has_effect(
                config
            ):
                found[key] = f"{key}: has no effect here; {fix}, or leave it out"
                break
    return found


def _paths(config: RunConfig) -> Iterator[str]:
    if config.pretrain:
        return
    calibrates = config.prune.method != "none" and config.calibration.path is None
    needs_data = config.recover.name != "none" or calibrates
    data = config.data
    if data.name != "digits_vqa" and data.path is None and needs_data:
        yield "data.path: not set; give a LLaVA-style JSON or JSONL file as data.path=…"
    for key in ("data.path", "calibration.path"):
        value = _value(config, key)
        if value is not None and not is_elsewhere(value) and not Path(value).expanduser().exists():
            yield f"{key}={value}: no such file; give a LLaVA-style JSON or JSONL file"
    elsewhere = data.name in IMAGE_FOLDERS and needs_data and not config.dry_run  # which is also for other machines
    if elsewhere and data.image_root is None and is_elsewhere(data.path or ""):
        yield f"data.image_root: not set; give the folder that holds the images: {IMAGE_FOLDERS[data.name]}"
    folders = {key: "image paths start from" for key in ("data.image_root", "calibration.image_root")}
    folders |= {
        "evaluate.judge.prompts": "holds the official prompt files",
        "evaluate.lmms_eval.include_path": "holds tasks in lmms-eval's format",
    }
    for key, purpose in folders.items():
        value = _value(config, key)
        if value is not None and not Path(value).expanduser().is_dir():
            yield f"{key}={value}: no such folder; give the folder that {purpose}"
    try:
        local_folder(config.model.path)
    except UserError as error:
        yield str(error)
    root = config.evaluate.root
    if root is not None and not Path(root).expanduser().exists():
        yield f"evaluate.root={root}: no such file or folder; give what holds the benchmark's rows"
    output = Path(config.paths.output_dir)
    existing = next((p for p in [output, *output.absolute().parents] if p.exists()), None)
    if existing is not None and not existing.is_dir():
        yield f"paths.output_dir={output}: {existing} is a file; give a folder"
    elif existing is not None and not os.access(existing, os.W_OK):
        yield f"paths.output_dir={output}: {existing} may not be written; give a folder of yours"
