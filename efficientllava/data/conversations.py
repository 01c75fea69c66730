"""Records: images with questions and answers, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import UserError


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
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"record {record.id!r}: image {str(record.image)!r} cannot be read ({error}); repair it or drop the record"
        ) from error
