"""Visual questions over images composed from scikit-learn's handwritten digits: nothing is downloaded or stored.

Every record is made on demand from ``(seed, split, index)`` with integer arithmetic only, so that it is identical on
every machine. The digit images (strokes) are divided before any scene is composed: a stroke of the test part is never
seen in training, calibration or search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence

from ...runtime.errors import UserError
from ..records import Record
from .questions import (
    IMAGE_KINDS,
    KINDS,
    TEXT_KINDS,
    ask,
)
from .scenes import (
    Scene,
    compose,
    draw,
    pick,
    strokes,
)

__all__ = ["IMAGE_KINDS", "KINDS", "SPLITS", "TEXT_KINDS", "Digits", "Split"]


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
        self.split = split
        default = SPLITS[split]
        self.spec = replace(default, size=size or default.size, questions=questions or default.questions)
        self.seed = seed
        self._max_digits = max_digits
        self._extra = tuple(extra)
        self._images = images
        self._made: dict[int, Record] = {}

    def __len__(self) -> int:
        return self.spec.size

    def record_id(self, index: int) -> str:
        """Id of a record, without making it."""
        return f"digits-{self.seed}-{self.split}-{index}"

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
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index in self._made:
            return self._made[index]
        scene, kinds, rng = self._compose(index)
        images = strokes(self.spec.strokes).images if self._images is None else self._images
        image = draw(rng, scene, images) if any(kind in IMAGE_KINDS for kind in kinds) else None
        turns = tuple(ask(rng, scene, kind) for kind in kinds)
        record = Record(self.record_id(index), image, turns, True, "digits_vqa")
        if self.spec.size <= KEEP_LIMIT:
            self._made[index] = record
        return record
