"""Visual questions over images composed from scikit-learn's handwritten digits: nothing is downloaded or stored.

Every record is made on demand from ``(seed, split, index)`` with integer arithmetic only, so that it is identical on
every machine. The digit images (strokes) are divided before any scene is composed: a stroke of the test part is never
seen in training, calibration or search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from ...runtime.errors import UserError
from ..records import Record, Turn
from .scenes import (
    COLOURS,
    PLACES,
    WORDS,
    Glyph,
    Scene,
    compose,
    draw,
    pick,
    strokes,
)

NOTHING = "nothing"
Asker = Callable[[Generator, Scene], tuple[str, str]]


def _yes(rng: Generator) -> tuple[bool, str]:
    value = bool(rng.integers(2))
    return value, "yes" if value else "no"


def _recognition(rng: Generator, scene: Scene) -> tuple[str, str]:
    empty = sorted(set(range(4)) - {glyph.place for glyph in scene})
    if empty and not rng.integers(8):
        return f"which digit is {PLACES[pick(rng, empty)]}?", NOTHING
    glyph = pick(rng, scene)
    return f"which digit is {PLACES[glyph.place]}?", glyph.word


def _about_one(say: Callable[[Glyph], tuple[str, str]]) -> Asker:
    """Questions about one digit of the scene."""
    return lambda rng, scene: say(pick(rng, scene))


def _count(_rng: Generator, scene: Scene) -> tuple[str, str]:
    return "how many digits are there?", str(len(scene))


def _count_by_colour(rng: Generator, scene: Scene) -> tuple[str, str]:
    present = sorted({glyph.colour for glyph in scene})
    absent = [name for name in COLOURS if name not in present]
    colour = pick(rng, absent) if not rng.integers(4) else pick(rng, present)
    return f"how many {colour} digits are there?", str(sum(glyph.colour == colour for glyph in scene))


def _absent_digit(rng: Generator, scene: Scene) -> str:
    present = {glyph.digit for glyph in scene}
    return WORDS[pick(rng, [digit for digit in range(10) if digit not in present])]


def _existence(rng: Generator, scene: Scene) -> tuple[str, str]:
    value, answer = _yes(rng)
    return f"is there a {pick(rng, scene).word if value else _absent_digit(rng, scene)}?", answer


def _existence_by_colour(rng: Generator, scene: Scene) -> tuple[str, str]:
    value, answer = _yes(rng)
    glyph = pick(rng, scene)
    colour, word = glyph.colour, glyph.word
    others = [name for name in COLOURS if name != colour]
    if not value:
        # Either the digit is there in another colour, preferably one of the scene, or the colour without the digit.
        seen = sorted({other.colour for other in scene} - {colour})
        if rng.integers(2):
            colour = pick(rng, seen or others)
        else:
            word = _absent_digit(rng, scene)
    return f"is there a {colour} {word}?", answer


def _comparison(rng: Generator, scene: Scene) -> tuple[str, str]:
    value, answer = _yes(rng)
    first, second = (scene[int(index)] for index in rng.permutation(len(scene))[:2])
    if (first.digit > second.digit) is not value:
        first, second = second, first
    return f"is the {PLACES[first.place]} digit larger than the {PLACES[second.place]} digit?", answer


def _largest(_rng: Generator, scene: Scene) -> tuple[str, str]:
    return "which digit is the largest?", WORDS[max(glyph.digit for glyph in scene)]


def _arithmetic(rng: Generator, _scene: Scene) -> tuple[str, str]:
    total = int(rng.integers(10))
    part = int(rng.integers(total + 1))
    if rng.integers(2):
        return f"what is {part} plus {total - part}?", str(total)
    return f"what is {total} minus {part}?", str(total - part)


def _ordering(rng: Generator, _scene: Scene) -> tuple[str, str]:
    first, second = (int(digit) for digit in rng.permutation(10)[:2])
    larger = bool(rng.integers(2))
    answer = max(first, second) if larger else min(first, second)
    return f"which is {'larger' if larger else 'smaller'}, {WORDS[first]} or {WORDS[second]}?", WORDS[answer]


def _copying(rng: Generator, _scene: Scene) -> tuple[str, str]:
    names = (*WORDS, *COLOURS)
    words = " ".join(names[int(index)] for index in rng.permutation(len(names))[: int(rng.integers(1, 4))])
    return f"repeat {words}", words


IMAGE_KINDS: dict[str, Asker] = {
    "recognition": _recognition,
    "colour_by_place": _about_one(lambda one: (f"which colour is the {PLACES[one.place]} digit?", one.colour)),
    "colour_by_digit": _about_one(lambda one: (f"which colour is the {one.word}?", one.colour)),
    "count": _count,
    "count_by_colour": _count_by_colour,
    "position": _about_one(lambda one: (f"where is the {one.word}?", PLACES[one.place])),
    "existence": _existence,
    "existence_by_colour": _existence_by_colour,
    "comparison": _comparison,
    "largest": _largest,
}
TEXT_KINDS: dict[str, Asker] = {
    "text_arithmetic": _arithmetic,
    "text_ordering": _ordering,
    "text_copying": _copying,
}
KINDS = {**IMAGE_KINDS, **TEXT_KINDS}


def vocabulary() -> tuple[str, ...]:
    """Every word that a question or an answer can hold, without punctuation, sorted."""
    phrases = (
        "which digit is the colour how many digits are there where a larger than largest",
        "what plus minus smaller or repeat yes no",
        *(str(number) for number in range(10)),
    )
    words = {*WORDS, *PLACES, *COLOURS, NOTHING}.union(*(phrase.split() for phrase in phrases))
    return tuple(sorted(words))


def ask(rng: Generator, scene: Scene, kind: str) -> Turn:
    """One question of a kind and its answer.

    Args:
        rng: Source of chance.
        scene: What the image shows; not read by text-only kinds.
        kind: A key of ``KINDS``.

    Returns:
        The turn; ``sees_image`` is false for text-only kinds.
    """
    question, answer = KINDS[kind](rng, scene)
    return Turn(question, answer, kind, sees_image=kind in IMAGE_KINDS)


@dataclass(frozen=True)
class Split:
    """A named part of the data.

    Attributes:
        size: Default number of records.
        strokes: The part of the digit images that it draws from: ``train``, ``minival`` or ``test``.
        questions: Questions per image.
        code: Number mixed into the seed of each record.
    """

    size: int
    strokes: str
    questions: int
    code: int


SPLITS = {
    "train": Split(4000, "train", 10, 0),
    "calibration": Split(1000, "train", 10, 1),
    "minival": Split(500, "minival", 10, 2),
    "test": Split(2000, "test", 1, 3),
    # Fresh scenes without end, for training the teachers from scratch.
    "pretrain": Split(1 << 40, "train", 10, 4),
}

SOURCE = "digits_vqa"
# Splits of up to this many records keep what they made.
KEEP_LIMIT = 20_000

# One cycle of single-question records: each image kind 12 times, each text kind 10 times (20 % text-only).
_CYCLE = tuple(kind for kind in IMAGE_KINDS for _ in range(12)) + tuple(kind for kind in TEXT_KINDS for _ in range(10))


def _kinds_of(rng: Generator, scene: Scene, count: int, extra: Sequence[str] = ()) -> list[str]:
    """``count`` kinds for one image, a fifth of them text-only, ``extra`` among them; else without needless repeats."""
    possible = [kind for kind in IMAGE_KINDS if kind != "comparison" or len(scene) > 1]
    extra = [kind for kind in extra if kind in possible]
    texts = count // 5
    kinds = [possible[int(index)] for index in rng.permutation(len(possible))[: count - texts - len(extra)]]
    kinds += extra
    kinds += [pick(rng, possible) for _ in range(count - texts - len(kinds))]
    kinds += [pick(rng, tuple(TEXT_KINDS)) for _ in range(texts)]
    return [kinds[int(index)] for index in rng.permutation(len(kinds))]


class Digits(Sequence[Record]):
    """A split of the embedded data set; records are made on first access (about 7 kB each, kept in small splits).

    Args:
        split: ``train``, ``calibration``, ``minival``, ``test`` or ``pretrain`` (fresh training scenes without end).
        size: Number of records; default: the split's own (4000, 1000, 500, 2000).
        seed: Seed of the scenes. The division of the digit images does not depend on it.
        max_digits: Digits per image, 1 to 4; below 4 only for a training curriculum.
        questions: Questions per image; default: the split's own (10; 1 in ``test``).
        extra: Kinds that every image asks in addition to its draw, within ``questions``.
        images: Other versions of the training strokes to paint with, e.g. augmented, ``(count, GLYPH, GLYPH)``.

    Raises:
        UserError: If the split is unknown or the size below 1.
    """

    def __init__(
        self,
        split: str,
        size: int | None = None,
        seed: int = 0,
        max_digits: int = 4,
        questions: int | None = None,
        extra: Sequence[str] = (),
        images: np.ndarray | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"data split: {split!r} is not one of {', '.join(SPLITS)}")
        if size is not None and size < 1:
            raise UserError(f"size of data split {split!r}: {size} is below 1; give a positive number or leave it out")
        self.split, self.seed, default = split, seed, SPLITS[split]
        self.spec = replace(default, size=size or default.size, questions=questions or default.questions)
        self._max_digits, self._extra, self._images = max_digits, tuple(extra), images
        self._made: dict[int, Record] = {}

    def __len__(self) -> int:
        return self.spec.size

    def _id(self, index: int) -> str:
        return f"digits-{self.seed}-{self.split}-{index}"

    def column(self, name: str) -> np.ndarray:
        """``id``, ``source`` or ``length`` of all records; see `efficientllava.data.records.column`."""
        same = {"source": SOURCE, "length": 1}  # there are images
        values = [self._id(index) if name == "id" else same[name] for index in range(len(self))]
        return np.array(values, dtype=object)

    def image_files(self, indices: np.ndarray) -> list[list[Path]]:
        """The files of records' images: none."""
        return [[] for _ in indices]

    def _kind(self, index: int) -> str:
        """The kind of a single-question record: cycles in which every kind has its share, each in its own order."""
        cycle, place = divmod(index, len(_CYCLE))
        rng = Generator(PCG64(SeedSequence([self.seed, self.spec.code, cycle, 1])))
        return _CYCLE[int(rng.permutation(len(_CYCLE))[place])]

    def _compose(self, index: int) -> tuple[Scene, list[str], Generator]:
        rng = Generator(PCG64(SeedSequence([self.seed, self.spec.code, index])))
        scene = compose(rng, self.spec.strokes, self._max_digits)
        if self.spec.questions > 1:
            return scene, _kinds_of(rng, scene, self.spec.questions, self._extra), rng
        kind = self._kind(index)
        while kind == "comparison" and len(scene) < 2:
            scene = compose(rng, self.spec.strokes, self._max_digits)
        return scene, [kind], rng

    def scene(self, index: int) -> Scene:
        """What the image of a record shows."""
        return self._compose(index)[0]

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        index = range(len(self))[index]
        if index in self._made:
            return self._made[index]
        scene, kinds, rng = self._compose(index)
        images = strokes(self.spec.strokes).images if self._images is None else self._images
        image = draw(rng, scene, images) if any(kind in IMAGE_KINDS for kind in kinds) else None
        turns = tuple(ask(rng, scene, kind) for kind in kinds)
        record = Record(self._id(index), image, turns, True, SOURCE)
        if self.spec.size <= KEEP_LIMIT:
            self._made[index] = record
        return record
