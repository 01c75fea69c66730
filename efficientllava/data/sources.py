"""Where records come from: local files, files and data sets of the Hugging Face hub, InternVL's lists of files."""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from pathlib import Path
from typing import IO, Any

from ..runtime import HUB, UserError, first_line, is_remote, local

log = logging.getLogger(__name__)

MOST = 1_000_000  # repetitions of a record in the training data
# The training split of a published data set: files of the hub's libraries, or a folder of its own.
TRAINED = re.compile(r"(.*/)?train(\w*-\d+-of-\d+\.parquet|\.parquet|(_\w+)?/[^/]+)")
CHUNK = 1 << 24  # characters of a JSON list that are read at once
FORMATS = (
    "give a JSON list of records, JSONL with the suffix .jsonl, parquet, or a JSON object of "
    "{name: {root, annotation, repeat_time}}"
)
SIGN = re.compile(r"\S")
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|["\[\]{},]', re.DOTALL)


class BadRecordError(ValueError):
    """Why one record of a file cannot be used; counted, and reported as a `UserError` when there are too many."""


def report_bad(where: str, bad: Sequence[str], total: int, max_bad_fraction: float, hint: str = "") -> None:
    """Warn about records that cannot be used, or fail if there are too many.

    Args:
        where: The file, for the message.
        bad: One reason for each.
        total: Number of records, these included.
        max_bad_fraction: Share of them that is tolerated, in [0, 1).
        hint: What else a user should know.

    Raises:
        UserError: If there are more than tolerated, or nothing is left.
    """
    if not total:
        raise UserError(f"{where}: holds no record; give a non-empty list of conversations")
    if not bad:
        return
    found = f"{where}: {len(bad)} of {total} records cannot be used, the first: {bad[0]}"
    if len(bad) > max_bad_fraction * total or len(bad) == total:
        allowed = f"data.max_bad_fraction allows {max_bad_fraction:g}"
        raise UserError(f"{found}; {allowed}; repair the data or raise it{hint}")
    log.warning("%s; they are left out", found)


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
        source: Name of the data set; None: see `efficientllava.data.table.row_of`.
        share: Share of its records that is used, from its beginning, in (0, 1].
        repeats: How often each record occurs in the training data, >= 1.
    """

    file: Path
    root: str = ""
    source: str | None = None
    share: float = 1.0
    repeats: int = 1


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
        trained = [one for one in found if TRAINED.fullmatch(one.relative_to(file).as_posix())]
        if 0 < len(trained) < len(found):  # splits of a published data set
            log.warning("%s: %s: %d of %d files are those of the split 'train'", key, file, len(trained), len(found))
        return [Part(one) for one in trained or found]
    if file.suffix == ".json":
        with _opened(file, key) as text:
            if text.read(CHUNK).lstrip().startswith("{"):
                return _listed(file, Path(image_root).expanduser() if image_root else file.parent, key)
    return [Part(file)]


@lru_cache(maxsize=64)
def locate(path: str, key: str = "data.path") -> Path:
    """The local file or folder behind a path; see `parts_of`."""
    if not is_remote(path):
        return local(path)
    from huggingface_hub import hf_hub_download, snapshot_download

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # each retry; we say it once
    owner, name, *rest = path.removeprefix(HUB).split("/")
    name, _, revision = name.partition("@")
    place: dict[str, Any] = {"repo_type": "dataset", "revision": revision or None}
    try:
        if rest:
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(rest), **place))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns="*.parquet", **place))
    except Exception as error:  # the hub client raises a dozen kinds; all mean the same to the user
        raise UserError(
            f"{key}={path}: neither in the hub's cache nor can it be fetched ({first_line(error)}); check the name and "
            f"the network, or download it elsewhere and set {key} to the local file"
        ) from error


def _listed(file: Path, base: Path, key: str) -> list[Part]:
    """The files of an InternVL list (``meta`` in its repository); a ``repeat_time`` below 1 takes a prefix."""
    try:
        with _opened(file, key) as text:
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
        if not isfile(one):  # of `os.path`, since it may be a name that no file can have
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
        with _opened(file, key) as text:
            yield from _lines(text) if file.suffix == ".jsonl" else _elements(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {str(file)!r} is not JSON ({error.msg}); give a JSON list, or JSONL with the suffix .jsonl"
        ) from error


@contextmanager
def _opened(file: Path, key: str) -> Iterator[IO[str]]:
    """Open a text of UTF-8, with or without a byte-order mark; bytes that are none become lone surrogates.

    Raises:
        UserError: It cannot be read, or its byte-order mark is that of another encoding.
    """
    try:
        with file.open("rb") as raw:
            if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # that of UTF-32 begins with it
                raise OSError("it is in UTF-16 or UTF-32; save it as UTF-8")
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
            yield text
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read ({error}); {FORMATS}") from error


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
                yield DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                yield BadRecordError(f"line {number}: {_reason(error)}")


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
        while not (found := SIGN.search(self._buffer, self.at)):
            self.at = len(self._buffer)
            if not self._more():
                return ""
        self.at = found.start()
        return found[0]

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
