"""Files and folders that are written whole or not at all: a kill, a power cut or a full disk leaves what was there.

A folder that holds a file `SUMS` is sealed: what `put` brings into it is noted there before it gets its name, in the
format of ``sha256sum``. Of a name that is written again, the last two lines count: a kill may fall between the line and
the renaming.

`Lines` are lines of JSON in a file that several processes add to; each carries a digest of itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from filelock import FileLock

from .errors import UserError, disk_full

SUMS = "SHA256SUMS"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it when the block ends well; of two writers the last one counts.

    Args:
        path: Final name; an existing file is replaced.

    Yields:
        The file to write, in the same folder.

    Raises:
        UserError: The file cannot be written (full disk, no permission), or a folder has its name.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{threading.get_native_id()}.part")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        put(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free the disk or set paths.output_dir"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_lines(values: Iterable[Any], **options: Any) -> str:
    """Values as lines of JSON; ``options`` are those of ``json.dumps``."""
    return "".join(json.dumps(value, **options) + "\n" for value in values)


@contextmanager
def whole_folder(folder: Path, fix: str = "set paths.output_dir elsewhere") -> Iterator[Path]:
    """Write a folder under a temporary name and rename it when the block ends well.

    Args:
        folder: Final name; an existing folder is replaced.
        fix: What a user can do where the disk is full, beside making room.

    Yields:
        The folder to write into.

    Raises:
        UserError: The disk is full.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        put(partial, folder)
    except Exception as error:
        if disk_full(error):
            raise UserError(f"{folder}: the disk is full; free some space or {fix}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put(part: Path, path: Path) -> None:
    """Give a finished file or folder its name, once all of it is on the disk.

    Args:
        part: What was written, on the same file system.
        path: Its name; what stands there is replaced.
    """
    as_umask(part)
    for each in (part, *part.rglob("*")) if part.is_dir() else (part,):
        _sync(each)
    if (path.parent / SUMS).is_file():
        seal(path.parent, {path.name: sha256(part)})
    if path.is_dir() and not path.is_symlink():
        discard(path)  # a rename replaces no folder
    elif part.is_dir():
        path.unlink(missing_ok=True)  # nor does that of a folder replace a file
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no sync of folders
            raise
    finally:
        os.close(handle)


def as_umask(path: Path) -> None:
    """Give a file, or those of a folder, the permissions of a new one; safetensors keeps its own from others.

    What is shared with another folder stays as it is.
    """
    probe = (path if path.is_dir() else path.parent) / f".umask.{os.getpid()}.{threading.get_ident()}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else (path,):
        found = file.stat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_mode & 0o777 != mode:
            file.chmod(mode)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill leaves no half of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone.partial")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def aside(path: Path) -> Path:
    """What a damaged file or folder is called once it is set aside."""
    return path.with_name(f".{path.name}.damaged")


def set_aside(path: Path) -> None:
    """Rename a damaged file or folder, so that it is in nobody's way; an earlier one of its name goes."""
    remove(aside(path))
    path.replace(aside(path))


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Digest of a file's content, or of the names and contents of a folder's files."""
    if not path.is_dir():
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{sha256(file)}  {file.relative_to(path)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def sources_below(folder: str | Path | None) -> list[Path]:
    """Python and YAML files of a folder that is the user's own; none without one."""
    return sorted(f for f in Path(folder).expanduser().rglob("*") if f.suffix in (".py", ".yaml")) if folder else []


def seal(folder: Path, sums: Mapping[str, str]) -> None:
    """Note digests of files of a folder, by name, in its file `SUMS`; several processes may do so at once."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    with (folder / SUMS).open("ab+", buffering=0) as handle:
        handle.seek(max(0, handle.seek(0, 2) - 1))
        torn = handle.read(1) not in (b"", b"\n")  # what a power cut has left must not spoil the next line
        handle.write(("\n" * torn + lines).encode())
        os.fsync(handle.fileno())


def sealed(folder: Path) -> dict[str, list[str]]:
    """The digests that count, by name; none where there is no file `SUMS`, and none of a line that is no such line."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            digest, _, name = line.partition("  ")
            if len(digest) == 64 and name:
                found[name] = [*found.get(name, [])[-1:], digest]
    return found


log = logging.getLogger(__name__)
SUM = "sum"  # key of a line's digest


class Lines:
    """Small values on disk, one line each.

    What a kill has left of the last line is cut off by whoever adds the next one. Whole lines that are not what was
    written are set aside with one warning; to whoever reads it is as if they had never been there.

    Args:
        path: The file; it and its folder are made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0
        self._mutex = threading.RLock()
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> None:
        """Hold the file: nobody else adds a line until the block ends."""
        self._mutex.acquire()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            self._mutex.release()
            raise self._refused(error) from error

    def __exit__(self, *_: object) -> None:
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
                    os.truncate(handle.fileno(), handle.seek(0, 2) - _tail(handle))
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
        bad = [line + b"\n" for line in lines if _value(line) is None]
        if lines and not bad:
            return
        there = aside(self.path)
        there.write_bytes(b"".join(bad))
        what = f"{len(bad)} of {len(lines)} lines are damaged" if lines else "is empty"
        log.warning("%s: %s; set aside (%s), what they held is found out again", self.path, what, there.name)
        if not good:
            self.path.unlink()
        else:
            with whole_file(self.path) as file:
                file.write_bytes(b"".join(good))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps({**value, SUM: _sum({**value})}).encode() + b"\n"


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
    if not (size := handle.seek(0, 2)):
        return 0
    with mmap(handle.fileno(), size, access=ACCESS_READ) as content:
        return size - 1 - content.rfind(b"\n")
