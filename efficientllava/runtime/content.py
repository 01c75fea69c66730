"""Digests of content: plain data, files, and our own source, so that changed code reuses nothing of the old one's.

What was read of a file once is remembered as long as the file stays.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import Lines, sha256
from .places import PACKAGE

MEMO = "contents.jsonl"
# A file may change again without another time stamp while its clock has not ticked.
TICK = 100_000_000  # nanoseconds
Stamp = tuple[int, int, int, int]


def digest(value: Any) -> str:
    """Digest of plain data, 16 hexadecimal digits; the same on every machine."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stamp(file: Path) -> Stamp:
    """What changes whenever a file is written: size, mtime and ctime in ns, inode."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class Memo:
    """SHA-256 of files by their whole content; a second look at a file that has stayed as it was costs a stat.

    Args:
        file: Where it is kept for other processes; None, or a file that cannot be written: in this process alone.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._lines = Lines(file) if file else None
        self._known: dict[str, tuple[Stamp, int, str]] = {}

    def digest(self, file: Path) -> str:
        """Digest of one file."""
        return self.digests([file])[0]

    def digests(self, files: Sequence[Path]) -> list[str]:
        """Digests of files, in their order; those that have to be read are read at the same time."""
        stamps = {file: stamp(file) for file in files}
        if any(self._find(file, stamps[file]) is None for file in stamps):
            self._read_new()
        found = {file: self._find(file, stamps[file]) for file in stamps}
        todo = [file for file, known in found.items() if known is None]
        if todo:
            with ThreadPoolExecutor(min(len(todo), os.cpu_count() or 1)) as pool:
                found |= dict(zip(todo, pool.map(sha256, todo), strict=True))
            self.remember({file: str(found[file]) for file in todo if stamp(file) == stamps[file]})
        return [str(found[file]) for file in files]

    def remember(self, digests: dict[Path, str]) -> None:
        """Take over digests of files that are known at this moment."""
        new = {str(file.absolute()): (stamp(file), time.time_ns(), known) for file, known in digests.items()}
        # Of one that has just been written the next look may see more; it is read again.
        new = {path: known for path, known in new.items() if known[1] - max(known[0][1:3]) > TICK}
        self._known |= new
        with suppress(UserError):  # where it cannot be kept, it is found out again
            if self._lines and new:
                self._lines.append([{"file": path, "seen": [list(s), at, d]} for path, (s, at, d) in new.items()])

    def _find(self, file: Path, now: Stamp) -> str | None:
        known = self._known.get(str(file.absolute()))
        return known[2] if known and known[0] == now else None

    def _read_new(self) -> None:
        for line in self._lines.new() if self._lines else ():
            when, at, known = line["seen"]
            self._known[line["file"]] = (tuple(when), at, known)


def settle(files: Iterable[Path]) -> None:
    """Wait until the next change of files cannot have their time stamps of now."""
    newest = max((max(stamp(file)[1:3]) for file in files), default=0)
    time.sleep(max(0.0, min(newest + TICK - time.time_ns(), TICK) / 1e9) + 0.001)


SHOWN = ("report", "launch", "runtime.console")  # what shows or starts, and decides no number
IMPORT = re.compile(r"^\s*from\s+([.\w]+)\s+import\s+(\([^)]*\)|.*)", re.MULTILINE)  # in a function, too


@functools.cache
def source_digest(*modules: str) -> str:
    """Digest of modules of this package and of everything inside it that they import, late imports included.

    Args:
        *modules: Their names inside the package, such as ``stages.prune``.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, file in sorted(closure(*modules).items()):
        total.update(name.encode() + file.read_bytes())
    return total.hexdigest()


def closure(*modules: str) -> dict[str, Path]:
    """The files behind modules and all that they import inside the package, by module; without `SHOWN`."""
    found: dict[str, Path] = {}
    todo = [f"{PACKAGE.name}.{name}" for name in modules]
    while todo:
        module = todo.pop()
        name, file = module.partition(".")[2], _file(module)
        if name and file and name not in found and not name.startswith(SHOWN):
            found[name] = file
            todo += [module.rpartition(".")[0], *_imports(module, file)]
    return found


def _file(module: str) -> Path | None:
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _imports(module: str, file: Path) -> Iterator[str]:
    """What a module may import of the package; names that are no modules lead to no file."""
    around = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for source, names in IMPORT.findall(file.read_text("utf-8")):
        if source.startswith((".", PACKAGE.name)):
            source = resolve_name(source, around)
            yield source
            yield from (f"{source}.{name}" for name in re.findall(r"\w+", names))
