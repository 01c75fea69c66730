"""Everything that can be wrong with a run's configuration, found at once and before any weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

from ..evaluation.tasks import available
from ..runtime.errors import ConfigError, UserError
from ..runtime.places import is_elsewhere, local_folder
from ..settings.checks import problems
from ..settings.schema import RunConfig

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
