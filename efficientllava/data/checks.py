"""Records that a run will use, looked at before it begins: which of them are at fault, what their images are."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import isfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..runtime.content import Memo, digest, stamp
from ..runtime.errors import UserError
from ..settings.schema import CalibrationConfig, DataConfig
from .records import Record, Subset, column, image_files, image_key

log = logging.getLogger(__name__)
Value = TypeVar("Value")

# Up to this many records are opened and measured before a run. Of more, it is only asked whether their images exist;
# a broken one is then found when its record is used.
CHECK_LIMIT = 5000
SHOWN_FOLDERS = 8  # in a message


def report_bad(where: str, bad: Sequence[str], total: int, max_bad_fraction: float, hint: str = "") -> None:
    """Warn about corrupt records, or fail if there are too many.

    Args:
        where: The file, for the message.
        bad: One reason per corrupt record.
        total: Number of records, corrupt ones included.
        max_bad_fraction: Share of corrupt records that is tolerated, in [0, 1).
        hint: What else a user should know.

    Raises:
        UserError: If more are corrupt than tolerated, or nothing is left.
    """
    if not total:
        raise UserError(f"{where}: holds no record; give a non-empty list of conversations")
    if not bad:
        return
    found = f"{where}: {len(bad)} of {total} records are corrupt, the first: {bad[0]}"
    if len(bad) > max_bad_fraction * total or len(bad) == total:
        allowed = f"data.max_bad_fraction allows {max_bad_fraction:g}"
        raise UserError(f"{found}; {allowed}; repair the data or raise it{hint}")
    log.warning("%s; they are left out", found)


def usable(records: Sequence[Record], collate: Any, data: DataConfig) -> Sequence[Record]:
    """Leave out the records that cannot be used; see `CHECK_LIMIT`.

    Args:
        records: The records to check; no other record's image is touched.
        collate: The collator that will serve them.
        data: Path for messages, and the share of corrupt records that is tolerated.

    Raises:
        UserError: If too many cannot.
    """
    problems = missing_images(records)
    hint = _layout(records) if problems else ""
    opened = range(len(records)) if len(records) <= CHECK_LIMIT else ()
    found = {index: _problem(collate, records[index]) for index in opened if index not in problems}
    problems |= {index: problem for index, problem in found.items() if problem}
    bad = [problems[index] for index in sorted(problems)]
    report_bad(str(data.path or data.name), bad, len(records), data.max_bad_fraction, hint)
    return Subset(records, np.setdiff1d(np.arange(len(records)), list(problems))) if bad else records


def usable_first(
    records: Sequence[Record], count: int, collate: Any, calibration: CalibrationConfig, data: DataConfig
) -> list[Record]:
    """The first calibration records that can be used.

    Args:
        records: Where to take them from.
        count: How many.
        collate: The collator that will serve them; None takes all as they are.
        calibration: Path for messages.
        data: Share of corrupt records that is tolerated among those tried, rounded up; path for messages.

    Returns:
        ``count`` records, or fewer where the data ends.

    Raises:
        UserError: If too many cannot be used.
    """
    where = str(calibration.path or data.path or data.name)
    good: list[Record] = []
    bad: list[str] = []
    for index in range(len(records)):
        if len(good) == count:
            break
        record = records[index]
        if problem := collate and _problem(collate, record):
            bad.append(problem)
            if len(bad) > math.ceil(data.max_bad_fraction * count):
                report_bad(where, bad, len(good) + len(bad), data.max_bad_fraction, _layout(records))
        else:
            good.append(record)
    if bad:
        log.warning("%s: %d calibration records are corrupt and left out, the first: %s", where, len(bad), bad[0])
    return good


def _problem(collate: Any, record: Record) -> str | None:
    try:
        collate.check(record)
    except UserError as error:
        return str(error)


def missing_images(records: Sequence[Record]) -> dict[int, str]:
    """What is missing, by index of the record; images are looked for, not opened."""
    files = image_files(records)
    # Of `os.path`, since a name may be one that no file can have.
    there = _of_each(isfile, (file for each in files for file in each))
    # From the last to the first, so that the first is named.
    lost = {index: file for index, each in enumerate(files) for file in reversed(each) if not there[file]}
    ids = column(records, "id") if lost else ()
    return {index: f"record {ids[index]!r}: image {str(file)!r} does not exist" for index, file in lost.items()}


def _layout(records: Sequence[Record]) -> str:
    """The folders that the images of some records are expected in."""
    root = getattr(records.records if isinstance(records, Subset) else records, "image_root", None)
    if root is None:
        return ""
    files = image_files(records, range(min(len(records), 10 * CHECK_LIMIT)))
    parents = Counter(file.parent for each in files for file in each)
    common = [parent for parent, _ in parents.most_common(SHOWN_FOLDERS)]
    folders = [str(parent.relative_to(root) if parent.is_relative_to(root) else parent) for parent in common]
    if not folders or folders == ["."]:
        return f"; the images are expected in data.image_root={root}"
    return f"; data.image_root={root} is expected to hold {', '.join(folders)}"


def image_stamps(records: Sequence[Record], indices: Sequence[int] | None = None) -> list[str]:
    """What tells that one of many images was replaced under its name.

    Args:
        records: Records.
        indices: Which of them; None: all.

    Returns:
        For each record, a digest of size, times and inode of its image files; empty where it has none.
    """
    files = image_files(records, indices)
    known = _of_each(_stamp, (file for each in files for file in each))
    return [digest([known[file] for file in each]) if each else "" for each in files]


def image_contents(records: Sequence[Record], memo: Memo) -> str:
    """Digest of the whole content of all images of a few records."""
    images = [image for record in records for image in record.images]
    files = [image for image in images if isinstance(image, Path) and image.is_file()]
    sums = dict(zip(files, memo.digests(files), strict=True))
    return digest([sums.get(image) if isinstance(image, Path) else image_key(image) for image in images])


def _of_each(look: Callable[[Path], Value], files: Iterable[Path]) -> dict[Path, Value]:
    """What a look at each of some files says; in parallel, since image folders are often on a network."""
    distinct = list(dict.fromkeys(files))
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(distinct, pool.map(look, distinct, chunksize=256), strict=True))


def _stamp(file: Path) -> list[object]:
    try:
        return [str(file), *stamp(file)]
    except (OSError, ValueError):  # ValueError: a name with a zero in it
        return [str(file), None]  # whoever opens it says what is wrong with it
