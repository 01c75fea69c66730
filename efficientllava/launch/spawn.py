"""Jobs of a sweep as ordinary processes on leased slots: the GPUs of this machine, or shares of its cores.

A job is never run inside the sweep's own process, so that a crash, an out-of-memory or a process group of a job is its
own affair. Every job leads a process group, which ends as a whole.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime import state
from ..runtime.errors import UserError

LOG = "job.log"  # what a job prints, in its folder, after its command
PROMPT = "\n$ "
ABOVE = "see the messages above"  # end of a message that says less than those before it
GRACE = 10.0  # seconds between the polite and the certain end of a job
POLL = 0.1  # seconds between two looks at the jobs


@dataclass(frozen=True)
class Job:
    """One process of a sweep.

    Args:
        number: Its number in the sweep.
        name: What tells it from the others, such as its overrides.
        command: What to run.
        folder: Its folder; made if it does not exist. What it prints is appended to ``job.log`` in it.
        environment: What it is told beside the environment of the process that starts the sweep.
    """

    number: int
    name: str
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class AtWork:
    """A job at work.

    Args:
        job: The job.
        slot: Where: the index of the slot that it has leased, or what a cluster calls it.
        started: Moment of its start, of `time.monotonic`.
    """

    job: Job
    slot: int | str
    started: float


@dataclass
class Running(AtWork):
    """A job at work in a process that this one has started.

    Args:
        slot: Index of the slot that it has leased.
        process: Its process, leader of a group.
        late: Moment after which it counts as hanging; None: never.
    """

    slot: int
    process: subprocess.Popen[bytes]
    late: float | None


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Args:
        job: The job.
        code: Exit code, 0 for success; negative: the signal that ended it.
        seconds: How long it took.
        hung: Whether it was ended because it took too long.
        before: Whether it was finished before and no process was started.
        told: Why it failed, from whoever has ended it; empty: its own last words count.
    """

    job: Job
    code: int = 0
    seconds: float = 0.0
    hung: bool = False
    before: bool = False
    told: str = ""

    @property
    def failed(self) -> bool:
        """Whether it did not succeed."""
        return self.hung or self.code != 0

    def reason(self) -> str:
        """Why it failed, in one line: its own last error line if it has told one."""
        if self.told:
            return self.told
        if self.hung:
            return f"ended after {self.seconds / 60:.1f} min without result (hydra.launcher.timeout_min)"
        lines = (self.job.folder / LOG).read_text("utf-8", "replace").rpartition(PROMPT)[2].splitlines()
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if told:
            return next((line for line in reversed(told) if not line.endswith(ABOVE)), told[-1])
        signs = "out of memory, if nobody has ended it" if self.code == -signal.SIGKILL else "see its log"
        how = f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        return f"ended by {how}, {signs}: {self.job.folder / LOG}"


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands.

    Args:
        total: Number of jobs.
        running: Jobs at work.
        ended: Jobs that have ended, in the order of their ends.
        slots: Number of slots.
    """

    total: int
    running: tuple[AtWork, ...]
    ended: tuple[Ended, ...]
    slots: int

    @property
    def failed(self) -> int:
        """Number of jobs that have failed."""
        return sum(entry.failed for entry in self.ended)

    def seconds_left(self) -> float | None:
        """Estimate from the jobs that have succeeded; None before the first."""
        took = [entry.seconds for entry in self.ended if not (entry.failed or entry.before)]
        if not took:
            return None
        mean, now = sum(took) / len(took), time.monotonic()
        waiting = (self.total - len(self.ended) - len(self.running)) * mean
        return (waiting + sum(max(mean - (now - job.started), 0.0) for job in self.running)) / self.slots


Show = Callable[[Progress], None]


def gpu_slots(gpus: Sequence[str], per_job: int) -> list[dict[str, str]]:
    """Environments that give each job its own GPUs.

    Args:
        gpus: Names of GPUs as ``CUDA_VISIBLE_DEVICES`` takes them.
        per_job: GPUs of one job, >= 1.

    Returns:
        One environment per slot; GPUs that do not fill a slot stay idle.

    Raises:
        UserError: There are fewer GPUs than one job wants.
    """
    if len(gpus) < per_job:
        raise UserError(
            f"hydra.launcher.gpus_per_job={per_job}: {len(gpus)} GPUs are visible; lower it, or choose trainer=cpu"
        )
    threads = max(1, cores() // (len(gpus) // per_job) // per_job)
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[start : start + per_job]), "OMP_NUM_THREADS": str(threads)}
        for start in range(0, len(gpus) - per_job + 1, per_job)
    ]


def cpu_slots(count: int) -> list[dict[str, str]]:
    """Environments that divide the cores of this machine among jobs, and show no GPU.

    Args:
        count: Number of slots, >= 1.
    """
    return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, cores() // count))} for _ in range(count)]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    timeout: float | None = None,
    show: Show = lambda _: None,
    finished: Collection[int] = (),
) -> list[Ended]:
    """Run all jobs, as many at once as there are slots; a failed one stops no other.

    Args:
        jobs: What to run, in this order.
        slots: What to add to the environment of a job, per slot; at least one where there is something to do.
        timeout: Seconds after which a job is ended; None: never.
        show: Called whenever a job has started or ended, and about every second.
        finished: Numbers of jobs for which nothing is left to do: no process is started.

    Returns:
        One result per job, in the order of the jobs.

    Raises:
        KeyboardInterrupt: After all jobs at work have been ended.
    """
    waiting = [job for job in reversed(jobs) if job.number not in finished]
    free = list(reversed(range(len(slots))))
    running: list[Running] = []
    ended = [Ended(job, before=True) for job in jobs if job.number in finished]
    show(Progress(len(jobs), (), tuple(ended), len(slots)))
    shown = time.monotonic()
    try:
        while waiting or running:
            changed = False
            while waiting and free:
                running.append(_start(waiting.pop(), free.pop(), slots, timeout))
                changed = True
            for entry in [entry for entry in running if _is_over(entry)]:
                ended.append(_end(entry))
                running.remove(entry)
                free.append(entry.slot)
                changed = True
            if changed or time.monotonic() - shown > 1:
                show(Progress(len(jobs), tuple(running), tuple(ended), len(slots)))
                shown = time.monotonic()
            if not changed:
                time.sleep(POLL)
    finally:
        stop([entry.process for entry in running])
    by_job = {entry.job.number: entry for entry in ended}
    return [by_job[job.number] for job in jobs]


def _start(job: Job, slot: int, slots: Sequence[Mapping[str, str]], timeout: float | None) -> Running:
    process, now = start(job, {**os.environ, **job.environment, **slots[slot]}), time.monotonic()
    return Running(job, slot, now, process, None if timeout is None else now + timeout)


def start(
    job: Job, environment: Mapping[str, str], log: str = LOG, before: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """Start a job as the leader of a process group.

    Args:
        job: The job.
        environment: All of its environment.
        log: Name of the file in its folder that what it prints is appended to, after its command.
        before: Called in the new process before the command takes over.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / log).open("ab") as handle:  # two sweeps may be at work in one folder
        handle.write(f"{PROMPT}{shlex.join(job.command)}\n".encode())
        handle.flush()
        return subprocess.Popen(
            job.command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before,
        )


def _is_over(entry: Running) -> bool:
    return entry.process.poll() is not None or (entry.late is not None and time.monotonic() > entry.late)


def _end(entry: Running) -> Ended:
    hung = entry.process.poll() is None
    stop([entry.process])
    ended = Ended(entry.job, entry.process.returncode, time.monotonic() - entry.started, hung)
    if ended.failed:
        state.write(entry.job.folder, state="failed", reason=ended.reason())
    return ended


def stop(leaders: Sequence[subprocess.Popen[bytes]]) -> None:
    """End jobs with everything that they have started: politely, and after a grace period for certain.

    Args:
        leaders: Leaders of process groups; those that are over lose only what they have left behind.
    """
    for process in leaders:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in leaders:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is empty: nothing is left to end
        os.killpg(process.pid, number)
