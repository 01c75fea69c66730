"""What a sweep does beside its jobs: it holds the cache, tells of failures as they come, and ends in a report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ..runtime import state
from ..runtime.errors import UserError
from ..runtime.exit_codes import (
    SweepRefused,
    at_end,
    hand_over,
    job_failed,
    lines_of,
)
from ..settings.checks import check_sweep
from ..settings.compose import (
    SWEEP_NAME,
    at_home,
    key_of,
    quoted,
    typed,
)


class ReportSweep(Callback):
    """Hydra callback: a bad job of a sweep is reported when it ends, the others go on, and a page closes the sweep."""

    def on_multirun_start(self, config: DictConfig, config_name: str | None, **_kwargs: Any) -> None:
        """Refuse a sweep for which something was typed in vain, and remember where it lies.

        Hydra does not say that a sweep has ended where a job has failed.
        """
        from ..runtime.keeping import at_work

        try:
            check_sweep(jobs(config), lambda job: typed(compose(config_name, [*job]), job))
        except UserError as error:
            raise SweepRefused(error) from error
        held, folder = ExitStack(), _settle(config)
        if not config.dry_run:
            held.enter_context(at_work(Path(at_home(config.paths.cache_dir)), clean=config.keep != "all"))
            trials = config.hydra.sweeper.get("n_trials")  # of a sweeper that makes up its jobs as it goes
            state.write(folder, state.SWEEP, jobs=[[]] * trials if trials else jobs(config))
        at_end(partial(_close, folder, held))

    def on_job_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Note that a job of a sweep is at work."""
        if _in_sweep(config):
            state.begin(Path(config.hydra.runtime.output_dir), list(config.hydra.overrides.task))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_kwargs: Any) -> None:
        """Note and print why a job of a sweep has failed; hand the failure of a single run over."""
        failed, sweeping = job_return.status == JobStatus.FAILED, config.hydra.mode == RunMode.MULTIRUN
        in_sweep = _in_sweep(config)
        lines = [*lines_of(job_return._return_value)] if failed and (in_sweep or sweeping) else []
        if in_sweep:
            state.end(Path(config.hydra.runtime.output_dir), "; ".join(lines) or None)
        if not failed:
            return
        if sweeping:
            job_failed(int(config.hydra.job.num), lines)
            return
        hand_over(job_return._return_value)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None


def _settle(config: DictConfig) -> Path:
    """Resolve name and folder of a sweep here, once, and let both travel with every job, whatever launches it.

    Launchers compose the configuration of a job anew in its own process, where other words were typed.
    """
    folder, given = Path(config.hydra.sweep.dir).absolute(), config.hydra.overrides.hydra
    with open_dict(config):
        given.extend([f"hydra.sweep.dir={quoted(folder)}", f"+hydra.job.env_set.{SWEEP_NAME}={config.sweep.name}"])
    return folder


def _in_sweep(config: DictConfig) -> bool:
    """Whether this process is to say how a job of a sweep stands: others of the same run, and dry runs, are not."""
    first = int(os.environ.get("RANK", "0")) == 0
    return first and not (config.dry_run or OmegaConf.is_missing(config.hydra.job, "num"))


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


def _close(folder: Path, held: ExitStack, complete: bool) -> None:
    """Write table, plots and page of a sweep that has finished runs; a complete one lets go of the cache."""
    if complete:
        held.close()
    if "efficientllava.estimate.dry_run" in sys.modules:
        from ..estimate.dry_run import tell_sweep

        tell_sweep(folder, folder.name)
    if any(entry.state in (state.DONE, state.FAILED) for entry in state.standings(folder)):
        from ..report.page import report
        from ..runtime.keeping import alone_in

        with alone_in(folder, print):
            report(folder)
        print(f"table, plots and page of the sweep: {folder / 'report.html'}")
