"""Which records serve which purpose: train, calibration, minival and test share none, and every draw is seeded."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime import UserError, stamp
from ..settings.schema import CalibrationConfig, DataConfig, RunConfig
from .embedded.digits import Digits
from .embedded.prose import calibrating
from .records import Record, Subset, column, expected_folders, fault_of, image_names, missing_images, said
from .sources import parts_of, report_bad

if TYPE_CHECKING:
    from .table import Conversations

log = logging.getLogger(__name__)

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


@lru_cache(maxsize=2)
def _read(path: str, image_root: str | None, max_bad_fraction: float, key: str, *_seen: object) -> Conversations:
    from .table import read_conversations

    return read_conversations(path, image_root, max_bad_fraction, key)


def _source(data: DataConfig, calibration: CalibrationConfig | None = None) -> Conversations | None:
    """The file behind a configuration, or None for the embedded data."""
    if calibration is not None and calibration.path is not None:
        return _opened(data, calibration, "calibration.path")
    return None if data.embedded else _opened(data, data, "data.path")


def _opened(data: DataConfig, place: DataConfig | CalibrationConfig, key: str) -> Conversations:
    if not place.path:
        raise UserError(f"data.path: not set, but data={data.name} needs a LLaVA-style JSON or JSONL file")
    # Read once per process, as long as its files stay: several stages ask for splits of the same one.
    parts = tuple(parts_of(str(place.path), place.image_root, key))
    seen = (stamp(part.file) if part.file.exists() else None for part in parts)
    return _read(str(place.path), place.image_root, data.max_bad_fraction, key, parts, *seen)


def open_data(config: RunConfig) -> dict[str, str]:
    """Open the files that a run will read, so that a faulty one is found before anything else is done.

    Returns:
        For each stage that reads records, the digest of the file behind its records and of where their images are;
        empty for the embedded data.

    Raises:
        UserError: A file is missing, cannot be fetched, or is of another kind.
    """
    # What no stage reads is not opened, which may mean fetched.
    read = {"prune": _source(config.data, config.calibration)} if config.prune.method != "none" else {}
    read |= {"recover": _source(config.data)} if config.recover.name != "none" else {}
    # Losses of its minival are reported.
    read |= {"evaluate": _source(config.data)} if read and config.data.path is not None else {}
    return {stage: "" if table is None else f"{table.key}:{table.image_root}" for stage, table in read.items()}


def load_split(data: DataConfig, split: str, seed: int = 0) -> Sequence[Record]:
    """The records of one purpose.

    Args:
        data: The data node of the configuration.
        split: ``train``, ``calibration`` or ``minival``; what is tested on, benchmarks know.
        seed: Order of ``calibration`` and ``minival``, so that their first N records are a seeded draw. What belongs to
            which split does not depend on it; ``train`` keeps its own order.

    Returns:
        Records, made or opened when asked for.

    Raises:
        UserError: If there is no such data or split, or the file is at fault.
    """
    images = data.images if split == "train" else None
    records = Digits(split, images) if data.embedded else _part(data, split)
    return records if split == "train" else Subset(records, _rng(seed, split).permutation(len(records)))


def _part(data: DataConfig, split: str) -> Sequence[Record]:
    records = _opened(data, data, "data.path")
    if len(records) < LEAST:
        raise UserError(f"data.path: {data.path!r} holds {len(records)} records; at least {LEAST} are needed")
    parts = _division(records)
    # Only training repeats what a list of files asks to repeat, so that no repetition is in two splits.
    train = parts["train"]
    return Subset(records, np.repeat(train, records.column("repeats")[train]) if split == "train" else parts[split])


@lru_cache(maxsize=2)
def _division(records: Conversations) -> dict[str, np.ndarray]:
    """Indices of a file's records by split; records of one image or document are in one split, where it has ten."""
    codes: dict[str, int] = {}
    held = min(HELD_OUT, len(records) // 10)
    groups = np.array([codes.setdefault(name, len(codes)) for name in groups_of(records, held)])
    groups = groups if len(codes) >= LEAST else np.arange(len(records))
    # What is larger than what is set aside is a corpus, and no document.
    corpora = [code for name, code in codes.items() if name.startswith("text ")]
    apart = np.isin(groups, corpora) & (np.bincount(groups)[groups] > held)
    _, same = np.unique(said(records, np.flatnonzero(apart)), return_inverse=True)
    often = np.bincount(same)[same] > held  # of a text that fills a split, nothing else could be set aside
    groups[apart] = groups.max() + 1 + np.where(often, len(same) + np.arange(len(same)), same)
    _, groups = np.unique(groups, return_inverse=True)
    sizes = np.bincount(groups)
    smallest = sizes.min()
    waiting = _rng(0, "division").permutation(len(sizes)).tolist()
    split_of = np.full(len(sizes), "train", dtype=object)
    for split in ("calibration", "minival"):
        missing = held
        for group in list(waiting):
            if sizes[group] <= max(missing, smallest):
                split_of[group] = split
                missing -= sizes[group]
                waiting.remove(group)
            if missing <= 0:
                break
    order = _rng(0, "order").permutation(len(records))
    found = {split: order[split_of[groups[order]] == split] for split in ("calibration", "minival")}
    return {"train": np.flatnonzero(split_of[groups] == "train"), **found}


def groups_of(records: Sequence[Record], most: int | None = None) -> list[str]:
    """What each record must share its role with: its images, with all that others show beside them, or its document.

    The document is what stands before the last "/" of an id, without the source's name and the number of a repeated id.
    Documents that share a whole conversation are one.

    Args:
        records: The records.
        most: An image that more of them show beside others, such as a logo, does not bind them; None: every one does.
    """
    names = [[f"image {image}" for image in images] for images in image_names(records)]
    if most is not None:
        shown = Counter(image for images in names for image in {*images})
        names = [[image for image in images if shown[image] <= most] or images[:1] for images in names]
    plain = [index for index, images in enumerate(names) if not images]
    ids, sources = column(records, "id").tolist(), column(records, "source").tolist()
    documents = [_document(ids[index], sources[index]) for index in plain]
    texts = documents if len({*documents}) >= LEAST_DOCUMENTS else [ids[index] for index in plain]
    for index, text, content in zip(plain, texts, said(records, plain), strict=True):
        names[index] = [f"text {text}", f"said {content}"]
    return _together(names)


def _together(names: Sequence[Sequence[str]]) -> list[str]:
    """One name for all that records link with each other, the first of one of them."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := leader.get(name, name)) != name:
            leader[name] = leader.get(above, above)
            name = above
        return name

    for first, *others in (each for each in names if len(each) > 1):
        for other in others:
            leader[find(other)] = find(first)
    return [find(first) for first, *_ in names]


def _document(name: str, source: str) -> str:
    name = name.removeprefix(f"{source}/")
    name = name.rpartition("#")[0] or name
    return name.rpartition("/")[0] or name


def calibration_records(
    calibration: CalibrationConfig, data: DataConfig, seed: int = 0, collate: Any = None
) -> list[Record]:
    """The ``calibration.samples`` records that importance and refit statistics come from.

    Args:
        calibration: Number of records, and the user's own file where given.
        data: Data whose calibration split serves otherwise.
        seed: Seed of the draw.
        collate: As of `usable_first`.

    Raises:
        UserError: If there are fewer, or too many cannot be used.
    """
    records = load_split(data, "calibration", seed) if calibration.path is None else _own(calibration, data, seed)
    if data.embedded and calibration.path is None and calibration.prose:
        return _mixed(records, calibration)
    if calibration.samples > len(records):
        there = (
            "in calibration.path; ask for fewer"
            if calibration.path
            else "set aside for it (a tenth of the data); ask for fewer, or give a file of its own as calibration.path"
        )
        raise UserError(f"calibration.samples={calibration.samples}: only {len(records)} records are {there}")
    return usable_first(records, calibration.samples, collate, calibration, data)


def _mixed(records: Sequence[Record], calibration: CalibrationConfig) -> list[Record]:
    """Embedded records, with as much prose among them as is asked for, one after the other as long as there are both.

    Raises:
        UserError: More prose is asked for than there are to be samples.
    """
    if calibration.prose > calibration.samples:
        raise UserError(
            f"calibration.prose={calibration.prose}: must be at most calibration.samples={calibration.samples}, which "
            "counts it; ask for less"
        )
    others = range(min(len(records), calibration.samples - calibration.prose))
    sides = (Subset(records, others), calibrating()[: calibration.prose])
    return [record for pair in zip_longest(*sides) for record in pair if record is not None]


def usable_first(
    records: Sequence[Record], count: int, collate: Any, calibration: CalibrationConfig, data: DataConfig
) -> list[Record]:
    """The first calibration records that can be used.

    Args:
        records: Where to take them from.
        count: How many.
        collate: The collator that will serve them; None takes all as they are.
        calibration, data: Paths for messages, and the share of others that is tolerated among those tried,
            rounded up.

    Returns:
        ``count`` records, or fewer where the data ends.

    Raises:
        UserError: If too many cannot be used.
    """
    where = str(calibration.path or data.path or data.name)
    good: list[Record] = []
    bad: list[str] = []
    for record in records:
        if len(good) == count:
            break
        if problem := collate and fault_of(collate, record):
            bad.append(problem)
            if len(bad) > math.ceil(data.max_bad_fraction * count):
                tried = Subset(records, range(len(good) + len(bad)))
                hint = expected_folders(records) if missing_images(tried) else ""
                report_bad(where, bad, len(tried), data.max_bad_fraction, hint)
        else:
            good.append(record)
    if bad:
        log.warning(
            "%s: %d calibration records cannot be used and are left out, the first: %s", where, len(bad), bad[0]
        )
    return good


def _own(calibration: CalibrationConfig, data: DataConfig, seed: int) -> Subset:
    """The user's own records in the order in which they are drawn."""
    source = _opened(data, calibration, "calibration.path")
    return Subset(source, _rng(seed, "calibration").permutation(len(source)))


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
        return usable_first(fresh, count, collate, own, data)

    source = _source(data) if data.path is not None else None
    if data.embedded or (source is not None and len(source) >= LEAST):
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
    groups: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups_of(records)):
        groups[group].append(index)
    chosen: set[int] = set()
    for group in reversed(list(groups.values())[LEAST_FITTED:]):
        if len(chosen) + len(group) <= share * len(records):
            chosen.update(group)
    if len(chosen) < LEAST_COMPARED:
        return list(records), []
    parts: tuple[list[Record], list[Record]] = [], []
    for index, record in enumerate(records):
        parts[index in chosen].append(record)
    return parts


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
    """Number of records that `draw` takes of the training records; None where the file is not on this machine."""
    here = data.embedded or (data.path and Path(data.path).expanduser().is_file())
    return max(1, round(fraction * len(load_split(data, "train")))) if here else None


def _shares(sizes: dict[str, int], fraction: float) -> dict[str, int]:
    """Records to take of each source: largest remainders, so that the sum is the rounded total."""
    total = max(1, round(fraction * sum(sizes.values())))
    counts = {name: int(fraction * size) for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - fraction * sizes[name], name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
