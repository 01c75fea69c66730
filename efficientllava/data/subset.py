"""Some records of a sequence, and what can be known of records without making them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .conversations import Record
from .digits import Digits

if TYPE_CHECKING:
    from .table import Conversations


class Subset(Sequence[Record]):
    """Chosen records of a sequence, made or opened only when asked for.

    Args:
        records: The sequence.
        indices: Which of its records, in which order.
    """

    def __init__(self, records: Sequence[Record], indices: Sequence[int] | np.ndarray) -> None:
        self.records = records
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.records[int(self.indices[index])]

    def record_id(self, index: int) -> str:
        """Id of a record, without making it where that is possible."""
        return record_id(self.records, int(self.indices[index]))

    def column(self, name: str) -> np.ndarray:
        """A property of all records; see `column`."""
        return column(self.records, name)[self.indices]


def record_id(records: Sequence[Record], index: int) -> str:
    """Id of a record, without making it where that is possible."""
    name_of = getattr(records, "record_id", None)
    return records[index].id if name_of is None else name_of(index)


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """``id``, ``source``, or ``length`` (words, negative without an image) of all records of a file.

    Of records that come from no file, there is no ``length``.
    """
    if (read := getattr(records, "column", None)) is not None:
        return read(name)
    if isinstance(records, Digits) and name == "source":
        return np.full(len(records), "digits_vqa", dtype=object)
    if name == "id":
        return np.array([record_id(records, index) for index in range(len(records))], dtype=object)
    return np.array([getattr(record, name) for record in records], dtype=object)


def conversations_of(records: Sequence[Record]) -> tuple[Conversations | None, np.ndarray]:
    """The table that records come from, and their places in it; None for records that come from no file."""
    indices = np.arange(len(records))
    while isinstance(records, Subset):
        indices, records = records.indices[indices], records.records
    return (records if hasattr(records, "image_files") else None), indices  # pyright: ignore[reportReturnType]


def show_images(records: Sequence[Record]) -> bool:
    """Whether any record has an image; none is made or opened."""
    table, _ = conversations_of(records)
    return table is None or bool((column(records, "length") > 0).any())
