"""The prompts of a processor: its own chat template, its tokens, and which of them a model learns to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import UserError
from .conversations import Turn

IGNORE = -100
# Short prompts come again and again in the embedded data; long conversations do not, and would fill the memory.
CACHE_LIMIT, CACHE_TOKENS = 20_000, 64


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


def _common(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


class Prompts:
    """The chat template, tokenizer and image placeholder of a processor.

    Args:
        processor: A stock multimodal processor with a chat template, or one of `efficientllava.models.processors`.

    Raises:
        UserError: If the processor has no chat template.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        self.image_token_id: int = processor.image_token_id
        self._template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not self._template:
            raise UserError(f"processor {type(processor).__name__}: no chat template; save one as chat_template.jinja")
        # Gemma3's alone writes line breaks around an image.
        sequence: str = getattr(processor, "full_image_sequence", "")
        core = sequence.strip()
        self._gaps = tuple(sequence.split(core)) if core else ("", "")
        # Chat markers such as Phi-3's <|end|> are added tokens without a name of their own.
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self._specials = frozenset([*self.tokenizer.all_special_tokens, *added])
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
        for index, turn in enumerate(turns):
            content: list[dict[str, str]] = [{"type": "text", "text": turn.question}]
            if with_image and index == 0:
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        text = self.tokenizer.apply_chat_template(
            messages[:-1] if open_question else messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=open_question,
        )
        return text.replace(self.image_token, self.image_token.join(self._gaps))

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
            # Some templates open an answer with more than stands before a given one, such as a blank.
            answer, common = turn.answer.strip(), _common(asked, closed)
            start = closed.find(answer, common)
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
        result = Encoded(tuple(ids), tuple(labels), tuple(ends), self.placeholder(ids, with_image))
        if len(ids) <= CACHE_TOKENS and len(self._encoded) < CACHE_LIMIT:
            self._encoded[key] = result
        return result

    def placeholder(self, ids: Sequence[int], with_image: bool) -> int:
        """Position of the image placeholder among token ids; -1 without an image.

        Raises:
            UserError: If it occurs more or less often than it should.
        """
        count = ids.count(self.image_token_id)
        if count != int(with_image):
            raise UserError(
                f"a prompt holds the image placeholder {self.image_token!r} {count} times, expected {int(with_image)}; "
                "remove it from the questions and answers, the chat template writes it"
            )
        return ids.index(self.image_token_id) if with_image else -1

    def expansion(self, image: Image.Image) -> tuple[int, ...]:
        """Token ids that stand for the placeholder of an image of this size."""
        size = image.size
        if size not in self._expansions:
            out = self.processor(images=[image], text=[self.image_token], add_special_tokens=False)
            ids = [int(token) for token in out["input_ids"][0]]
            # The line breaks around an image are part of the text, whose tokens they may join.
            before, after = (len(self.tokenizer(gap, add_special_tokens=False)["input_ids"]) for gap in self._gaps)
            self._expansions[size] = tuple(ids[before : len(ids) - after])
        return self._expansions[size]

    def pixels(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[int]]:
        """Image inputs of the model, and the rows of ``pixel_values`` (tiles, or patches) that each image takes."""
        options = dict(getattr(self.processor, "images_kwargs", None) or {})
        # One list per image: some processors take the images of a flat list for those of one text.
        out = self.processor.image_processor(images=[[image] for image in images], return_tensors="pt", **options)
        rows = out.get("num_patches", [1] * len(images))
        if "image_grid_thw" in out:
            rows = out["image_grid_thw"].prod(1)
        unused = {"num_patches", *self.processor.unused_input_names}
        return {key: out[key] for key in out if key not in unused}, [int(count) for count in rows]
