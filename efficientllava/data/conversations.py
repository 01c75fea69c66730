"""Records: images with questions and answers, and the files that they are read from."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError

log = logging.getLogger(__name__)

IMAGE_TAG = "<image>"
# Files of up to this many records are read in full before a run, so that every fault is found early. In larger ones a
# broken image or an overlong answer is found when its record is used.
CHECK_LIMIT = 5000
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: Text of the user, without any image placeholder.
        answer: Text of the assistant.
        kind: Question type, for scores by type; may be empty.
        sees_image: False for a text-only question of a record that has an image.
    """

    question: str
    answer: str
    kind: str = ""
    sees_image: bool = True


@dataclass(frozen=True)
class Record:
    """One training or evaluation sample.

    Attributes:
        id: Unique name.
        image: A file that is opened when needed, an image in memory, or None.
        turns: Questions with answers.
        independent: True if the turns are separate questions about the same image (each sees the image and itself
            only); false for one conversation in which later turns see earlier ones.
        source: Name of the data set, for stratified subsets.
    """

    id: str
    image: Path | Image.Image | None
    turns: tuple[Turn, ...]
    independent: bool
    source: str


class BadRecordError(ValueError):
    """Why one record of a file cannot be used; counted, and reported as a `UserError` when there are too many."""


def open_image(record: Record) -> Image.Image | None:
    """The record's image in RGB, read from its file if it is not in memory.

    Args:
        record: Any record.

    Returns:
        The image, or None if the record has none.

    Raises:
        UserError: If the file is missing or broken.
    """
    if record.image is None or isinstance(record.image, Image.Image):
        return record.image
    try:
        with Image.open(record.image) as file:
            return file.convert("RGB")
    # Pillow's decoders raise SyntaxError and ValueError on broken files as well.
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"record {record.id!r}: image {str(record.image)!r} cannot be read ({error}); repair it or drop the record"
        ) from error


def read_conversations(
    path: str | Path, image_root: str | Path | None = None, max_bad_fraction: float = 0.0
) -> list[Record]:
    """Read LLaVA-style JSON or JSONL, or Hugging Face ``messages`` in either form.

    One record is ``{"id"?, "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`` or
    ``{"id"?, "images"?: [...], "messages": [{"role": "user" | "assistant", "content"}]}``, with at most one image, a
    path relative to ``image_root``; a record's source is its own ``source``, else the first folder of its image, else
    ``text``. Text-only records are kept. Up to ``CHECK_LIMIT`` records every image is decoded once to find broken ones;
    of more records it is only asked whether the files exist.

    Args:
        path: The file; one JSON list, or one JSON object per line.
        image_root: Folder of the images; default: the file's own folder.
        max_bad_fraction: Share of corrupt records that is dropped with a warning, in [0, 1).

    Returns:
        The records that can be used, in the order of the file.

    Raises:
        UserError: If the file is missing or no JSON, holds no record, or too many records are corrupt.
    """
    file = Path(path)
    root = Path(image_root) if image_root is not None else file.parent
    if not root.is_dir():
        raise UserError(f"data.image_root: {str(root)!r} is not a folder; give the folder that holds the images")
    records: list[Record] = []
    bad: list[str] = []
    seen: Counter[str] = Counter()
    for number, raw in enumerate(_raw_records(file)):
        try:
            record = _record(raw, number, root)
        except BadRecordError as error:
            bad.append(str(error))
            continue
        # The published mixtures use an image's id for several records.
        seen[record.id] += 1
        count = seen[record.id]
        records.append(record if count == 1 else replace(record, id=f"{record.id}#{count}"))
    decode = len(records) <= CHECK_LIMIT
    # In parallel, since image folders are often on a network.
    with ThreadPoolExecutor(16) as pool:
        problems = list(pool.map(lambda record: _image_problem(record, decode), records, chunksize=256))
    report_bad(str(file), [*bad, *filter(None, problems)], len(records) + len(bad), max_bad_fraction)
    return [record for record, problem in zip(records, problems, strict=True) if problem is None]


def report_bad(where: str, bad: Sequence[str], total: int, max_bad_fraction: float) -> None:
    """Warn about corrupt records, or fail if there are too many.

    Args:
        where: The file, for the message.
        bad: One reason per corrupt record.
        total: Number of records, corrupt ones included.
        max_bad_fraction: Share of corrupt records that is tolerated, in [0, 1).

    Raises:
        UserError: If more are corrupt than tolerated, or nothing is left.
    """
    if not total:
        raise UserError(f"{where}: holds no record; give a non-empty list of conversations")
    if not bad:
        return
    found = f"{where}: {len(bad)} of {total} records are corrupt, the first: {bad[0]}"
    if len(bad) > max_bad_fraction * total or len(bad) == total:
        raise UserError(f"{found}; data.max_bad_fraction allows {max_bad_fraction:g}; repair the data or raise it")
    log.warning("%s; they are left out", found)


def _image_problem(record: Record, decode: bool) -> str | None:
    if isinstance(record.image, Path) and not record.image.is_file():
        return f"record {record.id!r}: image {str(record.image)!r} does not exist"
    try:
        open_image(record) if decode else None
    except UserError as error:
        return str(error)
    return None


def _raw_records(file: Path) -> Iterator[Any]:
    """The decoded records of a file; a line that is no JSON comes as a `BadRecordError`."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: {str(file)!r} cannot be read ({error}); give a JSON or JSONL file") from error
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield BadRecordError(f"line {number}: not JSON ({error})")
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"data.path: {str(file)!r} is not JSON ({error}); give a JSON list, or JSONL with the suffix .jsonl"
        ) from error
    if not isinstance(content, list):
        raise UserError(f"data.path: {str(file)!r} holds a {type(content).__name__}; give a JSON list of records")
    yield from content


def _record(raw: Any, number: int, root: Path) -> Record:
    """One decoded record; ``number`` is its place in the file, and its id if it has none."""
    if isinstance(raw, BadRecordError):
        raise raw
    if not isinstance(raw, Mapping):
        raise BadRecordError(f"record {number}: a {type(raw).__name__} instead of an object")
    name = str(raw.get("id", number))
    turns, inline = _turns(raw, name)
    images = raw.get("image", raw.get("images")) or inline
    images = images if isinstance(images, list) else [images]
    if len(images) > 1:
        raise BadRecordError(f"record {name!r}: {len(images)} images; one is supported")
    image = images[0] if images else None
    if image is not None and not isinstance(image, str):
        raise BadRecordError(f"record {name!r}: image is a {type(image).__name__} instead of a path")
    folders = Path(image).parts[:-1] if image else ()
    source = str(raw.get("source") or (folders[0] if folders else "images" if image else "text"))
    return Record(name, root / image if image else None, turns, False, source)


def _turns(raw: Mapping[str, Any], name: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """Question-answer pairs, and image paths that stand inside the messages."""
    messages = raw.get("conversations", raw.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"record {name!r}: neither 'conversations' nor 'messages' with at least one turn")
    images: list[Any] = []
    said: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise BadRecordError(f"record {name!r}: a turn is a {type(message).__name__} instead of an object")
        role = message.get("from", message.get("role"))
        if role not in ROLES:
            raise BadRecordError(f"record {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        said.append((ROLES[role], _content(message.get("value", message.get("content")), name, images)))
    # As in LLaVA: an answer without a question at the start is dropped.
    if said[0][0] == "assistant":
        said = said[1:]
    if not said or len(said) % 2 or [role for role, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise BadRecordError(f"record {name!r}: roles do not alternate between a question and its answer")
    if any(not answer for _, answer in said[1::2]):
        raise BadRecordError(f"record {name!r}: an empty answer")
    pairs = zip(said[::2], said[1::2], strict=True)
    return tuple(Turn(question, answer) for (_, question), (_, answer) in pairs), images


def _content(content: Any, name: str, images: list[Any]) -> str:
    if isinstance(content, str):
        return content.replace(IMAGE_TAG, "").strip()
    if not isinstance(content, list):
        raise BadRecordError(f"record {name!r}: a turn holds a {type(content).__name__} instead of text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_content(part.get("text"), name, images))
        elif kind == "image":
            # A bare marker refers to the record's own ``images``.
            images.extend(part[key] for key in ("image", "path") if key in part)
        else:
            raise BadRecordError(f"record {name!r}: a part of a turn is neither text nor image")
    return "\n".join(texts).strip()
