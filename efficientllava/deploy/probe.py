"""What the runtime makes of an image, read out of it: it hands image embeddings to a decoder and to nobody else.

So a decoder is written that gives them back: one layer of attention whose scores depend on the distance alone and peak
at one distance, with the identity as values. The final state of a text behind an image is then the direction of that
image token which stands as far before the text's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import files, vocabulary
from .runtime import Runtime, serve

WORDS = ("<unk>", "<img>", "</img>", vocabulary.SPACE + "a")
TYPES = [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.NORMAL]
MARGIN = 9  # words behind an image whose first token is asked for
SHARPNESS = 60.0  # what a neighbour of the peak lacks, in units of the softmax


def _decoder(width: int, distance: int) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    head = math.gcd(width, 128)
    # One turn of the slowest use of the first pair of channels is longer than twice the distance.
    score = 2 * SHARPNESS * distance**2 * math.sqrt(head)
    query, key = torch.zeros(width // head, head), torch.zeros(width // head, head)
    query[:, 0], query[:, 1] = math.sqrt(score) * math.cos(1.0), math.sqrt(score) * -math.sin(1.0)
    key[:, 0] = math.sqrt(score)
    none, same, ones = torch.zeros(width, width), torch.eye(width), torch.ones(width)
    made = {
        "token_embd.weight": torch.zeros(len(WORDS), width),
        "output_norm.weight": ones,
        "rope_freqs.weight": torch.full((head // 2,), float(distance)),
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": none,
        "blk.0.attn_q.bias": query.flatten(),
        "blk.0.attn_k.weight": none,
        "blk.0.attn_k.bias": key.flatten(),
        "blk.0.attn_v.weight": same,
        "blk.0.attn_output.weight": same,
        "blk.0.ffn_norm.weight": ones,
        **{f"blk.0.{name}.weight": torch.zeros(files.BLOCK, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down.weight": torch.zeros(width, files.BLOCK),
    }
    keys = {
        "context_length": 4 * distance,
        "embedding_length": width,
        "block_count": 1,
        "attention.head_count": width // head,
        "attention.head_count_kv": width // head,
        "feed_forward_length": files.BLOCK,
        "attention.layer_norm_rms_epsilon": 1e-12,
        "rope.dimension_count": head,
    }
    words = {
        "model": "t5",
        "tokens": [*WORDS],
        "token_type": TYPES,
        "scores": [0.0] * len(WORDS),
        "unknown_token_id": 0,
        "eos_token_id": 0,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    return metadata, iter([(name, lambda tensor=tensor: tensor) for name, tensor in made.items()])


def cosines(
    folder: Path, mmproj: Path, image: Image.Image, features: Tensor, sample: Sequence[int], closed: bool
) -> list[float]:
    """Cosine between what the runtime makes of an image and what the model makes of it.

    Args:
        folder: Where the decoder is written; it is removed again.
        mmproj: The image side.
        image: An image.
        features: The model's, ``(tokens, width)``.
        sample: Image tokens to compare, each in ``range(tokens)``.
        closed: Whether the runtime writes a token behind an image, see `efficientllava.deploy.vision.is_closed`.
    """
    tokens, width = features.shape
    file = folder / ".probe.gguf"
    try:
        metadata, tensors = _decoder(width, tokens + MARGIN - 1)
        files.write(file, "llama", metadata, tensors, "f32")
        with serve(file, mmproj, context=4 * tokens + 64, embeddings=True, exact=True) as runtime:
            found = [_read(runtime, image, index + MARGIN - closed) for index in sample]
    finally:
        file.unlink(missing_ok=True)
    return [
        float(torch.cosine_similarity(vector, features[index], 0)) for index, vector in zip(sample, found, strict=True)
    ]


def _read(runtime: Runtime, image: Image.Image, words: int) -> Tensor:
    """The final state of a text of some words behind an image."""
    answer = runtime.ask("embedding", content=runtime.prompt(runtime.marker + " a" * words, [image]))
    return torch.tensor(answer[0]["embedding"][-1])
