"""Where records come from: local files, files and data sets of the Hugging Face hub, InternVL's lists of files.

What is said of records that cannot be used, and how many may be.

One raw record of a file, in any of the accepted forms, as a row with fixed columns.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from ..runtime.errors import UserError

log = logging.getLogger(__name__)


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


HUB, BUILTIN = "hf://datasets/", "builtin:"
MOST = 1_000_000  # repetitions of a record in the training data
CHUNK = 1 << 24  # characters of a JSON list that are read at once
FORMATS = (
    "give a JSON list of records, JSONL with the suffix .jsonl, parquet, or a JSON object of "
    "{name: {root, annotation, repeat_time}}"
)
SPACE = re.compile(r"\s*")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice in it, one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRecordError(f"the key {name!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


@dataclass(frozen=True)
class Part:
    """One file of records.

    Attributes:
        file: JSON, JSONL or parquet.
        root: What is put before its image paths.
        source: Name of the data set; None: see `efficientllava.data.sources.row_of`.
        share: Share of its records that is used, from its beginning, in (0, 1].
        repeats: How often each record occurs in the training data, >= 1.
    """

    file: Path
    root: str = ""
    source: str | None = None
    share: float = 1.0
    repeats: int = 1


def is_remote(path: str) -> bool:
    """Whether ``data.path`` names something on the hub: ``hf://datasets/org/name/file``, or a data set ``org/name``."""
    local = Path(path).expanduser()
    plain = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not local.suffix
    return path.startswith(HUB) or (plain and not local.exists())


def is_elsewhere(path: str) -> bool:
    """Whether ``data.path`` names something on the hub or a list that comes with this package."""
    return path.startswith(BUILTIN) or is_remote(path)


def parts_of(path: str, image_root: str | None = None, key: str = "data.path") -> list[Part]:
    """Find the files of a data set; what is on the hub is downloaded once, into the hub client's cache.

    Args:
        path: A local file, a folder of parquet files, ``hf://datasets/org/name[@revision]/file``, a data set
            ``org/name`` of parquet files, or ``builtin:`` and a list that comes with this package.
        image_root: Folder that the paths inside InternVL's lists start from; None: the list's own folder.
        key: The configuration key, for messages.

    Returns:
        At least one part.

    Raises:
        UserError: A file is missing or cannot be fetched, or an InternVL list is at fault.
    """
    file = locate(path, key)
    if file.is_dir():
        found = sorted(file.rglob("*.parquet"))
        if not found:
            raise UserError(f"{key}: {str(file)!r} holds no parquet file; {FORMATS}")
        return [Part(one) for one in found]
    if file.suffix == ".json" and _begins(file, key) == "{":
        return _listed(file, Path(image_root).expanduser() if image_root else file.parent, key)
    return [Part(file)]


@lru_cache(maxsize=64)
def locate(path: str, key: str = "data.path") -> Path:
    """The local file or folder behind a path; see `parts_of`."""
    if path.startswith(BUILTIN):
        return Path(__file__).parents[1] / "assets" / path.removeprefix(BUILTIN)
    if not is_remote(path):
        return Path(path).expanduser()
    from huggingface_hub import hf_hub_download, snapshot_download

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # each retry; we say it once
    owner, name, *rest = path.removeprefix(HUB).split("/")
    name, _, revision = name.partition("@")
    try:
        if rest:
            found = hf_hub_download(f"{owner}/{name}", "/".join(rest), repo_type="dataset", revision=revision or None)
        else:
            found = snapshot_download(
                f"{owner}/{name}", repo_type="dataset", revision=revision or None, allow_patterns="*.parquet"
            )
    except Exception as error:  # the hub client raises a dozen kinds; all mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path}: neither in the hub's cache nor can it be fetched ({reason}); check the name and the "
            f"network, or download it elsewhere and set {key} to the local file"
        ) from error
    return Path(found)


def _begins(file: Path, key: str) -> str:
    """First character of a text file that is no white space."""
    try:
        with open_text(file) as text:
            return next((line.lstrip()[0] for line in text if line.strip()), "")
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read ({error}); {FORMATS}") from error


def _listed(file: Path, base: Path, key: str) -> list[Part]:
    """The files of an InternVL list (``meta`` in its repository); a ``repeat_time`` below 1 takes a prefix."""
    try:
        with open_text(file) as text:
            content = DECODER.decode(text.read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {str(file)!r} is not JSON ({error}); {FORMATS}") from error
    parts = []
    for name, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise UserError(f"{key}: {str(file)!r} holds a dict, and its {name!r} names no annotation; {FORMATS}")
        times, root = entry.get("repeat_time", 1), str(entry.get("root", ""))
        if type(times) not in (int, float) or not 0 < times <= MOST or (times > 1 and times != int(times)):
            raise UserError(
                f"{key}: repeat_time={times!r} of {name!r}: must be a whole number up to {MOST:,}, or lie in (0, 1)"
            )
        annotation = entry["annotation"]
        one = locate(annotation, key) if annotation.startswith(HUB) else base / annotation
        if not is_file(one):
            raise UserError(
                f"{key}: annotation {str(one)!r} of {name!r} does not exist; the paths in {file.name} start from "
                "data.image_root, or from its own folder where that is not set"
            )
        root = root if not root or root.endswith("/") else root + "/"
        parts.append(Part(one, root, name, min(times, 1.0), max(int(times), 1)))
    if not parts:
        raise UserError(f"{key}: {str(file)!r} is empty; {FORMATS}")
    return parts


def raw_records(file: Path, key: str = "data.path") -> Iterator[Any]:
    """The decoded records of a JSON or JSONL file, one at a time; what is none comes as a `BadRecordError`.

    A list is read to its end or not at all: whoever takes its records must be prepared for the error behind the last.

    Raises:
        UserError: The file cannot be read, or is no JSON list.
    """
    try:
        with open_text(file) as text:
            yield from _lines(text) if file.suffix == ".jsonl" else _elements(text)
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read ({error}); {FORMATS}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {str(file)!r} is not JSON ({error.msg}); give a JSON list, or JSONL with the suffix .jsonl"
        ) from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:  # such as one that is too long
        return False


def open_text(file: Path) -> IO[str]:
    """Open a text of UTF-8, with or without a byte-order mark; bytes that are none become lone surrogates.

    Raises:
        OSError: It cannot be read, or its byte-order mark is that of another encoding.
    """
    with file.open("rb") as raw:
        if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # that of UTF-32 begins with it
            raise OSError("it is in UTF-16 or UTF-32; save it as UTF-8")
    return file.open(encoding="utf-8-sig", errors="surrogateescape")


def decoded(text: str) -> Any:
    """Decode JSON.

    Raises:
        BadRecordError: It is none, or more than Python decodes.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, BadRecordError):
        return str(error)
    if isinstance(error, RecursionError):
        return "too many brackets inside each other"
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else "a number of too many digits"


def _lines(text: IO[str]) -> Iterator[Any]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield decoded(line)
            except BadRecordError as error:
                yield BadRecordError(f"line {number}: {error}")


def _elements(text: IO[str]) -> Iterator[Any]:
    """The elements of a JSON list, without holding all of it."""
    window, number = _Window(text), 0
    if window.peek() != "[":
        raise _no_json("it does not begin with [")
    window.at += 1
    follows = window.peek()
    while follows != "]":
        yield window.element(number)
        follows, number = window.peek(), number + 1
        if follows == ",":
            window.at += 1
            if window.peek() == "]":
                raise _no_json(f"nothing follows the comma behind record {number - 1}")
        elif follows != "]":
            raise _no_json(f"no comma and no closing bracket behind record {number - 1}")
    window.at += 1
    if window.peek():
        raise _no_json("something follows the closing bracket, such as a second list; make one list of them")


def _no_json(reason: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(reason, "", 0)


class _Window:
    """The part of a text that is being looked at.

    Args:
        text: Read on as far as needed.
    """

    def __init__(self, text: IO[str]) -> None:
        self._text, self._buffer, self.at = text, "", 0

    def _more(self) -> bool:
        # Doubling keeps the cost of a record that is longer than a chunk linear.
        more = self._text.read(max(CHUNK, len(self._buffer) - self.at))
        self._buffer, self.at = self._buffer[self.at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """Go to the next character that is no white space, and return it; empty at the end."""
        while True:
            self.at = SPACE.match(self._buffer, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._more():
                return ""

    def element(self, number: int) -> Any:
        """Decode the next element and go behind it; one that Python does not decode comes as a `BadRecordError`."""
        while True:
            try:
                found, end = DECODER.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            except (ValueError, RecursionError) as error:
                found, end = BadRecordError(f"record {number}: {_reason(error)}"), self._end()
            if end < len(self._buffer) or not self._more():  # a number may go on behind the window
                self.at = end
                return found

    def _end(self) -> int:
        """Where the next element ends, by its brackets and strings alone."""
        while True:
            depth = 0
            for token in TOKEN.finditer(self._buffer, self.at):
                sign = token[0]
                if sign == '"':
                    break  # a string that goes on behind the window
                depth += (sign in ("[", "{")) - (sign in ("]", "}"))
                if depth < 0 or (sign == "," and not depth):
                    return token.start()
                if not depth and sign in ("]", "}"):
                    return token.end()
            if not self._more():
                raise _no_json("it ends too early")
