"""A file of any size as a sequence of records: rows in an Arrow file that is mapped, not held, in memory.

How one raw record of a file, in any of the accepted forms, becomes a row.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from os.path import join
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from ..runtime import Store, UserError, digest, one_line, source_digest
from .records import AnyImage, Record, Turn, content_key
from .sources import BadRecordError, Part, locate, parts_of, raw_records, report_bad

log = logging.getLogger(__name__)

ARROW = "rows.arrow"
# Files below this size are read anew in every run instead of being kept as Arrow.
SMALL = 16 << 20
TEXTS = 10_000  # records whose texts are held at once
BATCH = 100  # rows that are held at once: they may have images in them
TURN = pa.struct([("question", pa.string()), ("answer", pa.string()), ("images_at", pa.list_(pa.int32()))])
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("images", pa.list_(pa.string())),  # paths; null where the content is in the next column
        ("contents", pa.list_(pa.large_binary())),
        ("keys", pa.list_(pa.string())),  # of these contents; null where there is a path
        ("turns", pa.list_(TURN)),
        ("length", pa.int32()),
        ("repeats", pa.int32()),
        ("problem", pa.string()),
    ]
)
TAG = "<image>"
# Where several images stand in a text, a tag is followed by a line break, which the chat templates write again.
TAG_AND_BREAK = TAG + r"\n?"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
Row = dict[str, Any]


class Conversations(Sequence[Record]):
    """The usable records of a data set; see `read_conversations`.

    Args:
        rows: Rows of `COLUMNS`, those that cannot be used included.
        image_root: Folder that image paths start from.
        key: Digest of all that the rows depend on.
        option: Configuration key of that folder, for messages.
    """

    def __init__(self, rows: datasets.Dataset, image_root: Path, key: str, option: str) -> None:
        self._rows, self.image_root, self.key, self.option = rows, image_root, key, option
        self._shown = rows.remove_columns(["contents", "keys"])
        problems = rows.data.column("problem")
        self._usable = np.flatnonzero(problems.is_null().to_numpy())
        self.problems: list[str] = problems.drop_null().to_pylist()

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        place = int(self._usable[index])
        row = self._shown[place]
        images: list[AnyImage] = [
            partial(self._content, place, number) if path is None else self.image_root / path
            for number, path in enumerate(row["images"])
        ]
        turns = tuple(Turn(t["question"], t["answer"], images_at=tuple(t["images_at"])) for t in row["turns"])
        return Record(row["id"], images[0] if images else None, turns, False, row["source"], tuple(images[1:]))

    def column(self, name: str) -> np.ndarray:
        """One of ``id``, ``source``, ``length``, ``repeats`` (in the training data) of all records."""
        return self._rows.data.column(name).to_numpy()[self._usable]

    def image_files(self, indices: np.ndarray) -> list[list[Path]]:
        """The image files of records; images that are stored in the data have none."""
        images = self._rows.data.column("images").take(self._usable[indices]).to_pylist()
        return [[self.image_root / path for path in paths if path is not None] for paths in images]

    def image_names(self, indices: np.ndarray) -> list[list[str]]:
        """Of records, see `efficientllava.data.records.image_names`."""
        places = self._usable[indices]
        paths, keys = (self._rows.data.column(name).take(places).to_pylist() for name in ("images", "keys"))
        pairs = (zip(path, key, strict=True) for path, key in zip(paths, keys, strict=True))
        return [[key or str(self.image_root / path) for path, key in pair] for pair in pairs]

    def turns(self, indices: np.ndarray) -> Iterator[list[tuple[str, str]]]:
        """Questions and answers of records, not all in memory at once."""
        for start in range(0, len(indices), TEXTS):
            places = self._usable[indices[start : start + TEXTS]]
            for turns in self._rows.data.column("turns").take(places).to_pylist():
                yield [(turn["question"], turn["answer"]) for turn in turns]

    def _content(self, place: int, number: int) -> bytes:
        return self._rows.data.column("contents")[place][number].as_py()


def read_conversations(
    path: str | Path, image_root: str | Path | None = None, max_bad_fraction: float = 0.0, key: str = "data.path"
) -> Conversations:
    """Open LLaVA-style JSON or JSONL, Hugging Face ``images`` and ``messages`` in JSON or parquet, or an InternVL list.

    The accepted records are those of `row_of`, the accepted paths those of `efficientllava.data.sources.parts_of`.
    Large files are read once and kept as Arrow beside the caches of the `datasets` library, by content. No image is
    opened.

    Args:
        path: The data.
        image_root: Folder of the images; default: the file's own folder.
        max_bad_fraction: Share of unusable records that is dropped with a warning, in [0, 1).
        key: The configuration key of ``path``, for messages.

    Returns:
        The records that can be used, in the order of the data.

    Raises:
        UserError: The data or the image folder is missing or of another kind, or too many records cannot be used.
    """
    parts = parts_of(str(path), None if image_root is None else str(image_root), key)
    option = key.replace("path", "image_root")
    root = Path(image_root).expanduser() if image_root is not None else locate(str(path), key).parent
    if not root.is_dir():
        raise UserError(f"{option}: {str(root)!r} is not a folder; give the folder that holds the images")
    store, files = table_store(), [part.file for part in parts]
    try:
        contents = store.memo.digests(files)
        small = sum(file.stat().st_size for file in files) < SMALL
    except OSError as error:
        raise UserError(f"{key}: {str(path)!r} cannot be read ({error}); give an existing file") from error
    facts = [(content, p.root, p.source, p.share, p.repeats) for content, p in zip(contents, parts, strict=True)]
    # How rows are made of them, in `_batches`.
    inputs = [facts, source_digest("data.table")]
    if small:
        rows = datasets.Dataset(pa.Table.from_batches(_batches(parts, key), COLUMNS))
    else:
        rows = datasets.Dataset.from_file(str(_arrow(store, parts, key, inputs)))
    records = Conversations(rows, root, digest(inputs), option)
    report_bad(str(path), records.problems, len(rows), max_bad_fraction)
    return records


def table_store() -> Store:
    """Where tables are kept: beside the caches of the `datasets` library."""
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


def _batches(parts: Sequence[Part], key: str) -> Iterator[pa.RecordBatch]:
    rows = _unique(row for part in parts for row in _part_rows(part, key))
    while batch := list(islice(rows, BATCH)):
        yield pa.RecordBatch.from_pylist(batch, COLUMNS)


def _part_rows(part: Part, key: str) -> Iterator[Row]:
    # A prefix is a share of a number that only reading tells.
    count = None if part.share == 1 else int(part.share * sum(1 for _ in _raw(part, key)))
    for number, raw in enumerate(islice(_raw(part, key), count)):
        try:
            row = row_of(raw, number, part.root, part.source)
        except (BadRecordError, RecursionError) as error:
            # What is no text in UTF-8 cannot be kept, and not be printed either.
            row = {"id": str(number), "problem": str(error).encode(errors="backslashreplace").decode()}
        yield row | {"repeats": part.repeats}


def _unique(rows: Iterator[Row]) -> Iterator[Row]:
    """Number repeated ids: the published mixtures use an image's id for several records."""
    seen: Counter[str] = Counter()
    for row in rows:
        name = row["id"]
        while seen[row["id"]]:
            seen[name] += 1
            row["id"] = f"{name}#{seen[name]}"
        seen[row["id"]] += 1
        yield row


def _raw(part: Part, key: str) -> Iterator[Any]:
    """The raw records of a file."""
    if part.file.suffix != ".parquet":
        yield from raw_records(part.file, key)
        return
    try:
        with ParquetFile(part.file) as file:
            yield from (row for batch in file.iter_batches(BATCH) for row in batch.to_pylist())
    except Exception as error:  # pyarrow raises different kinds for a broken file
        raise UserError(
            f"{key}: {str(part.file)!r} is no parquet file ({one_line(error)}); get the file again"
        ) from error


# ---- one raw record -------------------------------------------------------------------------------------------------


OTHER_MEDIA = ("video", "videos", "audio", "audios")


def row_of(raw: Any, number: int, root: str = "", source: str | None = None) -> Row:
    """Bring one decoded record into the form in which all are kept.

    One record is ``{"id"?, "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`` or
    ``{"id"?, "images"?: [...], "messages": [{"role": "user" | "assistant", "content"}]}``; ``image`` may be a list.
    Images stand where their tags ``<image>`` do, or all before the first question; some models see a single one before
    its question nevertheless, see `efficientllava.data.prompts`.

    Args:
        raw: The record.
        number: Its place in the file, and its id if it has none.
        root: Folder that image paths start from.
        source: Name of the data set; None: the record's own ``source``, else the first folder of its image, else
            ``text``.

    Returns:
        What `COLUMNS` has; ``length`` is the number of words, negative without an image (``modality_lengths`` in
        LLaVA).

    Raises:
        BadRecordError: It cannot be used.
    """
    if isinstance(raw, BadRecordError):
        raise raw
    if not isinstance(raw, dict):
        raise BadRecordError(f"record {number}: a {type(raw).__name__} instead of an object")
    name = str(raw.get("id", number))
    said, inline = _said(raw, name)
    if other := next((key for key in OTHER_MEDIA if raw.get(key)), None):
        raise BadRecordError(f"record {name!r}: has {other!r}; text and still images are supported")
    told = [each if isinstance(each, list) else [each] for key in ("image", "images") if (each := raw.get(key))]
    told += [inline] if inline else []
    if any(each != told[0] for each in told):
        raise BadRecordError(f"record {name!r}: 'image', 'images' and its turns name different images; keep one")
    images = [_source(image) for image in (told[0] if told else [])]
    for image in images:
        if not isinstance(image, str | bytes):
            raise BadRecordError(f"record {name!r}: image is a {type(image).__name__} instead of a path")
        if isinstance(image, str) and image.startswith("data:"):
            raise BadRecordError(f"record {name!r}: holds an image inlined as text; write it into a file")
    paths = [image if isinstance(image, str) else None for image in images]
    questions = _placed(said[::2], len(images), name)
    answers = [text.replace(TAG, "").strip() for text in said[1::2]]
    if not all(answers):
        raise BadRecordError(f"record {name!r}: an empty answer")
    # Blanks are counted much faster than words are made.
    words = sum(text.count(" ") for text in said) + len(said)
    folder, _, file = (paths[0] or "").lstrip("/").partition("/") if images else ("text", "", "text")
    origin = str(source or raw.get("source") or (folder if file else "images"))
    try:
        "".join((name, origin, root, *filter(None, paths), *said)).encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"record {name!r}: holds half of a surrogate pair, or bytes that are no UTF-8") from error
    return {
        "id": name if source is None else f"{source}/{name}",
        "source": origin,
        "images": [None if path is None else join(root, path) for path in paths],
        "contents": [image if isinstance(image, bytes) else None for image in images],
        "keys": [content_key(image) if isinstance(image, bytes) else None for image in images],
        "turns": [
            {"question": question, "answer": answer, "images_at": places}
            for (question, places), answer in zip(questions, answers, strict=True)
        ],
        "length": words if images else -words,
    }


def _source(image: Any) -> Any:
    """Of an image as `datasets` keeps it the content, or the path where that is all there is."""
    if not isinstance(image, dict) or "bytes" not in image:
        return image
    return image.get("path") if image["bytes"] is None else image["bytes"]


def _said(raw: Row, name: str) -> tuple[list[str], list[Any]]:
    """Questions and answers by turns, tags included, and image paths that stand inside the messages."""
    messages = _first(raw, "conversations", "messages")
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"record {name!r}: neither 'conversations' nor 'messages' with at least one turn")
    images: list[Any] = []
    roles: list[str] = []
    texts: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRecordError(f"record {name!r}: a turn is a {type(message).__name__} instead of an object")
        role = _first(message, "from", "role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecordError(f"record {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        content = _first(message, "value", "content")
        roles.append(ROLES[role])
        asked = len(images)
        texts.append(_content(content, name, images))
        if ROLES[role] == "assistant" and len(images) > asked:
            raise BadRecordError(f"record {name!r}: an answer shows an image; only questions do")
    # As in LLaVA: an answer without a question at the start is dropped.
    start = int(roles[0] == "assistant")
    if len(roles) == start or roles[start:] != ["user", "assistant"] * ((len(roles) - start) // 2):
        raise BadRecordError(f"record {name!r}: roles do not alternate between a question and its answer")
    return texts[start:], images


def _first(row: Row, *names: str) -> Any:
    """What a row has under the first of several names; a table of both styles has null under the others."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _content(content: Any, name: str, images: list[Any]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecordError(f"record {name!r}: a turn holds a {type(content).__name__} instead of text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_content(part.get("text"), name, images))
        elif kind == "image":
            # A bare marker refers to the record's own ``images``.
            images.extend(part[key] for key in ("image", "path") if part.get(key))
            texts.append(TAG)
        else:
            raise BadRecordError(f"record {name!r}: a part of a turn is neither text nor image")
    return "\n".join(texts)


def _placed(questions: Sequence[str], images: int, name: str) -> list[tuple[str, list[int]]]:
    """Questions without tags, each with the places of its images; see `row_of`."""
    counts = [question.count(TAG) for question in questions]
    # Inside a line, in a text about XML say, it is no image's.
    if not images and any(TAG in question.splitlines() for question in questions):
        raise BadRecordError(f"record {name!r}: a question shows {TAG}, but neither 'image' nor 'images' names a file")
    if images == 1 and max(counts) > 1:
        raise BadRecordError(f"record {name!r}: one image, but {max(counts)} tags {TAG} in a question")
    if images > 1 and sum(counts) not in (0, images):
        raise BadRecordError(f"record {name!r}: {images} images, but {sum(counts)} tags {TAG} in its questions")
    if images > 1 and sum(counts):
        return [in_place(question) for question in questions]
    if not images:
        return [(question.replace(TAG, "").strip(), []) for question in questions]
    placed = [in_place(question, TAG) for question in questions]
    first = next((index for index, count in enumerate(counts) if count), 0)
    # An image that begins the first question needs no place.
    return [(text, at[:1] if index == first and (first or any(at)) else []) for index, (text, at) in enumerate(placed)]


def in_place(question: str, tag: str = TAG_AND_BREAK) -> tuple[str, list[int]]:
    """A question without its tags, and where in it they stood, counted in characters.

    White space before an image that ends the question is part of it.
    """
    parts = re.split(tag, question)
    text = "".join(parts)
    start, end = len(text) - len(text.lstrip()), len(text) if not parts[-1] else len(text.rstrip())
    ends = [len("".join(parts[: index + 1])) for index in range(len(parts) - 1)]
    return text[start:end], [max(0, min(at, end) - start) for at in ends]
