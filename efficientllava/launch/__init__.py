"""The jobs of a sweep: handed to whoever runs them, watched, and told of until the last one has ended.

How a job stands is said by the small file in its folder, wherever it runs. So whoever waits here may go away: jobs of a
cluster stay, and the same command finds them.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ..runtime import Standing, state

GRACE = 10.0  # seconds in which a second Ctrl-C cancels the jobs
LOOKS = 2  # at a job that is gone, until its folder has the last word: shared file systems are late
CANCELLED = "cancelled"
UNSEEN = "it is gone and has left no word"

Show = Callable[[Sequence[Standing]], None]


@dataclass(frozen=True)
class Job:
    """One process of a sweep.

    Args:
        number: Its number in the sweep.
        overrides: What tells it from the others.
        command: What to run.
        folder: Its folder; made if it does not exist. What it prints is appended to ``job.log`` in it.
        environment: What it is told beside the environment of the process that starts the sweep.
    """

    number: int
    overrides: tuple[str, ...]
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def standing(self, **known: Any) -> Standing:
        """How it stands, as its folder says; ``known`` is known better."""
        return state.standing(self.folder)._replace(name=str(self.number), overrides=self.overrides, **known)


class Runner(Protocol):
    """What runs jobs: the slots of this machine, or a cluster.

    Attributes:
        name: Its name, as ``hydra/launcher`` says it.
        stays: Whether the jobs go on when this process ends.
    """

    name: str
    stays: bool = False

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand jobs over; returns what each is called there."""
        ...

    def look(self, ids: Sequence[str]) -> dict[str, tuple[bool, str]] | None:
        """Those of some jobs that are known there: whether each is still on its way, and a word on how or where it is.

        None: there is no answer.
        """

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, wherever they are."""

    def how_to_cancel(self, ids: Sequence[str], folder: Path) -> str:
        """The line that does so later; nothing where the jobs do not stay."""
        return ""


def supervise(
    jobs: Sequence[Job], runner: Runner, show: Show, finished: Collection[int], poll: float
) -> list[Standing]:
    """Run jobs and wait for them; a failed one stops no other.

    Args:
        jobs: The jobs.
        runner: What runs them.
        show: Called with how all of them stand after every look.
        finished: Numbers of jobs for which nothing is left to do.
        poll: Seconds between two looks.

    Returns:
        How each has ended, in the order of the jobs; ``seconds`` is None where it was finished before.

    Raises:
        KeyboardInterrupt: The jobs stay where they are, unless they cannot stay or there is a second one.
    """
    ended = {
        job.number: job.standing(state=state.DONE, reason="", seconds=None) for job in jobs if job.number in finished
    }
    pending: dict[str, Job] = {}
    missed: Counter[str] = Counter()
    try:
        pending |= _submitted([job for job in jobs if job.number not in finished], runner)
        while True:
            standings = dict(ended)
            seen = runner.look([*pending]) if pending else {}
            for key, job in list(pending.items()):
                inside, word = (True, "") if seen is None else seen.get(key, (False, ""))
                missed[key] = 0 if inside else missed[key] + 1
                told = state.read(job.folder).get("state") in state.ENDS
                if not inside and (told or missed[key] >= LOOKS):
                    ended[job.number] = _ended(pending.pop(key), word)
                standings[job.number] = ended.get(job.number) or _on_its_way(job, key, word)
            show([standings[job.number] for job in jobs])
            if not pending:
                return [ended[job.number] for job in jobs]
            time.sleep(poll)
    except BaseException:
        _leave(pending, runner)
        raise


def _submitted(jobs: Sequence[Job], runner: Runner) -> dict[str, Job]:
    """Jobs by what they are called there; those that are there from an earlier call are not submitted again."""
    known = {str(state.read(job.folder, state.CLUSTER).get(runner.name, "")): job for job in jobs}
    seen = runner.look([key for key in known if key]) or {}
    pending = {key: job for key, job in known.items() if seen.get(key, (False, ""))[0]}
    fresh = [job for job in jobs if job not in pending.values()]
    for job in fresh:  # before they can have begun
        state.write(job.folder, state=state.WAITING, reason="", seconds=None, overrides=job.overrides)
    for key, job in zip(runner.submit(fresh) if fresh else (), fresh, strict=True):
        state.write(job.folder, state.CLUSTER, **{runner.name: key})
        pending[key] = job
    return pending


def _ended(job: Job, word: str) -> Standing:
    """How a job that is gone has ended: what its folder says, and what was said there of one that was cut off."""
    facts = state.read(job.folder)
    if facts.get("state") != state.DONE:
        reason = word or (facts.get("state") == state.FAILED and facts.get("reason")) or UNSEEN
        state.write(job.folder, state=state.FAILED, reason=reason)
    return job.standing(seconds=facts.get("seconds") or 0.0)


def _on_its_way(job: Job, key: str, word: str) -> Standing:
    standing = job.standing(place=word or key)
    if standing.state == state.WAITING and word not in ("", standing.reason):
        state.write(job.folder, reason=word)  # what it waits for
    # One that has ended is so when it has left.
    return standing._replace(state=state.RUNNING) if standing.state in state.ENDS else standing


def _leave(pending: Mapping[str, Job], runner: Runner) -> None:
    """What Ctrl-C means: jobs that can stay do, until it is said twice."""
    if not pending:
        return
    if runner.stays:
        folder = next(iter(pending.values())).folder.parent
        print(
            f"\n{len(pending)} jobs stay on the cluster ({runner.name}); Ctrl-C within {GRACE:.0f} s cancels them"
            f"\n  cancel them later:   {runner.how_to_cancel([*pending], folder)}"
            f"\n  how they stand:      python -m efficientllava.report {shlex.quote(str(folder))} --watch"
            f"\n  table and page:      python -m efficientllava.report {shlex.quote(str(folder))}",
            file=sys.stderr,
        )
        try:
            time.sleep(GRACE)
            return
        except KeyboardInterrupt:
            pass
    runner.cancel([*pending])
    cancelled(job.folder for job in pending.values())
    print(f"{len(pending)} jobs cancelled", file=sys.stderr)


def cancelled(folders: Iterable[Path]) -> None:
    """Note that jobs were cancelled, but for those that were done before."""
    for folder in folders:
        if state.read(folder).get("state") != state.DONE:
            state.write(folder, state=state.FAILED, reason=CANCELLED)


def asked(trainers: Sequence[Mapping[str, Any]], found: int = 1) -> tuple[set[int], int, bool]:
    """What the trainers of jobs ask for: numbers of machines, most processes on one of them, and whether on GPUs.

    Args:
        trainers: Trainer nodes.
        found: What ``devices=auto`` finds where the jobs run, which is not known here.
    """

    def devices(told: Any) -> int:
        return found if str(told) in ("auto", "-1") else len(told) if isinstance(told, list) else int(told)

    return (
        {int(trainer.get("num_nodes", 1)) for trainer in trainers},
        max((devices(trainer.get("devices", 1)) for trainer in trainers), default=1),
        any(str(trainer.get("accelerator")) in ("gpu", "cuda") for trainer in trainers),
    )


@contextmanager
def jobs_table() -> Iterator[Show]:
    """A table of a sweep's jobs that updates in place on a terminal; in a file, a line per job that has ended.

    Yields:
        What `supervise` calls with how the jobs stand.
    """
    console = Console(highlight=False, soft_wrap=True)
    told: set[str] = set()

    def tell(jobs: Sequence[Standing]) -> None:
        for job in jobs:
            if job.state in state.ENDS and job.name not in told:
                told.add(job.name)
                failed = "[red]failed[/red]" if job.state == state.FAILED else "done"
                how = "was finished" if job.seconds is None else f"{failed} after {_duration(job.seconds)}"
                text = f"job {job.name} {how}  {escape(' '.join(job.overrides))}"
                console.print(f"{text}  ({len(told)}/{len(jobs)}{_left(jobs)})")

    if not console.is_terminal:
        yield tell
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def show(jobs: Sequence[Standing]) -> None:
            tell(jobs)
            live.update(_table(jobs))

        yield show


def _table(jobs: Sequence[Standing]) -> Table:
    table = Table(title=f"{state.counted(jobs)}{_left(jobs)}", title_justify="left", box=None)
    for column in ("job", "slot", "time", "overrides"):
        table.add_column(column, justify="left" if column == "overrides" else "right")
    for job in jobs:
        if job.state == state.RUNNING:
            table.add_row(job.name, job.place, _duration(job.seconds or 0.0), escape(" ".join(job.overrides)))
    return table


def _left(jobs: Sequence[Standing]) -> str:
    return f", about {_duration(seconds)} left" if (seconds := state.seconds_left(jobs)) else ""


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
