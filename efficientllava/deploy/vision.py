"""The image side (``mmproj``): vision towers and projectors as llama.cpp's ``clip`` knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import projector_of
from ..runtime.errors import UserError

Tensors = Iterator[tuple[str, Callable[[], Tensor]]]

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


def describe(model: Any, processor: Any) -> tuple[dict[str, Any], Tensors]:
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
            yield from _affine(written, modules[name])
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
        yield from _affine(written, projector_of(model).get_submodule(name))


def _block(modules: Mapping[str, Any], block: Any) -> Tensors:
    for name, written in BLOCK.items():
        if name in modules:
            yield from _affine(written, modules[name])
    for name, written in SCALES.items():
        if hasattr(block, name):
            yield written, lambda name=name: getattr(block, name)


def _affine(name: str, module: Any) -> Tensors:
    yield f"{name}.weight", lambda: module.weight
    if getattr(module, "bias", None) is not None:
        yield f"{name}.bias", lambda: module.bias


def is_closed(model: Any) -> bool:
    """Whether the runtime writes a token before an image and one behind it; they are in no prompt then."""
    return model.config.model_type == "internvl"


def image_features(model: Any, pixels: Tensor) -> Tensor:
    """What the language model gets of one image, ``(tokens, width)``."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    return torch.cat([*found]) if isinstance(found, list | tuple) else found.flatten(0, -2)
