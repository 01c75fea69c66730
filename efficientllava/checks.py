"""Everything that can be wrong with a configuration, found before any weight is read."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from .config import key_of
from .data.sources import is_elsewhere
from .errors import ConfigError, UserError
from .hub import local_folder
from .outcome import of_hydra
from .rules import EFFECTS, FOLLOWS, IMAGE_FOLDERS, RULES, TRAINER, bypassed
from .schema import MASKED, DeployConfig, JudgeConfig, PruneConfig, RecoverConfig, RunConfig, SearchConfig


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
        from .processes import on_gpu  # late: it imports torch

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
