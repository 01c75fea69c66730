"""What stays on disk once a run has ended (``keep``), and room for what is about to be written.

In a run's folder ``keep=all | recovered | none`` decides at once. The cache is shared: what a run with ``keep=all`` has
used stays there. The rest (checkpoints, teacher targets, level tables) goes when the last run or sweep at work ends
well, unless a run's folder has it too; a recovered checkpoint, which others rarely ask for, goes with its run. A sweep
with failed jobs leaves all of it, so that the same command fills the gaps. Answers and verdicts are small and stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .files import aside, discard, remove
from .store import TAKEN

LOCK = ".lock"  # in the folder of a run or of a sweep
# Options of NFS and Lustre with which flock(2) is not told to the server.
LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}
KEPT = "kept"  # marks an entry of the cache that a run with keep=all has used
LARGE = ("prune", "recover", "targets", "levels")  # folders of the cache that hold tensors
FIX = "free the disk, set keep=recovered or keep=none for your sweeps, or set paths.output_dir elsewhere"


def require_space(folder: Path, needed: int, what: str, fix: str = FIX) -> int:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: Where it will be written; may not exist yet.
        needed: Its size in bytes.
        what: Start of the message.
        fix: End of the message.

    Returns:
        Free bytes.

    Raises:
        UserError: Says what is needed and what there is.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"{what}: needs about {needed / 1e9:.3g} GB in {folder}, {free / 1e9:.3g} GB are free; {fix}")
    return free


def chosen(names: Sequence[str], keep: str) -> tuple[str, ...]:
    """Those of a run's checkpoints, in their order, that stay."""
    return tuple({"all": names, "recovered": names[-1:], "none": ()}[keep])


def surplus(folder: Path, keep: str) -> list[str]:
    """Names of the checkpoints in the folder of a finished run that do not stay.

    Args:
        folder: The run's folder.
        keep: ``all``, ``recovered`` or ``none``.
    """
    there = [name for name in ("pruned", "recovered") if (folder / name).is_dir()]
    return sorted({*there} - {*chosen(there, keep)})


def tidy(folder: Path, keep: str) -> None:
    """Remove them; see `surplus`."""
    for name in surplus(folder, keep):
        discard(folder / name)


def mark(entry: Path) -> None:
    """Say that an entry of the cache stays, whatever later runs keep."""
    if not (entry / KEPT).exists():
        (entry / KEPT).touch()


def drop(entry: Path) -> None:
    """Remove an entry of the cache that nobody is at work on, no run's folder has too, and none has marked."""
    if not entry.is_dir() or (entry / KEPT).exists():
        return
    # Where the lock is held, somebody waits for it.
    with contextlib.suppress(Timeout), FileLock(entry.with_name(f"{entry.name}.lock"), timeout=0):
        if not _in_use(entry):
            discard(entry)


def _in_use(entry: Path) -> bool:
    """Whether a run's folder links to an entry, or holds the copy that it has taken."""
    taken = (entry / TAKEN).read_text(encoding="utf-8").splitlines() if (entry / TAKEN).is_file() else []
    linked = any(file.stat().st_nlink > 1 for file in entry.rglob("*.safetensors"))
    return linked or any(Path(place).exists() for place in taken)


@contextlib.contextmanager
def alone_in(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process is at work on the folder of a run or of a sweep, such as the same command once more.

    Args:
        folder: The folder; made if it does not exist.
        tell: Called with a line where somebody is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{folder}: another process is at work here; waiting for it")
        lock.acquire()
    except NotImplementedError as error:
        raise UserError(
            f"paths.output_dir={folder}: this file system knows no file locks; choose another one"
        ) from error
    try:
        yield
    finally:
        lock.release()


def require_shared_locks(folder: Path) -> None:
    """Refuse a folder for several machines where each would see its own locks only.

    Raises:
        UserError: Says how it is mounted.
    """
    import psutil  # takes its time at every start

    around = [mount for mount in psutil.disk_partitions(all=True) if folder.absolute().is_relative_to(mount.mountpoint)]
    # Of several at one place the last one counts.
    mount = max(reversed(around), key=lambda mount: len(mount.mountpoint), default=None)
    if mount and (told := LOCAL_LOCKS & {*mount.opts.split(",")}):
        raise UserError(
            f"paths.output_dir={folder}: {mount.mountpoint} ({mount.fstype}) is mounted with "
            f"{', '.join(sorted(told))}, so that machines do not see each other's locks; mount it without, or choose "
            "another file system"
        )


@contextlib.contextmanager
def at_work(cache: Path, clean: bool) -> Iterator[None]:
    """Hold what lies in the cache until the block ends; even a kill lets go.

    Args:
        cache: The cache folder.
        clean: Remove what no longer needs to stay when the block ends well and nobody else is at work.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / "at_work.lock").open("a+")  # network file systems share locks of readable files only
    except OSError as error:
        raise UserError(f"paths.cache_dir={cache}: {error.strerror}; give a folder of yours") from error
    with lock as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
        except OSError as error:
            raise UserError(
                f"paths.cache_dir={cache}: this file system knows no file locks ({error.strerror}); "
                "on Lustre they need the mount option flock; choose another one"
            ) from error
        yield
        if not clean:
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for entry in (path for name in LARGE for path in (cache / name).glob("[!.]*") if path.suffix != ".work"):
                drop(entry)
            for left in (path for name in LARGE for path in (cache / name).glob(aside(Path("*")).name)):
                remove(left)
