"""Files of predictions: LLaVA's answer format, one JSON object per line, written as the answers come.

``question_id``, ``prompt``, ``text``, ``answer_id`` (ours: unique in the file), ``model_id`` and ``metadata``, which
holds the reference and whatever else a scorer wants. Files of other tools, in that format or in ours, are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.conversations import Record
from ..data.rows import BadRecordError
from ..data.sources import DECODER
from ..errors import UserError
from ..runtime.lines import Lines

# What others call our keys; the first that is there counts.
ALIASES = {
    "id": ("id", "question_id", "questionId", "pid"),
    "question": ("question", "prompt"),
    "prediction": ("prediction", "text", "response"),
    "answer": ("answer", "answers", "ground_truth", "label"),
    "verdict": ("verdict", "content"),
}
GOLD_ALIASES = ALIASES | {"question": ("question", "text"), "prediction": ()}

Line = dict[str, Any]


def line(record: Record, text: str, model_id: str, **metadata: Any) -> Line:
    """One answer.

    Args:
        record: The question, a record of one turn.
        text: What the model said.
        model_id: Which model.
        **metadata: Added to what the record says about itself.
    """
    (turn,) = record.turns
    details = dict(record.details)
    official = details.pop("id", record.id)
    # A benchmark's details are its own columns, the question without instructions and all answers among them.
    known = details or {"question": turn.question, "answer": turn.answer, "kind": turn.kind}
    return {
        "question_id": official,
        "prompt": turn.question,
        "text": text,
        "answer_id": record.id,
        "model_id": model_id,
        "metadata": {"benchmark": record.source, "has_image": record.image is not None, **known, **metadata},
    }


def as_record(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]] = ALIASES) -> dict[str, Any]:
    """What scorers read: a line with its ``metadata`` spread out and our keys beside its own; the id is a text.

    Args:
        row: A line, with some kind of id.
        aliases: Our keys, and the names under which they may be found.
    """
    flat = _flat(row)
    found = {key: flat[name] for key, names in aliases.items() for name in reversed(names) if name in flat}
    return flat | found | {"id": str(found["id"])}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata")
    return {**metadata, **row} if isinstance(metadata, dict) else dict(row)


def read(path: Path, aliases: Mapping[str, Sequence[str]] = ALIASES) -> list[dict[str, Any]]:
    """Read a file of predictions or references.

    Args:
        path: JSON lines, a JSON list of objects, or a JSON object of objects by id.
        aliases: Our keys, and the names under which they may be found.

    Returns:
        The objects as scorers read them, see `as_record`.

    Raises:
        UserError: If the file cannot be read, is no JSON, is empty, or holds something without an id.
    """
    try:
        content = _parse(path, path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a JSON or JSON-lines file") from error
    if isinstance(content, dict):
        nested = all(isinstance(item, dict) for item in content.values())
        content = [{"id": key, **item} for key, item in content.items()] if nested else [content]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: holds no objects; give one JSON object per line")
    for number, item in enumerate(content, 1):
        known = _flat(item) if isinstance(item, dict) else {}
        if not {*known} & {*aliases["id"]}:
            raise UserError(f"{path}: object {number} has no id; it needs one of {', '.join(aliases['id'])}")
    return [as_record(item, aliases) for item in content]


def _parse(path: Path, content: str) -> Any:
    try:
        return DECODER.decode(content)
    except BadRecordError as error:
        raise UserError(f"{path}: {error}; leave one of them out") from error
    except (ValueError, RecursionError):
        items = []
    for number, text in enumerate(content.split("\n"), 1):
        try:
            items += [DECODER.decode(text)] if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON ({error})") from error
    return items


def write(lines: Sequence[Line], path: Path) -> None:
    """Write lines."""
    with path.open("w", encoding="utf-8") as file:
        file.write("".join(json.dumps(item) + "\n" for item in lines))


def keep(lines: Sequence[Line], folder: Path, rank: int) -> None:
    """Keep what a process has answered for `resume`; it is on file when this returns."""
    Lines(folder / f"answers-{rank}.jsonl", shared=False).append(lines)


def resume(folder: Path) -> list[Line]:
    """What an interrupted evaluation has answered.

    Args:
        folder: Where its processes called `keep`; made if it is not there.

    Returns:
        The finished lines; one that was being written is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [line for path in sorted(folder.glob("answers-*.jsonl")) for line in Lines(path, shared=False).new()]
