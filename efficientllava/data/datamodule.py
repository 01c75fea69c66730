"""The recovery data as a Lightning DataModule: a seeded subset in a seeded order, sharded over processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning
from torch.utils.data import DataLoader

from ..checks import require_valid
from ..schema import DataConfig
from .checks import usable
from .collator import Collator
from .conversations import Record
from .samplers import GroupedBatches, ShardedBatches
from .splits import digest, draw, load_split
from .subset import column

log = logging.getLogger(__name__)


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
            if self._data.name != "digits_vqa":
                drawn = usable(drawn, self._collate, self._data)
            log.info("recovery data: %d records, ids %s", len(drawn), digest(drawn))
            self._records = drawn
        return self._records

    def setup(self, stage: str) -> None:
        """Draw and check the records, on every process alike."""
        _ = self.records

    def train_dataloader(self) -> DataLoader:
        """This process's batches, in the order of `ShardedBatches` or `GroupedBatches`."""
        trainer, data = self.trainer, self._data
        shard = (self._seed, trainer.global_rank, trainer.world_size) if trainer is not None else (self._seed,)
        if data.group_by_modality_length:
            lengths = column(self.records, "length")
            sampler = GroupedBatches(lengths, data.batch_size, data.global_batch_size or 0, *shard)
        else:
            sampler = ShardedBatches(len(self.records), data.batch_size, *shard)
        return DataLoader(
            self.records,  # pyright: ignore[reportArgumentType]
            batch_sampler=sampler,
            collate_fn=self._collate,
            num_workers=self._data.num_workers,
        )
