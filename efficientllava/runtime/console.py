"""What is said at the terminal: lines and progress of the first process, and how a failure ends a program.

`exit_code` is the only place that makes exit codes of exceptions.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra.errors import OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, ValidationError
from rich.console import Console, RenderableType

from .errors import UserError, disk_full, memory_full
from .processes import rank

Tick = Callable[[str, int, int], None]


def say(*lines: RenderableType) -> None:
    """Print on the first process."""
    if rank() == 0:
        Console(highlight=False, soft_wrap=True).print(*lines, sep="\n")


@contextmanager
def progress() -> Iterator[Tick]:
    """A display of bars that update in place on a terminal and stay quiet in a file.

    Yields:
        ``tick(what, done, total)``, which shows that ``done`` of ``total`` steps of ``what`` are finished.
    """
    # Here: a start imports this file, and has no bar.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, disable=rank() > 0) as display:

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done, total=total)

        yield tick


def quiet_libraries() -> None:
    """Keep what libraries say about themselves off the console; their warnings about a run stay."""
    import lightning.pytorch  # noqa: F401 - sets its own log level when first imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in [*logging.root.manager.loggerDict, "lightning.pytorch", "lightning.fabric"]:
        if name.startswith(("lightning", "httpx")):
            logging.getLogger(name).setLevel(logging.WARNING)
    # Deprecations inside the libraries, Lightning's views on loader workers and short epochs, and predictions that are
    # returned on another way.
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        "predict returned None.*",
        ".*Checkpoint directory.*",
        ".*gradient_checkpointing.* is deprecated.*",
        ".*`srun` command is available.*",
    ):
        warnings.filterwarnings("ignore", message=message)


DEBUG = "HYDRA_FULL_ERROR"
TRACEBACKS = "EFFICIENTLLAVA_TRACEBACKS"  # what the user has set `DEBUG` to, for the processes of a run
# Lines of Hydra's that mislead: an added key would be refused by the schema.
QUOTES = "\"'"
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
_sweeps: list[Callable[[bool], None]] = []  # what ends each


class SweepRefused(BaseException):
    """Something is wrong with a sweep as a whole; its cause says what. Hydra warns of other exceptions of callbacks."""


def hand_over(error: BaseException) -> None:
    """Keep the failure of a single run for `exit_code`: Hydra would print a line of its own before it raises it."""
    _failure.append(error)


def job_failed(number: int, lines: Iterable[str]) -> None:
    """Print why a job of a sweep has failed; the others go on."""
    _failed_jobs.append(number)
    for line in lines:
        print(f"error: job {number}: {line}", file=sys.stderr)


def at_end(close: Callable[[bool], None]) -> None:
    """Say what ends a sweep that has begun.

    Args:
        close: Called when its jobs have ended, with whether all of them have succeeded.
    """
    _sweeps.append(close)


def sweeping() -> bool:
    """Whether a sweep runs its jobs in this process."""
    return bool(_sweeps)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, once: what is open is closed, such as a W&B run."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of letters that the terminal does not know
    os.environ |= {DEBUG: "1", TRACEBACKS: str(int(debug))}
    try:
        with terminable():
            main()
        if _failure:
            raise _failure[0]
        _close_sweeps()
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as raised:
        if not any(isinstance(each, KeyboardInterrupt) for each in _causes(raised)):
            raise
        # A Trainer makes an exit with status 1 of it.
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except (Exception, SweepRefused) as raised:
        if isinstance(raised, BrokenPipeError) and _unread():
            # The reader has seen enough (``| head``); Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if debug:
            raise
        error = raised.__cause__ or raised if isinstance(raised, SweepRefused) else raised
        _close_sweeps(complete=False)
        if _failed_jobs:
            print(f"error: {len(_failed_jobs)} jobs of the sweep failed: {_failed_jobs}", file=sys.stderr)
            return 1
        if any("torchvision::" in str(cause) for cause in _causes(error)):
            error = UserError("torchvision: is not built for this torch; install the one that is, or pip uninstall it")
        elif isinstance(error, OSError) and not (
            _failure or isinstance(error, ConnectionError) or of_hydra(error) or disk_full(error)
        ):
            # Hydra makes the run's folder before anything of ours runs.
            error = UserError(f"paths.output_dir: {error.filename}: {error.strerror}; set it to a folder of yours")
        for line in lines_of(error):
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 2 if of_hydra(error) else 1
    finally:
        _sweeps.clear()  # one that has failed lets go of the cache as it is
    return 0


def _unread() -> bool:
    """Whether nobody reads what is printed any more: a pipe says so, whatever was written to it before."""
    if sys.stdout is not sys.__stdout__:
        return False
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(happened & (select.POLLERR | select.POLLHUP) for _, happened in pipe.poll(0))


def _close_sweeps(complete: bool = True) -> None:
    for close in _sweeps:
        close(complete and not _failed_jobs)


def of_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised it: the configuration cannot be composed."""
    return type(error).__module__.startswith(("hydra", "omegaconf"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def lines_of(error: BaseException) -> Iterator[str]:
    """What to tell about an error, one line per problem."""
    if isinstance(error, UserError):
        yield from str(error).splitlines()
    elif typed := next((each.override for each in _causes(error) if isinstance(each, OverrideParseException)), None):
        yield _unreadable(typed)
    elif isinstance(found := error.__cause__, ValidationError) and is_dataclass(found.object_type):
        typed = re.search(r"override (\S+)", str(error))
        yield of_another_type(found, typed[1] if typed else str(found.full_key))
    elif of_hydra(error):
        cause = f"\n{error.__cause__}" if error.__cause__ and of_hydra(error.__cause__) else ""
        yield f"{_one_line(f'{error}{cause}')}{_meant(error.__cause__)}; --help and --cfg job show what there is"
    elif disk_full(error):
        yield f"{getattr(error, 'filename', None) or 'writing'}: the disk is full; free some space and run again"
    elif memory_full(error):
        yield (
            "out of memory; lower data.batch_size, calibration.batch_size or evaluate.batch_size, whichever belongs to "
            f"the stage that was running; dry_run=true shows what each stage needs (details: {_keep(error)})"
        )
    else:
        yield f"{type(error).__name__}: {_one_line(str(error))} (details: {_keep(error)})"


def _unreadable(typed: str) -> str:
    """What to do about an argument that Hydra's grammar does not take."""
    key, separator, value = typed.partition("=")
    if not separator:
        return f"{typed}: is no key=value; --help shows the keys"
    quoted = shlex.quote(f'{key}="{value.strip(QUOTES).replace(chr(34), chr(92) + chr(34))}"')
    return f"{typed}: cannot be read: signs such as = [ ( {{ ~ and letters beyond ASCII need quotes; type {quoted}"


TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def of_another_type(error: ValidationError, typed: str) -> str:
    """What a value must be that is of another type than its key's.

    Args:
        error: What OmegaConf says of it.
        typed: Key and value as the user gave them.
    """
    [setting] = (each for each in fields(error.object_type) if each.name == error.key)  # pyright: ignore
    named, within = str(setting.type).removesuffix(" | None"), setting.metadata["about"].within
    kind = TYPES.get(named, "") if within is None or within.text.startswith("in ") else ""
    allowed = " ".join([kind, within.text if within else ""]).strip() or "set by keys below it"
    return f"{typed}: must be {allowed}"


def former_names(node: type) -> dict[str, str]:
    """Names that fields of a dataclass have had, and their names today."""
    return {was: each.name for each in fields(node) if (was := each.metadata.get("was"))}


def _meant(error: BaseException | None) -> str:
    """The keys that may have been meant by one that OmegaConf does not find."""
    if not (isinstance(error, ConfigKeyError | ConfigAttributeError) and is_dataclass(error.object_type)):
        return ""
    keys, key = [each.name for each in fields(error.object_type)], str(error.key)
    if new := former_names(error.object_type).get(key):
        return f"; it is now {str(error.full_key).removesuffix(key)}{new}"
    return f"; did you mean {' or '.join(get_close_matches(key, keys)) or 'one of ' + ', '.join(keys)}?"


def _one_line(text: str) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(HINTS)]
    return "; ".join(kept).replace(":; ", ": ").replace(".; ", "; ") or "no message"


def _keep(error: BaseException) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="efficientllava-", suffix=".log", delete=False) as handle:
        handle.write("".join(traceback.format_exception(error)))
    return handle.name
