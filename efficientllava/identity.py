"""What a run is, wherever it lies: the digest of all that decides its numbers, and whether a folder holds them.

torch is not imported: a sweep whose jobs are finished ends in the time that their configurations take.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from . import disk
from .cache import library_versions, source_digest
from .config import digest
from .schema import RunConfig

# What says where and how a run is done and what stays of it, and decides no number.
NOT_OF_THE_RUN = ("paths", "sweep", "keep", "reuse", "dry_run", "optimized_metric")


def run_key(settings: RunConfig) -> str:
    """Digest of all that decides the numbers of a run, wherever it lies: configuration, model, data, source, libraries.

    Args:
        settings: The checked configuration.
    """
    from .data.splits import sources_digest
    from .hub import digest as digest_of
    from .hub import source_folder

    files = sources_digest(settings)
    models = [digest_of(source_folder(settings.model.path, settings.model.revision))]
    teacher = settings.recover.teacher
    if settings.recover.name != "none" and teacher.path:
        models.append(digest_of(source_folder(teacher.path, teacher.revision)))
    return digest([settings_key(settings), files, models])


def settings_key(settings: RunConfig) -> str:
    """The part of `run_key` that is known without a look at model and data."""
    plain = {**asdict(settings), **dict.fromkeys(NOT_OF_THE_RUN)}
    return digest([plain, source_digest("."), library_versions()])


def finished(settings: RunConfig, folder: Path, dry: bool = False) -> bool:
    """Whether a folder holds the results of this very run, and the checkpoints that are to stay.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        dry: Take model and data to be those of the results, without a look.
    """
    from .results import read

    file = folder / "results.json"
    if not file.exists() or not all((folder / name).is_dir() for name in disk.staying(settings)):
        return False
    results = read(file)
    # Model and data, which are many files, are looked at where all else agrees.
    same = results.get("settings_key") == settings_key(settings)
    return same and (dry or results.get("run_key") == run_key(settings))


def nothing_to_do(settings: RunConfig, folder: Path) -> bool:
    """Whether a run can be left as it is: it is finished, and nothing has to be removed.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
    """
    return settings.reuse and finished(settings, folder) and not disk.surplus(folder, settings.keep)
