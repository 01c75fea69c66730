"""Tiny random decoders in the installed runtime: what it says of the next token, beside what the model says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from efficientllava.deploy import decoders
from efficientllava.deploy.runtime import serve
from efficientllava.models.anatomy import decoder_of, layers_of
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut

installed = all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp"))
needs_runtime = pytest.mark.skipif(not installed, reason="the extra [gguf] is not installed")


def words(count: int) -> dict[str, Any]:
    """Keys of a tokenizer of so many words."""
    keys = {
        "model": "t5",
        "tokens": [f"\u2581w{number}" for number in range(count)],
        "token_type": [2, 3, 3, *[1] * (count - 3)],
        "scores": [0.0] * count,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def pruned(model: Any, *shapes: tuple[int, int, int]) -> Any:
    """The model cut to layers given as index, number of KV groups, and number of channels."""
    layers = layers_of(model)
    entries = tuple(LayerPlan(index, tuple(range(groups)), tuple(range(width))) for index, groups, width in shapes)
    return cut(model, PruningPlan("widthwise", entries, len(layers), layers[0].heads_per_group, None, 0.0))


@torch.no_grad()
def differences(
    model: Any, folder: Path, ids: list[int], kind: str = "f32", context: int = 64, ends: tuple[int, ...] = ()
) -> tuple[str, float]:
    """The architecture of the exported decoder, and the largest difference of log-probabilities on a text's ends."""
    decoder, path = decoders.describe(model), folder / "model.gguf"
    keys = decoder.metadata() | words(decoder_of(model).embed_tokens.num_embeddings)
    decoders.write(path, decoder.architecture, keys, decoder.tensors(), kind)
    ours = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    with serve(path, context=context, exact=True) as runtime:
        found = [
            runtime.next_token(ids[:end], ours.shape[1])[0] - ours[end - 1]
            for end in ends or (1, len(ids) // 2, len(ids))
        ]
    return decoder.architecture, float(torch.stack(found).abs().max())
