"""The recovery data as a Lightning DataModule: a seeded subset in a seeded order, sharded over processes.

The order of training records: batches of one epoch for one process, the same on every machine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning
import numpy as np
from torch.utils.data import DataLoader, Sampler

from ..settings.checks import require_valid
from ..settings.schema import DataConfig
from .collator import Collator
from .records import Record, column, usable
from .splits import draw, load_split

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
        order = self._generator().permutation(self._size)
        rounds = np.resize(order, (len(self), self._world, self._batch_size))
        yield from rounds[:, self._rank].tolist()

    def _generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, self._epoch])))


class GroupedBatches(ShardedBatches):
    """Batches of one modality and of similar lengths, as LLaVA's ``group_by_modality_length``.

    Records with and without an image are shuffled apart and cut into groups of ``group`` records; a group is sorted by
    length, longest first, and dealt to the processes round by round. Groups of both kinds are shuffled together, the
    two incomplete ones come last. In a round, every process has records of the same kind. What fills up the last round
    of a kind are the first records of its order, so that, other than in LLaVA, no batch mixes the two.

    Args:
        lengths: Length of each record, negative for one without an image; not 0.
        batch_size: Records per batch and process, >= 1.
        group: Records that are sorted together, usually those of an optimiser step; at least a round's.
        seed: Seed of the order.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, group: int, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(len(lengths), batch_size, seed, rank, world)
        self._lengths, self._round = np.abs(lengths), batch_size * world
        self._kinds = [kind for kind in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)) if len(kind)]
        self._rounds_per_group = max(1, group // self._round)

    def __len__(self) -> int:
        return sum(-(-len(kind) // self._round) for kind in self._kinds)

    def __iter__(self) -> Iterator[list[int]]:
        generator = self._generator()
        whole: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for kind in self._kinds:
            order = generator.permutation(kind)
            rounds = np.resize(order, (-(-len(kind) // self._round), self._round))
            for start in range(0, len(rounds), self._rounds_per_group):
                group = rounds[start : start + self._rounds_per_group]
                (whole if len(group) == self._rounds_per_group else rest).append(self._sorted(group))
        for group in [*(whole[index] for index in generator.permutation(len(whole))), *rest]:
            # Dealing like cards gives the processes of a round equally long batches.
            yield from group[:, self._rank :: self._world].tolist()

    def _sorted(self, group: np.ndarray) -> np.ndarray:
        records = group.ravel()
        return records[np.argsort(-self._lengths[records], kind="stable")].reshape(group.shape)


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

    @cached_property
    def records(self) -> Sequence[Record]:
        """The drawn records, checked; drawn on first use, on every process alike."""
        drawn = draw(load_split(self._data, "train"), self._frac, self._seed)
        if not self._data.embedded:
            drawn = usable(drawn, self._collate, self._data)
        log.info("recovery data: %d records, ids %s", len(drawn), ids_digest(drawn))
        return drawn

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


def ids_digest(records: Sequence[Record]) -> str:
    """Hash of the ids in their order, 16 hexadecimal digits: which records a run has used."""
    listed = "".join(f"{name}\n" for name in column(records, "id").tolist())
    return hashlib.sha256(listed.encode()).hexdigest()[:16]
