"""Hydra's side of the pool: from overrides to commands, and from folders back to results."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from efficientllava.launch.spawn import Ended, Job, cores, cpu_slots, gpu_slots, run_jobs
from efficientllava.schema import GpuPoolConfig

# Hydra runs this file before it is a module, so that no dataclass can be made here.
ConfigStore.instance().store(group="hydra/launcher", name="gpu_pool", node=GpuPoolConfig, provider="gpu_pool")


class GpuPoolLauncher(Launcher):
    """Runs the jobs of a sweep as processes, as many at once as the machine has slots.

    Args:
        gpus_per_job: See `efficientllava.schema.GpuPoolConfig`.
        slots: See `efficientllava.schema.GpuPoolConfig`.
        timeout_min: See `efficientllava.schema.GpuPoolConfig`.
    """

    def __init__(self, gpus_per_job: int | None, slots: int | None, timeout_min: float | None) -> None:
        super().__init__()
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self._gpus_per_job, self._slots, self._timeout_min = gpus_per_job, slots, timeout_min

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over what Hydra has composed; the task itself runs in other processes, but for a dry run."""
        self.config, self.hydra_context = config, hydra_context
        self._basic = BasicLauncher()
        self._basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs.

        Args:
            job_overrides: Overrides of every job.
            initial_job_idx: Number of the first one.

        Returns:
            One result per job; that of a failed one raises when it is looked at.

        Raises:
            UserError: A key of ``hydra.launcher`` is out of range, or the GPUs do not suffice for one job.
        """
        from efficientllava.launch.progress import jobs_table

        if self.config is None:
            raise RuntimeError("setup() comes first")
        self._check()
        if self.config.dry_run:  # says what the jobs would do and needs no slots
            return self._basic.launch(job_overrides, initial_job_idx)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [
            self._job_config(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        jobs = [self._job(config, overrides) for config, overrides in zip(configs, job_overrides, strict=True)]
        finished = {job.number for job, config in zip(jobs, configs, strict=True) if _is_finished(job, config)}
        waiting = [config for config in configs if config.hydra.job.num not in finished]
        slots = self._environments(waiting) if waiting else []  # looks for GPUs, and imports torch for it
        with jobs_table() as show:
            ended = run_jobs(jobs, slots, self._timeout_min and 60 * self._timeout_min, show, finished)
        return [_result(config, entry) for config, entry in zip(configs, ended, strict=True)]

    def _check(self) -> None:
        from efficientllava.errors import UserError

        for name, value in (("gpus_per_job", self._gpus_per_job), ("slots", self._slots)):
            if value is not None and value < 1:
                raise UserError(f"hydra.launcher.{name}={value}: must be 1 or more, or null")
        if self._timeout_min is not None and self._timeout_min <= 0:
            raise UserError(f"hydra.launcher.timeout_min={self._timeout_min:g}: must be above 0, or null")

    def _job_config(self, number: int, overrides: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config

    def _job(self, config: DictConfig, overrides: Sequence[str]) -> Job:
        hydra = config.hydra
        folder = Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)).absolute()
        command = [sys.executable, sys.argv[0], *_config_flags(config), *overrides, "hydra.mode=RUN"]
        command += ["hydra/launcher=basic", "hydra/sweeper=basic", f"hydra.run.dir={folder}"]
        command += [f"hydra.job.num={hydra.job.num}"]
        return Job(hydra.job.num, " ".join(filter_overrides(overrides)), tuple(command), folder)

    def _environments(self, configs: Sequence[DictConfig]) -> list[dict[str, str]]:
        """The slots that the trainers of the jobs call for."""
        from efficientllava.processes import on_gpu, wanted

        trainers: list[Any] = [OmegaConf.to_container(config.trainer) for config in configs]
        if not any(on_gpu(trainer) for trainer in trainers):
            return cpu_slots(min(self._slots or cores(), len(configs)))
        return gpu_slots(_visible_gpus(), self._gpus_per_job or max(wanted(trainer) for trainer in trainers))


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
    from efficientllava.checks import check
    from efficientllava.config import typed
    from efficientllava.errors import UserError
    from efficientllava.identity import nothing_to_do

    task, overrides = copy.deepcopy(config), list(config.hydra.overrides.task)
    with open_dict(task):
        del task["hydra"]  # as Hydra does for the job itself
    try:
        settings = typed(task, overrides)
        check(settings)
        return nothing_to_do(settings, job.folder)
    except UserError:
        return False


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _result(config: DictConfig, entry: Ended) -> JobReturn:
    from efficientllava.launch.sweep import FailedJob
    from efficientllava.results import lookup, read

    known = {"overrides": config.hydra.overrides.task, "cfg": config, "working_dir": str(entry.job.folder)}
    if entry.failed:
        return FailedJob(entry.job.number, entry.reason(), **known)
    metric = config.get("optimized_metric")
    value = None if metric is None else lookup(read(entry.job.folder), metric)
    return JobReturn(status=JobStatus.COMPLETED, _return_value=value, **known)
