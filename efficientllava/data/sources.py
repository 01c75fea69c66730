"""Where records come from: local files, files and data sets of the Hugging Face hub, InternVL's lists of files."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rows import BadRecordError

HUB, BUILTIN = "hf://datasets/", "builtin:"
CHUNK = 1 << 24  # characters of a JSON list that are read at once
FORMATS = (
    "give a JSON list of records, JSONL with the suffix .jsonl, parquet, or a JSON object of "
    "{name: {root, annotation, repeat_time}}"
)
BETWEEN = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Part:
    """One file of records.

    Attributes:
        file: JSON, JSONL or parquet.
        root: What is put before its image paths.
        source: Name of the data set; None: see `efficientllava.data.rows.row_of`.
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
        with file.open(encoding="utf-8") as text:
            return next((line.lstrip()[0] for line in text if line.strip()), "")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read ({error}); {FORMATS}") from error


def _listed(file: Path, base: Path, key: str) -> list[Part]:
    """The files of an InternVL list (``meta`` in its repository); a ``repeat_time`` below 1 takes a prefix."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: {str(file)!r} is not JSON ({error}); {FORMATS}") from error
    parts = []
    for name, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
            raise UserError(f"{key}: {str(file)!r} holds a dict, and its {name!r} names no annotation; {FORMATS}")
        times, root = entry.get("repeat_time", 1), str(entry.get("root", ""))
        if type(times) not in (int, float) or times <= 0 or (times > 1 and times != int(times)):
            raise UserError(f"{key}: repeat_time={times!r} of {name!r}: must be a whole number, or lie in (0, 1)")
        annotation = entry["annotation"]
        one = locate(annotation, key) if annotation.startswith(HUB) else base / annotation
        if not one.is_file():
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
    """The decoded records of a JSON or JSONL file, one at a time; a line that is no JSON comes as a `BadRecordError`.

    Raises:
        UserError: The file cannot be read, or is no JSON list.
    """
    try:
        with file.open(encoding="utf-8") as text:
            yield from _lines(text) if file.suffix == ".jsonl" else _elements(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read ({error}); {FORMATS}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}: {str(file)!r} is not JSON ({error.msg}); give a JSON list, or JSONL with the suffix .jsonl"
        ) from error


def _lines(text: Any) -> Iterator[Any]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield BadRecordError(f"line {number}: not JSON ({error})")


def _elements(text: Any) -> Iterator[Any]:
    """The elements of a JSON list, without holding all of it."""
    decoder, buffer, at = json.JSONDecoder(), text.read(CHUNK).lstrip(), 1
    if not buffer.startswith("["):
        raise json.JSONDecodeError("it does not begin with [", buffer, 0)
    while True:
        at = BETWEEN.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if buffer.startswith("]", at):
            return
        try:
            element, at = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError:
            # Doubling keeps the cost of a record that is longer than a chunk linear.
            more = text.read(max(CHUNK, len(buffer) - at))
            if not more:
                raise
            buffer, at = buffer[at:] + more, 0
            continue
        yield element
