"""Hydra's side of every launcher of ours: from overrides to commands, and from folders back to results.

Every job of a sweep is one process with its own command line, whoever starts it, so that a crash, an out-of-memory or a
process group of a job is its own affair.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ..runtime.errors import UserError
from ..runtime.exit_codes import DEBUG, TRACEBACKS
from ..settings.compose import quoted
from .spawn import Ended, Job, Show


class ProcessLauncher(Launcher):
    """Runs the jobs of a sweep as processes; `run` says where."""

    def __init__(self) -> None:
        super().__init__()
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over what Hydra has composed; the task itself runs in other processes, but for a dry run."""
        self.config, self.hydra_context = config, hydra_context
        self._basic = BasicLauncher()
        self._basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def check(self) -> None:
        """Refuse keys of ``hydra.launcher`` that are out of range.

        Raises:
            UserError: One is.
        """

    def run(self, jobs: Sequence[Job], trainers: Sequence[Any], finished: Collection[int], show: Show) -> list[Ended]:
        """Run jobs and wait for them.

        Args:
            jobs: The jobs.
            trainers: The trainer node of each job that is not finished.
            finished: Numbers of those for which nothing is left to do.
            show: Called with the state of the sweep.

        Returns:
            One result per job, in their order.
        """
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Args:
            job_overrides: Overrides of every job.
            initial_job_idx: Number of the first one.

        Returns:
            One result per job; that of a failed one raises when it is looked at.

        Raises:
            UserError: A key of ``hydra.launcher`` is out of range, or there is not enough for one job.
        """
        from .progress import jobs_table

        if self.config is None:
            raise RuntimeError("setup() comes first")
        self.check()
        if self.config.dry_run:  # says what the jobs would do and needs no slots
            return self._basic.launch(job_overrides, initial_job_idx)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [
            self._job_config(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        jobs = [_job(config, overrides) for config, overrides in zip(configs, job_overrides, strict=True)]
        finished = {job.number for job, config in zip(jobs, configs, strict=True) if _is_finished(job, config)}
        waiting = [config.trainer for config in configs if config.hydra.job.num not in finished]
        with jobs_table() as show:
            ended = self.run(jobs, [OmegaConf.to_container(trainer) for trainer in waiting], finished, show)
        return [_result(config, entry) for config, entry in zip(configs, ended, strict=True)]

    def _job_config(self, number: int, overrides: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config


def _job(config: DictConfig, overrides: Sequence[str]) -> Job:
    hydra = config.hydra
    folder = Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)).absolute()
    command = [sys.executable, sys.argv[0], *_config_flags(config), *overrides, "hydra.mode=RUN"]
    command += ["hydra/launcher=basic", "hydra/sweeper=basic", f"hydra.run.dir={quoted(folder)}"]
    command += [f"hydra.job.num={hydra.job.num}"]
    # Tracebacks are for those who ask for them; the sweep's own process has them on for itself.
    environment = {**hydra.job.env_set, DEBUG: os.environ.get(TRACEBACKS, "0")}
    return Job(hydra.job.num, " ".join(filter_overrides(overrides)), tuple(command), folder, environment)


def _config_flags(config: DictConfig) -> list[str]:
    """Where the jobs find the configuration, if it is not where the program looks."""
    flags = []
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
    if config.hydra.job.config_name not in (None, "config"):
        flags += ["--config-name", config.hydra.job.config_name]
    return flags


def _is_finished(job: Job, config: DictConfig) -> bool:
    """Whether a job has nothing to do; what is wrong with one, its own process tells."""
    from ..settings.checks import check
    from ..settings.compose import typed
    from ..stages.identity import nothing_to_do

    task, overrides = copy.deepcopy(config), list(config.hydra.overrides.task)
    with open_dict(task):
        del task["hydra"]  # as Hydra does for the job itself
    try:
        settings = typed(task, overrides)
        check(settings)
        return nothing_to_do(settings, job.folder)
    except UserError:
        return False


def _result(config: DictConfig, entry: Ended) -> JobReturn:
    from ..record import lookup, read
    from .sweep import FailedJob

    known = {"overrides": config.hydra.overrides.task, "cfg": config, "working_dir": str(entry.job.folder)}
    if entry.failed:
        return FailedJob(entry.job.number, entry.reason(), **known)
    metric = config.get("optimized_metric")
    value = None if metric is None else lookup(read(entry.job.folder), metric)
    return JobReturn(status=JobStatus.COMPLETED, _return_value=value, **known)
