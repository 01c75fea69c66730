"""Records to tensors: prompts from the processor's own chat template, labels on answers, questions packed per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .conversations import Record, Turn, open_image

IGNORE = -100
CACHE_LIMIT = 100_000


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, with one placeholder where the image goes.

    Attributes:
        ids: Token ids.
        labels: The ids of answers and of the token that closes them, ``IGNORE`` elsewhere.
        ends: Position after each answer's closing token.
        image_at: Position of the image placeholder; -1 without an image.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    ends: tuple[int, ...]
    image_at: int


@dataclass
class _Row:
    ids: list[int]
    labels: list[int]
    positions: list[int]
    segments: list[int]
    record: str
    sees_image: bool


class Prompts:
    """The chat template, tokenizer and image placeholder of a processor.

    Args:
        processor: A stock multimodal processor with a chat template, or one of `efficientllava.models.processors`.
        system: Text of a system turn; None for none.

    Raises:
        UserError: If the processor has no chat template.
    """

    def __init__(self, processor: Any, system: str | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.system = system
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self._template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not self._template:
            raise UserError(f"processor {type(processor).__name__}: no chat template; save one as chat_template.jinja")
        self._encoded: dict[tuple[Any, ...], Encoded] = {}
        self._expansions: dict[tuple[int, int], tuple[int, ...]] = {}

    def render(self, turns: Sequence[Turn], with_image: bool, open_question: bool) -> str:
        """Text of a conversation by the chat template.

        Args:
            turns: Questions and answers, oldest first.
            with_image: Whether the first question carries the image.
            open_question: Leave out the last answer and end with the template's generation prompt.

        Returns:
            The text, with one image placeholder if ``with_image``.
        """
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for index, turn in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "text", "text": turn.question}]
            if with_image and index == 0:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return self.tokenizer.apply_chat_template(
            messages[:-1] if open_question else messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=open_question,
        )

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a rendered text and the characters that each one covers."""
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        out = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
        ids, offsets = list(out["input_ids"]), list(out["offset_mapping"])
        # Some tokenizers close the text by themselves; the template is what decides that here.
        while ids and offsets[-1][0] == offsets[-1][1] and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
            offsets.pop()
        return ids, offsets

    def _text(self, turns: Sequence[Turn], with_image: bool) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation and the character spans of answers with their closing tokens."""
        text, spans, before = "", [], ""
        for index, turn in enumerate(turns):
            upto = turns[: index + 1]
            asked, closed = self.render(upto, with_image, True), self.render(upto, with_image, False)
            if not closed.startswith(before):
                raise UserError("chat template: it rewrites earlier turns; give a template that only appends")
            common = next((i for i, (a, b) in enumerate(zip(asked, closed, strict=False)) if a != b), len(asked))
            answer = turn.answer.strip()
            start = closed.index(answer, min(common, len(closed)))
            tail = closed[start + len(answer) :]
            end = self._closing(tail)
            if end is None:
                tail, end = self.tokenizer.eos_token + tail, len(self.tokenizer.eos_token)
            text += closed[len(before) : start]
            spans.append((len(text), len(text) + len(answer) + end))
            text += answer + tail
            before = closed
        return text, spans

    def _closing(self, tail: str) -> int | None:
        """Length of what closes an answer, up to and including the first special token; None if there is none."""
        found = [(at, at + len(mark)) for mark in self.tokenizer.all_special_tokens if (at := tail.find(mark)) >= 0]
        return min(found)[1] if found else None

    def encode(self, turns: Sequence[Turn], with_image: bool) -> Encoded:
        """Tokens and labels of a conversation.

        Args:
            turns: Questions and answers, oldest first.
            with_image: Whether the first question carries the image.

        Returns:
            The tokens; the image is still a single placeholder.
        """
        key = (with_image, *((turn.question, turn.answer) for turn in turns))
        if (known := self._encoded.get(key)) is not None:
            return known
        text, spans = self._text(turns, with_image)
        ids, offsets = self.tokenize(text)
        labels, ends = [IGNORE] * len(ids), []
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
            for i in inside:
                labels[i] = ids[i]
            ends.append(inside[-1] + 1)
        result = Encoded(tuple(ids), tuple(labels), tuple(ends), self._placeholder(ids, with_image))
        if len(self._encoded) < CACHE_LIMIT:
            self._encoded[key] = result
        return result

    def _placeholder(self, ids: Sequence[int], with_image: bool) -> int:
        count = ids.count(self.image_token_id)
        if count != int(with_image):
            raise UserError(
                f"a prompt holds the image placeholder {self.image_token!r} {count} times, expected {int(with_image)}; "
                "remove it from the questions and answers, the chat template writes it"
            )
        return ids.index(self.image_token_id) if with_image else -1

    def expansion(self, image: Image.Image) -> tuple[int, ...]:
        """Token ids that stand for an image of this size in the text."""
        size = image.size
        if size not in self._expansions:
            out = self.processor(images=[image], text=[self.image_token], add_special_tokens=False)
            self._expansions[size] = tuple(int(token) for token in out["input_ids"][0])
        return self._expansions[size]

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor, list[int]]:
        """Pixel values ``(tiles, 3, height, width)`` of images, and the number of tiles of each."""
        options = dict(getattr(self.processor, "images_kwargs", None) or {})
        out = self.processor.image_processor(images=list(images), return_tensors="pt", **options)
        tiles = [int(count) for count in out.get("num_patches", [1] * len(images))]
        return out["pixel_values"], tiles


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
        at = self.prompts._placeholder(ids, image is not None)
        if image is not None:
            ids[at : at + 1] = self.prompts.expansion(image)
        return ids
