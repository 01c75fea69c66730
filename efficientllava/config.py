"""Everything that can be wrong with a configuration, found before any weight is read; and the instantiate helper."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .data.sources import is_elsewhere
from .errors import ConfigError, UserError
from .presets import register_presets
from .schema import IMPORTANCES, JUDGED, TAYLOR, JudgeConfig, RecoverConfig, RunConfig

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
    def inside(value: float) -> bool:
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
    "model.dtype": DTYPE,
    "model.train": _one_of("lora", "full"),
    "model.protocol": _one_of(None, "vicuna_v1"),
    "calibration.samples": AT_LEAST_1,
    "calibration.batch_size": AT_LEAST_1,
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
    "prune.selection": _one_of("shape", "local", "global"),
    "prune.refit_target": _one_of("layer", "residual"),
    "prune.damping": POSITIVE,
    "prune.round_to": AT_LEAST_1,
    "prune.tokens": _one_of("all", "image", "text", "answer"),
    "prune.block_influence": _one_of("mean", "sum"),
    "prune.taylor_mean": _one_of("sample", "batch"),
    "prune.share": SHARE,
    "prune.drop_layers": _number(0, None),
    "search.method": _one_of("evolution", "random"),
    "search.granularity": _one_of("structured", "unstructured", "2:4"),
    "search.budget.resource": _one_of("params", "flops", "latency"),
    "search.budget.target": POSITIVE,
    "search.risk": _one_of("loss", "kl", "error"),
    "search.gap": _one_of("fro", "fro_logprod", "dist", "none"),
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
    "evaluate.judge.runs": AT_LEAST_1,
    "evaluate.judge.attempts": AT_LEAST_1,
    "evaluate.judge.concurrency": AT_LEAST_1,
    "evaluate.judge.timeout": POSITIVE,
    "evaluate.judge.retries": _number(0, None),
}

OF_FILES = ("path", "image_root", "group_by_modality_length")


def _reads_benchmarks(config: RunConfig) -> bool:
    return any(task != "digits_vqa" for task in config.evaluate.tasks)


# (typed key or prefix, whether it has an effect, what would give it one)
EFFECTS: tuple[tuple[str, Callable[[RunConfig], bool], str], ...] = (
    ("data_frac", lambda c: c.recover.name != "none" or bool(c.pretrain), "choose a recovery with recover="),
    ("data.images", lambda c: c.data.name == "digits_vqa", "it belongs to data=digits_vqa"),
    ("data.test_questions", lambda c: c.data.name == "digits_vqa", "it belongs to data=digits_vqa"),
    *((f"data.{key}", lambda c: c.data.name != "digits_vqa", "choose data=conversations") for key in OF_FILES),
    ("data.group_by_modality_length", lambda c: c.recover.name != "none", "choose a recovery with recover="),
    ("prune.", lambda c: c.prune.method != "none", "choose a paradigm with prune="),
    ("prune.importance", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.selection",
        lambda c: c.prune.method == "widthwise" and c.prune.share is None,
        "it belongs to prune=widthwise without prune.share",
    ),
    (
        "prune.round_to",
        lambda c: c.prune.method in ("widthwise", "auto"),
        "it belongs to prune=widthwise or prune=auto",
    ),
    ("prune.share", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    ("prune.protect", lambda c: c.prune.method == "widthwise", "it belongs to prune=widthwise"),
    (
        "prune.taylor_mean",
        lambda c: c.prune.method == "widthwise" and c.prune.importance in TAYLOR,
        f"it needs prune.importance={'|'.join(TAYLOR)}",
    ),
    ("prune.refit_target", lambda c: c.prune.refit, "set prune.refit=true"),
    (
        "prune.damping",
        lambda c: c.prune.refit or c.prune.importance == "obs",
        "set prune.refit=true or prune.importance=obs",
    ),
    ("prune.offload", lambda config: _on_gpu(config), "without a GPU all weights are in host memory anyway"),
    ("search", lambda c: c.prune.method == "auto", "set prune=auto"),
    ("search.projector_lr", lambda c: c.search.projector, "set search.projector=on"),
    ("search.projector_pull", lambda c: c.search.projector, "set search.projector=on"),
    ("search.projector_anchor", lambda c: c.search.projector, "set search.projector=on"),
    (
        "search.finalists",
        lambda c: c.search.granularity == "structured",
        "masks are not refitted; set search.granularity=structured",
    ),
    ("search.gap_weight", lambda c: c.search.gap != "none", "set search.gap"),
    ("prune.drop_layers", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.iterative", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.block_influence", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("prune.final_norm", lambda c: c.prune.method == "layerwise", "it belongs to prune=layerwise"),
    ("recover.", lambda c: c.recover.name != "none", "choose a recovery with recover="),
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
    ("evaluate.repeats", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.new_tokens", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
    ("evaluate.speed_batches", lambda c: c.evaluate.efficiency, "set evaluate.efficiency=true"),
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


def _on_gpu(config: RunConfig) -> bool:
    from .processes import on_gpu  # late: it imports torch

    return on_gpu(config.trainer, planned=config.dry_run)


def register_schema() -> None:
    """Make ``_schema``, the presets and ``${sweep_digest:}`` available to the configuration files."""
    store = ConfigStore.instance()
    store.store(name="_schema", node=RunConfig)
    # --help copies everything behind the groups once per option, the store of which there is only one included.
    vars(store)["__deepcopy__"] = lambda _memo: store
    register_presets()
    OmegaConf.register_new_resolver("sweep_digest", sweep_digest, replace=True)


def sweep_digest() -> str:
    """Digest of what was typed, in any order; not of how and where the sweep runs."""
    return digest(sorted(typed for typed in sys.argv[1:] if not typed.startswith(("-", "hydra", "paths."))))


def instantiate(node: Any, **overrides: Any) -> Any:
    """Build the object that a node with ``_target_`` describes; every instantiation goes through here.

    Args:
        node: A plain dictionary or configuration node.
        **overrides: Arguments that only the program knows.

    Raises:
        UserError: The target does not exist or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    try:
        return build(node, **overrides, _convert_="all")
    except InstantiationException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{node.get('_target_')}: cannot be built: {'; '.join(lines)}") from error


def typed(config: DictConfig) -> RunConfig:
    """Turn the composed configuration into dataclasses.

    Raises:
        ConfigError: A value is missing, of the wrong type, or an interpolation leads nowhere.
    """
    unknown = [f"{key}: unknown key; remove it" for key in _unknown(config)]
    missing = [f"{key}: not set; give it on the command line as {key}=…" for key in OmegaConf.missing_keys(config)]
    if unknown or missing:
        raise ConfigError([*unknown, *missing])
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    assert isinstance(result, RunConfig)
    return result


def _unknown(config: DictConfig) -> Iterator[str]:
    """Keys that ``+key=value`` added beside the schema: OmegaConf lets them pass, nothing would read them."""

    def walk(node: Any, cls: type, prefix: str) -> Iterator[str]:
        names = {field.name: field for field in dataclasses.fields(cls)}
        for key in node:
            if key not in names:
                yield prefix + str(key)
                continue
            child = OmegaConf.get_type(node, key)
            if isinstance(child, type) and dataclasses.is_dataclass(child):
                yield from walk(node[key], child, f"{prefix}{key}.")

    yield from walk(config, RunConfig, "")


def check(config: RunConfig, overrides: Sequence[str] = ()) -> None:
    """Find every problem at once.

    Args:
        config: The typed configuration.
        overrides: What the user typed, such as ``prune.ratio=0.3``; a typed key must have an effect.

    Raises:
        ConfigError: One line per problem: key, value, what is allowed, the fix.
    """
    problems = [*_ranges(config), *_combinations(config), *_effects(config, overrides), *_paths(config)]
    if problems:
        raise ConfigError(problems)


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _ranges(config: Any, node: str = "") -> Iterator[str]:
    for key, (allowed, description) in RULES.items():
        value = _value(config, key.removeprefix(node)) if key.startswith(node) else None
        if value not in (None, MISSING) and not allowed(value):
            yield f"{key}={value}: must be {description}"


def require_valid(config: Any, node: str) -> None:
    """Refuse a configuration node of the Python interface, which does not come through `check`.

    Args:
        config: The node.
        node: Its key with a dot behind it, such as ``recover.``.

    Raises:
        ConfigError: One line per problem.
    """
    problems = [*_ranges(config, node), *(_recovery(config) if isinstance(config, RecoverConfig) else ())]
    problems += _judge(config) if isinstance(config, JudgeConfig) else ()
    if problems:
        raise ConfigError(problems)


def _combinations(config: RunConfig) -> Iterator[str]:
    prune, recover = config.prune, config.recover
    if prune.method != "none" and prune.ratio is None and prune.share is None and prune.drop_layers is None:
        yield "prune.ratio=null: set it, in [0, 1), or prune.share (widthwise) or prune.drop_layers (layerwise)"
    if prune.method == "auto" and prune.offload:
        yield (
            "prune.offload=true: a search runs whole candidates on the GPU; leave it out, or choose prune=widthwise or "
            "prune=layerwise"
        )
    search = config.search
    if (
        prune.method == "auto"
        and search.uniform
        and (search.granularity, search.budget.resource)
        != (
            "structured",
            "params",
        )
    ):
        yield "search.uniform=true: needs search.granularity=structured and search.budget.resource=params"
    if prune.method == "auto" and search.mutants + search.crossovers > search.population:
        yield (
            f"search.population={search.population}: is less than search.mutants={search.mutants} + "
            f"search.crossovers={search.crossovers}; raise it, or lower them"
        )
    stages = search.stages
    if prune.method == "auto" and (not stages or stages != sorted({*stages, 1.0}) or stages[0] <= 0):
        yield f"search.stages={stages}: must be rising shares of the samples that end with 1, such as [0.25,1.0]"
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


def _tasks(names: Sequence[str]) -> Iterator[str]:
    from .evaluation.tasks import available

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
            f"recover.steps={recover.steps}, recover.epochs={recover.epochs}: exactly one must be set; "
            "set the other to null, as in recover.epochs=null recover.steps=100"
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


def _effects(config: RunConfig, overrides: Sequence[str]) -> Iterator[str]:
    keys = [override.lstrip("+").partition("=")[0] for override in overrides if not override.startswith("~")]
    for key in keys:
        for prefix, has_effect, fix in EFFECTS:
            if (key == prefix or key.startswith(prefix if prefix.endswith(".") else prefix + ".")) and not has_effect(
                config
            ):
                yield f"{key}: has no effect here; {fix}, or leave it out"
                break


def _paths(config: RunConfig) -> Iterator[str]:
    if config.pretrain:
        return
    calibrates = config.prune.method != "none" and config.calibration.path is None
    needs_data = not config.dry_run and (config.recover.name != "none" or calibrates)
    data = config.data
    if data.name != "digits_vqa" and data.path is None and needs_data:
        yield "data.path: not set; give a LLaVA-style JSON or JSONL file as data.path=…"
    for key in ("data.path", "calibration.path"):
        value = _value(config, key)
        if value is not None and not is_elsewhere(value) and not Path(value).expanduser().exists():
            yield f"{key}={value}: no such file; give a LLaVA-style JSON or JSONL file"
    if data.name in IMAGE_FOLDERS and needs_data and data.image_root is None and is_elsewhere(data.path or ""):
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
    root = config.evaluate.root
    if root is not None and not Path(root).expanduser().exists():
        yield f"evaluate.root={root}: no such file or folder; give what holds the benchmark's rows"
    output = Path(config.paths.output_dir)
    existing = next((p for p in [output, *output.absolute().parents] if p.exists()), None)
    if existing is not None and not existing.is_dir():
        yield f"paths.output_dir={output}: {existing} is a file; give a folder"
    elif existing is not None and not os.access(existing, os.W_OK):
        yield f"paths.output_dir={output}: {existing} may not be written; give a folder of yours"


def digest(value: Any) -> str:
    """Digest of plain data, 16 hexadecimal digits; the same on every machine."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
