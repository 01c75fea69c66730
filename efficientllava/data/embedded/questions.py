"""Question types of the embedded data: each draws one question about a scene, and its answer."""

from __future__ import annotations

from collections.abc import Callable

from numpy.random import Generator

from ..records import Turn
from .scenes import (
    COLOURS,
    PLACES,
    WORDS,
    Scene,
    pick,
)

NOTHING = "nothing"


def _yes(rng: Generator) -> tuple[bool, str]:
    value = bool(rng.integers(2))
    return value, "yes" if value else "no"


def _recognition(rng: Generator, scene: Scene) -> tuple[str, str]:
    empty = sorted(set(range(4)) - {glyph.place for glyph in scene})
    if empty and not rng.integers(8):
        return f"which digit is {PLACES[pick(rng, empty)]}?", NOTHING
    glyph = pick(rng, scene)
    return f"which digit is {PLACES[glyph.place]}?", glyph.word


def _colour_by_place(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = pick(rng, scene)
    return f"which colour is the {PLACES[glyph.place]} digit?", glyph.colour


def _colour_by_digit(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = pick(rng, scene)
    return f"which colour is the {glyph.word}?", glyph.colour


def _count(_rng: Generator, scene: Scene) -> tuple[str, str]:
    return "how many digits are there?", str(len(scene))


def _count_by_colour(rng: Generator, scene: Scene) -> tuple[str, str]:
    present = sorted({glyph.colour for glyph in scene})
    absent = [name for name in COLOURS if name not in present]
    colour = pick(rng, absent) if not rng.integers(4) else pick(rng, present)
    return f"how many {colour} digits are there?", str(sum(glyph.colour == colour for glyph in scene))


def _position(rng: Generator, scene: Scene) -> tuple[str, str]:
    glyph = pick(rng, scene)
    return f"where is the {glyph.word}?", PLACES[glyph.place]


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
