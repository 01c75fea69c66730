"""Checkpoints of random weights in the published layouts: sharded, of full size, with tokenizers of the real sizes.

One shard is in memory at a time. Names, fused tensors and rows of the vocabulary are those of
``llava-hf/llava-1.5-7b-hf``, ``BAAI/Bunny-v1_0-3B`` and ``OpenGVLab/Mini-InternVL-Chat-4B-V1-5``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaProcessor

from efficientllava.checkpoint.folder import stock_config
from efficientllava.checkpoint.processors import VICUNA_SYSTEM, vicuna_template
from efficientllava.estimate import meta_model
from efficientllava.stages.request import composed
from tests.evaluation.published import tables
from tests.evaluation.published import write as write_table
from tests.models.originals import BUNNY, INTERNVL, bunny_tokenizer, internvl_tokenizer, llama_tokenizer

SHARD = 2 << 30  # bytes of a file of weights
# Stock names to published ones, replaced in this order.
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.lm_head",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
BUNNY_NAMES = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    "model.language_model.": "model.",
}
INTERNVL_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.lm_head",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    "lambda_": "ls",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
}
# Rows of the published vocabulary where the conversion adds to them; the tokenizers have as many tokens.
ROWS = {"bunny_3b": 50_295, "mini_internvl_4b": 32_020}
LLAVA_TOKENS = 32_000  # and two that are added; the rows are filled up to 32,064
QUESTIONS = "scienceqa_img"


def config_of(option: str, layers: int | None = None) -> Any:
    """The stock configuration of a family as published, of all its decoder layers or of the first ones."""
    config = stock_config(composed(f"model={option}", "dry_run=true").model)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    config.text_config.vocab_size = ROWS.get(option, config.text_config.vocab_size)
    return config


def published(config: Any, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors on the meta device under their published names; those of InternViT's queries, keys and values are one."""
    weights = meta_model(config).to(config.dtype).state_dict()
    for name in [name for name in weights if "vision_tower" in name and ".attention.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    renamed = {}
    for name, tensor in weights.items():
        for stock, original in names.items():
            name = name.replace(stock, original)
        renamed[name] = tensor
    return renamed


def drawn(name: str, tensor: Tensor) -> Tensor:
    """Random values for a tensor on the meta device: matrices with a standard deviation of 0.02, norms the identity."""
    if tensor.ndim == 1:
        return torch.full(tensor.shape, float("bias" not in name), dtype=tensor.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype).sub_(0.5).mul_(0.07)


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write random weights as numbered shards with an index, or as one file where they fit."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: drawn(name, tensors[name]) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_llava(folder: Path, config: Any) -> None:
    """LLaVA's layout."""
    tokenizer = llama_tokenizer(LLAVA_TOKENS, ["<image>", "<pad>"], VICUNA_SYSTEM)
    tokenizer.pad_token = "<pad>"
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    write_weights(folder, published(config, LLAVA_NAMES))
    side = config.vision_config.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, **options, chat_template=vicuna_template()).save_pretrained(folder)


def write_bunny(folder: Path, config: Any) -> None:
    """Bunny's layout."""
    text = config.text_config
    sizes = {key: getattr(text, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), text.num_attention_heads)
    end = bunny_tokenizer(folder, text.vocab_size) - 1
    tower = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_hidden_size": config.vision_config.hidden_size}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    (folder / "config.json").write_text(json.dumps({**BUNNY, **sizes, **heads, **tower, **tokens}))
    write_weights(folder, published(config, BUNNY_NAMES))


def write_internvl(folder: Path, config: Any) -> None:
    """Mini-InternVL's layout."""
    text, vision = config.text_config, config.vision_config
    internvl_tokenizer(folder, text.vocab_size)
    side, patch = vision.image_size[0], vision.patch_size[0]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    rope = {"type": "su", **{key: text.rope_parameters[key] for key in ("short_factor", "long_factor")}}
    more = ("vocab_size", "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings")
    changes = {
        "llm_config": {key: getattr(text, key) for key in (*keys, *more)} | {"rope_scaling": rope},
        "vision_config": {key: getattr(vision, key) for key in keys} | {"image_size": side, "patch_size": patch},
    }
    raw = {**INTERNVL, "force_image_size": side, **{part: {**INTERNVL[part], **changes[part]} for part in changes}}
    (folder / "config.json").write_text(json.dumps(raw))
    write_weights(folder, published(config, INTERNVL_NAMES))


WRITERS = {"llava_1_5_7b": write_llava, "bunny_3b": write_bunny, "mini_internvl_4b": write_internvl}


def write_data(folder: Path, side: int, tokens: int) -> None:
    """Records with noise for images and answers that are cut where a record has its tokens; and two questions."""
    draw = np.random.default_rng(0)
    for number in range(4):
        noise = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    rows = [{"id": str(n), "image": f"{n % 4}.png", "conversations": _said(draw, tokens)} for n in range(40)]
    (folder / "records.json").write_text(json.dumps(rows))
    file, columns = tables(2)[QUESTIONS]
    write_table(folder / "questions" / file, columns)


def _said(draw: np.random.Generator, letters: int) -> list[dict[str, str]]:
    answer = "".join(draw.choice([*"abcdefgh "], letters))
    return [{"from": "human", "value": "<image>\nwhere?"}, {"from": "gpt", "value": answer}]


def write_many(file: Path, count: int) -> None:
    """Records in the number of LLaVA's mixture, of several turns, most of them with an image, streamed into a file."""
    with file.open("w") as out:
        for start, end in pairwise([*range(0, count, 10_000), count]):
            rows = ",\n".join(map(json.dumps, _many(start, end)))
            out.write(("[" if start == 0 else ",\n") + rows)
        out.write("]")


def _many(start: int, end: int) -> Iterator[dict[str, Any]]:
    text = "a red door is there, and behind it a house of two floors. " * 4
    for n in range(start, end):
        turns = [(f"is it {n + i}?", text[: 40 + (n * 37 + i * 61) % 180]) for i in range(1 + n % 6)]
        sees = n % 17 > 0
        said = [
            {"from": side, "value": ("<image>\n" if sees and i == 0 and side == "human" else "") + value}
            for i, turn in enumerate(turns)
            for side, value in zip(("human", "gpt"), turn, strict=True)
        ]
        yield {"id": str(n), **({"image": f"{n % 4}.png"} if sees else {}), "conversations": said}
