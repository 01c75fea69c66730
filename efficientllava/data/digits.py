"""Visual questions over images composed from scikit-learn's handwritten digits: nothing is downloaded or stored.

Every record is made on demand from ``(seed, split, index)`` with integer arithmetic only, so that it is identical on
every machine. The digit images (strokes) are divided before any scene is composed: a stroke of the test part is never
seen in training, calibration or search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from PIL import Image

from ..errors import UserError
from .conversations import Record, Turn

T = TypeVar("T")

IMAGE_SIZE = 32
CELL = 16
GLYPH = 14
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
COLOURS = {
    "red": (235, 60, 60),
    "green": (60, 205, 80),
    "blue": (85, 120, 255),
    "yellow": (235, 215, 60),
    "purple": (195, 85, 225),
    "white": (240, 240, 240),
}
NOTHING = "nothing"
BACKGROUND = 26
NOISE = 12

# Share of the strokes, in percent of each class: test, then minival; the rest is for training and calibration.
TEST_PERCENT, MINIVAL_PERCENT = 15, 8


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


@dataclass(frozen=True)
class Glyph:
    """One digit of a scene: its value, colour name, place (index into ``PLACES``) and stroke number."""

    digit: int
    colour: str
    place: int
    stroke: int

    @property
    def word(self) -> str:
        """The digit as a word."""
        return WORDS[self.digit]


Scene = tuple[Glyph, ...]


@dataclass(frozen=True)
class Strokes:
    """Digit images of one part.

    Attributes:
        images: ``(count, GLYPH, GLYPH)`` int64, 0 (paper) to ``FULL`` (ink).
        digits: Their values, ``(count,)``.
        by_digit: For each value the indices of its images.
    """

    images: np.ndarray
    digits: np.ndarray
    by_digit: tuple[np.ndarray, ...]


FULL = 16 * GLYPH * GLYPH


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Bilinear 8x8 -> GLYPHxGLYPH in integers: the result is in units of 1 / GLYPH**2 of the input."""
    weights = np.zeros((GLYPH, 8), dtype=np.int64)
    for row in range(GLYPH):
        # Centre of the target pixel on the source grid, in units of 1/GLYPH: 8 (row + 1/2) - GLYPH/2.
        position = min(max(8 * row + 4 - GLYPH // 2, 0), 7 * GLYPH)
        low = min(position // GLYPH, 6)
        weights[row, low] = GLYPH - (position - low * GLYPH)
        weights[row, low + 1] = position - low * GLYPH
    return weights @ images @ weights.T


@lru_cache(maxsize=1)
def _parts() -> dict[str, Strokes]:
    from sklearn.datasets import load_digits

    source = load_digits()
    images = _enlarge(source.images.astype(np.int64))
    digits = source.target.astype(np.int64)
    chosen: dict[str, list[np.ndarray]] = {"test": [], "minival": [], "train": []}
    rng = Generator(PCG64(20240))
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(digits == digit))
        test = len(order) * TEST_PERCENT // 100
        minival = test + len(order) * MINIVAL_PERCENT // 100
        for part, index in zip(chosen, (order[:test], order[test:minival], order[minival:]), strict=True):
            chosen[part].append(np.sort(index))
    parts = {}
    for part, groups in chosen.items():
        index = np.concatenate(groups)
        values = digits[index]
        parts[part] = Strokes(images[index], values, tuple(np.flatnonzero(values == digit) for digit in range(10)))
    return parts


def strokes(part: str) -> Strokes:
    """Digit images of a part.

    Args:
        part: ``train``, ``minival`` or ``test``; they share no image.

    Returns:
        The images, enlarged.
    """
    return _parts()[part]


def _pick(rng: Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def compose(rng: Generator, part: str, max_digits: int = 4) -> Scene:
    """Draw one to ``max_digits`` different digits in different places, in at most three colours.

    Args:
        rng: Source of chance.
        part: Part of the digit images.
        max_digits: 1 to 4.

    Returns:
        The scene, in the order of places.
    """
    count = int(rng.integers(1, max_digits + 1))
    places = np.sort(rng.permutation(4)[:count])
    palette = rng.permutation(len(COLOURS))[: int(rng.integers(1, 4))]
    names = tuple(COLOURS)
    by_digit = strokes(part).by_digit
    return tuple(
        Glyph(int(digit), names[int(_pick(rng, palette))], int(place), int(_pick(rng, by_digit[digit])))
        for digit, place in zip(rng.permutation(10)[:count], places, strict=True)
    )


def draw(rng: Generator, scene: Scene, images: np.ndarray) -> Image.Image:
    """Paint a scene: tinted digits with jitter on a dark ground, under noise of standard deviation about 10 of 255.

    Args:
        rng: Source of chance.
        scene: What to paint.
        images: Digit images that ``Glyph.stroke`` refers to, ``(count, GLYPH, GLYPH)`` in 0..``FULL``.

    Returns:
        An RGB image of ``IMAGE_SIZE`` x ``IMAGE_SIZE`` pixels.
    """
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    canvas = np.full(shape, BACKGROUND, dtype=np.int64)
    for glyph in scene:
        down, right = (int(value) for value in rng.integers(0, CELL - GLYPH + 1, 2))
        top, left = glyph.place // 2 * CELL + down, glyph.place % 2 * CELL + right
        tint = np.array(COLOURS[glyph.colour]) - BACKGROUND
        canvas[top : top + GLYPH, left : left + GLYPH] += images[glyph.stroke].astype(np.int64)[:, :, None] * tint // FULL
    # Two uniform integers instead of a normal number: no floating-point function decides a pixel.
    canvas += rng.integers(-NOISE, NOISE + 1, shape) + rng.integers(-NOISE, NOISE + 1, shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _yes(rng: Generator) -> tuple[bool, str]:
    value = bool(rng.integers(2))
    return value, "yes" if value else "no"


def _recognition(rng: Generator, scene: Scene) -> tuple[str, str]:
    empty = sorted(set(range(4)) - {glyph.place for glyph in scene})
    if empty and not rng.integers(8):
        return f"which digit is {PLACES[_pick(rng, empty)]}?", NOTHING
    glyph = _pick(rng, scene)
    return f"which digit is {PLACES[glyph.place]}?", glyph.word


def _colour_by_place(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = _pick(rng, scene)
    return f"which colour is the {PLACES[glyph.place]} digit?", glyph.colour


def _colour_by_digit(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = _pick(rng, scene)
    return f"which colour is the {glyph.word}?", glyph.colour


def _count(_rng: Generator, scene: Scene) -> tuple[str, str]:
    return "how many digits are there?", str(len(scene))


def _count_by_colour(rng: Generator, scene: Scene) -> tuple[str, str]:
    present = sorted({glyph.colour for glyph in scene})
    absent = [name for name in COLOURS if name not in present]
    colour = _pick(rng, absent) if not rng.integers(4) else _pick(rng, present)
    return f"how many {colour} digits are there?", str(sum(glyph.colour == colour for glyph in scene))


def _position(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = _pick(rng, scene)
    return f"where is the {glyph.word}?", PLACES[glyph.place]


def _absent_digit(rng: Generator, scene: Scene) -> str:
    present = {glyph.digit for glyph in scene}
    return WORDS[_pick(rng, [digit for digit in range(10) if digit not in present])]


def _existence(rng: Generator, scene: Scene) -> tuple[str, str]:
    value, answer = _yes(rng)
    return f"is there a {_pick(rng, scene).word if value else _absent_digit(rng, scene)}?", answer


def _existence_by_colour(rng: Generator, scene: Scene) -> tuple[str, str]:
    value, answer = _yes(rng)
    glyph = _pick(rng, scene)
    colour, word = glyph.colour, glyph.word
    others = [name for name in COLOURS if name != colour]
    if not value:
        # Either the digit is there in another colour, preferably one of the scene, or the colour without the digit.
        seen = sorted({other.colour for other in scene} - {colour})
        if rng.integers(2):
            colour = _pick(rng, seen or others)
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


Asker = Callable[[Generator, Scene], tuple[str, str]]

IMAGE_KINDS: dict[str, Asker] = {
    "recognition": _recognition,
    "colour_by_place": _colour_by_place,
    "colour_by_digit": _colour_by_digit,
    "count": _count,
    "count_by_colour": _count_by_colour,
    "position": _position,
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
# One cycle of single-question records: each image kind 12 times, each text kind 10 times (20 % text-only).
_CYCLE = tuple(kind for kind in IMAGE_KINDS for _ in range(12)) + tuple(kind for kind in TEXT_KINDS for _ in range(10))


def vocabulary() -> tuple[str, ...]:
    """Every word that a question or an answer can hold, without punctuation, sorted."""
    words = {*WORDS, *PLACES, *COLOURS, NOTHING, "yes", "no", *(str(number) for number in range(10))}
    words |= set("which digit is the colour how many digits are there where a larger than largest".split())
    words |= set("what plus minus smaller or repeat".split())
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


def _kinds_of(rng: Generator, scene: Scene, count: int) -> list[str]:
    """``count`` kinds for one image, a fifth of them text-only; without repeats as long as there are enough."""
    possible = [kind for kind in IMAGE_KINDS if kind != "comparison" or len(scene) > 1]
    texts = count // 5
    kinds = [possible[int(index)] for index in rng.permutation(len(possible))[: count - texts]]
    kinds += [_pick(rng, possible) for _ in range(count - texts - len(kinds))]
    kinds += [_pick(rng, tuple(TEXT_KINDS)) for _ in range(texts)]
    return [kinds[int(index)] for index in rng.permutation(len(kinds))]


class Digits(Sequence[Record]):
    """A split of the embedded data set; records are made on access and are the same each time.

    Args:
        split: ``train``, ``calibration``, ``minival``, ``test`` or ``pretrain`` (fresh training scenes without end).
        size: Number of records; default: the split's own (4000, 1000, 500, 2000).
        seed: Seed of the scenes. The division of the digit images does not depend on it.
        max_digits: Digits per image, 1 to 4; below 4 only for a training curriculum.
        questions: Questions per image; default: the split's own (10; 1 in ``test``).
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
        images: np.ndarray | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"data split: {split!r} is not one of {', '.join(SPLITS)}")
        if size is not None and size < 1:
            raise UserError(f"size of data split {split!r}: {size} is below 1; give a positive number or leave it out")
        self.split = split
        default = SPLITS[split]
        self.spec = replace(default, size=size or default.size, questions=questions or default.questions)
        self.seed = seed
        self._max_digits = max_digits
        self._images = images

    def __len__(self) -> int:
        return self.spec.size

    def _kind(self, index: int) -> str:
        """The kind of a single-question record: cycles in which every kind has its share, each in its own order."""
        cycle, place = divmod(index, len(_CYCLE))
        rng = Generator(PCG64(SeedSequence([self.seed, self.spec.code, cycle, 1])))
        return _CYCLE[int(rng.permutation(len(_CYCLE))[place])]

    def _compose(self, index: int) -> tuple[Scene, list[str], Generator]:
        rng = Generator(PCG64(SeedSequence([self.seed, self.spec.code, index])))
        scene = compose(rng, self.spec.strokes, self._max_digits)
        if self.spec.questions > 1:
            return scene, _kinds_of(rng, scene, self.spec.questions), rng
        kind = self._kind(index)
        while kind == "comparison" and len(scene) < 2:
            scene = compose(rng, self.spec.strokes, self._max_digits)
        return scene, [kind], rng

    def scene(self, index: int) -> Scene:
        """What the image of a record shows."""
        return self._compose(index)[0]

    def __getitem__(self, index: int) -> Record:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        scene, kinds, rng = self._compose(index)
        images = strokes(self.spec.strokes).images if self._images is None else self._images
        image = draw(rng, scene, images) if any(kind in IMAGE_KINDS for kind in kinds) else None
        turns = tuple(ask(rng, scene, kind) for kind in kinds)
        return Record(f"digits-{self.seed}-{self.split}-{index}", image, turns, True, "digits_vqa")
