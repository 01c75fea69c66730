"""Ray: one actor per job, which holds its CPUs and GPUs and goes on when whoever has started it is gone.

A task of Ray ends with the process that has called it; a detached actor does not, and its creation alone waits for
resources. On a cluster of our own (``ray.init.address=null``) nothing stays: it ends with this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime import UserError, keeping, state
from . import Job, asked, cancelled
from .local import Work, of_this_process

ray: Any = import_module("ray") if find_spec("ray") else None

NAMESPACE = "efficientllava"
DECIDED = ("RAY_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
QUIET = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
SLOW = "timed out during startup"  # what Ray says after 30 seconds; the second time its files are in memory
LINGER = 60.0  # seconds after its end in which an actor gives its result to somebody who waits


def require(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot work here.

    Args:
        options: ``hydra.launcher.ray``.

    Raises:
        UserError: Says which and why.
    """
    if ray is None:
        raise UserError("hydra/launcher=ray: needs ray; pip install -c constraints.txt -e '.[ray]'")
    for name in ("num_cpus", "num_gpus"):
        value = options["remote"].get(name)
        if value is not None and value < 0:
            raise UserError(f"hydra.launcher.ray.remote.{name}={value}: must be 0 or more, or null")


class Host:
    """The actor of one job.

    Args:
        job: The job.
        environment: The environment of the process that has started the sweep.
        folder: Its working directory.
    """

    def __init__(self, job: Job, environment: Mapping[str, str], folder: str) -> None:
        os.chdir(folder)
        self._code: int | None = None
        environment = merged({**environment, **job.environment}, os.environ)
        self._work = Work(job, environment, before=of_this_process)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._code = self._work.wait()
        time.sleep(LINGER)
        os._exit(0)

    def wait(self) -> int:
        """Wait for the end of the job; returns its exit code."""
        while self._code is None:
            time.sleep(0.2)
        return self._code

    def stop(self) -> None:
        """End the job."""
        self._work.stop()


class Ray:
    """A Ray cluster, for the time of a sweep.

    Args:
        options: ``hydra.launcher.ray``.
        trainers: The trainer node of every job that is not finished.
    """

    name = "ray"

    def __init__(self, options: Mapping[str, Any], trainers: Sequence[Mapping[str, Any]]) -> None:
        self._init = {key: value for key, value in options["init"].items() if value not in (None, "")}
        told = {key: value for key, value in options["remote"].items() if value is not None}
        self._remote = {**options["remote"], **resources(trainers), **told}
        address = self._init.get("address", os.environ.get("RAY_ADDRESS"))
        self.stays = address not in (None, "", "local")
        self._actors: dict[str, Any] = {}
        self._ends: dict[str, Any] = {}

    def __enter__(self) -> Ray:
        # Without an address Ray would take a cluster that somebody has started on this machine.
        own = {} if self.stays else {"address": "local", "include_dashboard": False}
        for again in (True, False):
            try:
                ray.init(**{**QUIET, **own, **self._init})
                break
            except (Exception, SystemExit) as error:
                told = "nobody answers there" if isinstance(error, SystemExit) else " ".join(str(error).split())
                if not (again and SLOW in told):
                    address = self._init.get("address", "local")
                    raise UserError(f"hydra.launcher.ray.init.address={address}: {told}") from error
                ray.shutdown()
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Make an actor per job; each waits for its resources."""
        if self.stays:
            keeping.require_shared_locks(jobs[0].folder)
        actor, environment = ray.remote(Host), ray.put(dict(os.environ))
        life = {"lifetime": "detached"} if self.stays else {}
        ids = []
        for job in jobs:
            key = f"{job.folder.parent.name}/{job.number}/{time.time_ns():x}"
            options = {"max_restarts": 0, "max_concurrency": 4, **self._remote, **life, "name": key}
            self._watch(key, actor.options(**options).remote(job, environment, os.getcwd()))
            ids.append(key)
        return ids

    def _watch(self, key: str, actor: Any) -> None:
        self._actors[key], self._ends[key] = actor, actor.wait.remote()

    def look(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]] | None:
        """What has become of jobs; nothing of those whose actors are gone."""
        for key in ids:
            if key not in self._ends:
                with contextlib.suppress(ValueError):  # it is gone
                    self._watch(key, ray.get_actor(key, NAMESPACE))
        ends = {key: self._ends[key] for key in ids if key in self._ends}
        over, _ = ray.wait(list(ends.values()), num_returns=len(ends), timeout=0) if ends else ([], [])
        return {key: (end not in over, self._word(key) if end in over else "") for key, end in ends.items()}

    def _word(self, key: str) -> str:
        """Why an actor is gone; nothing where its job has ended by itself. It gives its resources back."""
        try:
            ray.get(self._ends[key])
        except ray.exceptions.RayError as error:
            return f"Ray: {' '.join(str(error).split())[:200]}"
        ray.kill(self._actors[key])
        return ""

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, politely where they run."""
        _end([self._actors[key] for key in ids if key in self._actors])

    def how_to_cancel(self, ids: Sequence[str], folder: Path) -> str:
        """The line that does so later."""
        return f"{sys.executable} -m efficientllava.launch.on_ray {folder}"


def merged(given: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment that was sent along, with what Ray has decided here.

    Args:
        given: What was sent.
        own: The environment here.
    """
    kept = {name: value for name, value in given.items() if not name.startswith(DECIDED)}
    return {**kept, **{name: value for name, value in own.items() if name.startswith(DECIDED)}}


def resources(trainers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """CPUs and GPUs of a job, from what the trainers ask for."""
    several, devices, on_gpu = asked(trainers)
    if max(several, default=1) > 1:
        raise UserError(f"trainer.num_nodes={max(several)}: a job of hydra/launcher=ray is on one machine; take slurm")
    return {"num_cpus": devices, "num_gpus": devices * on_gpu}


def cancel(folder: Path) -> int:
    """End all jobs of a sweep that are on the Ray cluster of ``RAY_ADDRESS``, or on that of this machine.

    Args:
        folder: The sweep's folder.

    Returns:
        Their number.
    """
    ray.init(address="auto", **QUIET)
    actors = {}
    for place in sorted(file.parent for file in folder.glob(f"*/{state.CLUSTER}")):
        with contextlib.suppress(ValueError):  # it is over
            actors[place] = ray.get_actor(state.read(place, state.CLUSTER).get("ray", ""), NAMESPACE)
    _end(list(actors.values()))
    cancelled(actors)
    return len(actors)


def _end(actors: Sequence[Any]) -> None:
    """End the jobs of actors, politely where they run; one that waits for resources cannot be asked."""
    if actors:
        ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=15)
    for actor in actors:
        ray.kill(actor)


if __name__ == "__main__":
    print(f"{cancel(Path(sys.argv[1]))} jobs cancelled")
