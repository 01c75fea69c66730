"""Accuracy of a model on questions with short answers: by teacher forcing while it trains, by generation in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..data.collator import Collator, GenerationCollator
from ..data.conversations import Record
from .forward import forward_hidden, supervised_positions

Scores = dict[str, dict[str, float]]


def _score(kinds: Sequence[str], right: Sequence[bool]) -> Scores:
    scores: Scores = {}
    for kind in ("all", *sorted(set(kinds))):
        hits = [hit for name, hit in zip(kinds, right, strict=True) if kind in ("all", name)]
        scores[kind] = {"accuracy": sum(hits) / len(hits), "n": len(hits)}
    return scores


def _chunks(records: Sequence[Record], size: int) -> Iterator[list[Record]]:
    for start in range(0, len(records), size):
        yield [records[i] for i in range(start, min(start + size, len(records)))]


@torch.no_grad()
def forced_match(model: nn.Module, processor: Any, records: Sequence[Record]) -> Scores:
    """Share of questions whose answer is the most likely continuation, token by token; all and by kind.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    collate = Collator(processor, pack=False)
    right: list[bool] = []
    for chunk in _chunks(records, 32):
        batch = collate(chunk)
        mask, targets = supervised_positions(batch["labels"])
        hits = torch.ones_like(mask)
        hits[mask] = model.lm_head(forward_hidden(model, batch)[mask]).argmax(-1) == targets  # pyright: ignore[reportCallIssue]
        right += hits.all(1).tolist()
    return _score([turn.kind for record in records for turn in record.turns], right)


@torch.no_grad()
def exact_match(model: nn.Module, processor: Any, records: Sequence[Record], batch_size: int = 100) -> Scores:
    """Share of questions whose generated text equals the answer; all and by kind.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.
        batch_size: Records per call of ``generate``.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    collate = GenerationCollator(processor)
    kinds: list[str] = []
    right: list[bool] = []
    for chunk in _chunks(records, batch_size):
        batch = collate(chunk)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # pyright: ignore[reportCallIssue]
        texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [text.strip() == answer for text, answer in zip(texts, batch["answers"], strict=True)]
        kinds += batch["kinds"]
    return _score(kinds, right)
