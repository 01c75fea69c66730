"""From exceptions to exit codes: the only place that does so."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from .errors import UserError, disk_full, memory_full

DEBUG = "HYDRA_FULL_ERROR"
TRACEBACKS = "EFFICIENTLLAVA_TRACEBACKS"  # what the user has set `DEBUG` to, for the processes of a run
# Lines of Hydra's that mislead: an added key would be refused by the schema.
HINTS = (
    "To append to your config use",
    "Config search path",
    "provider=",
    "full_key:",
    "object_type=",
    "reference_type=",
)
_failed_jobs: list[int] = []
_failure: list[BaseException] = []
_sweeps: list[tuple[Path, ExitStack]] = []  # folders, and what the sweeps hold until they have ended


class ReportSweep(Callback):
    """Hydra callback: a bad job of a sweep is reported when it ends, the others go on, and a page closes the sweep."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Remember where the sweep lies: Hydra does not say that it has ended where a job has failed."""
        from .disk import at_work

        held = ExitStack()
        if not config.dry_run:
            held.enter_context(at_work(Path(config.paths.cache_dir), clean=config.keep != "all"))
        _sweeps.append((Path(config.hydra.sweep.dir), held))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_kwargs: Any) -> None:
        """Print why a job of a sweep has failed; hand the failure of a single run to `exit_code`."""
        if job_return.status != JobStatus.FAILED:
            return
        if config.hydra.mode != RunMode.MULTIRUN:
            # Hydra would print its own line about the overrides before it raises the error.
            _failure.append(job_return._return_value)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            return
        _failed_jobs.append(int(config.hydra.job.num))
        for line in _lines(job_return._return_value):
            print(f"error: job {config.hydra.job.num}: {line}", file=sys.stderr)


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
        _failed_jobs.append(number)
        print(f"error: job {number}: {reason}", file=sys.stderr)

    @property
    def return_value(self) -> Any:
        """Never a value: asking for it raises the failure, without the line that Hydra would print first."""
        raise self._return_value


def sweeping() -> bool:
    """Whether a sweep runs its jobs in this process."""
    return bool(_sweeps)


def exit_code(main: Callable[[], object]) -> int:
    """Run a program and report its failure in one line per problem.

    Args:
        main: The decorated Hydra application.

    Returns:
        0 on success; 2 for a fault that was found before the first stage; 1 for what happened later, and for a sweep of
        which a job has failed. With ``HYDRA_FULL_ERROR=1`` the traceback is shown.
    """
    _failed_jobs.clear()
    _failure.clear()
    debug = os.environ.get(DEBUG) == "1"
    # Hydra would print its own shortened traceback and exit with 1.
    os.environ |= {DEBUG: "1", TRACEBACKS: str(int(debug))}
    try:
        main()
        if _failure:
            raise _failure[0]
        _close_sweep()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough (``| head``); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if _failed_jobs:
            _close_sweep()
            print(f"error: {len(_failed_jobs)} jobs of the sweep failed: {_failed_jobs}", file=sys.stderr)
            return 1
        if any("torchvision::" in str(cause) for cause in _causes(error)):
            error = UserError("torchvision: is not built for this torch; install the one that is, or pip uninstall it")
        elif isinstance(error, OSError) and not (_failure or _of_hydra(error) or disk_full(error)):
            # Hydra makes the run's folder before anything of ours runs.
            error = UserError(f"paths.output_dir: {error.filename}: {error.strerror}; set it to a folder of yours")
        for line in _lines(error):
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 2 if _of_hydra(error) else 1
    finally:
        _sweeps.clear()  # one that has failed lets go of the cache as it is
    return 0


def _close_sweep() -> None:
    """Write table, plots and page of a sweep that has finished runs; a complete one lets go of the cache."""
    for folder, held in _sweeps:
        if not _failed_jobs:
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


def _of_hydra(error: BaseException) -> bool:
    return type(error).__module__.startswith(("hydra", "omegaconf"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _lines(error: BaseException) -> Iterator[str]:
    """What to tell about an error, one line per problem."""
    if isinstance(error, UserError):
        yield from str(error).splitlines()
    elif _of_hydra(error):
        cause = f"\n{error.__cause__}" if error.__cause__ and _of_hydra(error.__cause__) else ""
        yield f"{_one_line(f'{error}{cause}')}; --help and --cfg job show what there is"
    elif disk_full(error):
        yield f"{getattr(error, 'filename', None) or 'writing'}: the disk is full; free some space and run again"
    elif memory_full(error):
        yield (
            "out of memory; lower data.batch_size, calibration.batch_size or evaluate.batch_size, whichever belongs to "
            f"the stage that was running; dry_run=true shows what each stage needs (details: {_keep(error)})"
        )
    else:
        yield f"{type(error).__name__}: {_one_line(str(error))} (details: {_keep(error)})"


def _one_line(text: str) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(HINTS)]
    return "; ".join(kept).replace(":; ", ": ").replace(".; ", "; ") or "no message"


def _keep(error: BaseException) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="efficientllava-", suffix=".log", delete=False) as handle:
        handle.write("".join(traceback.format_exception(error)))
    return handle.name
