"""The prompts of a processor: its own chat template, its tokens, and which of them a model learns to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.internvl.processing_internvl import InternVLProcessor

from ..models.chat import template_of
from ..runtime.errors import UserError, one_line
from .records import Turn

IGNORE = -100
# Short prompts come again and again in the embedded data; long conversations do not, and would fill the memory.
CACHE_LIMIT, CACHE_TOKENS = 20_000, 64

Encoded = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # see `Prompts.encode`


class Prompts:
    """The chat template, tokenizer and image placeholder of a processor.

    Args:
        processor: A stock multimodal processor with a chat template, or one of `efficientllava.checkpoint.processors`.

    Raises:
        UserError: If the processor has no chat template, or it cannot be rendered.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self.template = template_of(processor)
        if not self.template:
            raise UserError(f"processor {type(processor).__name__}: no chat template; save one as chat_template.jinja")
        # Gemma3's alone writes line breaks around an image.
        sequence: str = getattr(processor, "full_image_sequence", "")
        core = sequence.strip()
        self._gaps = tuple(sequence.split(core)) if core else ("", "")
        # Chat markers such as Phi-3's <|end|> are added tokens without a name of their own.
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._specials = frozenset([*self.tokenizer.all_special_tokens, *added])
        # As in LLaVA and Bunny (``preprocess_multimodal``); InternVL leaves an image where its tag is.
        self._leads = not isinstance(processor, InternVLProcessor)
        self._encoded: dict[tuple[Any, ...], Encoded] = {}
        self._expansions: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._distinct: dict[tuple[int, ...], tuple[int, ...]] = {}  # many sizes have the same tokens
        self.render([Turn("?", "")], 1, True)  # so that a faulty template is found at once

    def render(self, turns: Sequence[Turn], images: int, open_question: bool) -> str:
        """Text of a conversation by the chat template.

        Args:
            turns: Questions and answers, oldest first.
            images: Number of images; those that no turn places stand before the first question.
            open_question: Leave out the last answer and end with the template's generation prompt.

        Returns:
            The text, with one placeholder per image.
        """
        messages: list[dict[str, Any]] = []
        leading = images - sum(len(turn.images_at) for turn in turns)
        for index, turn in enumerate(turns):
            content = _content(turn, 0 if index else leading)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        try:
            text = self.tokenizer.apply_chat_template(
                messages[:-1] if open_question else messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_question,
            )
        except Exception as error:  # those of Jinja, and whatever its expressions raise
            raise UserError(
                f"chat template: cannot be rendered ({one_line(error)}); mend chat_template.jinja"
            ) from error
        return text.replace(self.image_token, self.image_token.join(self._gaps))

    def arranged(self, turns: Sequence[Turn], images: int) -> Sequence[Turn]:
        """The turns of a whole conversation, with a single image where the model's own training data have it.

        Args:
            turns: All turns.
            images: Number of images.
        """
        return turns if images != 1 else [self._alone(turn) if turn.images_at else turn for turn in turns]

    def _alone(self, turn: Turn) -> Turn:
        if self._leads:
            return replace(turn, question=turn.question.strip(), images_at=(0,))
        at = turn.images_at[0]  # behind which the chat template breaks the line
        return replace(turn, question=turn.question[:at] + turn.question[at:].removeprefix("\n"))

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

    def text(self, turns: Sequence[Turn], images: int) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation and the character spans of answers with their closing tokens."""
        text, spans, before = "", [], ""
        for index, turn in enumerate(turns):
            upto = turns[: index + 1]
            shown = images_of(upto, turns, images)
            asked, closed = self.render(upto, shown, True), self.render(upto, shown, False)
            if not closed.startswith(before):
                raise UserError("chat template: it rewrites earlier turns; give a template that only appends")
            # Some templates open an answer with more than stands before a given one, such as a blank.
            answer = turn.answer.strip()
            differ = (at for at, (a, b) in enumerate(zip(asked, closed, strict=False)) if a != b)
            start = closed.find(answer, len(asked) if closed.startswith(asked) else next(differ, len(closed)))
            if start < 0:
                raise UserError(
                    f"chat template: it changes the answer {answer[:40]!r}; give one that writes it as it is"
                )
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
        found = [(at, at + len(mark)) for mark in self._specials if (at := tail.find(mark)) >= 0]
        return min(found)[1] if found else None

    def encode(self, turns: Sequence[Turn], images: int) -> Encoded:
        """Tokens and labels of a conversation.

        Args:
            turns: Questions and answers, oldest first.
            images: Number of images.

        Returns:
            Token ids, with one placeholder where each image goes; labels: the ids of answers and of the token that
            closes them, ``IGNORE`` elsewhere; the position after each answer's closing token; the positions of the
            image placeholders.
        """
        key = (images, *((turn.question, turn.answer, turn.images_at) for turn in turns))
        if (known := self._encoded.get(key)) is not None:
            return known
        text, spans = self.text(self.arranged(turns, images), images)
        ids, offsets = self.tokenize(text)
        labels, ends = [IGNORE] * len(ids), []
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
            for i in inside:
                labels[i] = ids[i]
            ends.append(inside[-1] + 1)
        result = (tuple(ids), tuple(labels), tuple(ends), self.placeholders(ids, images))
        if len(ids) <= CACHE_TOKENS and len(self._encoded) < CACHE_LIMIT:
            self._encoded[key] = result
        return result

    def placeholders(self, ids: Sequence[int], images: int) -> tuple[int, ...]:
        """Positions of the image placeholders among token ids.

        Raises:
            UserError: If there are more or fewer than images.
        """
        found = tuple(position for position, token in enumerate(ids) if token == self.image_token_id)
        if len(found) != images:
            raise UserError(
                f"a prompt holds the image placeholder {self.image_token!r} {len(found)} times, expected {images}; "
                "remove it from the questions and answers, the chat template writes it"
            )
        return found

    def expansion(self, image: Image.Image, share: int, record: str) -> tuple[int, ...]:
        """Token ids that stand for the placeholder of an image of this size.

        Args:
            image: The image.
            share: Number of images of its record, which share the tiles that a single one may have.
            record: Id of the record, for messages.

        Raises:
            UserError: If the processor refuses an image of this shape.
        """
        key = (*image.size, share)
        if key not in self._expansions:
            try:
                out = self.processor(
                    images=[image], text=[self.image_token], add_special_tokens=False, **self._tiles(share)
                )
            except ValueError as error:  # Qwen's, of an image that is more than 200 times as long as wide
                raise UserError(
                    f"record {record!r}: the model's processor refuses its image of {image.width} x {image.height} "
                    f"pixels ({error}); crop it or drop the record"
                ) from error
            ids = [int(token) for token in out["input_ids"][0]]
            # The line breaks around an image are part of the text, whose tokens they may join.
            before, after = (len(self.tokenizer(gap, add_special_tokens=False)["input_ids"]) for gap in self._gaps)
            tokens = tuple(ids[before : len(ids) - after])
            self._expansions[key] = self._distinct.setdefault(tokens, tokens)
        return self._expansions[key]

    def pixels(
        self, images: Sequence[Image.Image], shares: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Image inputs of the model, and the rows of ``pixel_values`` (tiles, or patches) that each image takes.

        Args:
            images: The images.
            shares: Of each, as for `expansion`; None: 1.
        """
        limits = [self._tiles(share) for share in shares or [1] * len(images)]
        made: list[tuple[dict[str, Tensor], list[int]]] = []
        # Neighbours with the same limit are prepared together: mostly all of a batch.
        for limit, pairs in groupby(zip(images, limits, strict=True), lambda pair: pair[1]):
            made.append(self._pixels([image for image, _ in pairs], limit))
        inputs = {key: torch.cat([part[key] for part, _ in made]) for key in made[0][0]} if made[1:] else made[0][0]
        return inputs, [count for _, rows in made for count in rows]

    def _pixels(self, images: Sequence[Image.Image], limit: dict[str, int]) -> tuple[dict[str, Tensor], list[int]]:
        options = {**(getattr(self.processor, "images_kwargs", None) or {}), **limit}
        # One list per image: some processors take the images of a flat list for those of one text.
        out = self.processor.image_processor(images=[[image] for image in images], return_tensors="pt", **options)
        rows = out.get("num_patches", [1] * len(images))
        if "image_grid_thw" in out:
            rows = out["image_grid_thw"].prod(1)
        unused = {"num_patches", *self.processor.unused_input_names}
        return {key: out[key] for key in out if key not in unused}, [int(count) for count in rows]

    def _tiles(self, share: int) -> dict[str, int]:
        # As in InternVL (internvl_chat_finetune.py, multi_modal_multi_image_get_item).
        most = getattr(self.processor.image_processor, "max_patches", None)
        return {"max_patches": max(1, most // share)} if share > 1 and most else {}


def images_of(some: Sequence[Turn], turns: Sequence[Turn], images: int) -> int:
    """How many of a conversation's images its first turns show.

    Args:
        some: The first turns.
        turns: All turns.
        images: Number of images of all turns.
    """
    return images - sum(len(turn.images_at) for turn in turns[len(some) :])


def _content(turn: Turn, leading: int) -> list[dict[str, str]]:
    """The parts of a question: images, text, and images inside the text."""
    parts: list[dict[str, str]] = [{"type": "image"}] * leading
    for start, end in pairwise((0, *turn.images_at, len(turn.question))):
        parts += [{"type": "text", "text": turn.question[start:end]}] if end > start else []
        parts.append({"type": "image"})
    return parts[:-1] or [{"type": "text", "text": ""}]
