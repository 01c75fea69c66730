"""Processes of this machine: a job of a sweep, as many jobs as there are slots, and the processes of one run.

A job is never run inside the sweep's own process, so that a crash, an out-of-memory or a process group of a job is its
own affair. Every job leads a process group, which ends as a whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ..runtime import DEBUG, TRACEBACKS, UserError, state
from ..runtime.processes import program
from ..settings.compose import quoted
from . import Job, Runner

LOG = "job.log"  # what a job prints, in its folder, after its command
PROMPT = "\n$ "
ABOVE = "see the messages above"  # end of a message that says less than those before it
GRACE = 10.0  # seconds between the polite and the certain end of a process
POLL = 0.2  # seconds between two looks at the jobs
STOPPED = (130, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a job that was asked to end
ASKED = "asked to end: cancelled or preempted"
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


class Work:
    """One job at work on this machine; its beginning and its end stand in its folder.

    Args:
        job: The job.
        environment: All of its environment.
        rank: Its index among the processes of the job that a cluster has started; the first one speaks for it.
        before: Called in the new process before the command takes over.
    """

    def __init__(
        self, job: Job, environment: Mapping[str, str], rank: int = 0, before: Callable[[], None] | None = None
    ) -> None:
        self.job, self.rank = job, rank
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / (f"job.{rank}.log" if rank else LOG)).open("ab") as handle:  # two sweeps may be at work
            handle.write(f"{PROMPT}{shlex.join(job.command)}\n".encode())
            handle.flush()
            self.process = subprocess.Popen(
                job.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before,
            )
        if not rank:
            state.begin(job.folder, job.overrides, self.process.pid)

    def code(self) -> int | None:
        """Exit code; None while it is at work."""
        code = self.process.poll()
        if code is not None and not self.rank:
            expected = state.FAILED if code else state.DONE
            if state.read(self.job.folder).get("state") != expected:  # it could not say so itself
                state.end(self.job.folder, _reason(self.job, code) if code else None)
        return code

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        while (code := self.code()) is None:  # short looks: a signal's handler may want to stop it meanwhile
            time.sleep(POLL)
        return code

    def stop(self) -> None:
        """End it, and everything that it has started."""
        stop([self.process])


def _reason(job: Job, code: int) -> str:
    """Why a job failed, in one line: its own last error line if it has told one; ``code`` is negative for a signal."""
    if code in STOPPED:
        return ASKED
    lines = (job.folder / LOG).read_text("utf-8", "replace").rpartition(PROMPT)[2].splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if told:
        return next((line for line in reversed(told) if not line.endswith(ABOVE)), told[-1])
    signs = "out of memory, if nobody has ended it" if code == -signal.SIGKILL else "see its log"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"ended by {how}, {signs}: {job.folder / LOG}"


def of_this_process() -> None:
    """In a job's process: end with whoever has started it, and leave the cluster's signals to them."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGTERM)


def _tell_group(leader: subprocess.Popen[Any], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is empty: nothing is left to end
        os.killpg(leader.pid, number)


def stop(processes: Sequence[subprocess.Popen[Any]], tell: Callable[..., None] = _tell_group) -> None:
    """End processes: politely, and after a grace period for certain.

    Args:
        processes: By default leaders of groups, which end as a whole; those that are over lose what they left behind.
        tell: What sends a signal.
    """
    for process in processes:
        tell(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        tell(process, signal.SIGKILL)
        process.wait()


class Pool(Runner):
    """Slots of this machine, each of which runs one job at a time.

    Args:
        slots: What to add to the environment of a job, per slot; at least one where there is something to do.
        timeout: Seconds after which a job is ended; None: never.
    """

    name = "gpu_pool"

    def __init__(self, slots: Sequence[Mapping[str, str]], timeout: float | None = None) -> None:
        self._slots, self._timeout = slots, timeout or math.inf
        self._free = list(reversed(range(len(slots))))
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, tuple[Work, int, float]] = {}  # work, slot, moment of its start

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Take jobs; they begin in this order, when a slot is free."""
        self._waiting |= {str(job.number): job for job in jobs}
        return [str(job.number) for job in jobs]

    def look(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]]:
        """Fill free slots; returns the jobs that are here, and their slots."""
        for key, (work, slot, started) in list(self._running.items()):
            seconds = time.monotonic() - started
            if (code := work.code()) is None and seconds < self._timeout:
                continue
            work.stop()
            if code is None:
                told = f"ended after {seconds / 60:.1f} min without result (hydra.launcher.timeout_min)"
                state.end(work.job.folder, told)
            del self._running[key]
            self._free.append(slot)
        for key in list(self._waiting)[: len(self._free)]:
            job, slot = self._waiting.pop(key), self._free.pop()
            environment = {**os.environ, **job.environment, **self._slots[slot]}
            self._running[key] = Work(job, environment), slot, time.monotonic()
        here = {key: (True, str(slot)) for key, (_, slot, _) in self._running.items()}
        return here | dict.fromkeys(self._waiting, (True, ""))

    def cancel(self, ids: Sequence[str]) -> None:
        """End all jobs."""
        stop([work.process for work, _, _ in self._running.values()])


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
    """Environments that divide the cores of this machine among ``count`` jobs, >= 1, and show no GPU."""
    return [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, cores() // count))}] * count


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def relaunch(processes: int, overrides: Sequence[str], output_dir: str) -> int:
    """Start the same run in several processes, one per device, set up as torchrun does, and wait for them.

    The first process speaks; of the others only errors that it has not told are repeated.

    Args:
        processes: Number of processes on this machine.
        overrides: The run's overrides as typed.
        output_dir: The run's folder, shared by all.

    Returns:
        Exit code of the run.
    """
    # A sweep's job must not start the sweep again, and what was typed is checked.
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    command = [*program(hydra), *overrides, "hydra.mode=RUN", f"hydra.run.dir={quoted(output_dir)}", "hydra.job.num=0"]
    world = {**os.environ, **_world(processes)}
    told: list[list[str]] = [[] for _ in range(processes)]
    started: list[subprocess.Popen[str]] = []
    listeners: list[threading.Thread] = []
    try:
        for rank in range(processes):
            environment = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            quiet = subprocess.DEVNULL if rank else None
            process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=subprocess.PIPE, text=True)
            started.append(process)
            listeners.append(threading.Thread(target=_listen, args=(process, told[rank], rank == 0), daemon=True))
            listeners[-1].start()
        _wait(started)
    finally:
        stop(started, subprocess.Popen.send_signal)
        for listener in listeners:
            listener.join()
    for rank, lines in enumerate(told[1:], 1):
        for line in dict.fromkeys(line for line in lines if line not in told[0]):
            print(line.replace("error: ", f"error: process {rank}: ", 1), file=sys.stderr)
    codes = [process.returncode for process in started]
    return next((code for code in codes if code > 0), int(any(codes)))


def _world(processes: int) -> dict[str, str]:
    """What all processes of a run on this machine are told."""
    import torch
    from torch.distributed.elastic.utils.distributed import get_free_port

    return {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // processes)),
        # Set for Hydra by our own wrapper; each process has that wrapper too.
        DEBUG: os.environ.get(TRACEBACKS, "0"),
    }


def _listen(process: subprocess.Popen[str], errors: list[str], forward: bool) -> None:
    """Collect the error lines of a process, and pass everything on for the one that speaks."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("error: "):
            errors.append(line.rstrip())
        if forward:
            sys.stderr.write(line)
            sys.stderr.flush()


def _wait(started: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until all have ended, or until one has failed and the others have had time to say why."""
    deadline = math.inf
    while None in (codes := [process.poll() for process in started]) and time.monotonic() < deadline:
        if deadline == math.inf and any(codes):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
