"""Pictures of handwritten digits: real strokes from scikit-learn, composed with integer arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image

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
BACKGROUND = 26
NOISE = 12

# Share of the strokes, in percent of each class: test, then minival; the rest is for training and calibration.
TEST_PERCENT, MINIVAL_PERCENT = 15, 8


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

    source: Any = load_digits()
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


def pick(rng: Generator, options: Sequence[T] | np.ndarray) -> T:
    """One of the options, each as likely."""
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
        Glyph(int(digit), names[int(pick(rng, palette))], int(place), int(pick(rng, by_digit[digit])))
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
        canvas[top : top + GLYPH, left : left + GLYPH] += (
            images[glyph.stroke].astype(np.int64)[:, :, None] * tint // FULL
        )
    # Two uniform integers instead of a normal number: no floating-point function decides a pixel.
    canvas += rng.integers(-NOISE, NOISE + 1, shape) + rng.integers(-NOISE, NOISE + 1, shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
