"""What a sweep does beside its jobs: it holds the cache, tells of failures as they come, and ends in a report."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from .errors import UserError
from .outcome import at_end, hand_over, job_failed


class ReportSweep(Callback):
    """Hydra callback: a bad job of a sweep is reported when it ends, the others go on, and a page closes the sweep."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Remember where the sweep lies: Hydra does not say that it has ended where a job has failed."""
        from .disk import at_work

        held = ExitStack()
        if not config.dry_run:
            held.enter_context(at_work(Path(config.paths.cache_dir), clean=config.keep != "all"))
        at_end(partial(_close, Path(config.hydra.sweep.dir), held))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_kwargs: Any) -> None:
        """Print why a job of a sweep has failed; hand the failure of a single run over."""
        if job_return.status != JobStatus.FAILED:
            return
        if config.hydra.mode == RunMode.MULTIRUN:
            job_failed(int(config.hydra.job.num), job_return._return_value)
            return
        hand_over(job_return._return_value)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None


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
        job_failed(number, UserError(reason))

    @property
    def return_value(self) -> Any:
        """Never a value: asking for it raises the failure, without the line that Hydra would print first."""
        raise self._return_value


def _close(folder: Path, held: ExitStack, complete: bool) -> None:
    """Write table, plots and page of a sweep that has finished runs; a complete one lets go of the cache."""
    if complete:
        held.close()
    if "efficientllava.dry_run" in sys.modules:
        from .dry_run import tell_sweep

        tell_sweep(folder, folder.name)
    if next(folder.glob("*/results.json"), None):
        from .disk import alone_in
        from .report.__main__ import report

        with alone_in(folder, print):
            report(folder)
        print(f"table, plots and page of the sweep: {folder / 'report.html'}")
