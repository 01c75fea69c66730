"""Records to tensors: labels on answers, the questions of an image packed into one row, prompts for generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..runtime.errors import UserError
from .prompts import IGNORE, Prompts, images_of
from .records import (
    Record,
    Turn,
    image_key,
    open_images,
)


@dataclass
class _Row:
    """Tokens of a row, and the images that it shows: the first ones of its record."""

    record: Record
    images: list[Image.Image]
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
    return pad_sequence([torch.tensor(row) for row in rows], True, fill, "left" if left else "right")


def _batch(prompts: Prompts, rows: Sequence[_Row], left: bool = False) -> dict[str, Any]:
    """Tokens and images of rows."""
    # Padding is told from text by the attention mask, never by its id, which may be the end token's.
    ids = _stack([row.ids for row in rows], prompts.tokenizer.pad_token_id or 0, left)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": _stack([[1] * len(row.ids) for row in rows], 0, left)}
    shown = [(row.record.images, place, image) for row in rows for place, image in enumerate(row.images)]
    if not shown:
        return batch
    inputs, tiles = prompts.pixels([image for *_, image in shown], [len(images) for images, *_ in shown])
    # Images that share a record may be cut into fewer tiles than alone.
    names = [image_key(images[place]) + (f"/{len(images)}" if images[1:] else "") for images, place, _ in shown]
    return {**batch, **inputs, "image_ids": names, "image_tiles": tiles}


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


def _tells_images(processor: Any) -> bool:
    """Whether a processor says which tokens stand for an image; an attribute of its own since transformers 5.23."""
    kwargs = processor.valid_processor_kwargs._defaults.get("text_kwargs", {})
    return getattr(processor, "return_mm_token_type_ids", kwargs.get("return_mm_token_type_ids", False))


class Collator:
    """Right-padded training batches.

    Args:
        processor: The model's processor.
        max_length: Longest row of a conversation, in tokens, image tokens included; None for the tokenizer's limit. A
            conversation is cut after the last turn that fits, a first answer that does not fit is cut itself (as in
            LLaVA); image tokens are never cut.
        pack: Put the independent questions of a record into one row, each seeing the image and itself only. A packed
            row may be longer than ``max_length``, each of its questions may not.
    """

    def __init__(self, processor: Any, max_length: int | None = None, pack: bool = True) -> None:
        self.prompts = Prompts(processor)
        self.max_length = max_length or int(self.prompts.tokenizer.model_max_length)
        # Where images have positions or masks of their own, a packed row would need them per question.
        self.pack = pack and not _tells_images(processor)

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """Collate records.

        Args:
            records: One or more.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` ``(rows, seq)``; ``position_ids`` and ``segment_ids`` where a
            row holds several questions (0: the shared prefix, above: a question that sees it, below: a text-only
            question); ``pixel_values``, ``image_ids``, ``image_tiles`` where a row has an image; ``ids``.

        Raises:
            UserError: If an image cannot be read, or the tokens of a record's images do not fit into ``max_length``.
        """
        rows = [row for record in records for row in self._rows(record)]
        batch = _batch(self.prompts, rows)
        batch |= {"labels": _stack([row.labels for row in rows], IGNORE), "ids": [row.record.id for row in rows]}
        if any(len(set(row.segments)) > 1 for row in rows):
            batch["position_ids"] = _stack([row.positions for row in rows], 0)
            batch["segment_ids"] = _stack([row.segments for row in rows], 0)
        return batch

    def check(self, record: Record) -> list[int]:
        """Open a record's images and measure its prompts.

        Args:
            record: Any record.

        Returns:
            Tokens of its rows.

        Raises:
            UserError: As for `__call__`, or if a first question leaves no room for its answer.
        """
        rows = list(self._rows(record))
        for row in rows:
            if all(label == IGNORE for label in row.labels):
                raise UserError(
                    f"record {record.id!r}: its prompt leaves no room for the answer, the context holds "
                    f"{self.max_length} tokens; shorten or drop the record, or raise data.max_length"
                )
        return [len(row.ids) for row in rows]

    def _rows(self, record: Record) -> Iterator[_Row]:
        images = open_images(record)
        if not record.turns:
            raise UserError(f"record {record.id!r}: no question; drop the record")
        if not record.independent:
            yield self._conversation(record, record.turns, images)
        elif self.pack and len(record.turns) > 1:
            yield self._packed(record, images)
        else:
            for turn in record.turns:
                yield self._conversation(record, (turn,), images if turn.sees_image else [])

    def _encoded(
        self, record: Record, turns: Sequence[Turn], images: list[Image.Image]
    ) -> tuple[list[int], list[int], int, int]:
        """Ids and labels of the turns that fit, the position after the last image, and the number of images shown."""
        (ids, labels, ends, images_at), after = map(list, self.prompts.encode(turns, len(images))), 0
        # From the last to the first, so that the earlier positions stay true.
        for at, image in zip(reversed(images_at), reversed(images), strict=True):
            tokens = self.prompts.expansion(image, len(images), record.id)
            ids[at : at + 1] = tokens
            labels[at : at + 1] = [IGNORE] * len(tokens)
            ends = [end + len(tokens) - 1 if end > at else end for end in ends]
            after = after + len(tokens) - 1 if after else at + len(tokens)
        if len(ids) <= self.max_length:
            return ids, labels, after, len(images)
        fitting = sum(end <= self.max_length for end in ends)
        shown = images_of(turns[: fitting or 1], turns, len(images))
        cut = ends[fitting - 1] if fitting else self.max_length
        if not fitting and self.prompts.image_token_id in ids[cut : ends[0]]:
            raise UserError(
                f"record {record.id!r}: its {shown} image(s) and prompt take more tokens than the context holds, "
                f"{self.max_length}; image tokens are never cut: drop the record, or raise data.max_length"
            )
        return ids[:cut], labels[:cut], min(after, cut), shown

    def _conversation(self, record: Record, turns: Sequence[Turn], images: list[Image.Image]) -> _Row:
        ids, labels, _, shown = self._encoded(record, turns, images)
        row = _Row(record, images[:shown])
        row.add(ids, labels, 0, 1)
        return row

    def _packed(self, record: Record, images: list[Image.Image]) -> _Row:
        row = _Row(record, images if any(turn.sees_image for turn in record.turns) else [])
        seeing = [turn for turn in record.turns if turn.sees_image and images]
        for number, turn in enumerate(seeing, 1):
            ids, labels, prefix, _ = self._encoded(record, (turn,), images)
            if number == 1:
                row.add(ids[:prefix], labels[:prefix], 0, 0)
            row.add(ids[prefix:], labels[prefix:], prefix, number)
        for number, turn in enumerate((turn for turn in record.turns if turn not in seeing), 1):
            ids, labels, _, _ = self._encoded(record, (turn,), [])
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
        rows: list[_Row] = []
        asked: list[Turn] = []
        for record in records:
            images = open_images(record)
            turns = self.prompts.arranged(record.turns, len(images))
            for index, turn in enumerate(turns):
                history = (turn,) if record.independent else turns[: index + 1]
                seen = images if turn.sees_image or not record.independent else []
                seen = seen if record.independent else seen[: images_of(history, turns, len(images))]
                rows.append(_Row(record, seen, self._ids(record, history, seen, len(images))))
                asked.append(turn)
        facts = {"kinds": [turn.kind for turn in asked], "answers": [turn.answer for turn in asked]}
        return {**_batch(self.prompts, rows, left=True), "ids": [row.record.id for row in rows], **facts}

    def _ids(self, record: Record, turns: Sequence[Turn], images: list[Image.Image], share: int) -> list[int]:
        ids, _ = self.prompts.tokenize(self.prompts.render(turns, len(images), True))
        for at, image in zip(reversed(self.prompts.placeholders(ids, len(images))), reversed(images), strict=True):
            ids[at : at + 1] = self.prompts.expansion(image, share, record.id)
        return ids
