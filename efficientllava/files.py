"""Files and folders that are written whole or not at all: a kill or a full disk leaves what was there before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, disk_full


@contextmanager
def whole_file(path: Path, fix: str = "free the disk or set paths.output_dir") -> Iterator[Path]:
    """Write a file under a temporary name and rename it when the block ends well.

    Args:
        path: Final name; an existing file is replaced.
        fix: What a user can do where it cannot be written.

    Yields:
        The file to write, in the same folder.

    Raises:
        UserError: The file cannot be written (full disk, no permission).
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {fix}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder under a temporary name and rename it when the block ends well.

    Args:
        folder: Final name; an existing folder is replaced.

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
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except Exception as error:
        if disk_full(error):
            raise UserError(f"{folder}: the disk is full; free some space or set paths.output_dir elsewhere") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def as_umask(folder: Path) -> None:
    """Give the files of a folder the permissions that a new file gets here; safetensors keeps its own from others."""
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill leaves no half of it under its name."""
    gone = folder.with_name(f".{folder.name}.gone.partial")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
