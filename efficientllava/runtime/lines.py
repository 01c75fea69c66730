"""Lines of JSON in a file that several processes add to; each carries a digest of itself."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import UserError
from .files import aside, whole_file

log = logging.getLogger(__name__)
SUM = "sum"  # key of a line's digest


class Lines:
    """Small values on disk, one line each.

    What a kill has left of the last line is cut off by whoever adds the next one. Whole lines that are not what was
    written are set aside with one warning; to whoever reads it is as if they had never been there.

    Args:
        path: The file; it and its folder are made with the first line.
        shared: Whether other processes may add to it too.
    """

    def __init__(self, path: Path, shared: bool = True) -> None:
        self.path = path
        self._inode, self._offset = 0, 0
        self._mutex = threading.RLock()
        self._lock = FileLock(path.with_name(f".{path.name}.lock")) if shared else None

    def __enter__(self) -> None:
        """Hold the file: nobody else adds a line until the block ends."""
        self._mutex.acquire()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._lock:
                self._lock.acquire()
        except OSError as error:
            self._mutex.release()
            raise self._refused(error) from error

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.release()
        self._mutex.release()

    def new(self) -> list[dict[str, Any]]:
        """The lines that were added since the last look."""
        with self._mutex:
            values, damaged = self._read()
            if damaged:
                with self:
                    self._repair()
            return values

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are in the file when this returns.

        Raises:
            UserError: The file cannot be written.
        """
        with self:
            try:
                with self.path.open("ab+") as handle:
                    content = _tail(handle)
                    if content:
                        os.truncate(handle.fileno(), handle.seek(0, 2) - content)
                    handle.write(b"".join(map(_line, values)))
            except OSError as error:
                raise self._refused(error) from error

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror}); free the disk")

    def _read(self) -> tuple[list[dict[str, Any]], bool]:
        """New lines, and whether there is something to repair."""
        try:
            with self.path.open("rb") as handle:
                found = os.fstat(handle.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._inode, self._offset = found.st_ino, 0
                handle.seek(self._offset)
                added = handle.read()
        except OSError:
            return [], False
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        values = [_value(line) for line in whole.split(b"\n")[:-1]]
        return [value for value in values if value is not None], None in values or not found.st_size

    def _repair(self) -> None:
        """Keep what is whole; somebody else may have done so already."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        good = [line + b"\n" for line in lines if _value(line) is not None]
        if len(good) == len(lines) and lines:
            return
        bad = len(lines) - len(good)
        there = aside(self.path)
        there.write_bytes(b"".join(line + b"\n" for line in lines if _value(line) is None))
        what = f"{bad} of {len(lines)} lines are damaged" if lines else "is empty"
        log.warning("%s: %s; set aside (%s), what they held is found out again", self.path, what, there.name)
        if not good:
            self.path.unlink()
        else:
            with whole_file(self.path) as file:
                file.write_bytes(b"".join(good))


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(value))
    return json.dumps({**json.loads(text), SUM: _sum(json.loads(text))}).encode() + b"\n"


def _sum(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _value(line: bytes) -> dict[str, Any] | None:
    """The value of a line; None where it is not what was written."""
    try:
        value = json.loads(line)
        return value if value.pop(SUM) == _sum(value) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _tail(handle: Any) -> int:
    """Bytes of a last line without an end."""
    size, step, tail = handle.seek(0, 2), 1 << 16, 0
    while tail < size:
        start = max(0, size - tail - step)
        handle.seek(start)
        block = handle.read(size - tail - start)
        if (at := block.rfind(b"\n")) >= 0:
            return tail + len(block) - at - 1
        tail += len(block)
    return tail
