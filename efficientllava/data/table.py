"""A file of any size as a sequence of records: rows in an Arrow file that is mapped, not held, in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa

from ..runtime.content import Stamp, digest, stamp
from ..runtime.errors import UserError
from ..runtime.source import source_digest
from ..runtime.store import Store, library_versions
from .records import (
    AnyImage,
    Record,
    StoredImage,
    Turn,
)
from .sources import (
    BadRecordError,
    Part,
    locate,
    parts_of,
    raw_records,
    report_bad,
    row_of,
)

log = logging.getLogger(__name__)

ARROW = "rows.arrow"
# Files below this size are read anew in every run instead of being kept as Arrow.
SMALL = 16 << 20
BATCH = 1000  # rows per Arrow batch
TURN = pa.struct([("question", pa.string()), ("answer", pa.string()), ("images_at", pa.list_(pa.int32()))])
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", pa.list_(pa.string())),
        ("turns", pa.list_(TURN)),
        ("length", pa.int32()),
        ("part", pa.int32()),
        ("problem", pa.string()),
    ]
)


class Conversations(Sequence[Record]):
    """The usable records of a data set; see `read_conversations`.

    Args:
        rows: Rows of `COLUMNS`, corrupt ones included.
        parts: The files that they come from.
        stamps: These files as they were when they were read.
        image_root: Folder that image paths start from.
        key: Digest of all that the rows depend on.
    """

    def __init__(
        self, rows: datasets.Dataset, parts: Sequence[Part], stamps: Sequence[Stamp], image_root: Path, key: str
    ) -> None:
        self._rows, self._parts, self._stamps, self.image_root, self.key = rows, parts, stamps, image_root, key
        table: pa.Table = rows.data
        self._usable = np.flatnonzero(table.column("problem").is_null().to_numpy())
        self.problems: list[str] = table.column("problem").drop_null().to_pylist()

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        row = self._rows[int(self._usable[index])]
        stored = self._stored(row["part"])
        images: list[AnyImage] = [self._image(stored, place) for place in row["images"]]
        turns = tuple(Turn(t["question"], t["answer"], images_at=tuple(t["images_at"])) for t in row["turns"])
        return Record(row["id"], images[0] if images else None, turns, False, row["source"], tuple(images[1:]))

    def column(self, name: str) -> np.ndarray:
        """One of ``id``, ``source``, ``length`` of all records."""
        return self._rows.data.column(name).to_numpy()[self._usable]

    def record_id(self, index: int) -> str:
        """Id of a record, without making it."""
        return self._rows.data.column("id")[int(self._usable[index])].as_py()

    def repeats(self) -> np.ndarray:
        """How often each record occurs in the training data."""
        return np.array([part.repeats for part in self._parts])[self.column("part")]

    def image_files(self, indices: np.ndarray) -> list[list[str]]:
        """Image paths of records, relative to ``image_root``; images that are stored in the data have none."""
        images, parts = (self._rows.data.column(n).take(self._usable[indices]).to_pylist() for n in ("images", "part"))
        stored = {part: self._stored(part) for part in {*parts}}
        return [
            [path for place in places if (path := _path(stored[part], place)) is not None]
            for places, part in zip(images, parts, strict=True)
        ]

    def _stored(self, part: int) -> Stored | None:
        return stored_images(self._parts[part].file, self._stamps[part])

    def _image(self, stored: Stored | None, place: str) -> AnyImage:
        path = _path(stored, place)
        if stored is None or path is not None:
            return self.image_root / str(path)
        return StoredImage(partial(_read_stored, stored, place))


def read_conversations(
    path: str | Path, image_root: str | Path | None = None, max_bad_fraction: float = 0.0, key: str = "data.path"
) -> Conversations:
    """Open LLaVA-style JSON or JSONL, Hugging Face ``images`` and ``messages`` in JSON or parquet, or an InternVL list.

    The accepted records are those of `efficientllava.data.sources.row_of`, the accepted paths those of
    `efficientllava.data.sources.parts_of`. Large files are read once and kept as Arrow beside the caches of the
    `datasets` library, by content. No image is opened.

    Args:
        path: The data.
        image_root: Folder of the images; default: the file's own folder.
        max_bad_fraction: Share of corrupt records that is dropped with a warning, in [0, 1).
        key: The configuration key of ``path``, for messages.

    Returns:
        The records that can be used, in the order of the data.

    Raises:
        UserError: The data or the image folder is missing or of another kind, or too many records are corrupt.
    """
    parts = parts_of(str(path), None if image_root is None else str(image_root), key)
    root = Path(image_root).expanduser() if image_root is not None else locate(str(path), key).parent
    if not root.is_dir():
        raise UserError(
            f"{key.replace('path', 'image_root')}: {str(root)!r} is not a folder; give the folder that holds the images"
        )
    try:
        store, stamps = _store(), [stamp(part.file) for part in parts]
        contents = store.memo.digests([part.file for part in parts])
        small = sum(size for size, *_ in stamps) < SMALL
    except OSError as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read ({error}); give an existing file") from error
    facts = [(content, p.root, p.source, p.share, p.repeats) for content, p in zip(contents, parts, strict=True)]
    # How rows are made of them, in `_batches`.
    inputs = [facts, source_digest("data.table")]
    if small:
        rows = datasets.Dataset(pa.Table.from_batches(_batches(parts, key), COLUMNS))
    else:
        rows = datasets.Dataset.from_file(str(_arrow(store, parts, key, inputs)))
    records = Conversations(rows, parts, stamps, root, digest(inputs))
    report_bad(str(path), records.problems, len(records) + len(records.problems), max_bad_fraction)
    return records


def _store() -> Store:
    root = Path(datasets.config.HF_DATASETS_CACHE) / "efficientllava"
    return Store(root, together=False, fix="set HF_HOME to a folder of yours")


def _arrow(store: Store, parts: Sequence[Part], key: str, inputs: Any) -> Path:
    """The Arrow file of some parts, written where it does not exist yet."""

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        files = [str(part.file) for part in parts]
        log.info("reading %s into %s", ", ".join(files), store.root)
        with pa.ipc.new_stream(str(folder / ARROW), COLUMNS) as writer:
            for batch in _batches(parts, key):
                writer.write_batch(batch)
        return {"of": files}

    return store.entry("tables", inputs, compute).folder / ARROW


def mapped(form: str, files: Sequence[Path]) -> datasets.Dataset:
    """Rows of files as `datasets` reads them, mapped from an entry of our own: its cache trusts paths and times.

    Args:
        form: ``parquet`` or ``json``.
        files: Files with the same columns.

    Raises:
        Exception: Whatever `datasets` raises for files that it cannot read.
    """
    store = _store()
    inputs = [form, store.memo.digests(files), library_versions(), datasets.__version__]

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        names = [str(file) for file in files]
        with TemporaryDirectory(dir=folder) as scratch:
            rows: Any = datasets.load_dataset(form, data_files=names, split="train", cache_dir=scratch)
            for column in rows.data.columns:
                if "binary" not in str(column.type):  # encoded images, which may be many GB
                    column.validate(full=True)  # such as texts that are no UTF-8
            for made in Path(scratch).rglob("*.arrow"):
                made.rename(folder / made.name)
        return {"of": names}

    entry = store.entry("tables", inputs, compute)
    parts = [datasets.Dataset.from_file(str(file)) for file in sorted(entry.folder.glob("*.arrow"))]
    rows = datasets.concatenate_datasets(parts)
    rows._fingerprint = entry.folder.name  # `datasets` makes it of times
    return rows


def _batches(parts: Sequence[Part], key: str) -> Iterator[pa.RecordBatch]:
    rows = _unique(row for index in range(len(parts)) for row in _part_rows(parts, index, key))
    while batch := list(islice(rows, BATCH)):
        yield pa.RecordBatch.from_pylist(batch, COLUMNS)


def _part_rows(parts: Sequence[Part], index: int, key: str) -> Iterator[dict[str, Any]]:
    part = parts[index]
    rows = (_row(raw, number, part) | {"part": index} for number, raw in enumerate(_raw(part, key)))
    # A prefix is a share of a number that only reading tells.
    yield from rows if part.share == 1 else (kept := list(rows))[: int(len(kept) * part.share)]


def _row(raw: Any, number: int, part: Part) -> dict[str, Any]:
    try:
        row = row_of(raw, number, part.root, part.source)
        return row if part.source is None else row | {"id": f"{part.source}/{row['id']}"}
    except (BadRecordError, RecursionError) as error:
        # What is no text in UTF-8 cannot be kept, and not be printed either.
        return {"id": str(number), "problem": str(error).encode(errors="backslashreplace").decode()}


def _unique(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Number repeated ids: the published mixtures use an image's id for several records."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["id"]] += 1
        if (count := seen[row["id"]]) > 1:
            row["id"] = f"{row['id']}#{count}"
        yield row


# ---- images inside parquet files ------------------------------------------------------------------------------------


def _raw(part: Part, key: str) -> Iterator[Any]:
    if part.file.suffix != ".parquet":
        yield from raw_records(part.file, key)
        return
    when = stamp(part.file)
    stored, rows = stored_images(part.file, when), _parquet(part.file, when)
    if stored is None:
        yield from rows
        return
    images = stored.rows.data.column(0)
    counts = (
        images.combine_chunks().value_lengths().fill_null(0) if pa.types.is_list(images.type) else images.is_valid()
    )
    for number, row in enumerate(rows.remove_columns(stored.rows.column_names)):
        yield {**dict(row), "images": [f"{number}:{place}" for place in range(int(counts[number].as_py()))]}


@dataclass(frozen=True)
class Stored:
    """The column of images of a parquet file.

    Attributes:
        rows: The encoded images, one or several a row.
        paths: For each row that says of an image nothing but where its file is: these places, None for all others.
    """

    rows: datasets.Dataset
    paths: dict[int, list[str | None]]


@lru_cache(maxsize=64)
def _parquet(file: Path, _when: Stamp) -> datasets.Dataset:
    try:
        return mapped("parquet", [file])
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise different kinds for a broken file
        reason = " ".join(str(error).split())
        raise UserError(f"data.path: {str(file)!r} is no parquet file ({reason}); get the file again") from error


@lru_cache(maxsize=64)
def stored_images(file: Path, when: Stamp) -> Stored | None:
    """The column of encoded images of a parquet file, or None where it has none.

    Args:
        file: A file of any format.
        when: Its stamp: another one may hold something else.
    """
    if file.suffix != ".parquet":
        return None
    rows = _parquet(file, when)
    for name in ("images", "image"):
        feature = rows.features.get(name)
        if isinstance(getattr(feature, "feature", feature), datasets.Image):
            plain = datasets.Image(decode=False)
            images = rows.select_columns([name]).cast_column(
                name, plain if isinstance(feature, datasets.Image) else datasets.List(plain)
            )
            return Stored(images, image_paths(images.data.column(0)))
    return None


def image_paths(images: pa.ChunkedArray) -> dict[int, list[str | None]]:
    """The ``paths`` of `Stored`; of the encoded images it is only looked whether they are there."""
    found: dict[int, list[str | None]] = {}
    first = 0
    for chunk in images.chunks:
        several = pa.types.is_list(chunk.type)
        cells = chunk.flatten() if several else chunk
        bare = cells.is_valid().to_numpy(False) & cells.field("bytes").is_null().to_numpy(False)
        paths = cells.field("path").to_pylist() if bare.any() else []
        places = [path if alone else None for path, alone in zip(paths, bare, strict=False)]
        ends = np.cumsum(chunk.value_lengths().fill_null(0)) if several else np.arange(1, len(chunk) + 1)
        for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True) if places else ()):
            if any(path is not None for path in places[start:end]):
                found[first + row] = places[start:end]
        first += len(chunk)
    return found


def _path(stored: Stored | None, place: str) -> str | None:
    if stored is None:
        return place
    row, _, index = place.partition(":")
    return stored.paths[int(row)][int(index)] if int(row) in stored.paths else None


def _read_stored(stored: Stored, place: str) -> bytes:
    row, _, index = place.partition(":")
    value = stored.rows[int(row)][stored.rows.column_names[0]]
    return (value[int(index)] if isinstance(value, list) else value)["bytes"]
