"""From a batch to texts: greedy answers through the stock ``generate``, with vision features computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..models.chat import end_tokens
from ..models.forward import Batch, decoder_inputs
from ..runtime import NotFiniteError

# Fields of a generation configuration that change no greedy answer, and special tokens, which are obeyed.
MEANINGLESS = {
    *("_from_model_config", "transformers_version", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size", "low_memory"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def greedy_config(model: nn.Module, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops at the model's own end tokens, whatever else its folder suggests.

    Args:
        model: The model; its ``generation_config`` names the end tokens.
        tokenizer: Names the end and padding token where the model does not.
        max_new_tokens: Longest answer.

    Returns:
        The configuration for ``model.generate``, to be used with `unadvised`.
    """
    end, padding = end_tokens(model, tokenizer), tokenizer.pad_token_id
    if padding is None and end:
        padding = end[0]
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end or None, pad_token_id=padding
    )


@contextmanager
def unadvised(model: nn.Module) -> Iterator[None]:
    """Set what a model's folder suggests for generation aside: ``generate`` fills every field that is not set from it.

    Args:
        model: Its ``generation_config`` is back in place afterwards.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        model.generation_config = own


def set_aside(model: nn.Module) -> dict[str, Any]:
    """What a model's folder suggests for generation beside its special tokens, and answers are made without."""
    suggested = model.generation_config.to_diff_dict()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return {name: value for name, value in suggested.items() if value not in (None, False) and name not in MEANINGLESS}


class StopTexts(StoppingCriteria):
    """Ends the rows in which a text has appeared; transformers' own criterion fails on word-level tokenizers.

    Args:
        tokenizer: The model's tokenizer.
        stop: Texts, none of them empty.
        start: Length of the prompts.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        self._window = max(map(len, stop))  # tokens, since none of them is shorter than a character

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One boolean per row."""
        tails = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._window :])
        ended = [any(mark in tail for mark in self._stop) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


class FiniteLogits(LogitsProcessor):
    """Refuses to choose a token by logits that are not finite.

    Args:
        ids: Name of each row's record.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores as they are.

        Raises:
            NotFiniteError: Names the first record whose largest logit is NaN or infinite.
        """
        bad = ~scores.amax(-1).isfinite()  # single tokens may be ruled out by minus infinity
        if bad.any():
            raise NotFiniteError(
                f"record {self._ids[int(bad.nonzero()[0])]!r}: the model's logits are not finite; evaluate in another "
                "type with model.dtype, or look at the checkpoint"
            )
        return scores


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    batch: Batch,
    features: Tensor | None,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[str]:
    """Answer left-padded prompts through the stock ``generate``.

    Args:
        model: An image-text-to-text model in eval mode.
        tokenizer: Its tokenizer.
        batch: A batch of `efficientllava.data.collator.GenerationCollator` on the model's device.
        features: Output of `efficientllava.models.forward.vision_features` for the batch's images, or None.
        max_new_tokens: Longest answer.
        stop: Texts that end an answer; they and what follows are cut off.

    Returns:
        Text per row, without special tokens, stripped.

    Raises:
        NotFiniteError: Names a record for which the logits are not finite.
    """
    config, start = greedy_config(model, tokenizer, max_new_tokens), batch["input_ids"].shape[1]
    criteria = StoppingCriteriaList([StopTexts(tokenizer, stop, start)] if stop else [])
    checks = LogitsProcessorList([FiniteLogits(batch["ids"])])
    inputs = decoder_inputs(model, batch, features)
    with unadvised(model):
        tokens = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, generation_config=config, logits_processor=checks, stopping_criteria=criteria
        )
    answers = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [_until(answer, stop).strip() for answer in answers]


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]
