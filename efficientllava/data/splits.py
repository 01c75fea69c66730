"""Which records serve which purpose: train, calibration, minival and test share none, and every draw is seeded."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ..errors import UserError
from ..schema import CalibrationConfig, DataConfig
from .conversations import Record, read_conversations
from .digits import SPLITS, Digits

PURPOSES = ("train", "calibration", "minival", "test")
# A file of conversations lends a tenth of its records, but no more than this, to calibration and to minival each.
HELD_OUT = 1000


class Subset(Sequence[Record]):
    """Chosen records of a sequence, made or opened only when asked for.

    Args:
        records: The sequence.
        indices: Which of its records, in which order.
    """

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self._records = records
        self._indices = [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._records[self._indices[index]]

    def record_id(self, index: int) -> str:
        """Id of a record, without making it where that is possible."""
        return record_id(self._records, self._indices[index])


def record_id(records: Sequence[Record], index: int) -> str:
    """Id of a record, without making it where that is possible."""
    name_of = getattr(records, "record_id", None)
    return records[index].id if name_of is None else name_of(index)


def _rng(seed: int, purpose: str) -> np.random.Generator:
    code = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, code])))


@lru_cache(maxsize=2)
def _conversations(path: str, image_root: str | None, max_bad_fraction: float) -> tuple[Record, ...]:
    """Read once per process: several stages ask for splits of the same file."""
    return tuple(read_conversations(path, image_root, max_bad_fraction))


def load_split(data: DataConfig, split: str, seed: int = 0) -> Sequence[Record]:
    """The records of one purpose.

    Args:
        data: The data node of the configuration.
        split: ``train``, ``calibration``, ``minival`` or ``test``.
        seed: Order of ``calibration`` and ``minival``, so that their first N records are a seeded draw. What belongs to
            which split does not depend on it; ``train`` and ``test`` keep their own order.

    Returns:
        Records, made or opened when asked for.

    Raises:
        UserError: If there is no such data or split, or the file is at fault.
    """
    if split not in PURPOSES:
        raise UserError(f"data split: {split!r} is not one of {', '.join(PURPOSES)}")
    if data.name == "digits_vqa":
        sizes = {"train": data.images, "test": data.test_questions}
        records: Sequence[Record] = Digits(split, sizes.get(split, SPLITS[split].size))
    else:
        records = _part(data, split)
    if split in ("train", "test"):
        return records
    return Subset(records, _rng(seed, split).permutation(len(records)).tolist())


def _part(data: DataConfig, split: str) -> Sequence[Record]:
    if not data.path:
        raise UserError(f"data.path: not set, but data={data.name} needs a LLaVA-style JSON or JSONL file")
    if split == "test":
        raise UserError(f"data={data.name}: has no test split; choose a benchmark with evaluate=")
    records = _conversations(str(data.path), data.image_root, data.max_bad_fraction)
    order = _rng(0, "division").permutation(len(records))
    held = min(HELD_OUT, len(records) // 10)
    if not held:
        raise UserError(f"data.path: {data.path!r} holds {len(records)} records; at least 10 are needed")
    parts = {"calibration": order[:held], "minival": order[held : 2 * held], "train": np.sort(order[2 * held :])}
    return Subset(records, parts[split].tolist())


def calibration_records(calibration: CalibrationConfig, data: DataConfig, seed: int = 0) -> list[Record]:
    """The records that importance and refit statistics come from.

    Args:
        calibration: Number of records, and the user's own file where given.
        data: Data whose calibration split serves otherwise.
        seed: Seed of the draw.

    Returns:
        ``calibration.samples`` records.

    Raises:
        UserError: If there are fewer.
    """
    if calibration.path is None:
        records = load_split(data, "calibration", seed)
    else:
        own = _conversations(str(calibration.path), calibration.image_root, data.max_bad_fraction)
        records = Subset(own, _rng(seed, "calibration").permutation(len(own)).tolist())
    if calibration.samples > len(records):
        raise UserError(
            f"calibration.samples={calibration.samples}: only {len(records)} records are there; ask for fewer"
        )
    return [records[index] for index in range(calibration.samples)]


def draw(records: Sequence[Record], fraction: float, seed: int) -> Sequence[Record]:
    """A seeded subset, stratified by source; the same on every rank and machine.

    Args:
        records: Where to draw from.
        fraction: Share to draw, in (0, 1].
        seed: Seed of the draw. Smaller fractions are contained in larger ones, but for rounding between sources.

    Returns:
        ``round(fraction * n)`` records, at least one, in their original order.

    Raises:
        UserError: If the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data_frac={fraction}: must lie in (0, 1]; 1 takes all data")
    if fraction == 1:
        return records
    groups: dict[str, list[int]] = defaultdict(list)
    for index in range(len(records)):
        # Records of the embedded data are made on access; their source is known.
        groups["digits_vqa" if isinstance(records, Digits) else records[index].source].append(index)
    chosen: list[int] = []
    for source, count in _shares({name: len(group) for name, group in groups.items()}, fraction).items():
        order = _rng(seed, f"draw/{source}").permutation(len(groups[source]))
        chosen += [groups[source][int(index)] for index in order[:count]]
    return Subset(records, sorted(chosen))


def _shares(sizes: dict[str, int], fraction: float) -> dict[str, int]:
    """Records to take of each source: largest remainders, so that the sum is the rounded total."""
    total = max(1, round(fraction * sum(sizes.values())))
    counts = {name: int(fraction * size) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - fraction * sizes[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def digest(records: Sequence[Record]) -> str:
    """Hash of the ids in their order, 16 hexadecimal digits: which records a run has used."""
    hasher = hashlib.sha256()
    for index in range(len(records)):
        hasher.update(record_id(records, index).encode() + b"\n")
    return hasher.hexdigest()[:16]
