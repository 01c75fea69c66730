"""Hydra's side of a sweep: its beginning and end, its jobs from what was typed to commands, and results from folders.

Every job of a launcher of ours is one process with its own command line, whoever starts it. Nobody else in this package
knows how Hydra sweeps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ..runtime import (
    DEBUG,
    RESULTS,
    TRACEBACKS,
    SweepRefused,
    UserError,
    at_end,
    hand_over,
    job_failed,
    keeping,
    lines_of,
    peek_json,
    processes,
    remove,
    state,
)
from ..settings.checks import check_sweep
from ..settings.compose import HOW, SWEEP_NAME, key_of, quoted, typed
from . import Job, Runner, jobs_table, supervise
from .local import POLL


class ReportSweep(Callback):
    """Hydra callback: a bad job of a sweep is reported when it ends, the others go on, and a page closes the sweep."""

    def on_multirun_start(self, config: DictConfig, config_name: str | None, **_kwargs: Any) -> None:
        """Refuse a sweep for which something was typed in vain or whose folder is another's; remember where it lies.

        Hydra does not say that a sweep has ended where a job has failed.
        """
        held, folder, listed = ExitStack(), _settle(config), jobs(config)
        trials = config.hydra.sweeper.get("n_trials")  # of a sweeper that makes up its jobs as it goes
        planned = [list(config.hydra.overrides.task)] * trials if trials else listed
        try:
            check_sweep(listed, lambda job: typed(compose(config_name, [*job]), job))
            if not config.dry_run:
                require_own(folder, planned)
                cache = Path(config.paths.cache_dir).expanduser()
                held.enter_context(keeping.at_work(cache, clean=config.keep != "all"))
        except UserError as error:
            raise SweepRefused from error
        if not config.dry_run:
            state.write(folder, state.SWEEP, jobs=planned)
        at_end(partial(_close, folder, held))

    def on_job_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Note that a job of a sweep is at work."""
        if _in_sweep(config):
            folder, words = Path(config.hydra.runtime.output_dir), list(config.hydra.overrides.task)
            if (known := peek_json(folder / RESULTS).get("overrides")) and _content(known) != _content(words):
                remove(folder / RESULTS)  # of the job that had this number before; this one may fail
            state.begin(folder, words)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_kwargs: Any) -> None:
        """Note and print why a job of a sweep has failed; hand the failure of a single run over."""
        failed, sweeping = job_return.status == JobStatus.FAILED, config.hydra.mode == RunMode.MULTIRUN
        in_sweep = _in_sweep(config)
        lines = [*lines_of(job_return._return_value)] if failed and (in_sweep or sweeping) else []
        if in_sweep:
            state.end(Path(config.hydra.runtime.output_dir), "; ".join(lines) or None)
        if failed and sweeping:
            job_failed(int(config.hydra.job.num), lines)
        elif failed:
            hand_over(job_return._return_value)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None


def _settle(config: DictConfig) -> Path:
    """Resolve name and folder of a sweep here, once, and let both travel with every job, whatever launches it.

    Launchers compose the configuration of a job anew in its own process, where other words were typed.
    """
    folder, given = Path(config.hydra.sweep.dir).absolute(), config.hydra.overrides.hydra
    with open_dict(config):
        given.extend(
            [f"hydra.sweep.dir={quoted(folder)}", f"+hydra.job.env_set.{SWEEP_NAME}={quoted(config.sweep.name)}"]
        )
    return folder


def require_own(folder: Path, planned: Sequence[Sequence[str]]) -> None:
    """Refuse a folder with jobs of another sweep: it would overwrite some of them, and its table would have the rest.

    Args:
        folder: The sweep's folder.
        planned: Overrides of every job of the sweep; it may have more than it had before, and go without failed ones.

    Raises:
        UserError: Names one of those jobs.
    """
    own = [_content(job) for job in planned]
    for number, job in enumerate(state.read(folder, state.SWEEP).get("jobs", [])):
        how, content = state.standing(folder / str(number)).state, _content(job)
        if how == state.RUNNING and own[number : number + 1] != [content]:
            raise UserError(
                f"sweep.name: job {number} of {folder} is at work ({' '.join(job)}); wait until it has ended"
            )
        if how == state.DONE and content not in own:
            raise UserError(
                f"sweep.name: {folder} has jobs that this sweep does not have, such as {' '.join(job)}; give it "
                "another sweep.name, or remove the folder"
            )


def _content(job: Sequence[str]) -> frozenset[str]:
    """What decides the numbers of a job, of which Hydra writes ``false`` as ``False``."""
    return frozenset(word.lower() for word in job if key_of(word).partition(".")[0] not in HOW)


def _in_sweep(config: DictConfig) -> bool:
    """Whether this process is to say how a job of a sweep stands: others of the same run, and dry runs, are not."""
    first = int(os.environ.get("RANK", "0")) == 0
    return first and not (config.dry_run or OmegaConf.is_missing(config.hydra.job, "num"))


def _close(folder: Path, held: ExitStack, complete: bool) -> None:
    """Write table, plots and page of a sweep that has finished runs; a complete one lets go of the cache."""
    if complete:
        held.close()
    if any(entry.state in state.ENDS for entry in state.standings(folder)):
        from ..report.page import report

        with keeping.alone_in(folder, print):
            report(folder)
        print(f"table, plots and page of the sweep: {folder / 'report.html'}")


class ProcessLauncher(BasicLauncher):
    """Runs the jobs of a sweep as processes; a dry run, which needs no slots, as Hydra's own launcher does.

    Args:
        **options: The keys of ``hydra.launcher``; ``poll_s`` are the seconds between two looks at the jobs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in options.items()
        }

    def check(self) -> None:
        """Refuse keys of ``hydra.launcher`` that cannot work.

        Raises:
            UserError: One is out of range, or what it needs is not here.
        """

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """What runs the jobs; ``trainers`` are the trainer nodes of those that are not finished."""
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
        assert self.config is not None
        self.check()
        if self.config.dry_run:
            return super().launch(job_overrides, initial_job_idx)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        configs = [self._composed(number, words) for number, words in enumerate(job_overrides, initial_job_idx)]
        jobs = [_job(config, words) for config, words in zip(configs, job_overrides, strict=True)]
        finished = {job.number for job, config in zip(jobs, configs, strict=True) if _is_finished(job, config)}
        waiting = [config.trainer for config in configs if config.hydra.job.num not in finished]
        trainers = [OmegaConf.to_container(trainer) for trainer in waiting]
        with jobs_table() as show, self.runner(trainers) as runner:
            ended = supervise(jobs, runner, show, finished, self.options.get("poll_s", POLL))
        reasons = [job.reason if job.state == state.FAILED else None for job in ended]
        return [_result(*each) for each in zip(configs, jobs, reasons, strict=True)]

    def _composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config


def _job(config: DictConfig, overrides: Sequence[str]) -> Job:
    hydra = config.hydra
    folder = Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)).absolute()
    own = ["hydra.mode=RUN", "hydra/launcher=basic", "hydra/sweeper=basic", f"hydra.run.dir={quoted(folder)}"]
    command = [*processes.program(hydra), *overrides, *own, f"hydra.job.num={hydra.job.num}"]
    # Tracebacks are for those who ask for them; the sweep's own process has them on for itself.
    environment = {**hydra.job.env_set, DEBUG: os.environ.get(TRACEBACKS, "0")}
    return Job(hydra.job.num, tuple(filter_overrides(overrides)), tuple(command), folder, environment)


def _is_finished(job: Job, config: DictConfig) -> bool:
    """Whether a job has nothing to do; what is wrong with one, its own process tells."""
    from ..stages.request import check, nothing_to_do

    task, overrides = copy.deepcopy(config), list(config.hydra.overrides.task)
    with open_dict(task):
        del task["hydra"]  # as Hydra does for the job itself
    try:
        settings = typed(task, overrides)
        check(settings)
        return nothing_to_do(settings, job.folder)
    except UserError:
        return False


def _result(config: DictConfig, job: Job, reason: str | None) -> JobReturn:
    from ..record import lookup, read

    known = {"overrides": config.hydra.overrides.task, "cfg": config, "working_dir": str(job.folder)}
    if reason is not None:
        return FailedJob(job.number, reason, **known)
    metric = config.get("optimized_metric")
    value = None if metric is None else lookup(read(job.folder), metric)
    return JobReturn(status=JobStatus.COMPLETED, _return_value=value, **known)


class FailedJob(JobReturn):
    """What is left of a job of a sweep that has failed in a process of its own; told when it is made.

    Args:
        number: Number of the job.
        reason: Why it failed, in one line.
        **known: Fields of Hydra's ``JobReturn``.
    """

    def __init__(self, number: int, reason: str, **known: Any) -> None:
        super().__init__(status=JobStatus.FAILED, **known)
        self._return_value = UserError(f"job {number}: {reason}")
        job_failed(number, [reason])

    @property
    def return_value(self) -> Any:
        """Never a value: asking for it raises the failure, without the line that Hydra would print first."""
        raise self._return_value


def jobs(config: DictConfig) -> list[list[str]]:
    """Overrides of every job of a sweep, without what a sweeper draws from intervals.

    Args:
        config: The composed configuration with Hydra's own node, in which no value of the grid is chosen yet.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    grid_of_file = config.hydra.sweeper.get("params") or {}  # a sweeper may know no such key
    params = parser.parse_overrides([f"{key}={value}" for key, value in grid_of_file.items()])
    told = parser.parse_overrides(list(config.hydra.overrides.task))
    counted = [each for each in (*params, *told) if each.is_discrete_sweep() or not each.is_sweep_override()]
    [grid] = BasicSweeper.split_arguments(counted, None)
    return jobs_of(grid, config.sweep.arms, [str(each.key_or_group) for each in told])


def jobs_of(grid: Sequence[Sequence[str]], arms: Mapping[str, Sequence[str]], typed: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep.

    Args:
        grid: Overrides of every point of the grid, what the user typed included.
        arms: Overrides of every arm by its name, which becomes the job's ``name``; none: the grid is all there is.
        typed: What the user typed; an arm may not set these keys to something else.

    Returns:
        Overrides of every job, arm after arm; arms that differ in nothing but what the user typed are run once.
    """
    if not arms:
        return [list(point) for point in grid]
    fixed = {key_of(override) for override in typed}
    jobs: dict[tuple[str, ...], list[str]] = {}
    for name, overrides in arms.items():
        arm = [override for override in (f"name={name}", *overrides) if key_of(override) not in fixed]
        told = {key_of(override) for override in arm}
        for point in grid:
            rest = [override for override in point if key_of(override) not in told]
            content = (*rest, *(override for override in arm if key_of(override) != "name"))
            jobs.setdefault(tuple(sorted(content)), [*rest, *arm])
    return list(jobs.values())
