"""The recovery data as a Lightning DataModule: a seeded subset in a seeded order, sharded over processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy as np
from torch.utils.data import DataLoader, Sampler

from ..config import require_valid
from ..errors import UserError
from ..schema import DataConfig
from .collator import Collator
from .conversations import CHECK_LIMIT, Record, report_bad
from .splits import Subset, digest, draw, load_split

log = logging.getLogger(__name__)


class ShardedBatches(Sampler[list[int]]):
    """Batches of one epoch for one process, in an order that depends on the seed and the epoch alone.

    Every process gets the same number of full batches; the last round is filled up with the first records of the
    epoch's order.

    Args:
        size: Number of records, >= 1.
        batch_size: Records per batch and process, >= 1.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self._size, self._batch_size, self._seed = size, batch_size, seed
        self._rank, self._world = rank, world
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._size // (self._batch_size * self._world))

    def __iter__(self) -> Iterator[list[int]]:
        seed = np.random.SeedSequence([self._seed, self._epoch])
        order = np.random.Generator(np.random.PCG64(seed)).permutation(self._size)
        rounds = np.resize(order, (len(self), self._world, self._batch_size))
        yield from rounds[:, self._rank].tolist()


class RecoveryData(lightning.LightningDataModule):
    """Batches for recovery training.

    Args:
        data: The data node of the configuration.
        processor: The model's processor.
        data_frac: Share of the training records to draw, in (0, 1].
        seed: Seed of the draw and of the order.

    Raises:
        UserError: If a value is outside its range, or the data is at fault.
    """

    def __init__(self, data: DataConfig, processor: Any, data_frac: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        require_valid(data, "data.")
        self._data, self._frac, self._seed = data, data_frac, seed
        self._collate = Collator(processor, data.max_length)
        self._records: Sequence[Record] | None = None

    @property
    def records(self) -> Sequence[Record]:
        """The drawn records, checked; drawn on first use."""
        if self._records is None:
            drawn = draw(load_split(self._data, "train"), self._frac, self._seed)
            if self._data.name != "digits_vqa" and len(drawn) <= CHECK_LIMIT:
                drawn = usable(drawn, self._collate, self._data)
            log.info("recovery data: %d records, ids %s", len(drawn), digest(drawn))
            self._records = drawn
        return self._records

    def setup(self, stage: str) -> None:
        """Draw and check the records, on every process alike."""
        _ = self.records

    def train_dataloader(self) -> DataLoader:
        """This process's batches, in the order of `ShardedBatches`."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler = ShardedBatches(len(self.records), self._data.batch_size, self._seed, rank, world)
        return DataLoader(
            self.records,  # pyright: ignore[reportArgumentType]
            batch_sampler=sampler,
            collate_fn=self._collate,
            num_workers=self._data.num_workers,
        )


def usable(records: Sequence[Record], collate: Collator, data: DataConfig) -> Sequence[Record]:
    """Open every image and measure every record.

    Args:
        records: The records to check.
        collate: The collator that will serve them.
        data: Path for messages, and the share of corrupt records that is tolerated.

    Returns:
        The records that can be collated.

    Raises:
        UserError: If too many cannot.
    """
    kept: list[int] = []
    bad: list[str] = []
    for index in range(len(records)):
        try:
            collate.check(records[index])
            kept.append(index)
        except UserError as error:
            bad.append(str(error))
    report_bad(str(data.path or data.name), bad, len(records), data.max_bad_fraction)
    return records if len(kept) == len(records) else Subset(records, kept)
