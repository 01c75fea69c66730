"""The jobs of a sweep on a cluster: submit what is not there, watch, and take the word of the folders for the rest.

Whoever waits here may go away: the jobs stay, each says in its folder how it stands, and the same command finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..runtime import state
from .spawn import (
    LOG,
    AtWork,
    Ended,
    Job,
    Progress,
    Show,
    start,
    stop,
)

GRACE = 10.0  # seconds in which a second Ctrl-C cancels the jobs
LOOKS = 2  # at a job that has left the queue, until its folder has the last word: shared file systems are late
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
STOPPED = (130, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a job that was asked to end
CANCELLED = "cancelled"
UNSEEN = "it is gone and has left no word"
ASKED = "asked to end: cancelled or preempted"


class Cluster(Protocol):
    """What runs jobs elsewhere.

    Attributes:
        name: Its name, as ``hydra/launcher`` says it.
        stays: Whether the jobs go on when this process ends.
    """

    name: str
    stays: bool

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand jobs over; returns what the cluster calls each."""
        ...

    def look(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]] | None:
        """Those of some jobs that the cluster knows: whether each is still its own, and a word on how it is there.

        None: the cluster does not answer.
        """
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, wherever they are."""
        ...

    def how_to_cancel(self, ids: Sequence[str], folder: Path) -> str:
        """The line that does so later."""
        ...


def supervise(jobs: Sequence[Job], cluster: Cluster, show: Show, finished: Collection[int], poll: float) -> list[Ended]:
    """Run jobs on a cluster and wait for them; a failed one stops no other.

    Args:
        jobs: The jobs.
        cluster: Where.
        show: Called with the state of the sweep after every look.
        finished: Numbers of jobs for which nothing is left to do.
        poll: Seconds between two looks.

    Returns:
        One result per job, in the order of the jobs.

    Raises:
        KeyboardInterrupt: The jobs stay where they are, unless they cannot stay or there is a second one.
    """
    ended = [Ended(job, before=True) for job in jobs if job.number in finished]
    pending = _submitted([job for job in jobs if job.number not in finished], cluster)
    gone: dict[str, int] = {}
    try:
        while True:
            seen = cluster.look([*pending]) if pending else {}
            for key, job in list(pending.items()) if seen is not None else ():
                inside, word = (seen or {}).get(key, (False, ""))
                gone[key] = 0 if inside else gone.get(key, 0) + 1
                told = state.read(job.folder).get("state") in (state.DONE, state.FAILED)
                if not inside and (told or gone[key] >= LOOKS):
                    ended.append(_ended(pending.pop(key), word))
            show(_progress(jobs, pending, ended, seen or {}))
            if not pending:
                break
            time.sleep(poll)
    except KeyboardInterrupt:
        _leave(pending, cluster)
        raise
    by_job = {entry.job.number: entry for entry in ended}
    return [by_job[job.number] for job in jobs]


def _submitted(jobs: Sequence[Job], cluster: Cluster) -> dict[str, Job]:
    """Jobs by what the cluster calls them; those that it still has from an earlier call are not submitted again."""
    known = {str(state.read(job.folder, state.CLUSTER).get(cluster.name, "")): job for job in jobs}
    seen = cluster.look([key for key in known if key]) or {}
    pending = {key: job for key, job in known.items() if seen.get(key, (False, ""))[0]}
    there = {job.number for job in pending.values()}
    fresh = [job for job in jobs if job.number not in there]
    for job in fresh:  # before they can have begun
        state.write(job.folder, state=state.WAITING, reason="", seconds=None, overrides=job.name.split(" "))
    for key, job in zip(cluster.submit(fresh) if fresh else (), fresh, strict=True):
        state.write(job.folder, state.CLUSTER, **{cluster.name: key})
        pending[key] = job
    return pending


def _ended(job: Job, word: str) -> Ended:
    """The result of a job that has left the cluster: what its folder says, and what the cluster says of one cut off."""
    facts = state.read(job.folder)
    seconds = facts.get("seconds") or 0.0
    if facts.get("state") == state.DONE:
        return Ended(job, 0, seconds)
    reason = word or (facts.get("state") == state.FAILED and facts.get("reason")) or UNSEEN
    state.write(job.folder, state=state.FAILED, reason=reason)
    return Ended(job, 1, seconds, told=reason)


def _progress(
    jobs: Sequence[Job], pending: Mapping[str, Job], ended: Sequence[Ended], seen: Mapping[str, tuple[bool, str]]
) -> Progress:
    running: list[AtWork] = []
    for key, job in pending.items():
        facts = state.read(job.folder)
        if facts.get("state") == state.RUNNING:
            running.append(AtWork(job, key, time.monotonic() - (time.time() - facts["started"])))
        elif (word := seen.get(key, (False, ""))[1]) and facts.get("reason") != word:
            state.write(job.folder, reason=word)  # what it waits for
    return Progress(len(jobs), tuple(running), tuple(ended), max(1, len(running)))


def _leave(pending: Mapping[str, Job], cluster: Cluster) -> None:
    """What Ctrl-C means: jobs that can stay do, until it is said twice."""
    if not pending:
        return
    if cluster.stays:
        folder = next(iter(pending.values())).folder.parent
        print(
            f"\n{len(pending)} jobs stay on the cluster ({cluster.name}); Ctrl-C within {GRACE:.0f} s cancels them"
            f"\n  cancel them later:   {cluster.how_to_cancel([*pending], folder)}"
            f"\n  how they stand:      python -m efficientllava.report {shlex.quote(str(folder))} --watch"
            f"\n  table and page:      python -m efficientllava.report {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        try:
            time.sleep(GRACE)
            return
        except KeyboardInterrupt:
            pass
    cluster.cancel([*pending])
    for job in pending.values():
        if state.read(job.folder).get("state") != state.DONE:
            state.write(job.folder, state=state.FAILED, reason=CANCELLED)
    print(f"{len(pending)} jobs cancelled", file=sys.stderr)


class Work:
    """One job on the machine that a cluster has given it.

    Args:
        job: The job.
        environment: All of its environment.
        rank: Its index among the processes of the job that the cluster has started.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], rank: int = 0) -> None:
        self.job, self.rank = job, rank
        log = f"job.{rank}.log" if rank else LOG
        self._process: subprocess.Popen[bytes] | None = start(job, environment, log, _of_this_process)

    def wait(self) -> int:
        """Wait for the end of the job and note it; returns the exit code."""
        process = self._process
        assert process is not None
        while process.poll() is None:  # short looks: a signal's handler may want to stop the process meanwhile
            time.sleep(0.2)
        code = process.returncode
        if code and not self.rank and state.read(self.job.folder).get("state") != state.FAILED:
            state.end(self.job.folder, ASKED if code in STOPPED else Ended(self.job, code).reason())
        return code

    def stop(self) -> None:
        """End it, and everything that it has started."""
        if self._process is not None:
            stop([self._process])


def _of_this_process() -> None:
    """In a job's process: end with whoever has started it, and leave the cluster's signals to them."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGTERM)


def asked_devices(trainer: Mapping[str, Any], found: int) -> int:
    """Processes of a job on one machine.

    Args:
        trainer: The trainer node.
        found: What ``auto`` finds there, which is not known here.
    """
    devices = trainer.get("devices", 1)
    if str(devices) in ("auto", "-1"):
        return found
    return len(devices) if isinstance(devices, list) else int(devices)
