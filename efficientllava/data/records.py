"""Records: questions and answers about images, which are opened when they are needed, in RGB of 8 bits.

Before a run begins they are looked at: which of them are at fault, what their images are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from io import BytesIO
from os.path import isfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageCms

from ..runtime import Memo, UserError, digest, memory_full, one_line, stamp
from ..settings.schema import DataConfig
from .sources import report_bad

Value = TypeVar("Value")

# Up to this many records are opened and measured before a run. Of more, it is only asked whether their images exist;
# a broken one is then found when its record is used.
CHECK_LIMIT = 5000
SHOWN_FOLDERS = 8  # in a message

# Formats whose values of 16 bits, which Pillow may give as 32, span the whole range. None: an image in memory.
FULL_RANGE = ("PNG", "PPM", "TIFF", "JPEG2000", None)
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8
SAMPLES, SIGNED = 339, 2  # section 19


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: Text of the user, without any image placeholder.
        answer: Text of the assistant.
        kind: Question type, for scores by type; may be empty.
        sees_image: False for a text-only question of a record that has an image.
        images_at: Places in the question, counted in characters, where an image stands; may repeat. The images that no
            turn places stand before the first question.
    """

    question: str
    answer: str
    kind: str = ""
    sees_image: bool = True
    images_at: tuple[int, ...] = ()


# Fetches an encoded image that lies inside a larger file: the content of its own file, such as PNG or JPEG.
StoredImage = Callable[[], bytes]
AnyImage = Path | StoredImage | Image.Image


@dataclass(frozen=True)
class Record:
    """One training or evaluation sample.

    Attributes:
        id: Unique name.
        image: A file or a stored image that is opened when needed, an image in memory, or None.
        turns: Questions with answers.
        independent: True if the turns are separate questions about the same image (each sees the image and itself
            only); false for one conversation in which later turns see earlier ones.
        source: Name of the data set, for stratified subsets.
        more_images: The second image and all that follow, in the order in which the turns show them.
        details: What a benchmark's scorer wants to know beside question and answer.
    """

    id: str
    image: AnyImage | None
    turns: tuple[Turn, ...]
    independent: bool
    source: str
    more_images: tuple[AnyImage, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[AnyImage, ...]:
        """All images."""
        return () if self.image is None else (self.image, *self.more_images)


class Subset(Sequence[Record]):
    """Chosen records of a sequence, made or opened only when asked for.

    Args:
        records: The sequence.
        indices: Which of its records, in which order.
    """

    def __init__(self, records: Sequence[Record], indices: Sequence[int] | np.ndarray) -> None:
        places = np.asarray(indices, dtype=np.int64)
        nested = isinstance(records, Subset)
        self.records, self.indices = (records.records, records.indices[places]) if nested else (records, places)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.records[int(self.indices[index])]


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """``id``, ``source``, or ``length`` (words, negative without an image) of all records; none is made where possible.

    Of records that come from no file, there is no ``length``.
    """
    if isinstance(records, Subset):
        return column(records.records, name)[records.indices]
    if (read := getattr(records, "column", None)) is not None:
        return read(name)
    return np.array([getattr(record, name) for record in records], dtype=object)


def image_files(records: Sequence[Record], indices: Sequence[int] | np.ndarray | None = None) -> list[list[Path]]:
    """The image files of records; images that lie inside the data, or are made by a program, count with these.

    Args:
        records: The records.
        indices: Which of them; None: all.
    """
    chosen = np.arange(len(records)) if indices is None else np.asarray(indices, int)
    if isinstance(records, Subset):
        return image_files(records.records, records.indices[chosen])
    if (listed := getattr(records, "image_files", None)) is not None:
        return listed(chosen)
    return [[image for image in records[int(index)].images if isinstance(image, Path)] for index in chosen]


def open_image(record: Record) -> Image.Image | None:
    """The record's first image in RGB, read from where it is stored if it is not in memory.

    Args:
        record: Any record.

    Returns:
        The image, or None if the record has none.

    Raises:
        UserError: If the file is missing or broken.
    """
    return None if record.image is None else _opened(record.image, record.id)


def open_images(record: Record) -> list[Image.Image]:
    """All images of a record, as `open_image` opens the first."""
    return [_opened(image, record.id) for image in record.images]


def image_key(image: AnyImage) -> str:
    """Name of an image, the same wherever it is shown: its path, else a digest of its content."""
    if isinstance(image, Path):
        return str(image)
    if isinstance(image, Image.Image):
        return content_key(repr((image.size, image.mode)).encode() + bytes(image.getpalette() or ()) + image.tobytes())
    return content_key(image())


def content_key(content: bytes) -> str:
    """Name of what has a content, such as an image, see `image_key`."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def image_names(records: Sequence[Record]) -> list[list[str]]:
    """Names of every record's images, see `image_key`. Tables know them unopened."""
    table, chosen = (records.records, records.indices) if isinstance(records, Subset) else (records, None)
    if (known := getattr(table, "image_names", None)) is not None:
        return known(np.arange(len(table)) if chosen is None else chosen)
    return [[image_key(image) for image in record.images] for record in records]


def said(records: Sequence[Record], indices: Sequence[int] | np.ndarray) -> list[str]:
    """Digests of what some records ask and answer, the same under any id."""
    table, chosen = (records.records, records.indices) if isinstance(records, Subset) else (records, None)
    places = np.asarray(indices, int) if chosen is None else chosen[indices]
    if (known := getattr(table, "turns", None)) is not None:
        turns = known(places)
    else:
        turns = ([(turn.question, turn.answer) for turn in table[place].turns] for place in places.tolist())
    return [content_key(json.dumps(each).encode()) for each in turns]


def _opened(image: AnyImage, name: str) -> Image.Image:
    shown = f"image {str(image)!r}" if isinstance(image, Path) else "its image"
    try:
        if isinstance(image, Image.Image):
            return image if image.mode == "RGB" else rgb(image)
        with Image.open(image if isinstance(image, Path) else BytesIO(image())) as file:
            return rgb(file)
    except FileNotFoundError as error:
        raise UserError(f"record {name!r}: {shown} does not exist; restore it or drop the record") from error
    except Exception as error:  # a decoder may raise anything, Pillow's own SyntaxError and those of plugins others
        if memory_full(error):
            raise
        raise UserError(
            f"record {name!r}: {shown} cannot be read ({one_line(error)}); repair it or drop the record"
        ) from error


def rgb(image: Image.Image) -> Image.Image:
    """Bring an image to 8 bits per channel of red, green and blue; transparency is dropped.

    More than 8 bits are scaled, where the format says what is white.

    Args:
        image: Of any mode.

    Returns:
        An image in memory, of mode ``RGB``.

    Raises:
        ValueError: The range of the values is not known, or Pillow knows no conversion.
    """
    mode, kind = image.mode, image.format
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        if kind not in FULL_RANGE:
            raise ValueError(f"{kind} of mode {mode} does not say which value is white; convert it to 8 bits")
        return _scaled(image).convert("RGB")
    if mode in ("I", "F"):
        numbers = "integers" if mode == "I" else "floating-point numbers"
        raise ValueError(f"32-bit {numbers} do not say which value is white; convert it to 8 bits")
    if mode == "L" and int(np.ravel(getattr(image, "tag_v2", {}).get(SAMPLES, 1))[0]) == SIGNED:
        raise ValueError("its values have a sign, which Pillow does not see; convert it to 8 bits without")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image  # None only in place
    if mode in ("La", "RGBa"):  # multiplied by their transparency, which Pillow takes back one step at a time
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way, which gives the same
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, or of as many as a TIFF says, in 8."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = int(np.ravel(tags.get(BITS, 16))[0])
    largest = 2 ** (bits if 8 < bits <= 16 else 16) - 1
    if values.min() < 0 or values.max() > largest:
        raise ValueError(f"its values span {values.min()} to {values.max()}, not 0 to {largest}; convert it to 8 bits")
    grey = (values.astype(np.uint32) * 255 + largest // 2) // largest
    return Image.fromarray((255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey).astype(np.uint8))


# ---- looked at before a run ----------------------------------------------------------------------------------------


def usable(records: Sequence[Record], collate: Any, data: DataConfig) -> Sequence[Record]:
    """Leave out the records that cannot be used; see `CHECK_LIMIT`.

    Args:
        records: The records to check; no other record's image is touched.
        collate: The collator that will serve them.
        data: Path for messages, and the share of records that cannot be used and are tolerated.

    Raises:
        UserError: If too many cannot.
    """
    problems = missing_images(records)
    hint = expected_folders(records) if problems else ""
    opened = range(len(records)) if len(records) <= CHECK_LIMIT else ()
    found = {index: fault_of(collate, records[index]) for index in opened if index not in problems}
    problems |= {index: problem for index, problem in found.items() if problem}
    bad = [problems[index] for index in sorted(problems)]
    report_bad(str(data.path or data.name), bad, len(records), data.max_bad_fraction, hint)
    return Subset(records, np.setdiff1d(np.arange(len(records)), list(problems))) if bad else records


def fault_of(collate: Any, record: Record) -> str | None:
    """Why a collator cannot use a record; None where it can."""
    try:
        collate.check(record)
    except UserError as error:
        return str(error)


def missing_images(records: Sequence[Record]) -> dict[int, str]:
    """What is missing, by index of the record; images are looked for, not opened."""
    files = image_files(records)
    # Of `os.path`, since a name may be one that no file can have.
    there = _of_each(isfile, (file for each in files for file in each))
    # From the last to the first, so that the first is named.
    lost = {index: file for index, each in enumerate(files) for file in reversed(each) if not there[file]}
    ids = column(records, "id") if lost else ()
    return {index: f"record {ids[index]!r}: image {str(file)!r} does not exist" for index, file in lost.items()}


def expected_folders(records: Sequence[Record]) -> str:
    """The folders that the images of some records are expected in."""
    table: Any = records.records if isinstance(records, Subset) else records
    if not hasattr(table, "image_root"):
        return ""
    root, option = table.image_root, table.option
    files = image_files(records, range(min(len(records), 10 * CHECK_LIMIT)))
    parents = Counter(file.parent for each in files for file in each)
    common = [parent for parent, _ in parents.most_common(SHOWN_FOLDERS)]
    folders = [str(parent.relative_to(root) if parent.is_relative_to(root) else parent) for parent in common]
    if not folders or folders == ["."]:
        return f"; the images are expected in {option}={root}"
    return f"; {option}={root} is expected to hold {', '.join(folders)}"


def image_stamps(records: Sequence[Record], indices: Sequence[int] | None = None) -> list[str]:
    """What tells that one of many images was replaced under its name.

    Args:
        records: Records.
        indices: Which of them; None: all.

    Returns:
        For each record, a digest of size, times and inode of its image files; empty where it has none.
    """
    files = image_files(records, indices)
    known = _of_each(_stamp, (file for each in files for file in each))
    return [digest([known[file] for file in each]) if each else "" for each in files]


def text_contents(records: Sequence[Record]) -> str:
    """Digest of all that a few records say, and of what they say about it."""
    return digest([[r.id, r.independent, [astuple(turn) for turn in r.turns], dict(r.details)] for r in records])


def image_contents(records: Sequence[Record], memo: Memo) -> str:
    """Digest of the whole content of all images of a few records."""
    images = [image for record in records for image in record.images]
    files = [image for image in images if isinstance(image, Path) and isfile(image)]
    sums = dict(zip(files, memo.digests(files), strict=True))
    return digest([sums.get(image) if isinstance(image, Path) else image_key(image) for image in images])


def _of_each(look: Callable[[Path], Value], files: Iterable[Path]) -> dict[Path, Value]:
    """What a look at each of some files says; in parallel, since image folders are often on a network."""
    distinct = list(dict.fromkeys(files))
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(distinct, pool.map(look, distinct, chunksize=256), strict=True))


def _stamp(file: Path) -> list[object]:
    try:
        return [str(file), *stamp(file)]
    except (OSError, ValueError):  # ValueError: a name with a zero in it
        return [str(file), None]  # whoever opens it says what is wrong with it
