"""What tells that an image was replaced under its name: of many, their time stamps; of a few, their whole content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..runtime.content import Memo, digest, stamp
from .records import Record, image_key
from .splits import conversations_of


def image_stamps(records: Sequence[Record], indices: Sequence[int] | None = None) -> list[str]:
    """For each record, a digest of size, times and inode of its image files; empty where it has none.

    Images that lie inside the data, or are made by a program, count with these.

    Args:
        records: Records; only of those that come from a file, or stand in a list, are images looked for.
        indices: Which of them; None: all.
    """
    chosen = list(range(len(records)) if indices is None else indices)
    table, places = conversations_of(records)
    if table is not None:
        listed = table.image_files(places[np.asarray(chosen, int)])
        files = [[table.image_root / path for path in paths] for paths in listed]
    elif isinstance(records, list | tuple):
        files = [[image for image in records[index].images if isinstance(image, Path)] for index in chosen]
    else:
        files = [[] for _ in chosen]
    known = _stamps({file for each in files for file in each})
    return [digest([known[file] for file in each]) if each else "" for each in files]


def _stamps(files: Iterable[Path]) -> dict[Path, list[object]]:
    found = sorted(files)
    # In parallel, since image folders are often on a network.
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(found, pool.map(_stamp, found, chunksize=256), strict=True))


def _stamp(file: Path) -> list[object]:
    try:
        return [str(file), *stamp(file)]
    except (OSError, ValueError):  # ValueError: a name with a zero in it
        return [str(file), None]  # whoever opens it says what is wrong with it


def image_contents(records: Sequence[Record], memo: Memo) -> str:
    """Digest of the whole content of all images of a few records."""
    images = [image for record in records for image in record.images]
    files = [image for image in images if isinstance(image, Path) and image.is_file()]
    sums = dict(zip(files, memo.digests(files), strict=True))
    return digest([sums.get(image) if isinstance(image, Path) else image_key(image) for image in images])
