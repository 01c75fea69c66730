"""What a tiny model is trained on from nothing: fresh scenes, painted with augmented training strokes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.collator import Collator
from ..data.digits import Digits
from ..data.scenes import COLOURS, FULL, WORDS, Scene, strokes
from ..schema import PretrainConfig


def augmented(images: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Digit images after small random rotations, scalings, shears and shifts.

    Args:
        images: ``(count, size, size)``, 0..``FULL``.
        seed: Seed of this version.

    Returns:
        An int64 array of the same shape.
    """
    rng = np.random.default_rng(list(seed))
    count = len(images)
    angle, shear = rng.uniform(-0.22, 0.22, count), rng.uniform(-0.2, 0.2, count)
    scale, shift = rng.uniform(0.9, 1.12, (2, count)), rng.uniform(-0.12, 0.12, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.stack(
        [cos / scale[0], (shear - sin) / scale[0], shift[0], sin / scale[1], cos / scale[1], shift[1]], axis=1
    ).reshape(count, 2, 3)
    source = torch.from_numpy(images / FULL).float().unsqueeze(1)
    grid = nn.functional.affine_grid(torch.from_numpy(affine).float(), list(source.shape), align_corners=False)
    warped = nn.functional.grid_sample(source, grid, align_corners=False).squeeze(1)
    return (warped.clamp(0, 1) * FULL).round().long().numpy()


def scene_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What each quadrant shows: ``digits`` (10: nothing) and ``colours`` (-100: none), ``(scenes, 4)``."""
    digits = torch.full((len(scenes), 4), len(WORDS))
    colours = torch.full((len(scenes), 4), -100)
    for row, scene in enumerate(scenes):
        for glyph in scene:
            digits[row, glyph.place] = glyph.digit
            colours[row, glyph.place] = list(COLOURS).index(glyph.colour)
    return {"digits": digits, "colours": colours}


def quadrants(tokens: int) -> Tensor:
    """Index of the quadrant that each of ``tokens`` image tokens (a square grid, row by row) lies in."""
    side = math.isqrt(tokens)
    half = torch.arange(side) * 2 // side
    return (half[:, None] * 2 + half[None, :]).flatten()


class Scenes(Dataset[Any]):
    """One item per training step: scenes with their pixels in the first stage, a collated batch in the second.

    Args:
        config: The recipe.
        processor: The model's processor.
        start: First step.
    """

    def __init__(self, config: PretrainConfig, processor: Any, start: int) -> None:
        self.config, self.start = config, start
        self.collate = Collator(processor)

    def __len__(self) -> int:
        return self.config.align_steps + self.config.steps - self.start

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        config, step = self.config, index + self.start
        align = step < config.align_steps
        easy = not align and step < config.align_steps + config.easy_steps
        images = augmented(strokes("train").images, (config.seed, step))
        extra = config.extra if step >= config.align_steps + config.extra_from else ()
        data = Digits("pretrain", None, config.seed, 2 if easy else 4, config.questions, extra, images)
        size = config.align_images if align else config.images
        # Blocks of indices that no two steps share, whatever the sizes.
        indices = range(step * 4096, step * 4096 + size)
        records = [data[i] for i in indices]
        if not align:
            return self.collate(records)
        inputs, _ = self.collate.prompts.pixels([record.image for record in records if record.image is not None])  # pyright: ignore[reportArgumentType]
        return {**inputs, **scene_targets([data.scene(i) for i in indices])}
