"""What is asked for, before anything is loaded.

What can be chosen, and docs/options.md; all that can be wrong with what was chosen; what a run is, wherever it lies
(the digest of all that decides its numbers), and whether a folder holds it. torch is not imported: a sweep whose jobs
are finished ends in the time that their configurations take.

``python -m efficientllava.stages.request > docs/options.md`` writes every option of every group, and every key with its
range, its meaning and when it has an effect.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from importlib import metadata
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ..evaluation.tasks import available, load, register_benchmarks
from ..record import read
from ..runtime import (
    CONF,
    MEMO,
    RESULTS,
    ConfigError,
    Memo,
    UserError,
    digest,
    is_elsewhere,
    keeping,
    library_versions,
    local_folder,
    set_aside,
    sha256,
    source_digest,
    sources_below,
)
from ..settings import About, settings_of
from ..settings.checks import RUNTIME, absent, problems
from ..settings.compose import register_schema, typed
from ..settings.schema import PROSE, GpuPoolConfig, RunConfig, WandbConfig
from . import inputs_of, numbers

BEGINNING = """# Options

Written by `python -m efficientllava.stages.request > docs/options.md`.

`group=option` chooses a file of `conf/`, or one of your own: write `conf/<group>/mine.yaml`, or write
`<folder>/<group>/mine.yaml` and add `--config-dir <folder>`. `key=value` sets one value of what is chosen; a key that
is typed must have an effect.

## Groups"""
HEAD = "| key | default | allowed | meaning | to have an effect |\n|---|---|---|---|---|"


def register() -> None:
    """Make all options that are not files known to Hydra."""
    register_schema()
    register_benchmarks()


def composed(*overrides: str) -> RunConfig:
    """The configuration of what is typed, for programs of their own."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", [*overrides]), overrides)


def page() -> str:
    """The text of the page."""
    register()
    parts = [BEGINNING]
    for group in sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        made = {option.removesuffix(".yaml"): "" for option in ConfigStore.instance().repo.get(group.name, {})}
        options = made | {file.stem: _comment(file) for file in group.glob("*.yaml")}
        parts += [f"\n### {group.name}=\n", *(f"- `{name}`{about}" for name, about in sorted(options.items()))]
    parts += ["\n## Keys\n", *_node(RunConfig())]
    parts += ["\n### logger=wandb\n", *_node(WandbConfig(), "logger.")]
    parts += ["\n### hydra/launcher=gpu_pool\n", *_node(GpuPoolConfig(), "hydra.launcher.")]
    return "\n".join(parts) + "\n"


def _comment(file: Path) -> str:
    """What a configuration file says of itself before it begins."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    said = " ".join(line[2:] for line in lines if not line.startswith("# @package"))
    return said and f": {_plain(said)}"


def _plain(text: str) -> str:
    """Text without what Markdown would take for its own."""
    return re.sub(r"([<|*_])", r"\\\1", text)


def _node(node: Any, prefix: str = "") -> Iterator[str]:
    """The table of a node's own keys, and then the nodes in it."""
    own = [each for each in settings_of(node, prefix) if "." not in each[0].removeprefix(prefix)]
    yield f"{node.__doc__}\n\n{HEAD}"
    for key, value, about, _ in own:
        if not is_dataclass(value):
            shown = "" if value == MISSING else f"`{json.dumps(value)}`"
            cells = (about.within.text if about.within else "", about.help, _needs(about))
            yield f"| `{key}` | {shown} | {' | '.join(map(_plain, cells))} |"
    for key, value, about, _ in own:
        if is_dataclass(value):
            needs = _plain(_needs(about))
            yield f"\n### {key}\n" + (needs and f"\nTo have an effect: {needs}.\n")
            yield from _node(value, f"{key}.")


def _needs(about: About) -> str:
    return "; ".join(when.fix for when in (*about.when, *about.inside))


RECORDS = ("file", "give a LLaVA-style JSON or JSONL file")
IMAGES = ("folder", "give the folder that image paths start from")
# key -> what has to be there, and the fix
PLACES = {
    "data.path": RECORDS,
    "calibration.path": RECORDS,
    "data.image_root": IMAGES,
    "calibration.image_root": IMAGES,
    "evaluate.judge.prompts": ("folder", "give the folder that holds the official prompt files"),
    "evaluate.lmms_eval.include_path": ("folder", "give the folder that holds tasks in lmms-eval's format"),
    "evaluate.root": ("file or folder", "give what holds the benchmark's rows"),
}


def check(config: RunConfig, overrides: Sequence[str] = ()) -> None:
    """Find every problem at once.

    Args:
        config: The typed configuration.
        overrides: What the user typed, such as ``prune.ratio=0.3``; a typed key must have an effect.

    Raises:
        ConfigError: One line per problem: key, value, what is allowed, the fix.
    """
    found = [*problems(config, overrides), *_tasks(config.evaluate.tasks)]
    if not config.pretrain:
        found += [*_data(config), *_places(config), *_output(Path(config.paths.output_dir))]
    if found:
        raise ConfigError(found)


def _tasks(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name not in available():
            yield f"evaluate.tasks: {name!r} is not a benchmark; choose of {', '.join(available())}"
    if len(names) > len({*names}):
        yield f"evaluate.tasks=[{','.join(names)}]: names a benchmark more than once; leave one of them out"


def _data(config: RunConfig) -> Iterator[str]:
    data, calibrates = config.data, config.prune.method != "none" and config.calibration.path is None
    if config.recover.name == "none" and not calibrates:
        return
    if not data.embedded and data.path is None:
        yield "data.path: not set; give a LLaVA-style JSON or JSONL file as data.path=…"
    # A dry run is also for other machines.
    if data.image_layout and data.image_root is None and is_elsewhere(data.path or "") and not config.dry_run:
        yield f"data.image_root: not set; give the folder that holds the images: {data.image_layout}"


def _places(config: RunConfig) -> Iterator[str]:
    for key, (kind, fix) in PLACES.items():
        value = attrgetter(key)(config)
        if value is None or (kind == "file" and is_elsewhere(value)):
            continue
        place = Path(value).expanduser()
        if not (place.is_dir() if kind == "folder" else place.exists()):
            yield f"{key}={value}: no such {kind}; {fix}"
    try:
        local_folder(config.model.path)
    except UserError as error:
        yield str(error)


def _output(folder: Path) -> Iterator[str]:
    existing = next((place for place in [folder, *folder.absolute().parents] if place.exists()), None)
    if existing is not None and not existing.is_dir():
        yield f"paths.output_dir={folder}: {existing} is a file; give a folder"
    elif existing is not None and not os.access(existing, os.W_OK):
        yield f"paths.output_dir={folder}: {existing} may not be written; give a folder of yours"


log = logging.getLogger(__name__)

# Modules whose imports are the source of a run.
STAGES = tuple(f"stages.{name}" for name in ("evaluate", "prune", "recover", "record"))
# What says where a run is done and what stays of it, and decides no number.
NOT_OF_THE_RUN = ("paths", "sweep", "keep", "reuse", "dry_run", "optimized_metric")


def run_key(settings: RunConfig) -> str:
    """Digest of all that decides the numbers of a run, wherever it lies: configuration, model, data, source, libraries.

    Args:
        settings: The checked configuration.
    """
    from ..checkpoint.hub import folder_digest, origin_of, source_folder
    from ..data.records import image_stamps  # takes its time, which a check and --help do without
    from ..data.splits import calibration_records, draw, keep_back, load_split, open_data

    memo = Memo(Path(settings.paths.cache_dir) / MEMO)
    model, teacher, data, read = settings.model, settings.recover.teacher, settings.data, open_data(settings)
    folder = source_folder(model.path, model.revision)
    base = folder_digest(folder, memo)
    prunes, own = settings.prune.method != "none", read.get("prune")
    calibration = calibration_records(settings.calibration, data, settings.seed) if prunes and own else []
    reported = keep_back(settings, calibration)[1] if own or read.get("evaluate") else []
    shown = [*_shown(settings), digest(image_stamps(reported))]
    known = {"model": base, "files": read.get("evaluate")}
    stages: list[dict[str, Any]] = [inputs_of("evaluate", settings, images=shown, **known)]
    if prunes:
        files, images = own, image_stamps(calibration) if own else None
        stages.append(inputs_of("prune", settings, model=base, files=files, images=images))
    if settings.recover.name != "none":
        taught_by = None
        place = (teacher.path, teacher.revision) if teacher.path else origin_of(folder)
        if settings.recover.taught and place:
            taught_by = folder_digest(source_folder(*place), memo)
        files = read["recover"]
        drawn = draw(load_split(data, "train"), settings.data_frac, settings.seed) if files else []
        images = digest(image_stamps(drawn))
        stages.append(inputs_of("recover", settings, model=base, teacher=taught_by, files=files, images=images))
    return digest([settings_key(settings), stages])


def _shown(settings: RunConfig) -> list[str]:
    """Stamps of the images of benchmarks whose files are the user's own, and of other files of the user's own."""
    from ..data.records import image_stamps

    config = settings.evaluate
    places = [config.prose.path if PROSE in config.tasks else None, config.judge.prompts]
    places += sources_below(config.lmms_eval.include_path)
    own = [sha256(place) for path in places if path and (place := Path(path).expanduser()).exists()]
    tasks = config.tasks if config.root else []
    return own + [digest(image_stamps(load(name, settings.data, config).records())) for name in tasks]


def settings_key(settings: RunConfig) -> str:
    """The part of `run_key` that is known without a look at model and data."""
    plain = {**numbers(settings), **dict.fromkeys(NOT_OF_THE_RUN)}
    benchmarks = [f"evaluation.tasks.{name}" for name in settings.evaluate.tasks]  # those with a file of their own
    return digest([plain, source_digest(*STAGES, *benchmarks), library_versions() | _extras(settings)])


def _extras(settings: RunConfig) -> dict[str, str]:
    """Versions of what only some runs use, where it is installed."""
    config = settings.evaluate
    used = {"torchao": config.quantization != "none", "lmms-eval": bool(config.lmms_eval.tasks)}
    used |= dict.fromkeys(RUNTIME, settings.deploy.name != "none")
    there = {name for name, is_used in used.items() if is_used and not absent(name.replace("-", "_"))}
    return {name: metadata.version(name) for name in sorted(there)}


def made(settings: RunConfig) -> list[str]:
    """Names of the checkpoints that a run makes, in their order."""
    stages = {"pruned": settings.prune.method != "none", "recovered": settings.recover.name != "none"}
    return [name for name, asked in stages.items() if asked]


def staying(settings: RunConfig) -> tuple[str, ...]:
    """Names of the checkpoints that a run's folder holds in the end."""
    return keeping.chosen(made(settings), settings.keep)


def finished(settings: RunConfig, folder: Path, dry: bool = False) -> bool:
    """Whether a folder holds the results of this very run, and the checkpoints that are to stay.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        dry: Take model and data to be those of the results, without a look.
    """
    file = folder / RESULTS
    wanted = (*staying(settings), *([] if settings.deploy.name == "none" else [settings.deploy.name]))
    if not file.exists() or not all((folder / name).is_dir() for name in wanted):
        return False
    try:
        results = read(file)
    except UserError:
        if not dry:
            log.warning("%s: is damaged; set aside, the run is done again", file)
            set_aside(file)
        return False
    # Model and data, which are many files, are looked at where all else agrees.
    same = results.get("settings_key") == settings_key(settings)
    return same and (dry or results.get("run_key") == run_key(settings))


def nothing_to_do(settings: RunConfig, folder: Path) -> bool:
    """Whether a run can be left as it is: it is finished, and nothing has to be removed.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
    """
    return settings.reuse and finished(settings, folder) and not keeping.surplus(folder, settings.keep)


if __name__ == "__main__":
    print(page(), end="")
