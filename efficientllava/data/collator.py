"""Records to tensors: labels on answers, the questions of an image packed into one row, prompts for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .conversations import Record, Turn, open_image
from .prompts import IGNORE, Encoded, Prompts


@dataclass
class _Row:
    ids: list[int]
    labels: list[int]
    positions: list[int]
    segments: list[int]
    record: str
    sees_image: bool


def prompt(processor: Any, question: str, image: Image.Image | None = None) -> dict[str, Tensor]:
    """What ``model.generate`` needs to answer one question.

    Args:
        processor: The model's processor.
        question: Plain text, without any image placeholder.
        image: An image, or None for a text-only question.

    Returns:
        ``input_ids``, ``attention_mask`` and, with an image, ``pixel_values``; a batch of one.
    """
    batch = GenerationCollator(processor)([Record("prompt", image, (Turn(question, ""),), True, "prompt")])
    return {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}


class Collator:
    """Right-padded training batches.

    Args:
        processor: The model's processor.
        max_length: Longest prompt with its answer, in tokens, image tokens included; None for the tokenizer's limit.
            A conversation is cut after the last turn that fits; image tokens are never cut.
        pack: Put the independent questions of a record into one row, each seeing the image and itself only. A packed
            row may be longer than ``max_length``, each of its questions may not.
        system: Text of a system turn; None for none.
    """

    def __init__(
        self, processor: Any, max_length: int | None = None, pack: bool = True, system: str | None = None
    ) -> None:
        self.prompts = Prompts(processor, system)
        self.max_length = max_length or int(self.prompts.tokenizer.model_max_length)
        self.pack = pack

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
        images: list[Image.Image] = []
        names: list[str] = []
        for record in records:
            image = open_image(record)
            for row in self._rows(record, image):
                rows.append(row)
                if row.sees_image and image is not None:
                    images.append(image)
                    names.append(record.id)
        batch = self._padded(rows)
        if images:
            batch["pixel_values"], batch["image_tiles"] = self.prompts.pixels(images)
            batch["image_ids"] = names
        return batch

    def check(self, record: Record) -> None:
        """Open a record's image and measure its prompts.

        Args:
            record: Any record.

        Raises:
            UserError: As for `__call__`.
        """
        self._rows(record, open_image(record))

    def _padded(self, rows: Sequence[_Row]) -> dict[str, Any]:
        def stack(lists: list[list[int]], fill: int) -> Tensor:
            width = max(len(values) for values in lists)
            return torch.tensor([values + [fill] * (width - len(values)) for values in lists])

        # Padding is told from text by the attention mask, never by its id, which may be the end token's.
        pad = self.prompts.tokenizer.pad_token_id or 0
        batch: dict[str, Any] = {
            "input_ids": stack([row.ids for row in rows], pad),
            "attention_mask": stack([[1] * len(row.ids) for row in rows], 0),
            "labels": stack([row.labels for row in rows], IGNORE),
            "ids": [row.record for row in rows],
        }
        if any(len(set(row.segments)) > 1 for row in rows):
            batch["position_ids"] = stack([row.positions for row in rows], 0)
            batch["segment_ids"] = stack([row.segments for row in rows], 0)
        return batch

    def _rows(self, record: Record, image: Image.Image | None) -> list[_Row]:
        if not record.turns:
            raise UserError(f"record {record.id!r}: no question; drop the record")
        if not record.independent:
            return [self._conversation(record, record.turns, image)]
        if len(record.turns) == 1 or not self.pack:
            return [self._conversation(record, (turn,), image if turn.sees_image else None) for turn in record.turns]
        return [self._packed(record, image)]

    def _expanded(self, encoded: Encoded, image: Image.Image | None) -> tuple[list[int], list[int], int]:
        """Ids and labels with the image's tokens in place, and how many tokens that added."""
        ids, labels = list(encoded.ids), list(encoded.labels)
        if image is None:
            return ids, labels, 0
        tokens, at = self.prompts.expansion(image), encoded.image_at
        ids[at : at + 1] = tokens
        labels[at : at + 1] = [IGNORE] * len(tokens)
        return ids, labels, len(tokens) - 1

    def _check(self, record: Record, length: int) -> None:
        if length > self.max_length:
            raise UserError(
                f"record {record.id!r}: prompt and answer take {length} tokens, the context holds {self.max_length}; "
                "shorten or drop the record, or raise data.max_length"
            )

    def _conversation(self, record: Record, turns: Sequence[Turn], image: Image.Image | None) -> _Row:
        encoded = self.prompts.encode(turns, image is not None)
        ids, labels, added = self._expanded(encoded, image)
        ends = [end + added for end in encoded.ends]
        self._check(record, ends[0])
        if len(ids) > self.max_length:
            cut = max(end for end in ends if end <= self.max_length)
            ids, labels = ids[:cut], labels[:cut]
        return _Row(ids, labels, list(range(len(ids))), [1] * len(ids), record.id, image is not None)

    def _packed(self, record: Record, image: Image.Image | None) -> _Row:
        row = _Row([], [], [], [], record.id, False)
        seen = [turn for turn in record.turns if turn.sees_image and image is not None]
        prefix = 0
        for number, turn in enumerate(seen, 1):
            encoded = self.prompts.encode((turn,), True)
            ids, labels, added = self._expanded(encoded, image)
            self._check(record, len(ids))
            if number == 1:
                prefix = encoded.image_at + added + 1
                row.sees_image = True
                self._append(row, ids[:prefix], labels[:prefix], 0, 0)
            self._append(row, ids[prefix:], labels[prefix:], prefix, number)
        for number, turn in enumerate((turn for turn in record.turns if turn not in seen), 1):
            encoded = self.prompts.encode((turn,), False)
            self._check(record, len(encoded.ids))
            self._append(row, encoded.ids, encoded.labels, 0, -number)
        return row

    @staticmethod
    def _append(row: _Row, ids: Sequence[int], labels: Sequence[int], position: int, segment: int) -> None:
        row.ids.extend(ids)
        row.labels.extend(labels)
        row.positions.extend(range(position, position + len(ids)))
        row.segments.extend([segment] * len(ids))


class GenerationCollator:
    """Left-padded prompts for ``generate``: one row per question.

    Args:
        processor: The model's processor.
        system: Text of a system turn; None for none.
    """

    def __init__(self, processor: Any, system: str | None = None) -> None:
        self.prompts = Prompts(processor, system)

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
        images: list[Image.Image] = []
        batch: dict[str, Any] = {"ids": [], "kinds": [], "answers": []}
        names: list[str] = []
        for record in records:
            image = open_image(record)
            for index, turn in enumerate(record.turns):
                shown = None if record.independent and not turn.sees_image else image
                history = (turn,) if record.independent else record.turns[: index + 1]
                rows.append(self._ids(history, shown))
                batch["ids"].append(record.id)
                batch["kinds"].append(turn.kind)
                batch["answers"].append(turn.answer)
                if shown is not None:
                    images.append(shown)
                    names.append(record.id)
        width, pad = max(len(row) for row in rows), self.prompts.tokenizer.pad_token_id or 0
        batch["input_ids"] = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        batch["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        if images:
            batch["pixel_values"], batch["image_tiles"] = self.prompts.pixels(images)
            batch["image_ids"] = names
        return batch

    def _ids(self, turns: Sequence[Turn], image: Image.Image | None) -> list[int]:
        ids, _ = self.prompts.tokenize(self.prompts.render(turns, image is not None, True))
        at = self.prompts.placeholder(ids, image is not None)
        if image is not None:
            ids[at : at + 1] = self.prompts.expansion(image)
        return ids
