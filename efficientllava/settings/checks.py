"""What can be wrong with a configuration by itself: values out of range, values that do not go together, idle keys.

Whether the files, folders and benchmarks that it names are there, `efficientllava.stages.request` looks.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from hydra.errors import HydraException
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from ..runtime import ConfigError, UserError, processes
from . import Rule, rule, settings_of
from .compose import key_of
from .methods import IMPORTANCES
from .schema import ANSWERS, MEASURES, DeployConfig, JudgeConfig, PruneConfig, RecoverConfig, RunConfig, SearchConfig

RUNTIME = ("gguf", "xllamacpp")  # what writes files for llama.cpp, and what runs them


COUNTED = Rule(lambda value: bool(re.fullmatch("[1-9][0-9]*", str(value))), "a whole number >= 1")
# Those that start processes of their own, _spawn and _fork, cannot take a run with them.
STRATEGIES = "auto|single_device|(ddp|fsdp|deepspeed)(_(?!spawn|fork|notebook)[a-z0-9_]+)?"


# Arguments of Lightning's Trainer that are the user's, and what they may be; the others belong to the stages.
TRAINER: dict[str, Rule | None] = {
    **dict.fromkeys(("_target_", "plugins", "deterministic", "benchmark")),
    **dict.fromkeys(("log_every_n_steps", "enable_model_summary", "enable_progress_bar", "num_sanity_val_steps")),
    "accelerator": rule("auto | cpu | gpu | cuda"),
    "num_nodes": COUNTED,
    "devices": Rule(
        lambda value: value in ("auto", "-1", -1) or COUNTED.allows(value),
        "a number >= 1 or auto; CUDA_VISIBLE_DEVICES=1,3 in front of the command chooses GPUs",
    ),
    "strategy": Rule(
        lambda value: bool(re.fullmatch(STRATEGIES, value) if isinstance(value, str) else value),
        "auto, ddp, fsdp or one of their variants, or a node with _target_",
    ),
    "precision": rule("32-true | bf16-mixed | bf16-true | 16-mixed | 16-true"),
}


def _is_endpoint(text: str) -> bool:
    """Whether it is the address of a server, without anything in which a key may hide."""
    try:
        url = urlsplit(text)
        plain = not (url.username or url.query or url.fragment)
        return url.scheme in ("http", "https") and bool(url.hostname) and plain and url.port != 0
    except ValueError:
        return False


def absent(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


# By node n: what does not go together, and what to say of it. Never a value in which a judge's key may hide.
CONFLICTS: dict[type, tuple[tuple[Callable[[Any], bool], str], ...]] = {
    RunConfig: (
        (
            lambda n: n.prune.method != "none" and n.prune.ratio is None and not n.bypassed,
            "prune.ratio=null: set it, in [0, 1), or prune.share (widthwise), prune.drop_layers (layerwise) or "
            "search.budget.target (auto)",
        ),
        (
            lambda n: n.prune.method == "auto" and n.prune.offload,
            "prune.offload: a search runs whole candidates; leave it out, or choose prune=widthwise or prune=layerwise",
        ),
        (
            lambda n: n.prune.offload == "disk" and n.on_gpu,
            "prune.offload=disk: is for a CPU; set trainer=cpu, or prune.offload=true",
        ),
        (
            lambda n: n.prune.offload == "disk" and n.prune.reinitialise,
            "prune.offload=disk: prune.reinitialise=true draws all weights in memory; leave one of them out",
        ),
        (
            lambda n: (
                n.prune.offload == "disk"
                and (n.recover.name != "none" or MEASURES.holds(n) or ANSWERS.holds(n) or n.deploy.name != "none")
            ),
            "prune.offload=disk: recovery, benchmarks, speeds and deploy hold a whole model; set recover=none "
            "evaluate=none evaluate.efficiency=false deploy=none, and do them in a run from this one's pruned folder",
        ),
        (
            lambda n: n.prune.method == "widthwise" and n.prune.importance == "flap" and n.calibration.samples < 2,
            "calibration.samples={n.calibration.samples}: one record has no fluctuation; prune.importance=flap needs 2 "
            "or more",
        ),
        (
            lambda n: n.masks and n.search.budget.target is None and n.search.most < (n.prune.ratio or 0) < 1,
            "prune.ratio={n.prune.ratio:g}: search.granularity={n.search.granularity} removes at most "
            "{n.search.most:g}; lower it",
        ),
        (
            lambda n: n.evaluate.quantization != "none" and absent("torchao"),
            "evaluate.quantization={n.evaluate.quantization}: torchao is not installed; pip install -c constraints.txt "
            "'.[quantize]', or set evaluate.quantization=none",
        ),
        (
            lambda n: n.evaluate.lmms_eval.tasks and absent("lmms_eval"),
            "evaluate.lmms_eval.tasks: lmms-eval is not installed; pip install -c constraints.txt -e '.[lmms]'",
        ),
        (
            lambda n: n.deploy.name != "none" and not n.dry_run and n.masks,
            "search.granularity={n.search.granularity}: masks make no file for llama.cpp smaller; set "
            "search.granularity=structured or deploy=none",
        ),
    ),
    PruneConfig: (
        (
            lambda n: n.bias and n.refit,
            "prune.bias=true: a refit makes up for more than the mean; set prune.refit=false, or leave prune.bias out",
        ),
        (
            lambda n: n.prefix == "pruned" and n.share is None and n.selection not in ("local", "floor"),
            "prune.prefix=pruned: scores then depend on what earlier layers keep, which prune.selection={n.selection} "
            "decides by scores; set prune.selection=local or floor",
        ),
        (
            lambda n: IMPORTANCES.get(n.importance) == "records" and n.prefix == "pruned",
            "prune.prefix=pruned: prune.importance={n.importance} looks at the dense model; leave prune.prefix out",
        ),
    ),
    SearchConfig: (
        (
            lambda n: n.granularity != "structured" and n.budget.resource != "params",
            "search.budget.resource={n.budget.resource}: weight masks change no shape, so they save none; set "
            "search.granularity=structured, or leave search.budget.resource=params",
        ),
        (
            lambda n: n.budget.resource == "params" and (n.budget.target or 0) >= 1,
            "search.budget.target={n.budget.target:g}: a speed-up is no share of parameters; give a share below 1, or "
            "set search.budget.resource=flops or latency",
        ),
        (
            lambda n: n.most < (n.budget.target or 0) < 1,
            "search.budget.target={n.budget.target:g}: search.granularity={n.granularity} removes at most {n.most:g}; "
            "lower it",
        ),
        (
            lambda n: n.uniform and (n.granularity, n.budget.resource) != ("structured", "params"),
            "search.uniform=true: needs search.granularity=structured and search.budget.resource=params",
        ),
        (
            lambda n: n.method != "random" and n.mutants + n.crossovers > n.population,
            "search.population={n.population}: is less than search.mutants={n.mutants} + "
            "search.crossovers={n.crossovers}; raise it, or lower them",
        ),
    ),
    RecoverConfig: (
        (
            lambda n: not any(vars(n.weights).values()),
            "recover.weights: all are 0, nothing would be learnt; set one above 0 or choose recover=none",
        ),
        (
            lambda n: (n.steps is None) == (n.epochs is None),
            "recover.steps={n.steps}, recover.epochs={n.epochs}: exactly one must be set; give one of them, as in "
            "recover.steps=100",
        ),
        (
            lambda n: n.teacher.source == "cached" and n.parity is not None,
            "recover.teacher.source=cached, recover.parity={n.parity}: this parity compares padding too, which is no "
            "property of a record; set recover.teacher.source=live",
        ),
    ),
    JudgeConfig: (
        (
            lambda n: n.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", n.key_env, re.ASCII),
            "evaluate.judge.key_env: must be the name of an environment variable that holds the key, not the key",
        ),
        (
            lambda n: n.base_url is not None and n.model is None,
            "evaluate.judge.model: not set; give the judge's name at evaluate.judge.base_url",
        ),
        (
            lambda n: n.base_url is not None and not _is_endpoint(n.base_url),
            "evaluate.judge.base_url: must be like https://host:port/v1; a key belongs into evaluate.judge.key_env",
        ),
    ),
}


def problems(config: RunConfig, overrides: Sequence[str] = ()) -> Iterator[str]:
    """All that is wrong with a configuration by itself, one line each: key, value, what is allowed, the fix.

    Args:
        config: The typed configuration.
        overrides: What the user typed, such as ``prune.ratio=0.3``; a typed key must have an effect.
    """
    prune, recover = config.prune, config.recover
    at_work = {
        "prune": prune.method == "widthwise",
        "search": prune.method == "auto",
        "recover": recover.name != "none" and not config.pretrain,
    }
    nodes = (config, config.evaluate.judge, *(getattr(config, name) for name, works in at_work.items() if works))
    yield from _ranges(config)
    yield from chain.from_iterable(map(_conflicts, nodes))
    yield from _trainer(config.trainer, config.dry_run)
    if config.deploy.name != "none" and not config.dry_run:
        yield from _installed(config.deploy)
    if at_work["search"] and config.search.budget.device == "gguf" and not config.dry_run:
        yield from _absences("search.budget.device=gguf", "search.budget.device=here")
    yield from _idle(config, overrides).values()


def require_valid(config: Any, node: str) -> None:
    """Refuse a configuration node of the Python interface.

    Args:
        config: The node.
        node: Its key with a dot behind it, such as ``recover.``; empty for a `RunConfig`.

    Raises:
        ConfigError: One line per problem.
    """
    found = [*_ranges(config, node), *_conflicts(config)]
    if isinstance(config, RunConfig) and config.prune.method == "widthwise":
        found += _conflicts(config.prune)
    found += _installed(config) if isinstance(config, DeployConfig) else ()
    if found:
        raise ConfigError(found)


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
        except (UserError, HydraException, OmegaConfBaseException):
            found = {}  # the job itself tells what is wrong with it
        pending -= own - {*found}
        idle |= found
    if pending:
        raise ConfigError([line for key, line in idle.items() if key in pending])


def _refused(key: str, value: Any, allowed: Rule | None, unset: Sequence[Any] = (None, MISSING)) -> Iterator[str]:
    if allowed and value not in unset and not allowed.allows(value):
        yield f"{key}={value}: must be {allowed.text}"


def _ranges(node: Any, prefix: str = "") -> Iterator[str]:
    values: dict[str, Any] = {}
    for key, value, about, _ in settings_of(node, prefix):
        values[key] = value
        if not (about.follows in values and values[about.follows] == value):  # told where it comes from
            yield from _refused(key, value, about.within)


def _conflicts(node: Any) -> Iterator[str]:
    return (text.format(n=node) for so, text in CONFLICTS.get(type(node), ()) if so(node))


def _trainer(trainer: Mapping[str, Any], planned: bool) -> Iterator[str]:
    for key, value in sorted(trainer.items()):
        yield from _refused(f"trainer.{key}", value, TRAINER.get(key), unset=(MISSING,))
        if key not in TRAINER:
            yield (
                f"trainer.{key}: is decided by the stages; remove it and use recover.steps, recover.epochs, recover."
                "max_grad_norm, data.global_batch_size, data_frac, evaluate.limit, logger=, callbacks= or debug="
            )
    if trainer.get("precision") in ("16-mixed", "16-true", "bf16-true") and not processes.on_gpu(trainer, planned):
        yield f"trainer.precision={trainer['precision']}: needs a GPU; set trainer.precision=bf16-mixed"


def _installed(deploy: DeployConfig) -> Iterator[str]:
    wanted = RUNTIME if deploy.check or deploy.measure else RUNTIME[:1]
    yield from _absences("deploy=gguf", "deploy=none", wanted)


def _absences(setting: str, otherwise: str, wanted: Sequence[str] = RUNTIME) -> Iterator[str]:
    if missing := [*filter(absent, wanted)]:
        yield (
            f"{setting}: {' and '.join(missing)} not installed; pip install -c constraints.txt -e '.[gguf]', or set "
            f"{otherwise}"
        )


def _idle(config: RunConfig, overrides: Sequence[str]) -> dict[str, str]:
    """Typed keys without an effect, and what to tell of each."""
    conditions = {key: when for key, _, _, when in settings_of(config)}
    found: dict[str, str] = {}
    for typed in (key_of(override) for override in overrides if not override.startswith("~")):
        key = typed
        while key and key not in conditions:  # of a node that is a dictionary
            key = key.rpartition(".")[0]
        failing = next((each.fix for each in conditions.get(key, ()) if not each.holds(config)), None)
        if failing:
            found[typed] = f"{typed}: has no effect here; {failing}, or leave it out"
    return found
