"""How a checkpoint talks: its chat template, and the tokens that end an answer."""

from __future__ import annotations

from typing import Any


def template_of(processor: Any) -> str:
    """The chat template of a processor or, where it has none, of its tokenizer; of several the one named ``default``.

    Returns:
        The template; empty where there is none.
    """
    for owner in (processor, processor.tokenizer):
        found = getattr(owner, "chat_template", None)
        found = found.get("default") if isinstance(found, dict) else found
        if found:
            return str(found)
    return ""


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, the first one first: those that the model names, else the tokenizer's; may be none."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return [*found] if isinstance(found, list | tuple) else [found] * (found is not None)
