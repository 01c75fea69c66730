"""What a run says: one console on the first process, a progress bar per stage."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

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
