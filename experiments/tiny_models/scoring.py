"""Accuracy of a model on questions with short answers, without generating them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from efficientllava.data.collator import Collator
from efficientllava.data.records import Record
from efficientllava.models.forward import forward_hidden, supervised_positions

Scores = dict[str, dict[str, float]]
CHUNK = 32  # records per forward pass


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
