"""Host memory that this process may still take: what the machine has left, and what its cgroups leave of that.

Containers and jobs of a cluster are cgroups; a process beyond the limit of one is killed, whatever the machine has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a group by version: its limit, what it holds, and the pages of files in that, which go when they have to.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def free_memory() -> int:
    """Bytes, the swap space with them."""
    swap = psutil.swap_memory().free
    return min([psutil.virtual_memory().available, *_left()]) + swap


def own_group() -> tuple[Path, int]:
    """The folder of this process's cgroup for memory, and the version of its files.

    Raises:
        OSError: This system has no cgroups.
    """
    path = ""
    for line in OWN.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            return GROUPS / "memory" / path.lstrip("/"), 1
    return GROUPS / path.lstrip("/"), 2


def _left() -> Iterator[int]:
    """What every group that this process is in, and that has a limit, may still hold."""
    with contextlib.suppress(OSError):
        folder, version = own_group()
        limit, used, pages = FILES[version]
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or without a limit
                most, held = (int((group / name).read_text()) for name in (limit, used))
                lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield most - held + sum(int(count) for name, count in lines if name in pages)
