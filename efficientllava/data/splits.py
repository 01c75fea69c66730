"""Which records serve which purpose: train, calibration, minival and test share none, and every draw is seeded.

Some records of a sequence, and what can be known of records without making them.

Faults of the records that a run will use, found before it begins.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.content import stamp
from ..runtime.errors import UserError
from ..settings.schema import CalibrationConfig, DataConfig, RunConfig
from .embedded.digits import SPLITS, Digits
from .records import Record, image_key
from .sources import is_file, parts_of, report_bad

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


log = logging.getLogger(__name__)

# Up to this many records are opened and measured before a run. Of more, it is only asked whether their images exist;
# a broken one is then found when its record is used.
CHECK_LIMIT = 5000
SHOWN_FOLDERS = 8  # in a message


def usable(records: Sequence[Record], collate: Any, data: DataConfig) -> Sequence[Record]:
    """Leave out the records that cannot be used; see `CHECK_LIMIT`.

    Args:
        records: The records to check; no other record's image is touched.
        collate: The collator that will serve them.
        data: Path for messages, and the share of corrupt records that is tolerated.

    Returns:
        The records that can be collated.

    Raises:
        UserError: If too many cannot.
    """
    problems = missing_images(records)
    hint = _layout(records) if problems else ""
    if len(records) <= CHECK_LIMIT:
        for index in range(len(records)):
            try:
                if index not in problems:
                    collate.check(records[index])
            except UserError as error:
                problems[index] = str(error)
    bad = [problems[index] for index in sorted(problems)]
    report_bad(str(data.path or data.name), bad, len(records), data.max_bad_fraction, hint)
    if not bad:
        return records
    return Subset(records, np.setdiff1d(np.arange(len(records)), list(problems)))


def usable_first(records: Sequence[Record], count: int, collate: Any, data: DataConfig, where: str) -> list[Record]:
    """The first records that can be used.

    Args:
        records: Where to take them from.
        count: How many.
        collate: The collator that will serve them.
        data: Share of corrupt records that is tolerated among those tried, rounded up.
        where: The file, for messages.

    Returns:
        ``count`` records, or fewer where the data ends.

    Raises:
        UserError: If too many cannot be used.
    """
    good: list[Record] = []
    bad: list[str] = []
    for index in range(len(records)):
        if len(good) == count:
            break
        record = records[index]
        try:
            collate.check(record)
            good.append(record)
        except UserError as error:
            bad.append(str(error))
            tried = len(good) + len(bad)
            if len(bad) > math.ceil(data.max_bad_fraction * count):
                report_bad(where, bad, tried, data.max_bad_fraction, _layout(records))
    if bad:
        log.warning("%s: %d calibration records are corrupt and left out, the first: %s", where, len(bad), bad[0])
    return good


def missing_images(records: Sequence[Record]) -> dict[int, str]:
    """What is missing, by index of the record; images are looked for, not opened."""
    table, indices = conversations_of(records)
    if table is None:
        return {}
    files = table.image_files(indices)
    paths = sorted({path for images in files for path in images})
    # In parallel, since image folders are often on a network.
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda path: is_file(table.image_root / path), paths, chunksize=256)
        missing = {path for path, there in zip(paths, found, strict=True) if not there}
    return {
        index: f"record {table.record_id(indices[index])!r}: image {str(table.image_root / path)!r} does not exist"
        for index, images in enumerate(files)
        if (path := next((p for p in images if p in missing), None)) is not None
    }


def _layout(records: Sequence[Record]) -> str:
    """The folders that the images of some records are expected in."""
    table, indices = conversations_of(records)
    if table is None:
        return ""
    files = table.image_files(indices[: 10 * CHECK_LIMIT])
    counts = Counter(str(Path(path).parent) for images in files for path in images)
    folders = [folder for folder, _ in counts.most_common(SHOWN_FOLDERS)]
    if not folders or folders == ["."]:
        return f"; the images are expected in data.image_root={table.image_root}"
    return f"; data.image_root={table.image_root} is expected to hold {', '.join(folders)}"


if TYPE_CHECKING:
    from .table import Conversations

PURPOSES = ("train", "calibration", "minival", "test")
# A file of conversations lends a tenth of its records, but no more than this, to calibration and to minival each.
HELD_OUT = 1000
LEAST = 10  # records, images or documents that can be divided so
COMPARED = 0.25  # share of the calibration records that candidates are compared on
LEAST_FITTED, LEAST_COMPARED = 2, 2  # groups that are fitted to, and records that are compared or reported on
LOOKED_AT = 4  # records that are looked at for each one to report on
LEAST_DOCUMENTS = 4  # ids that name fewer name something else: every record is a document of its own


def _rng(seed: int, purpose: str) -> np.random.Generator:
    code = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, code])))


def _conversations(path: str, image_root: str | None, max_bad_fraction: float, key: str = "data.path") -> Conversations:
    """Read once per process, as long as its files stay: several stages ask for splits of the same one."""
    parts = tuple(parts_of(path, image_root, key))
    seen = tuple(stamp(part.file) if part.file.exists() else None for part in parts)
    return _read(path, image_root, max_bad_fraction, key, parts, seen)


@lru_cache(maxsize=2)
def _read(path: str, image_root: str | None, max_bad_fraction: float, key: str, *_seen: object) -> Conversations:
    from .table import read_conversations

    return read_conversations(path, image_root, max_bad_fraction, key)


def _source(data: DataConfig, calibration: CalibrationConfig | None = None) -> Conversations | None:
    """The file behind a configuration, or None for the embedded data."""
    if calibration is not None and calibration.path is not None:
        where = (calibration.path, calibration.image_root)
        return _conversations(*where, data.max_bad_fraction, "calibration.path")
    if data.name == "digits_vqa":
        return None
    if not data.path:
        raise UserError(f"data.path: not set, but data={data.name} needs a LLaVA-style JSON or JSONL file")
    return _conversations(str(data.path), data.image_root, data.max_bad_fraction)


def open_data(config: RunConfig) -> dict[str, str]:
    """Open the files that a run will read, so that a faulty one is found before anything else is done.

    Args:
        config: The whole configuration.

    Returns:
        For each stage that reads records, the digest of the file behind its records and of where their images are;
        empty for the embedded data.

    Raises:
        UserError: A file is missing, cannot be fetched, or is of another kind.
    """
    # What no stage reads is not opened, which may mean fetched.
    read = {"prune": _source(config.data, config.calibration)} if config.prune.method != "none" else {}
    read |= {"recover": _source(config.data)} if config.recover.name != "none" else {}
    reports = read and config.data.path is not None  # losses of its minival
    read |= {"evaluate": _source(config.data)} if reports else {}
    return {stage: "" if table is None else f"{table.key}:{table.image_root}" for stage, table in read.items()}


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
    return Subset(records, _rng(seed, split).permutation(len(records)))


def _part(data: DataConfig, split: str) -> Sequence[Record]:
    if split == "test":
        raise UserError(f"data={data.name}: has no test split; choose a benchmark with evaluate=")
    records = _source(data)
    assert records is not None
    if len(records) < LEAST:
        raise UserError(f"data.path: {data.path!r} holds {len(records)} records; at least {LEAST} are needed")
    parts = _division(records)
    # Only training repeats what a list of files asks to repeat, so that no repetition is in two splits.
    train = parts["train"]
    return Subset(records, np.repeat(train, records.repeats()[train]) if split == "train" else parts[split])


@lru_cache(maxsize=2)
def _division(records: Conversations) -> dict[str, np.ndarray]:
    """Indices of a file's records by split; records of one image or document are in one split, where it has ten."""
    codes: dict[str, int] = {}
    groups = np.array([codes.setdefault(name, len(codes)) for name in groups_of(records)])
    groups = groups if len(codes) >= LEAST else np.arange(len(records))
    sizes = np.bincount(groups)
    held, smallest = min(HELD_OUT, len(records) // 10), sizes.min()
    waiting = _rng(0, "division").permutation(len(sizes)).tolist()
    split_of = np.full(len(sizes), PURPOSES.index("train"))
    for split in ("calibration", "minival"):
        missing = held
        for group in list(waiting):
            if missing > 0 and sizes[group] <= max(missing, smallest):
                split_of[group] = PURPOSES.index(split)
                missing -= sizes[group]
                waiting.remove(group)
            if missing <= 0:
                break
    order = _rng(0, "order").permutation(len(records))
    found = {split: order[split_of[groups[order]] == PURPOSES.index(split)] for split in ("calibration", "minival")}
    return {"train": np.flatnonzero(split_of[groups] == PURPOSES.index("train")), **found}


def groups_of(records: Sequence[Record]) -> list[str]:
    """What each record must share its role with: its first image, or else its document.

    The document is what stands before the last "/" of an id, without the source's name and the number of a repeated id.
    """
    table, places = conversations_of(records)
    if table is not None:
        images = [files[0] if files else None for files in table.image_files(places)]
    else:
        images = [image_key(record.image) if record.image is not None else None for record in records]
    ids, sources = column(records, "id").tolist(), column(records, "source").tolist()
    documents = [_document(*pair) for pair in zip(ids, sources, strict=True)]
    alone = len({d for d, image in zip(documents, images, strict=True) if image is None}) < LEAST_DOCUMENTS
    texts = ids if alone else documents
    return [f"text {text}" if image is None else f"image {image}" for text, image in zip(texts, images, strict=True)]


def _document(name: str, source: str) -> str:
    name = name.removeprefix(f"{source}/")
    name = name.rpartition("#")[0] or name
    return name.rpartition("/")[0] or name


def calibration_records(
    calibration: CalibrationConfig, data: DataConfig, seed: int = 0, collate: Any = None
) -> list[Record]:
    """The records that importance and refit statistics come from.

    Args:
        calibration: Number of records, and the user's own file where given.
        data: Data whose calibration split serves otherwise.
        seed: Seed of the draw.
        collate: The collator that will serve them, to leave out what it cannot use; None takes all as they are.

    Returns:
        ``calibration.samples`` records.

    Raises:
        UserError: If there are fewer, or too many are corrupt.
    """
    records = load_split(data, "calibration", seed) if calibration.path is None else _own(calibration, data, seed)
    if calibration.samples > len(records):
        there = (
            "in calibration.path; ask for fewer"
            if calibration.path
            else "set aside for it (a tenth of the data); ask for fewer, or give a file of its own as calibration.path"
        )
        raise UserError(f"calibration.samples={calibration.samples}: only {len(records)} records are {there}")
    return _first(records, calibration.samples, calibration, data, collate)


def _own(calibration: CalibrationConfig, data: DataConfig, seed: int) -> Subset:
    """The user's own records in the order in which they are drawn."""
    source = _source(data, calibration)
    assert source is not None
    return Subset(source, _rng(seed, "calibration").permutation(len(source)))


def _first(
    records: Sequence[Record], count: int, calibration: CalibrationConfig, data: DataConfig, collate: Any
) -> list[Record]:
    if collate is None:
        return [records[index] for index in range(min(count, len(records)))]
    return usable_first(records, count, collate, data, str(calibration.path or data.path or data.name))


def keep_back(config: RunConfig, records: Sequence[Record], collate: Any = None) -> tuple[list[Record], list[Record]]:
    """Find the records that losses are reported on: no choice of a run has seen them, nor their images or documents.

    They are of the data's minival. Where a user gives calibration records and no data, they are further records of that
    file, or part of the drawn ones.

    Args:
        config: The whole configuration; ``calibration.report`` of the user's own records are kept back.
        records: Calibration records as drawn; empty where nothing is pruned.
        collate: As of `calibration_records`.

    Returns:
        The calibration records that remain, and the ones to report on, which may be none.
    """
    own, data = config.calibration, config.data
    if config.prune.method == config.recover.name == "none":
        return list(records), []  # there is nothing to compare with the base

    def unseen(pool: Sequence[Record], count: int) -> list[Record]:
        near = [pool[index] for index in range(min(len(pool), len(records) + LOOKED_AT * count))]
        traces = _traces([*records, *near])
        seen = set().union(*traces[: len(records)])
        fresh = [record for record, trace in zip(near, traces[len(records) :], strict=True) if seen.isdisjoint(trace)]
        return _first(fresh, count, own, data, collate)

    source = _source(data) if data.path is not None else None
    if data.name == "digits_vqa" or (source is not None and len(source) >= LEAST):
        found = unseen(load_split(data, "minival", config.seed), own.samples)
        if len(found) >= LEAST_COMPARED or own.path is None:
            return list(records), found
    if not (own.path and own.report and records):
        return list(records), []
    found = unseen(_own(own, data, config.seed), own.report)
    if len(found) == own.report:
        return list(records), found
    return split_roles(records, min(COMPARED, own.report / len(records)))


def _traces(records: Sequence[Record]) -> list[set[str]]:
    """What tells that two records are about the same, also where their files or ids differ."""
    return [
        {group, *(f"{turn.question}\n{turn.answer}" for turn in record.turns if not record.images)}
        for record, group in zip(records, groups_of(records), strict=True)
    ]


def split_roles(records: Sequence[Record], share: float = COMPARED) -> tuple[list[Record], list[Record]]:
    """Part calibration records into those that candidates are fitted to, and those that they are compared on.

    Records that `groups_of` says belong together stay together.

    Args:
        records: Calibration records, in their order.
        share: Share that is compared on, (0, 1).

    Returns:
        Records to fit and records to compare, both in their order; the latter is empty where there are too few.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record, group in zip(records, groups_of(records), strict=True):
        groups[group].append(record)
    compared: list[Record] = []
    for group in reversed(list(groups.values())[LEAST_FITTED:]):
        if len(compared) + len(group) <= share * len(records):
            compared += group
    if len(compared) < LEAST_COMPARED:
        return list(records), []
    chosen = {id(record) for record in compared}
    return [r for r in records if id(r) not in chosen], [r for r in records if id(r) in chosen]


def split_folds(records: Sequence[Record]) -> tuple[list[Record], list[Record], list[Record]]:
    """Part calibration records twice, see `split_roles`.

    Returns:
        Records that candidates are fitted to, those that their refit makes its own choices on, and those that they are
        compared on: the latter two are of about one size, and empty where there are too few records.
    """
    rest, compared = split_roles(records)
    if not compared:
        return rest, [], []
    fitted, held = split_roles(rest, len(compared) / len(rest))
    return fitted, held, compared


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
    for index, source in enumerate(column(records, "source").tolist()):
        groups[source].append(index)
    chosen: list[int] = []
    for source, count in _shares({name: len(group) for name, group in groups.items()}, fraction).items():
        order = _rng(seed, f"draw/{source}").permutation(len(groups[source]))
        chosen += [groups[source][int(index)] for index in order[:count]]
    return Subset(records, sorted(chosen))


def record_count(data: DataConfig, fraction: float) -> int | None:
    """Number of records that `draw` takes of the training records, where it is known without reading them."""
    return max(1, round(fraction * data.images)) if data.name == "digits_vqa" else None


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
    for name in column(records, "id").tolist():
        hasher.update(name.encode() + b"\n")
    return hasher.hexdigest()[:16]
