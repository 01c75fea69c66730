"""A training stream that can stop anywhere and go on at the same batch, and the files it goes on from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from ..processes import gather
from ..runtime.files import put

RESUME_POINT = "last.ckpt"


def _endless(sampler: Any, start: int) -> Iterator[list[int]]:
    """Index batches of all epochs from a position on."""
    epoch, skip = divmod(start, len(sampler))
    for number in itertools.count(epoch):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        yield from itertools.islice(iter(sampler), skip, None)
        skip = 0


def used_records(loader: DataLoader, total: int) -> list[int]:
    """Indices of the records that a `BatchStream` of ``total`` batches serves on any process, ascending."""
    batches = itertools.islice(_endless(loader.batch_sampler, 0), min(total, len(loader)))
    mine = {index for batch in batches for index in batch}
    return sorted(set().union(*gather(mine)))


class BatchStream:
    """A given number of batches, over as many epochs as that takes, resumable by the global batch index.

    Lightning sees one epoch of ``total`` batches and saves the position with its own loop state. Skipped batches are
    never collated.

    Args:
        loader: A map-style loader whose batch sampler yields the order of one epoch; where it has ``set_epoch``, that
            is called before each epoch.
        total: Number of batches.
    """

    def __init__(self, loader: DataLoader, total: int) -> None:
        self._loader = loader
        self._total = total
        self._position = 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        batches = DataLoader(
            loader.dataset,
            batch_sampler=_endless(loader.batch_sampler, self._position),  # pyright: ignore[reportArgumentType]
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
        for batch in itertools.islice(batches, self._total - self._position):
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of ``state``."""
        self._position = state["position"]


class ResumePoint(L.Callback):
    """Saves what a killed run goes on from, under a temporary name that is renamed when whole.

    Args:
        folder: Folder of the file ``last.ckpt``.
        every: Optimiser steps between saves, >= 1.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._path = folder / RESUME_POINT
        self._every = every
        self._saved = -1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save after every ``every``-th optimiser step, once."""
        step = trainer.global_step
        if step == self._saved or step == 0 or step % self._every:
            return
        self._saved = step
        part = self._path.with_name(f".{RESUME_POINT}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            put(part, self._path)  # sharded strategies write folders
        trainer.strategy.barrier("resume point")
