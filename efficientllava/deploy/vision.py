"""The image side (``mmproj``): vision towers and projectors as llama.cpp's ``clip`` knows them, and what comes of them.

The runtime hands image embeddings to a decoder and to nobody else. So a decoder is written that gives them back: one
layer of attention whose scores depend on the distance alone and peak at one distance, with the identity as values. The
final state of a text behind an image is then the direction of that image token which stands as far before the text's
end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..models.anatomy import projector_of
from ..runtime.errors import UserError
from . import decoders, vocabulary
from .decoders import Tensors, affine
from .runtime import Runtime, serve

ImageSide = tuple[dict[str, Any], Tensors]  # keys, and tensors by name

# Name of a module in the tower -> its name in the file.
EMBEDDINGS = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.patch_embeddings.projection": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
}
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.projection_layer": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "layernorm_before": "ln1",
    "layernorm_after": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
SCALES = {"lambda_1": "ls1.weight", "lambda_2": "ls2.weight"}
PROJECTOR = {
    "llava": {"linear_1": "mm.0", "linear_2": "mm.2"},
    "internvl": {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"},
}
TOWERS = {"llava": ("clip_vision_model", "siglip_vision_model"), "internvl": ("internvl_vision",)}
# Activation of the tower -> the runtime's switch for it; without any, it is the quick one.
ACTIVATIONS = {"quick_gelu": {}, "gelu_pytorch_tanh": {"clip.use_gelu": True}, "gelu": {"clip.use_gelu": True}}

WORDS = ("<unk>", "<img>", "</img>", vocabulary.SPACE + "a")
TYPES = [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.NORMAL]
MARGIN = 9  # words behind an image whose first token is asked for
SHARPNESS = 60.0  # what a neighbour of the peak lacks, in units of the softmax
IMAGE_TOKENS = 16  # of an image that are read out of the runtime
SAME = 0.999  # cosine of image features that counts as the same


def describe(model: Any, processor: Any) -> ImageSide:
    """Keys and tensors of the image side.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.

    Raises:
        UserError: The runtime has no such image side; says why.
    """
    config = model.config
    tower = getattr(config.vision_config, "model_type", "?")
    if tower not in TOWERS.get(config.model_type, ()):
        known = "; ".join(f"{host}: {', '.join(towers)}" for host, towers in TOWERS.items())
        raise UserError(
            f"deploy.mmproj=true: a {config.model_type} model with a {tower} tower is not exported ({known}); "
            "set deploy.mmproj=false"
        )
    internvl = config.model_type == "internvl"
    return _metadata(config, processor.image_processor, internvl), _tensors(model, internvl)


def _metadata(config: Any, images: Any, internvl: bool) -> dict[str, Any]:
    vision = config.vision_config
    size, patch = (side(getattr(vision, name)) for name in ("image_size", "patch_size"))
    if vision.hidden_act not in ACTIVATIONS or config.projector_hidden_act != "gelu":
        raise UserError(
            f"deploy.mmproj=true: activations {vision.hidden_act!r} and {config.projector_hidden_act!r} are not "
            "exported; set deploy.mmproj=false"
        )
    blocks = vision.num_hidden_layers
    keys = {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "internvl" if internvl else "mlp",
        "clip.vision.image_size": size,
        "clip.vision.patch_size": patch,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": blocks,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "clip.vision.projection_dim": config.get_text_config().hidden_size,
        "clip.vision.image_mean": [float(value) for value in images.image_mean],
        "clip.vision.image_std": [float(value) for value in images.image_std],
        **ACTIVATIONS[vision.hidden_act],
    }
    if not internvl:
        return keys | {"clip.vision.feature_layer": [_feature_layer(config, blocks)]}
    _feature_layer(config, blocks, last=True)
    keys["clip.vision.projector.scale_factor"] = round(1 / config.downsample_ratio)
    if getattr(images, "crop_to_patches", False):
        keys |= {
            "clip.vision.preproc_min_tiles": images.min_patches,
            "clip.vision.preproc_max_tiles": images.max_patches,
        }
    return keys


def side(value: Any) -> int:
    """Side of a square, in pixels."""
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) > 1:
        raise UserError(f"deploy.mmproj=true: images of {value} are not exported; the runtime takes squares")
    return int(sides.pop())


def _feature_layer(config: Any, blocks: int, last: bool = False) -> int:
    """How many blocks of the tower run."""
    asked = config.vision_feature_layer
    if not isinstance(asked, int) or (last and asked not in (-1, blocks)):
        raise UserError(f"deploy.mmproj=true: vision_feature_layer={asked} is not exported; set deploy.mmproj=false")
    return asked % (blocks + 1)


def _tensors(model: Any, internvl: bool) -> Tensors:
    tower: nn.Module = model.model.vision_tower
    modules = dict(tower.named_modules())
    for name, written in EMBEDDINGS.items():
        if name in modules:
            yield from affine(written, modules[name])
    embeddings: Any = modules["embeddings"]
    if internvl:
        yield "v.class_embd", lambda: embeddings.cls_token.flatten()
        # The runtime appends the class token to the patches, so its position comes last too.
        yield "v.position_embd.weight", lambda: embeddings.position_embeddings[0].roll(-1, 0)
    elif hasattr(embeddings, "class_embedding"):
        yield "v.class_embd", lambda: embeddings.class_embedding.flatten()
    encoder: Any = modules["encoder"]
    for index, block in enumerate(encoder.layer if internvl else encoder.layers):
        yield from ((f"v.blk.{index}.{name}", made) for name, made in _block(dict(block.named_modules()), block))
    for name, written in PROJECTOR["internvl" if internvl else "llava"].items():
        yield from affine(written, projector_of(model).get_submodule(name))


def _block(modules: Mapping[str, Any], block: Any) -> Tensors:
    for name, written in BLOCK.items():
        if name in modules:
            yield from affine(written, modules[name])
    for name, written in SCALES.items():
        if hasattr(block, name):
            yield written, lambda name=name: getattr(block, name)


def is_closed(model: Any) -> bool:
    """Whether the runtime writes a token before an image and one behind it; they are in no prompt then."""
    return model.config.model_type == "internvl"


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """What the language model gets of one image, ``(tokens, width)``."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    return torch.cat([*found]) if isinstance(found, list | tuple) else found.flatten(0, -2)


def noise(width: int, height: int) -> Image.Image:
    """An image of noise, always the same."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_side(model: Any, processor: Any, mmproj: Path, folder: Path) -> dict[str, Any]:
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
    features = image_features(model, pixels)
    step = -(-len(features) // IMAGE_TOKENS)
    sample = range(0, len(features), step)
    found = cosines(folder, mmproj, image, features.float(), sample, is_closed(model))
    return {"cosine": statistics.fmean(found), "cosine_min": min(found), "n": len(found)}


def probe_decoder(width: int, distance: int) -> tuple[dict[str, Any], Tensors]:
    """Keys and tensors of a decoder that gives back what stands so many tokens before."""
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
        **{f"blk.0.{name}.weight": torch.zeros(decoders.BLOCK, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down.weight": torch.zeros(width, decoders.BLOCK),
    }
    keys = {
        "context_length": 4 * distance,
        "embedding_length": width,
        "block_count": 1,
        "attention.head_count": width // head,
        "attention.head_count_kv": width // head,
        "feed_forward_length": decoders.BLOCK,
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
        closed: Whether the runtime writes a token behind an image, see `is_closed`.
    """
    tokens, width = features.shape
    file = folder / ".probe.gguf"
    try:
        metadata, tensors = probe_decoder(width, tokens + MARGIN - 1)
        decoders.write(file, "llama", metadata, tensors, "f32")
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
