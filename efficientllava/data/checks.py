"""Faults of the records that a run will use, found before it begins."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..schema import DataConfig
from .conversations import Record
from .faults import report_bad
from .sources import is_file
from .subset import Subset, conversations_of

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
