"""Records: images with questions and answers, opened only when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.errors import UserError, memory_full
from .pixels import rgb


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


@dataclass(frozen=True)
class StoredImage:
    """An encoded image inside a larger file, fetched when needed.

    Attributes:
        read: Returns the content of its file, such as PNG or JPEG.
    """

    read: Callable[[], bytes]


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
    match image:
        case Path() as path:
            return str(path)
        case StoredImage() as stored:
            content = stored.read()
        case _:
            content = repr((image.size, image.mode)).encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _opened(image: AnyImage, name: str) -> Image.Image:
    if isinstance(image, Image.Image) and image.mode == "RGB":
        return image
    shown = f"image {str(image)!r}" if isinstance(image, Path) else "its image"
    try:
        if isinstance(image, Image.Image):
            return rgb(image)
        with Image.open(BytesIO(image.read()) if isinstance(image, StoredImage) else image) as file:
            return rgb(file)
    except FileNotFoundError as error:
        raise UserError(f"record {name!r}: {shown} does not exist; restore it or drop the record") from error
    except Exception as error:  # a decoder may raise anything, Pillow's own SyntaxError and those of plugins others
        if memory_full(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"record {name!r}: {shown} cannot be read ({reason}); repair it or drop the record") from error
