"""What is known of the jobs of a sweep, from anywhere: small files that are written by whoever knows.

``jobs.json`` in the sweep's folder says what the jobs are; ``job.json`` in a job's folder how it stands: its own
process writes its beginning and its end, whoever has started it what it could not tell itself.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import write_whole
from .places import peek_json

JOB, SWEEP, RESULTS = "job.json", "jobs.json", "results.json"
CLUSTER = "cluster.json"  # what a cluster calls a job; written once, by who has submitted it
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
ENDS = (DONE, FAILED)
BORN = time.time()


class Standing(NamedTuple):
    """How a job stands.

    Args:
        name: Its folder's name, which is its number.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        overrides: What tells it from the others.
        reason: Why it has failed, or what it waits for.
        seconds: How long it took, or has been running; None: not known.
        folder: Its folder.
        place: Where it runs, as whoever has started it calls that.
    """

    name: str
    state: str
    overrides: tuple[str, ...]
    reason: str
    seconds: float | None
    folder: Path
    place: str = ""


def write(folder: Path, file: str = JOB, /, **facts: Any) -> None:
    """Add facts to a small file in a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {**read(folder, file), **facts}
    write_whole(folder / file, json.dumps(known, indent=1) + "\n")


def read(folder: Path, file: str = JOB) -> dict[str, Any]:
    """What a small file in a folder says; nothing where it is missing or damaged."""
    return peek_json(folder / file)


def begin(folder: Path, overrides: Sequence[str], pid: int | None = None) -> None:
    """Say that a job is at work in a process of this machine, by default in this one."""
    here = {"host": socket.gethostname(), "pid": pid or os.getpid(), "started": time.time()}
    write(folder, state=RUNNING, reason="", seconds=None, overrides=list(overrides), **here)


def end(folder: Path, reason: str | None) -> None:
    """Say that the job of this process has ended.

    Args:
        folder: Its folder.
        reason: Why it has failed; None: it has not.
    """
    seconds = time.time() - read(folder).get("started", BORN)
    write(folder, state=DONE if reason is None else FAILED, reason=reason or "", seconds=seconds)


def standings(folder: Path) -> list[Standing]:
    """How the jobs of a sweep stand, in their order; those that have not begun and were not submitted come last.

    Args:
        folder: The sweep's folder.
    """
    places = {file.parent for name in (JOB, RESULTS) for file in folder.glob(f"*/{name}")} - dropped(folder)
    found = [standing(place) for place in sorted(places, key=lambda place: (len(place.name), place.name))]
    planned = {folder / str(number): tuple(words) for number, words in enumerate(read(folder, SWEEP).get("jobs", []))}
    rest = (place for place in planned if place not in places)
    return found + [Standing(place.name, WAITING, planned[place], "", None, place) for place in rest]


def dropped(folder: Path) -> set[Path]:
    """Folders of failed jobs that a sweep does not have any more."""
    planned = len(read(folder, SWEEP).get("jobs", []))
    numbered = (file.parent for file in folder.glob(f"*/{JOB}") if planned and file.parent.name.isdecimal())
    return {place for place in numbered if int(place.name) >= planned and standing(place).state == FAILED}


def standing(folder: Path) -> Standing:
    """How the job of a folder stands."""
    facts, results = read(folder), (folder / RESULTS).is_file()
    state = facts.get("state", DONE if results else WAITING)
    reason, seconds = facts.get("reason", ""), facts.get("seconds")
    if state == RUNNING:
        seconds = time.time() - facts.get("started", time.time())
        if not alive(facts):
            state, reason = FAILED, "its process is gone and has left no word"
    return Standing(folder.name, state, tuple(facts.get("overrides", ())), reason, seconds, folder)


def counted(jobs: Sequence[Standing]) -> str:
    """How many jobs stand how, in words."""
    counts = Counter(job.state for job in jobs)
    return ", ".join(f"{counts[name]} {name}" for name in (DONE, FAILED, RUNNING, WAITING))


def seconds_left(jobs: Sequence[Standing]) -> float | None:
    """Estimate of the seconds until all have ended, from those that are done; None where these say nothing.

    Args:
        jobs: The jobs of a sweep; as many are believed to run at once as do now.
    """
    took = [job.seconds for job in jobs if job.state == DONE and job.seconds]
    running = [job.seconds or 0.0 for job in jobs if job.state == RUNNING]
    if not took or not running:
        return None
    mean = sum(took) / len(took)
    waiting = mean * sum(job.state == WAITING for job in jobs)
    return (waiting + sum(max(mean - seconds, 0.0) for seconds in running)) / len(running)


def alive(facts: dict[str, Any]) -> bool:
    """Whether the process of a job that says to be running is there, as far as it can be seen from this machine."""
    import psutil  # takes its time at every start, and is asked of running jobs alone

    return facts.get("host") != socket.gethostname() or psutil.pid_exists(int(facts["pid"]))
