"""What a tiny model is trained on from nothing, fresh scenes with augmented training strokes, and how it is scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.embedded.scenes import COLOURS, FULL, WORDS, Scene, strokes
from efficientllava.data.records import Record
from efficientllava.models.forward import forward_hidden, supervised_positions

Scores = dict[str, dict[str, float]]
CHUNK = 32  # records per forward pass


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a tiny model from nothing."""

    name: str  # a key of `experiments.tiny_models.tiny.BUILDERS`
    seed: int = 0  # of the weights and of the scenes
    align_steps: int = 2000  # steps of the first stage (tower and projector), 0 or more
    align_images: int = 64  # images per step of the first stage
    steps: int = 6000  # steps of the second stage (projector and decoder)
    images: int = 16  # images per step of the second stage
    questions: int = 12  # questions per image, a fifth of them text-only
    easy_steps: int = 400  # first steps of the second stage, in which an image holds two digits at most
    # Kinds that every image asks in addition to its draw: those that are learnt last, since they need a digit bound to
    # its colour.
    extra: tuple[str, ...] = ("count_by_colour", "existence_by_colour")
    extra_from: int = 3750  # step of the second stage from which it does
    lr: float = 2e-3  # peak learning rate of AdamW (tower, projector, embeddings, norms, biases, head)
    muon_lr: float = 0.03  # peak learning rate of Muon (matrices of the decoder)
    warmup: int = 100  # steps of linear warm-up in each stage; a cosine to zero follows
    save_every: int = 250  # steps between saved training states; a killed run goes on from the last one
    check_every: int = 500  # steps between checks of accuracy on held-out scenes
    threads: int = 1  # CPU threads
    test_questions: int = 2000  # questions of the final score


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


def painted(collate: Collator, data: Digits, indices: Sequence[int]) -> dict[str, Any]:
    """Pixels of scenes, and what they show."""
    images: list[Any] = [data[i].image for i in indices]
    return {**collate.prompts.pixels(images)[0], **scene_targets([data.scene(i) for i in indices])}


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
        return painted(self.collate, data, indices) if align else self.collate([data[i] for i in indices])


@torch.no_grad()
def forced_match(model: nn.Module, processor: Any, records: Sequence[Record]) -> Scores:
    """Share of questions that greedy decoding answers exactly, end token included; all and by kind.

    Greedy decoding writes the reference if and only if each of its tokens is the most likely one after those before it,
    so that one teacher-forced pass tells.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    collate = Collator(processor, pack=False)
    kinds: list[str] = []
    right: list[bool] = []
    for start in range(0, len(records), CHUNK):
        chunk = [records[index] for index in range(start, min(start + CHUNK, len(records)))]
        batch = collate(chunk)
        mask, targets = supervised_positions(batch["labels"])
        hits = torch.ones_like(mask)
        hits[mask] = model.lm_head(forward_hidden(model, batch)[mask]).argmax(-1) == targets  # pyright: ignore[reportCallIssue]
        kinds += [turn.kind for record in chunk for turn in record.turns]
        right += hits.all(1).tolist()
    scores: Scores = {}
    for kind in ("all", *sorted(set(kinds))):
        counted = [hit for name, hit in zip(kinds, right, strict=True) if kind in ("all", name)]
        scores[kind] = {"accuracy": sum(counted) / len(counted), "n": len(counted)}
    return scores
