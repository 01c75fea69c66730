"""What a run says: one console on the first process, a progress bar per stage."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .processes import rank


def say(*lines: RenderableType) -> None:
    """Print on the first process."""
    if rank() == 0:
        Console(highlight=False, soft_wrap=True).print(*lines, sep="\n")


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display that updates in place on a terminal and stays quiet in a file."""
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=rank() > 0) as display:
        yield display


class Ticker:
    """Callable progress: ``ticker(what, done, total)``.

    Args:
        display: From `progress`.
    """

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._tasks: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``what`` are finished."""
        if what not in self._tasks:
            self._tasks[what] = self._display.add_task(what, total=total)
        self._display.update(self._tasks[what], completed=done, total=total)  # pyright: ignore[reportArgumentType]


def quiet_libraries() -> None:
    """Keep what libraries say about themselves off the console; their warnings about a run stay."""
    import lightning.pytorch  # noqa: F401 - sets its own log level when first imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in [*logging.root.manager.loggerDict, "lightning.pytorch", "lightning.fabric"]:
        if name.startswith(("lightning", "httpx")):
            logging.getLogger(name).setLevel(logging.WARNING)
    # transformers' own validation reads the sizes of per-layer configurations and warns about itself.
    heterogeneity = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    heterogeneity.addFilter(_is_no_validation)
    # Lightning's own deprecations, its view on loader workers, and predictions that are returned on another way.
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        "predict returned None.*",
        ".*Checkpoint directory.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_no_validation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Reading global config value")
