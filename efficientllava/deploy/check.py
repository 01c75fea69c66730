"""What the installed runtime computes, against transformers: tokens, probabilities, answers, image features."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from ..data.collator import prompt
from ..data.prompts import Prompts
from ..data.records import Turn
from ..evaluation.generation import unadvised
from ..models.chat import end_tokens
from ..models.forward import stock_inputs
from ..runtime import UserError
from .inputs import MARKER, lead, side
from .runtime import Runtime, cosines, serve

TEXT = (
    "What colour is the smallest of the 12345 digits? It's they're, we'll see:\n\n  two  blanks, a\ttab.\n"
    "def add(a, b): return a + b  # 3.14e-5 %$&@! (x) [y] {z} <b> https://example.org/?q=1 UPPER CamelCase "
    "naïve café Ünïcode 日本語 русский हिन्दी 🙂 — “quoted” … end"
)
POSITIONS = 24  # of the probe text whose next token is compared
ANSWER = 8  # greedy tokens of a question
TOP = 5
# Largest difference of the log-probabilities of the likeliest tokens that is rounding. Of types with fewer bits it is
# told, not bounded.
BOUNDS = {"f32": 0.02, "f16": 0.1, "bf16": 1.0}
IMAGE_TOKENS = 16  # of an image that are read out of the runtime
SAME = 0.999  # cosine of image features that counts as the same

Question = tuple[str, Image.Image | None]


@dataclass(frozen=True)
class Probe:
    """A prompt, and what the model makes of it.

    Args:
        question: What is asked; empty for the beginning of a text.
        text: The prompt's text, in which the placeholder of an image stands; or its token ids.
        image: The image.
        tokens: Length of the prompt, image tokens included.
        logprobs: Of the next token, ``(vocabulary,)``.
        greedy: The answer, with the token that ends it; None where only the next token is compared.
    """

    question: str
    text: str | list[int]
    image: Image.Image | None
    tokens: int
    logprobs: Tensor
    greedy: list[int] | None


def texts(tokenizer: Any) -> list[str]:
    """Probe texts; for a vocabulary of whole words, its words."""
    words = [word for word in sorted(tokenizer.get_vocab()) if word not in tokenizer.added_tokens_encoder]
    if tokenizer.backend_tokenizer.model.__class__.__name__ == "WordLevel":
        plain = [word for word in words if word.strip()]
        return [" ".join(plain), "\n".join(reversed(plain))]
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special][:4]
    return [TEXT, f"a{''.join(specials)}b"]


def noise(width: int, height: int) -> Image.Image:
    """An image of noise, always the same."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def questions(tokenizer: Any, size: int) -> list[Question]:
    """Questions for whoever has none: half of them about an image (noise: of the tower's size, and a wide one).

    Args:
        tokenizer: The checkpoint's.
        size: Side of the tower's images in pixels.
    """
    words = texts(tokenizer)[0].split()[:24]
    asked = [" ".join(words[start : start + 6]) for start in range(0, len(words), 6)]
    images = [noise(size, size), noise(2 * size, size)]
    return [(text, image) for text, image in zip(asked, (None, None, *images), strict=False)]


def require_tokens(runtime: Runtime, tokenizer: Any) -> None:
    """Compare token ids over the probe texts.

    Raises:
        UserError: They differ; shows where.
    """
    for text in texts(tokenizer):
        ours, theirs = list(tokenizer(text).input_ids), runtime.tokens(lead(tokenizer) + text)
        if ours != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            at = next((place for place, (our, their) in pairs if our != their), min(len(ours), len(theirs)))
            shown = [tokenizer.convert_ids_to_tokens(ids[at : at + 3]) for ids in (ours, theirs)]
            raise UserError(
                f"deploy=gguf: the runtime splits text into other tokens: token {at} is {shown[0]}, there {shown[1]} "
                f"(end token {tokenizer.eos_token_id}); this tokenizer is not exported"
            )


@torch.no_grad()
def expected(model: Any, processor: Any, asked: Sequence[Question], images: bool) -> list[Probe]:
    """What a model makes of the probe text and of questions.

    Args:
        model: An image-text-to-text model on the CPU.
        processor: Its processor.
        asked: Questions.
        images: Whether those with an image count.
    """
    limit = int(model.config.get_text_config().max_position_embeddings) // 2
    ids = list(processor.tokenizer(texts(processor.tokenizer)[0]).input_ids)[:limit]
    logprobs = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1).cpu()
    ends = sorted({max(1, round(len(ids) * step / POSITIONS)) for step in range(1, POSITIONS + 1)})
    found = [Probe("", ids[:end], None, end, logprobs[end - 1], None) for end in ends]
    return found + [_ask(model, processor, text, image) for text, image in asked if image is None or images]


def rendered(prompts: Prompts, question: str, images: int) -> str:
    """The prompt of a question as the runtime is given it, with placeholders of its images."""
    return lead(prompts.tokenizer) + prompts.render([Turn(question, "")], images, True)


def _ask(model: Any, processor: Any, question: str, image: Image.Image | None) -> Probe:
    inputs = stock_inputs(model, prompt(processor, question, image))
    ids = inputs["input_ids"][0].tolist()
    end = end_tokens(model, processor.tokenizer)
    config = GenerationConfig(
        max_new_tokens=ANSWER, eos_token_id=end, pad_token_id=end[0], output_logits=True, return_dict_in_generate=True
    )
    with unadvised(model):
        answer = model.generate(**inputs, generation_config=config)
    text = ids if image is None else rendered(Prompts(processor), question, 1)
    first, greedy = answer.logits[0][0].float().log_softmax(-1), answer.sequences[0, len(ids) :].tolist()
    return Probe(question, text, image, len(ids), first, greedy)


def compare(runtime: Runtime, probes: Sequence[Probe], placeholder: str, size: int) -> dict[str, Any]:
    """Agreement of the runtime with the model.

    Args:
        runtime: The exported files, loaded.
        probes: Output of `expected`.
        placeholder: What stands for an image in their texts.
        size: Side of the tower's images in pixels.

    Returns:
        For prompts of ``text``, for those with an image of the tower's size (``image``) and for those whose image has
        to be resized (``resized``), which each side does in its own way, where there are some: ``n``, mean ``kl`` of
        the next token in nats, share with the same likeliest token (``top1``), largest difference of the
        log-probabilities of the `TOP` likeliest tokens (``logprob_error``), and whether all greedy answers are the same
        (``greedy_equal``); with an image also whether prompts are as long (``lengths_equal``) and written so by the
        server's chat (``chat_equal``).
    """
    groups: dict[str, list[Probe]] = {"text": [], "image": [], "resized": []}
    for each in probes:
        groups["text" if each.image is None else "image" if each.image.size == (size, size) else "resized"].append(each)
    return {name: _agreement(runtime, group, placeholder) for name, group in groups.items() if group}


def _agreement(runtime: Runtime, probes: Sequence[Probe], placeholder: str) -> dict[str, Any]:
    rows = [_row(runtime, each, placeholder) for each in probes]
    kl, same, error, greedy, length = zip(*rows, strict=True)
    found = {
        "n": len(rows),
        "kl": statistics.fmean(kl),
        "top1": statistics.fmean(same),
        "logprob_error": max(error),
        "greedy_equal": all(greedy),
    }
    if probes[0].image is not None:
        found["lengths_equal"] = all(length)
        found["chat_equal"] = all(_same_chat(runtime, each, placeholder) for each in probes)
    return found


def _same_chat(runtime: Runtime, each: Probe, placeholder: str) -> bool:
    """Whether the server's chat writes the prompt that the model's own template writes."""
    assert isinstance(each.text, str) and each.image is not None
    theirs = runtime.chat(each.question, each.image)
    before, _, behind = theirs.partition(MARKER)
    return (before, behind.partition(">")[2]) == (each.text.partition(placeholder)[::2])


def _row(runtime: Runtime, each: Probe, placeholder: str) -> tuple[float, bool, float, bool, bool]:
    asked = runtime.prompt(each.text, each.image, placeholder)
    # The positions of one text follow each other: what the runtime has read of it stays.
    theirs, length = runtime.next_token(asked, len(each.logprobs), cached=each.greedy is None)
    best = each.logprobs.topk(min(TOP, len(theirs))).indices
    error = float((theirs - each.logprobs)[best].abs().max())
    terms = each.logprobs.exp() * (each.logprobs - theirs)
    kl = max(0.0, float(terms[each.logprobs.exp() > 0].sum()))
    greedy = each.greedy is None or runtime.complete(asked, tokens=ANSWER)["tokens"] == each.greedy
    return kl, int(theirs.argmax()) == int(best[0]), error, greedy, length == each.tokens


def agreements(
    files: dict[str, Path], mmproj: Path | None, model: Any, processor: Any, asked: Sequence[Question]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check every exported file in the runtime.

    Args:
        files: By type.
        mmproj: The image side, if there is one.
        model: The model on the CPU.
        processor: Its processor.
        asked: Questions.

    Yields:
        Types, and what `compare` says of each.

    Raises:
        UserError: Token ids differ or, in a type of 16 bits or more, log-probabilities by more than rounding.
    """
    probes = expected(model, processor, asked, mmproj is not None)
    context = 2 * max(each.tokens for each in probes) + ANSWER
    size = side(model.config.vision_config.image_size) if mmproj else 0
    for kind, file in files.items():
        with serve(file, mmproj, context=context, exact=kind in BOUNDS) as runtime:
            require_tokens(runtime, processor.tokenizer)
            found = compare(runtime, probes, Prompts(processor).image_token, size)
        error = found["text"]["logprob_error"]
        if kind in BOUNDS and not error <= BOUNDS[kind]:
            raise UserError(
                f"deploy=gguf: in {kind} the runtime's log-probabilities differ by {error:.3g} (allowed "
                f"{BOUNDS[kind]:g}): the exported decoder is not the model; please report it"
            )
        yield kind, found


@torch.no_grad()
def image_agreement(model: Any, processor: Any, mmproj: Path, folder: Path) -> dict[str, Any]:
    """Cosine of the runtime's image features with the model's, on an image that needs no resizing.

    Args:
        model: An image-text-to-text model on the CPU.
        processor: Its processor.
        mmproj: The exported image side.
        folder: For a file that is removed again.

    Returns:
        ``cosine``, the least one and ``n``, the number of image tokens that were compared.
    """
    size = side(model.config.vision_config.image_size)
    image = noise(size, size)
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"].to(model.dtype)
    made = model.get_image_features(pixel_values=pixels)
    made = getattr(made, "pooler_output", made)
    features = torch.cat([*made]) if isinstance(made, list | tuple) else made.flatten(0, -2)
    # The runtime writes a token before an image and one behind it; they are in no prompt then.
    closed = model.config.model_type == "internvl"
    step = -(-len(features) // IMAGE_TOKENS)
    sample = range(0, len(features), step)
    found = cosines(folder, mmproj, image, features.float(), sample, closed)
    return {"cosine": statistics.fmean(found), "cosine_min": min(found), "n": len(found)}
