"""What a run says: one console on the first process, a progress bar per stage."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .pool import Progress, Show
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
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, disable=rank() > 0) as display:

        def tick(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what, total=total)
            display.update(tasks[what], completed=done, total=total)

        yield tick


@contextmanager
def jobs_table() -> Iterator[Show]:
    """A table of a sweep's jobs that updates in place on a terminal; in a file, a line per job that has ended.

    Yields:
        What `efficientllava.pool.run_jobs` calls with the state of the sweep.
    """
    console = Console(highlight=False, soft_wrap=True)
    told: set[int] = set()

    def tell(state: Progress) -> None:
        for entry in state.ended:
            if entry.job.number not in told:
                told.add(entry.job.number)
                how = f"{'[red]failed[/red]' if entry.failed else 'done'} after {_duration(entry.seconds)}"
                how = "was finished" if entry.before else how
                text = f"job {entry.job.number} {how}  {escape(entry.job.name)}"
                console.print(f"{text}  ({len(told)}/{state.total}{_left(state)})")

    if not console.is_terminal:
        yield tell
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def show(state: Progress) -> None:
            tell(state)
            live.update(_jobs(state))

        yield show


def _jobs(state: Progress) -> Table:
    waiting = state.total - len(state.ended) - len(state.running)
    counts = f"{len(state.ended) - state.failed} done, {state.failed} failed, {len(state.running)} running, "
    table = Table(title=f"{counts}{waiting} waiting{_left(state)}", title_justify="left", box=None)
    for column in ("job", "slot", "time", "overrides"):
        table.add_column(column, justify="left" if column == "overrides" else "right")
    for entry in state.running:
        took = _duration(time.monotonic() - entry.started)
        table.add_row(str(entry.job.number), str(entry.slot), took, escape(entry.job.name))
    return table


def _left(state: Progress) -> str:
    seconds = state.seconds_left()
    return f", about {_duration(seconds)} left" if seconds else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


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
    ):
        warnings.filterwarnings("ignore", message=message)
