"""Records to tensors: labels on answers, the questions of an image packed into one row, prompts for generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .conversations import Record, Turn, open_image
from .prompts import IGNORE, Prompts


@dataclass
class _Row:
    record: str
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], labels: Sequence[int], position: int, segment: int) -> None:
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.positions.extend(range(position, position + len(ids)))
        self.segments.extend([segment] * len(ids))


def _stack(rows: Sequence[list[int]], fill: int, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fills, strict=True)])


def _tokens(prompts: Prompts, rows: Sequence[list[int]], left: bool = False) -> dict[str, Any]:
    # Padding is told from text by the attention mask, never by its id, which may be the end token's.
    ids = _stack(rows, prompts.tokenizer.pad_token_id or 0, left)
    return {"input_ids": ids, "attention_mask": _stack([[1] * len(row) for row in rows], 0, left)}


def _images(prompts: Prompts, shown: Sequence[tuple[str, Image.Image]]) -> dict[str, Any]:
    if not shown:
        return {}
    names, images = zip(*shown, strict=True)
    inputs, tiles = prompts.pixels(images)
    return {**inputs, "image_ids": list(names), "image_tiles": tiles}


def prompt(processor: Any, question: str, image: Image.Image | None = None) -> dict[str, Tensor]:
    """What ``model.generate`` needs to answer one question.

    Args:
        processor: The model's processor.
        question: Plain text, without any image placeholder.
        image: An image, or None for a text-only question.

    Returns:
        ``input_ids``, ``attention_mask`` and, with an image, ``pixel_values`` and what the model's processor says
        beside them (``image_sizes``, ``image_grid_thw``, ``pixel_attention_mask``); a batch of one.
    """
    batch = GenerationCollator(processor)([Record("prompt", image, (Turn(question, ""),), True, "prompt")])
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


class Collator:
    """Right-padded training batches.

    Args:
        processor: The model's processor.
        max_length: Longest prompt with its answer, in tokens, image tokens included; None for the tokenizer's limit.
            A conversation is cut after the last turn that fits; image tokens are never cut.
        pack: Put the independent questions of a record into one row, each seeing the image and itself only. A packed
            row may be longer than ``max_length``, each of its questions may not.
    """

    def __init__(self, processor: Any, max_length: int | None = None, pack: bool = True) -> None:
        self.prompts = Prompts(processor)
        self.max_length = max_length or int(self.prompts.tokenizer.model_max_length)
        # Where images have positions or masks of their own, a packed row would need them per question.
        self.pack = pack and not processor.return_mm_token_type_ids

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Collate records.

        Args:
            records: One or more.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` ``(rows, seq)``; ``position_ids`` and ``segment_ids`` where a
            row holds several questions (0: the shared prefix, above: a question that sees it, below: a text-only
            question); ``pixel_values``, ``image_ids``, ``image_tiles`` where a row has an image; ``ids``.

        Raises:
            UserError: If an image cannot be read, or a prompt with its first answer is longer than ``max_length``.
        """
        rows: list[_Row] = []
        shown: list[tuple[str, Image.Image]] = []
        for record in records:
            image = open_image(record)
            for row, seen in self._rows(record, image):
                rows.append(row)
                if seen is not None:
                    shown.append((record.id, seen))
        batch = _tokens(self.prompts, [row.ids for row in rows])
        batch |= {"labels": _stack([row.labels for row in rows], IGNORE), "ids": [row.record for row in rows]}
        if any(len(set(row.segments)) > 1 for row in rows):
            batch["position_ids"] = _stack([row.positions for row in rows], 0)
            batch["segment_ids"] = _stack([row.segments for row in rows], 0)
        return batch | _images(self.prompts, shown)

    def check(self, record: Record) -> None:
        """Open a record's image and measure its prompts.

        Args:
            record: Any record.

        Raises:
            UserError: As for `__call__`.
        """
        list(self._rows(record, open_image(record)))

    def _rows(self, record: Record, image: Image.Image | None) -> Iterator[tuple[_Row, Image.Image | None]]:
        """The rows of a record, each with the image that it shows."""
        if not record.turns:
            raise UserError(f"record {record.id!r}: no question; drop the record")
        if not record.independent:
            yield self._conversation(record, record.turns, image), image
        elif self.pack and len(record.turns) > 1:
            yield self._packed(record, image), image if any(turn.sees_image for turn in record.turns) else None
        else:
            for turn in record.turns:
                seen = image if turn.sees_image else None
                yield self._conversation(record, (turn,), seen), seen

    def _encoded(
        self, record: Record, turns: Sequence[Turn], image: Image.Image | None
    ) -> tuple[list[int], list[int], int]:
        """Ids and labels of the turns that fit, with the image's tokens in place, and the position after the image."""
        encoded = self.prompts.encode(turns, image is not None)
        ids, labels, ends, at = list(encoded.ids), list(encoded.labels), encoded.ends, encoded.image_at
        if image is not None:
            tokens = self.prompts.expansion(image)
            ids[at : at + 1] = tokens
            labels[at : at + 1] = [IGNORE] * len(tokens)
            ends = [end + len(tokens) - 1 for end in ends]
            at += len(tokens)
        if ends[0] > self.max_length:
            raise UserError(
                f"record {record.id!r}: prompt and answer take {ends[0]} tokens, the context holds {self.max_length}; "
                "shorten or drop the record, or raise data.max_length"
            )
        if len(ids) > self.max_length:
            cut = max(end for end in ends if end <= self.max_length)
            ids, labels = ids[:cut], labels[:cut]
        return ids, labels, at

    def _conversation(self, record: Record, turns: Sequence[Turn], image: Image.Image | None) -> _Row:
        row = _Row(record.id)
        ids, labels, _ = self._encoded(record, turns, image)
        row.add(ids, labels, 0, 1)
        return row

    def _packed(self, record: Record, image: Image.Image | None) -> _Row:
        row = _Row(record.id)
        seeing = [turn for turn in record.turns if turn.sees_image and image is not None]
        for number, turn in enumerate(seeing, 1):
            ids, labels, prefix = self._encoded(record, (turn,), image)
            if number == 1:
                row.add(ids[:prefix], labels[:prefix], 0, 0)
            row.add(ids[prefix:], labels[prefix:], prefix, number)
        for number, turn in enumerate((turn for turn in record.turns if turn not in seeing), 1):
            ids, labels, _ = self._encoded(record, (turn,), None)
            row.add(ids, labels, 0, -number)
        return row


class GenerationCollator:
    """Left-padded prompts for ``generate``: one row per question.

    Args:
        processor: The model's processor.
    """

    def __init__(self, processor: Any) -> None:
        self.prompts = Prompts(processor)

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Collate questions.

        Args:
            records: Their turns are asked one by one; in a conversation the reference answers before a question are
                part of its prompt.

        Returns:
            ``input_ids``, ``attention_mask`` ``(questions, seq)``; ``pixel_values``, ``image_ids``, ``image_tiles``
            where a question has an image; per question ``ids`` (of records), ``kinds`` and ``answers``.
        """
        rows: list[list[int]] = []
        shown: list[tuple[str, Image.Image]] = []
        asked: list[tuple[Record, Turn]] = []
        for record in records:
            image = open_image(record)
            for index, turn in enumerate(record.turns):
                seen = None if record.independent and not turn.sees_image else image
                history = (turn,) if record.independent else record.turns[: index + 1]
                rows.append(self._ids(history, seen))
                asked.append((record, turn))
                if seen is not None:
                    shown.append((record.id, seen))
        batch = _tokens(self.prompts, rows, left=True) | _images(self.prompts, shown)
        batch["ids"] = [record.id for record, _ in asked]
        batch |= {"kinds": [turn.kind for _, turn in asked], "answers": [turn.answer for _, turn in asked]}
        return batch

    def _ids(self, turns: Sequence[Turn], image: Image.Image | None) -> list[int]:
        ids, _ = self.prompts.tokenize(self.prompts.render(turns, image is not None, True))
        at = self.prompts.placeholder(ids, image is not None)
        if image is not None:
            ids[at : at + 1] = self.prompts.expansion(image)
        return ids
