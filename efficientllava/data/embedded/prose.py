"""Running text as records: the texts that come with this package, and how any plain text is cut.

A record gives the first `GIVEN` words of a piece and asks for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from ...runtime import PACKAGE, UserError
from ..records import Record, Turn

FOLDER = PACKAGE / "assets" / "prose"
# What is measured: two of a kind that people calibrate with, and one that is not; see the README beside them.
TEXTS = {
    "sqlite": "0bfc0b1377154ab9af6f597b112df50cd84efab806b8cbf925ae20f4f43dc2fe",
    "postgresql": "8d3497ec6dc145c7098d6eeb6e36ab75611dbaea63ecd1c33e0c7e7f657fe175",
    "moby_dick": "c70b7fce5f81f44a6b2e1fea6e4454bafe8ae71c4e9b91e348d63afe526b1c75",
}
CALIBRATES = {"rust_book": "ac53a80cdd7ec2a72c62fa0f1ad2987d93e8ac6ab92c3c28a8c6615dfb221875"}
SOURCE = "prose"
MOST, LEAST, GIVEN = 150, 40, 16  # words of a piece; of them, those that are given


@cache
def shipped() -> tuple[Record, ...]:
    """The records that are measured on, of all texts in turn, so that the first ones are of all texts."""
    return tuple(chain.from_iterable(zip(*(of_text(FOLDER / f"{name}.txt") for name in TEXTS), strict=True)))


@cache
def calibrating() -> tuple[Record, ...]:
    """The records that a model may be calibrated with; none of them is measured on."""
    return tuple(record for name in CALIBRATES for record in of_text(FOLDER / f"{name}.txt"))


def of_text(file: Path, key: str = "text") -> tuple[Record, ...]:
    """The records of a plain text; ``key`` is what messages call it.

    Raises:
        UserError: It cannot be read, or holds no piece.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={file}: cannot be read ({reason}); give a text in UTF-8, or JSON") from error
    made = tuple(_record(file.stem, number, words) for number, words in enumerate(pieces(text)))
    if not made:
        raise UserError(f"{key}={file}: holds no {LEAST} words between blanks; give a longer text, or JSON")
    return made


def pieces(text: str) -> list[list[str]]:
    """Cut a text into lists of words.

    Paragraphs, which empty lines part, are joined as long as they fit into `MOST` words together; longer ones are cut
    after every `MOST` words. What is shorter than `LEAST` is left out.
    """
    made: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(made[-1]) + len(words) > MOST:
            made += [words[start : start + MOST] for start in range(0, len(words), MOST)]
        else:
            made[-1] += words
    return [piece for piece in made if len(piece) >= LEAST]


def _record(text: str, number: int, words: Sequence[str]) -> Record:
    question = f"Continue this text: {' '.join(words[:GIVEN])}"
    turn = Turn(question, " ".join(words[GIVEN:]), text, sees_image=False)
    return Record(f"{text}/{number}", None, (turn,), False, SOURCE)
