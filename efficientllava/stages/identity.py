"""What a run is, wherever it lies: the digest of all that decides its numbers, and whether a folder holds them.

torch is not imported: a sweep whose jobs are finished ends in the time that their configurations take.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..runtime import keeping
from ..runtime.content import MEMO, Memo, digest
from ..runtime.errors import UserError
from ..runtime.files import set_aside
from ..runtime.source import source_digest
from ..runtime.store import library_versions
from ..settings.schema import RunConfig
from .inputs import inputs_of, numbers

log = logging.getLogger(__name__)

# Modules whose imports are the source of a run.
STAGES = tuple(f"stages.{name}" for name in ("evaluate", "prune", "recover", "deploy", "record"))
# What says where a run is done and what stays of it, and decides no number.
NOT_OF_THE_RUN = ("paths", "sweep", "keep", "reuse", "dry_run", "optimized_metric")


def run_key(settings: RunConfig) -> str:
    """Digest of all that decides the numbers of a run, wherever it lies: configuration, model, data, source, libraries.

    Args:
        settings: The checked configuration.
    """
    from ..checkpoint.hub import folder_digest, origin_of, source_folder
    from ..data.records import image_stamps
    from ..data.splits import (
        calibration_records,
        draw,
        keep_back,
        load_split,
        open_data,
    )

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
    """Stamps of the images of benchmarks whose files are the user's own."""
    from ..data.records import image_stamps
    from ..evaluation.tasks import load

    tasks = settings.evaluate.tasks if settings.evaluate.root else []
    return [digest(image_stamps(load(name, settings.data, settings.evaluate).records())) for name in tasks]


def settings_key(settings: RunConfig) -> str:
    """The part of `run_key` that is known without a look at model and data."""
    plain = {**numbers(settings), **dict.fromkeys(NOT_OF_THE_RUN)}
    benchmarks = [f"evaluation.tasks.{name}" for name in settings.evaluate.tasks]  # those with a file of their own
    return digest([plain, source_digest(*STAGES, *benchmarks), library_versions()])


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
    from ..record import read

    file = folder / "results.json"
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
