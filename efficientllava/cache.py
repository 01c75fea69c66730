"""Stage results by content: same inputs, same key; a finished result is linked, not computed again.

An entry is a folder under ``outputs/cache/<stage>/<key>/``. It is written under a temporary name and renamed when
whole, so a kill leaves nothing or a complete entry. Jobs that want the same entry at the same time wait for the first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from .config import digest
from .files import whole_file, whole_folder
from .processes import barrier, from_first, rank

RECORD = "stage.json"
PACKAGES = ("torch", "transformers", "lightning", "peft", "numpy", "scikit-learn", "pillow")
ROOT = Path(__file__).parent


@functools.cache
def source_digest(*parts: str) -> str:
    """Digest of our own source files, so that a changed stage does not reuse what its old code made.

    Args:
        *parts: Files or folders relative to the package.
    """
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        path = ROOT / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(file.read_bytes())
    return total.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a stage's numbers."""
    return {name: metadata.version(name) for name in PACKAGES}


@dataclass(frozen=True)
class Entry:
    """A finished stage.

    Args:
        folder: Where its files lie.
        record: What the stage reported.
        reused: Whether it came from the cache.
    """

    folder: Path
    record: dict[str, Any]
    reused: bool


class StageCache:
    """Finished stages under one folder.

    Args:
        root: The cache folder.
        reuse: Whether finished entries are taken; otherwise every stage is computed and replaces its entry.
    """

    def __init__(self, root: Path, reuse: bool = True) -> None:
        self._root, self._reuse = root, reuse

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[Path, Path], dict[str, Any]],
        take: Callable[[Path], None] = lambda _: None,
    ) -> Entry:
        """Return a finished stage, computing it where needed.

        Args:
            name: Stage name.
            inputs: Everything that the result depends on; plain values.
            compute: Given the folder to fill and a folder that outlives a kill, fills the first and returns the record.
                Runs on every process; only the first may write.
            take: Given the entry's folder on the first process, links what the run wants before anybody may remove it.

        Returns:
            The entry; the same on every process.
        """
        key = digest({**inputs, "libraries": library_versions()})
        folder = self._root / name / key
        with self._lock(folder):
            hit = from_first(self._reuse and (folder / RECORD).is_file())
            if not hit:
                self._compute(folder, compute)
            if rank() == 0:
                take(folder)
            return Entry(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")), hit)

    def _compute(self, folder: Path, compute: Callable[[Path, Path], dict[str, Any]]) -> None:
        work = folder.with_name(folder.name + ".work")
        if rank() == 0:
            if not self._reuse:
                shutil.rmtree(work, ignore_errors=True)
            # What a killed process has left; the lock says that nobody else is at work here.
            for left in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            with whole_folder(folder) as partial:
                record = compute(partial, work)
                (partial / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
            shutil.rmtree(work, ignore_errors=True)
        else:
            compute(folder, work)
        barrier()

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        if rank():
            yield
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            yield


def link(source: Path, target: Path) -> None:
    """Put a file or folder of the cache into a run, by hard links where the file system can, whole or not at all.

    Args:
        source: File or folder.
        target: Its new name; what stands there is replaced.

    Raises:
        UserError: It cannot be written, such as on a full disk.
    """
    if source.is_dir():
        with whole_folder(target) as partial:
            shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)
    else:
        with whole_file(target) as partial:
            _link_or_copy(source, partial)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)
