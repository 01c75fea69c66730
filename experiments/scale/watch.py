"""A program under a limit of memory, with the peak of what it and its children hold, by phase."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from efficientllava.runtime.limits import FILES, own_group

PERIOD = 0.2  # seconds between two looks
HELD = ("RssAnon:", "RssShmem:")  # mapped files are not the program's: the system takes them back when it has to


@dataclass(frozen=True)
class Watched:
    """What a program took.

    Args:
        code: Its exit status.
        seconds: How long it ran.
        cpu: CPU seconds of it and its children.
        peaks: By phase, most bytes of anonymous and shared pages of the whole tree of processes.
        limited: Whether a cgroup held it to its limit.
    """

    code: int
    seconds: float
    cpu: float
    peaks: Mapping[str, int]
    limited: bool

    @property
    def peak(self) -> int:
        """The largest one."""
        return max(self.peaks.values(), default=0)


def held(pid: int) -> int:
    """Bytes of anonymous and shared pages of a process and its children; 0 for one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(map(_held, (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))))
    return 0


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(HELD))


@contextlib.contextmanager
def limited(size: int) -> Iterator[Path | None]:
    """A cgroup, of version 1 or 2, inside of this process's own, that may hold so many bytes.

    Yields:
        Its folder; None where none can be made.
    """
    place, version = own_group()
    name, swapped = FILES[version][0], {1: "memory.swappiness", 2: "memory.swap.max"}[version]
    group = place / f"scale-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(size))
        if (group / swapped).exists():
            (group / swapped).write_text("0")  # what is swapped out would not count
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def last_line(log: Path) -> str:
    """What a program said last."""
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]


def watch(command: Sequence[str], environment: Mapping[str, str], limit: int, told: Path, log: Path) -> Watched:
    """Run a program.

    Args:
        command: What is run.
        environment: Beside this process's own.
        limit: Bytes that it may hold.
        told: File in which the program names its present phase.
        log: Takes what it says.
    """
    peaks, began = defaultdict[str, int](int), time.perf_counter()
    with limited(limit) as group, log.open("w") as out:

        def enter() -> None:
            if group:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=out, preexec_fn=enter)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            phase = told.read_text().strip() if told.exists() else "other"
            peaks[phase] = max(peaks[phase], held(process.pid))
            time.sleep(PERIOD)
        _, status, used = ended
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    return Watched(process.returncode, seconds, used.ru_utime + used.ru_stime, peaks, group is not None)
