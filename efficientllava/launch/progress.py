"""Where a sweep stands: a table on a terminal, lines in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from .spawn import Progress, Show


@contextmanager
def jobs_table() -> Iterator[Show]:
    """A table of a sweep's jobs that updates in place on a terminal; in a file, a line per job that has ended.

    Yields:
        What `efficientllava.launch.spawn.run_jobs` calls with the state of the sweep.
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
