"""One raw record of a file, in any of the accepted forms, as a row with fixed columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
TAG = "<image>"
# Where several images stand in a text, a tag is followed by a line break, which the chat templates write again.
TAG_AND_BREAK = TAG + r"\n?"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadRecordError(ValueError):
    """Why one record of a file cannot be used; counted, and reported as a `UserError` when there are too many."""


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
        ``id``, ``source``, ``images`` (paths), ``turns`` (``question``, ``answer``, ``images_at``), and ``length``: the
        number of words, negative without an image (``modality_lengths`` in LLaVA).

    Raises:
        BadRecordError: It cannot be used.
    """
    if isinstance(raw, BadRecordError):
        raise raw
    if not isinstance(raw, dict):
        raise BadRecordError(f"record {number}: a {type(raw).__name__} instead of an object")
    name = str(raw.get("id", number))
    said, inline = _said(raw, name)
    images = raw.get("image", raw.get("images")) or inline
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str):
            raise BadRecordError(f"record {name!r}: image is a {type(image).__name__} instead of a path")
    questions = _placed(said[::2], len(images), name)
    answers = [text.replace(TAG, "").strip() for text in said[1::2]]
    if not all(answers):
        raise BadRecordError(f"record {name!r}: an empty answer")
    # Blanks are counted much faster than words are made.
    words = sum(text.count(" ") for text in said) + len(said)
    folder, _, file = images[0].lstrip("/").partition("/") if images else ("text", "", "text")
    origin = str(source or raw.get("source") or (folder if file else "images"))
    try:
        "".join((name, origin, root, *images, *said)).encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"record {name!r}: holds half of a surrogate pair, or bytes that are no UTF-8") from error
    return {
        "id": name,
        "source": origin,
        "images": [root + image for image in images],
        "turns": [
            {"question": question, "answer": answer, "images_at": places}
            for (question, places), answer in zip(questions, answers, strict=True)
        ],
        "length": words if images else -words,
    }


def _said(raw: Row, name: str) -> tuple[list[str], list[Any]]:
    """Questions and answers by turns, tags included, and image paths that stand inside the messages."""
    messages = raw.get("conversations", raw.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"record {name!r}: neither 'conversations' nor 'messages' with at least one turn")
    images: list[Any] = []
    roles: list[str] = []
    texts: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRecordError(f"record {name!r}: a turn is a {type(message).__name__} instead of an object")
        role = message.get("from", message.get("role"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecordError(f"record {name!r}: role {role!r} is not one of {', '.join(ROLES)}")
        content = message.get("value", message.get("content"))
        roles.append(ROLES[role])
        texts.append(content if isinstance(content, str) else _content(content, name, images))
    # As in LLaVA: an answer without a question at the start is dropped.
    start = int(roles[0] == "assistant")
    if len(roles) == start or roles[start:] != ["user", "assistant"] * ((len(roles) - start) // 2):
        raise BadRecordError(f"record {name!r}: roles do not alternate between a question and its answer")
    return texts[start:], images


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
