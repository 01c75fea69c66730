"""The one store: results by what they were made from, computed once, and taken from there as long as they are whole.

An entry is a folder ``<root>/<kind>/<key>/``; its key is the digest of all that its content depends on. It is written
under a temporary name, synced and renamed, so that a kill leaves nothing or a complete entry; whoever wants the same
one at the same time waits for the first. `SUMS` in it holds a digest of each of its files. A hit is an entry whose
files are what was written; a damaged one is set aside, with one warning, and computed again. So is what a killed
computation would have gone on from. What was set aside goes when the entry is next found whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from .content import (
    MEMO,
    Memo,
    digest,
    settle,
)
from .errors import UserError
from .files import (
    SUMS,
    as_umask,
    aside,
    remove,
    seal,
    sealed,
    set_aside,
    sha256,
    whole_file,
    whole_folder,
)
from .processes import barrier, from_first, rank

log = logging.getLogger(__name__)

RECORD = "stage.json"
TAKEN = "taken.txt"  # where the checkpoints of an entry were taken to
PACKAGES = ("torch", "transformers", "lightning", "peft", "numpy", "scikit-learn", "pillow")
SEALED = (".ckpt", ".json", ".safetensors")  # of a sealed folder, files that are read only as they were written
LARGE = 64 << 20  # bytes from which on a file is shared with a run's folder, not copied
FICLONE = 0x40049409  # Linux: a copy that shares its blocks until one side is written


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide numbers."""
    from importlib import metadata  # takes its time at every start

    return {name: metadata.version(name) for name in PACKAGES}


class Entry(NamedTuple):
    """A finished computation.

    Attributes:
        folder: Where its files lie.
        record: What the computation reported.
        reused: Whether it was there already.
    """

    folder: Path
    record: dict[str, Any]
    reused: bool


class Store:
    """Entries of several kinds under one folder.

    Args:
        root: The folder; made when needed.
        reuse: Whether finished entries are taken; otherwise each is computed and replaces what is there.
        together: Whether all processes of a run ask for the same entry at the same time; otherwise each for itself.
        fix: What a user can do where nothing can be written there.

    Attributes:
        memo: Digests of files, those of the entries among them.
    """

    def __init__(
        self, root: Path, reuse: bool = True, together: bool = True, fix: str = "set paths.output_dir elsewhere"
    ) -> None:
        self.root, self.memo = root, Memo(root / MEMO)
        self._reuse, self._together, self._fix = reuse, together, fix

    def place(self, kind: str, inputs: Any) -> Path:
        """The folder of an entry, which may not exist; what is no folder there is set aside."""
        folder = self.root / kind / digest(inputs)
        if self._leads and os.path.lexists(folder) and not folder.is_dir():
            _warn(folder, "no folder")
            set_aside(folder)
        return folder

    def entry(
        self,
        kind: str,
        inputs: Any,
        compute: Callable[[Path, Path], dict[str, Any]],
        take: Callable[[Path], None] = lambda _: None,
    ) -> Entry:
        """Return an entry, computing it where needed.

        Args:
            kind: Name of its folder.
            inputs: Everything that it depends on; plain values.
            compute: Given the folder to fill and a sealed folder that outlives a kill, fills the first and returns the
                record. Runs on every process; only the first may write.
            take: Given the entry's folder on the first process, takes what is wanted before anybody may remove it.

        Returns:
            The entry; the same on every process.

        Raises:
            UserError: It cannot be written.
        """
        folder = self.place(kind, inputs)
        work = folder.with_name(f"{folder.name}.work")
        with self._lock(folder):
            hit = self._first(self._ready(folder, work) if self._leads else None)
            if not hit:
                self._compute(folder, work, compute)
                if self._together:
                    barrier()
            if self._leads:
                take(folder)
            return Entry(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")), hit)

    @property
    def _leads(self) -> bool:
        return not self._together or rank() == 0

    def _first(self, value: Any) -> Any:
        return from_first(value) if self._together else value

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        if not self._leads:
            yield
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder.parent}: cannot be made ({error.strerror}); {self._fix}") from error
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            yield

    def _ready(self, folder: Path, work: Path) -> bool:
        """Whether the entry can be taken; if not, nothing that is left of an earlier one can be mistaken for it."""
        if self._reuse and os.path.lexists(folder):
            if not (fault := self._fault(folder)):
                # Of who was killed after the last step, and of what was damaged before.
                for left in (work, aside(work), aside(folder)):
                    remove(left)
                return True
            _warn(folder, fault)
            set_aside(folder)
        # What a killed process has left; the lock says that nobody else is at work here.
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        if not self._reuse:
            remove(work)
        elif faults := damaged(work, self.memo):
            _warn(work, faults[0])
            set_aside(work)
        _open(work)
        return False

    def _fault(self, folder: Path) -> str | None:
        """A file of a finished entry that is not there, or not what was written."""
        names = [RECORD, *sealed(folder)]
        lost = [name for name in names if not (folder / name).is_file()]
        if lost or RECORD not in names[1:]:
            return (lost or [SUMS])[0]
        return next(iter(damaged(folder, self.memo)), None)

    def _compute(self, folder: Path, work: Path, compute: Callable[[Path, Path], dict[str, Any]]) -> None:
        if not self._leads:
            compute(folder, work)
            return
        try:
            with whole_folder(folder, self._fix) as partial:
                record = compute(partial, work)
                (partial / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
                as_umask(partial)
                files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
                names = [str(file.relative_to(partial)) for file in files]
                sums = dict(zip(names, self.memo.digests(files), strict=True))
                sums[RECORD] = sums.pop(RECORD)  # the last line: a list that was cut off lacks it
                seal(partial, sums)
        except BaseException:
            if not any(file.name != SUMS for file in work.iterdir()):
                shutil.rmtree(work)  # there is nothing to go on from
            raise
        self.memo.remember({folder / name: known for name, known in sums.items()})
        shutil.rmtree(work, ignore_errors=True)

    def share(self, source: Path, target: Path) -> None:
        """Put a file or folder of an entry into a run, whole or not at all.

        Small files are copied. Large ones share their blocks where the file system can do that, else they are links
        that are made read-only: whoever writes into one in spite of that is noticed when either side is read again.

        Args:
            source: File or folder of an entry.
            target: Its new name; what stands there is replaced.

        Raises:
            UserError: It cannot be written, such as on a full disk.
        """
        inside = [file for file in source.rglob("*") if file.is_file()] if source.is_dir() else [source]
        large = [file for file in inside if file.stat().st_size >= LARGE]
        known = self.memo.digests(large)
        if source.is_dir():
            _note(source.parent / TAKEN, str(target.absolute()))
            with whole_folder(target) as partial:
                shutil.copytree(source, partial, copy_function=_share, dirs_exist_ok=True)
        else:
            with whole_file(target) as partial:
                _share(source, partial)
        places = [target / file.relative_to(source) if file != source else target for file in large]
        settle([*large, *places])  # a link counts as a change of the file that it leads to
        self.memo.remember(dict(zip([*large, *places], [*known, *known], strict=True)))


@contextlib.contextmanager
def growing(folder: Path, memo: Memo) -> Iterator[None]:
    """Hold an entry that is added to, file by file, by all processes of a run; damaged files of it are set aside.

    Args:
        folder: The entry; made if it does not exist. `efficientllava.runtime.files.put` adds to it.
        memo: Digests of files.
    """
    if rank():
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        for left in folder.glob(".*.part"):  # of a killed process; the lock says that nobody else is at work
            left.unlink()
        faults = damaged(folder, memo)
        for left in () if faults else [aside(folder), *folder.glob(aside(Path("*")).name)]:
            remove(left)
        if faults:
            _warn(folder, ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else ""))
        for name in faults:
            set_aside(folder / name if name != "." else folder)
        _open(folder)
        yield


def damaged(folder: Path, memo: Memo) -> list[str]:
    """Files of a sealed folder that are not what was written; those that are not there are no such files."""
    if not folder.is_dir():
        return ["."] if os.path.lexists(folder) else []
    known = sealed(folder)
    there = {name for name in known if os.path.lexists(folder / name)}
    there |= {file.name for file in folder.iterdir() if file.suffix in SEALED and not file.name.startswith(".")}
    names = sorted(there)
    found = dict(zip(names, _sums([folder / name for name in names], memo), strict=True))
    return [name for name in names if found[name] not in known.get(name, [])]


def _sums(files: list[Path], memo: Memo) -> list[str | None]:
    """Digests of files and folders; None for those that cannot be read, such as links to nowhere."""
    plain = [file for file in files if file.is_file()]
    try:
        known = dict(zip(plain, memo.digests(plain), strict=True))
    except OSError:
        known = {}
    found: list[str | None] = []
    for file in files:
        try:
            found.append(known.get(file) or sha256(file))
        except OSError:
            found.append(None)
    return found


def _open(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).touch()


def _warn(folder: Path, fault: str) -> None:
    log.warning("%s: %s is damaged; set aside and computed again", folder, fault)


def _note(file: Path, line: str) -> None:
    known = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if line not in known:
        with file.open("a", encoding="utf-8") as handle:
            handle.write(f"{line}\n")


def _share(source: str | Path, target: str | Path) -> None:
    if os.stat(source).st_size >= LARGE:
        with contextlib.suppress(OSError), open(source, "rb") as old, open(target, "wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
            return
        Path(target).unlink()
        try:
            os.chmod(source, os.stat(source).st_mode & ~0o222)
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
    shutil.copyfile(source, target)
