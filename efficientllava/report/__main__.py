"""``python -m efficientllava.report <folder> [metric]``: one table and one page from all runs below a folder.

With ``--watch``: how the jobs of a sweep stand, until the last one has ended; nothing is touched or written.

Writes ``results.csv``, ``results.md``, ``report.html`` and ``plots/`` into the folder and prints the table: a row per
configuration, mean and standard deviation over its seeds. The runs of an experiment of which the structural study
prints numbers get a second table and a plot with both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..runtime import Standing, UserError, exit_code, state

POLL = 5.0  # seconds between two looks


def main(arguments: Sequence[str]) -> None:
    """Tabulate a folder of runs, or watch it.

    Raises:
        UserError: There is no finished run below the folder.
    """
    told = [argument for argument in arguments if argument != "--watch"]
    if not 1 <= len(told) <= 2:
        raise UserError("usage: python -m efficientllava.report <folder of runs> [task/metric] [--watch]")
    if "--watch" in arguments:
        watch(Path(told[0]))
        return
    from .page import report  # its libraries take their time to load

    print(report(Path(told[0]), *told[1:]), end="")


def watch(folder: Path, poll: float = POLL) -> None:
    """Print how a sweep stands whenever it changes, and why jobs fail, until the last one has ended.

    The small files in its folders are read, its jobs are not touched.

    Args:
        folder: The sweep's folder.
        poll: Seconds between two looks.

    Raises:
        UserError: There is no sweep.
    """
    told: set[tuple[str, str]] = set()
    before = ""
    while True:
        jobs = state.standings(folder)
        if not jobs:
            raise UserError(f"{folder}: no jobs of a sweep in this folder; give outputs/sweeps/<name>")
        for job in jobs:
            if job.state == state.FAILED and (job.name, job.reason) not in told:
                told.add((job.name, job.reason))
                print(f"job {job.name} failed: {job.reason}  {' '.join(job.overrides)}", flush=True)
        if (line := summary(jobs)) != before:
            print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
            before = line
        if all(job.state in state.ENDS for job in jobs):
            return
        time.sleep(poll)


def summary(jobs: Sequence[Standing]) -> str:
    """Counts by state and the time that is left, in one line."""
    line, seconds = state.counted(jobs), state.seconds_left(jobs)
    return line if seconds is None else f"{line}, about {max(1, round(seconds / 60))} min left"


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
