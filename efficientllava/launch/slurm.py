"""Slurm through submitit: one array per sweep, requeued when its time is over, and ``squeue`` instead of accounting."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime import UserError, keeping, state
from . import Job, asked
from .local import STOPPED, Work, of_this_process

submitit: Any = import_module("submitit") if find_spec("submitit") else None

OURS = ("cluster", "poll_s", "submitit_folder", "max_num_timeout", "processes")  # keys that are no options of sbatch
COMMON = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
COMMON += ("stderr_to_stdout",)  # options of every executor of submitit
# States of a job that is over, in words; all others are on their way.
OVER = {
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "cancelled",
    "COMPLETED": "",
    "DEADLINE": "ended at its deadline",
    "FAILED": "",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory (hydra.launcher.mem_gb)",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
    "TIMEOUT": "timed out (hydra.launcher.timeout_min)",
}
LINGER = 30.0  # seconds that a job which was asked to end leaves Slurm to requeue it


def require(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot work here.

    Args:
        options: ``hydra.launcher``.

    Raises:
        UserError: Says which and why.
    """
    if submitit is None:
        raise UserError("hydra/launcher=slurm: needs submitit; pip install -c constraints.txt -e '.[slurm]'")
    for name in ("timeout_min", "array_parallelism", "poll_s", "nodes", "tasks_per_node", "cpus_per_task", "mem_gb"):
        value = options.get(name)
        if value is not None and value <= 0:
            raise UserError(f"hydra.launcher.{name}={value}: must be above 0, or null where the file says null")
    if options["cluster"] not in ("slurm", "local"):
        raise UserError(f"hydra.launcher.cluster={options['cluster']}: must be slurm or local")
    missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(name)]
    if options["cluster"] == "slurm" and missing:
        raise UserError(f"hydra/launcher=slurm: no {missing[0]} here; start the sweep where Slurm's commands are")


class Slurm:
    """A queue of Slurm, or submitit's own processes on this machine (``cluster=local``).

    Args:
        options: ``hydra.launcher``.
        trainers: The trainer node of every job that is not finished.
    """

    def __init__(self, options: Mapping[str, Any], trainers: Sequence[Mapping[str, Any]]) -> None:
        self._options = {**options, **resources(options, trainers)} if trainers else dict(options)
        self.name = "slurm" if options["cluster"] == "slurm" else "submitit_local"
        self.stays = self.name == "slurm"
        self._local: dict[str, Any] = {}

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand jobs over as one array."""
        cluster, options = self._options["cluster"], self._options
        if cluster == "slurm":
            keeping.require_shared_locks(jobs[0].folder)
        limit = {f"{cluster}_max_num_timeout": options["max_num_timeout"]} if cluster == "slurm" else {}
        executor = submitit.AutoExecutor(folder=options["submitit_folder"], cluster=cluster, **limit)
        given = {key: value for key, value in options.items() if key not in OURS and value not in (None, {})}
        given = {key if key in COMMON else f"slurm_{key}": value for key, value in given.items()}
        try:
            executor.update_parameters(**given)
            submitted = executor.map_array(Attempt(self._options["processes"]), jobs)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, ValueError) as error:
            told = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
            raise UserError(f"hydra/launcher=slurm: sbatch refuses the jobs: {told[-1]}") from error
        if not self.stays:
            self._local = {job.job_id: job for job in submitted}
        return [job.job_id for job in submitted]

    def look(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]] | None:
        """What the queue says of jobs; nothing of those that it has forgotten."""
        if not self.stays:
            return {key: (job.state == "RUNNING", "") for key, job in self._local.items() if key in ids}
        return look(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs."""
        if self.stays:
            subprocess.run(["scancel", *ids], check=False)
        for job in self._local.values():
            job.cancel(check=False)

    def how_to_cancel(self, ids: Sequence[str], folder: Path) -> str:
        """The line that does so later."""
        return shlex.join(["scancel", *dict.fromkeys(key.partition("_")[0] for key in ids)])


def look(ids: Sequence[str]) -> dict[str, tuple[bool, str]] | None:
    """Ask ``squeue``, which knows running jobs and, for some minutes, those that have ended; needs no accounting.

    Args:
        ids: Jobs, such as ``12_0``.

    Returns:
        By job, whether it is still on its way, and why it waits or has ended; None: Slurm does not answer.
    """
    if not ids:
        return {}
    arrays = ",".join(dict.fromkeys(key.partition("_")[0] for key in ids))
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", "--format=%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        key, job_state, why = line.strip().split("|", 2)
        over = job_state in OVER
        found[key] = (not over, OVER[job_state] if over else "" if why in ("None", "") else why)
    return {key: found[key] for key in ids if key in found}


def resources(options: Mapping[str, Any], trainers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the trainers of jobs ask for, where ``hydra.launcher`` does not say it."""
    several, devices, on_gpu = asked(trainers, int(options["gpus_per_node"] or 1))
    nodes = options["nodes"] or max(several)
    if several != {nodes}:
        raise UserError(
            f"hydra.launcher.nodes={nodes}: jobs of one sweep share their size, and trainer.num_nodes is "
            f"{', '.join(map(str, sorted(several)))}; give both the same number"
        )
    gpus = options["gpus_per_node"] if options["gpus_per_node"] is not None else devices * on_gpu
    # On one node the run starts its own processes; on several, srun starts all of them.
    tasks = options["tasks_per_node"] or (devices if nodes > 1 else 1)
    found = {"nodes": nodes, "tasks_per_node": tasks, "gpus_per_node": gpus or None}
    return {**found, "processes": max(1, devices // tasks)}


class Attempt:
    """What Slurm runs: the job's command, as often as its time is over before it is.

    Args:
        processes: Processes that a task starts on its own.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes

    def __call__(self, job: Job) -> int:
        """Run a job to its end.

        Raises:
            RuntimeError: It has failed, which Slurm is to know.
        """
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
        threads = {"OMP_NUM_THREADS": str(max(1, cpus // self.processes))} if "SLURM_JOB_ID" in os.environ else {}
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        self._work = Work(job, {**os.environ, **threads, **job.environment}, rank, of_this_process)
        started = time.monotonic()
        try:
            code = self._work.wait()
        except RuntimeError:  # raised by submitit, which will not requeue it once more
            minutes = (time.monotonic() - started) / 60
            if not rank:
                keys = "hydra.launcher.timeout_min, max_num_timeout"
                state.end(job.folder, f"timed out after {minutes:.1f} min ({keys})")
            raise
        finally:
            self._work.stop()
        if code in STOPPED and "SLURM_JOB_ID" in os.environ:
            time.sleep(LINGER)  # one that ends by itself is not requeued
        if code:
            raise RuntimeError(f"job {job.number}: exit code {code}")
        return code

    def checkpoint(self, job: Job) -> Any:
        """Called when the time is over, or another job is more urgent: stop, and go on from the last checkpoint."""
        self._work.stop()
        state.write(job.folder, state=state.WAITING, reason="requeued")
        return submitit.helpers.DelayedSubmission(Attempt(self.processes), job)
