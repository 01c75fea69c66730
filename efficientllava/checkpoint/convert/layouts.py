"""Weight files, tensor by tensor, and the published layouts that are converted: which tensor becomes which.

Names and fused tensors were read off ``BAAI-DCAI/Bunny`` (``bunny/model``) and ``OpenGVLab/InternVL``
(``internvl_chat/internvl/model/internvl_chat``).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...runtime.errors import UserError, first_line
from ..processors import square_processor, tile_processor

Raw = Mapping[str, Any]
# As save_pretrained names them; safetensors are preferred where a folder has both.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Sizes of the towers that a Bunny's config.json names, and does not describe.
SIGLIP: dict[str, dict[str, int]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file.

    Args:
        shape: Its shape.
        kind: Its type, as its file calls it.
        read: Reads it.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in order.

    Raises:
        UserError: There is none, the index cannot be read, or a shard that it names is missing.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]  # as stock transformers, whatever an index says
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{index}: cannot be read ({reason}); get the complete folder") from error
            if not shards or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise UserError(f"{index}: must name files beside it; put all files into one folder")
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise UserError(f"{folder}: shard {missing[0]} is missing; get the complete folder")
            return [folder / shard for shard in shards]
    raise UserError(f"{folder}: has none of {', '.join(WEIGHTS)}, nor an index of shards; get the complete folder")


def stored_tensors(folder: Path) -> dict[str, tuple[Stored, Path]]:
    """The tensors of a folder by name, each with its file; all files are opened, and no tensor is read.

    Raises:
        UserError: As `shard_files` and `open_shard`, or a tensor is stored twice.
    """
    found: dict[str, tuple[Stored, Path]] = {}
    for file in shard_files(folder):
        tensors = open_shard(file)
        if twice := found.keys() & tensors.keys():
            name = min(twice)
            first = found[name][1].name
            raise UserError(f"{folder}: tensor {name} is in {first} and in {file.name}; get the original files")
        found |= {name: (tensor, file) for name, tensor in tensors.items()}
    return found


def open_shard(file: Path) -> dict[str, Stored]:
    """The tensors of one weight file by name, unread; the file stays open as long as one of them is kept.

    Args:
        file: A safetensors file, or a file of ``torch.save`` that holds nothing but tensors.

    Raises:
        UserError: The file is truncated, damaged, or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        try:
            handle = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or no safetensors file ({error}); get the file again") from error
        return {name: _lazy(handle, name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors and is not opened; use a safetensors checkpoint") from error
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{file}: truncated or no weight file ({first_line(error)}); get the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file}: holds more than tensors by name; get the original file")
    return {name: Stored(tuple(tensor.shape), str(tensor.dtype), tensor.clone) for name, tensor in tensors.items()}


def _lazy(handle: safe_open, name: str) -> Stored:
    part = handle.get_slice(name)
    return Stored(tuple(part.get_shape()), part.get_dtype(), lambda: handle.get_tensor(name))


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Args:
        host: ``model_type`` of the stock decoder.
        text: Key of the decoder's part of config.json; empty where that is the whole file.
        rules: Pattern of a source name, and the stock names of its equal blocks of rows; the first match holds.
        image_tokens: Special tokens of the stock processor by role; the first stands for a piece of an image.
        new_token: The one of them that the original tokenizer lacks.
        end: The token that ends a turn.
        required: What config.json must say for the conversion to be exact; an absent key passes.
        build: Makes the stock configuration from config.json, the text configuration and the source's tensor names.
        processor: Makes the processor from the tokenizer, the stock configuration and config.json.
    """

    host: str
    text: str
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    image_tokens: Mapping[str, str]
    new_token: str
    end: str
    required: Mapping[str, Any]
    build: Callable[[Raw, Any, Collection[str]], Any]
    processor: Callable[[Any, Any, Raw], Any]

    def text_part(self, raw: Raw) -> Raw:
        """The decoder's part of config.json."""
        return raw[self.text] if self.text else raw

    def targets(self, name: str) -> tuple[str, ...]:
        """Stock names of a source tensor; several where it is split into equal blocks of rows; none if unknown."""
        for pattern, targets in self.rules:
            if match := re.fullmatch(pattern, name):
                return tuple(match.expand(target) for target in targets)
        return ()


def _bunny_config(raw: Raw, text: Any, names: Collection[str]) -> Any:
    from transformers import LlavaConfig, SiglipVisionConfig

    tower = str(raw.get("mm_vision_tower", "")).rstrip("/").rpartition("/")[2]
    if tower not in SIGLIP:
        raise ValueError(f"mm_vision_tower={tower!r} is not supported; supported: {', '.join(SIGLIP)}")
    sizes, prefix = dict(SIGLIP[tower]), "model.vision_tower.vision_tower.vision_model."
    last = sizes["num_hidden_layers"] - 1
    whole = any(name.startswith(f"{prefix}encoder.layers.{last}.") for name in names)
    # Bunny reads the states before the last layer; what was released leaves that layer and the pooling head out.
    sizes["num_hidden_layers"] = last + whole
    head = any(name.startswith(f"{prefix}head.") for name in names)
    return LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes, vision_use_head=head),  # pyright: ignore[reportArgumentType]
        text_config=text,
        image_seq_length=(sizes["image_size"] // sizes["patch_size"]) ** 2,
        vision_feature_layer=-2 if whole else -1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def _internvl_config(raw: Raw, text: Any, _names: Collection[str]) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    vision, ratio = raw["vision_config"], raw.get("downsample_ratio", 0.5)
    side, patch = vision["image_size"], vision["patch_size"]
    if raw.get("force_image_size") not in (None, side):
        raise ValueError(f"force_image_size={raw['force_image_size']}: must equal the tower's {side}")
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    tower = InternVLVisionConfig(
        **{key: vision[key] for key in (*same, "hidden_act", "layer_norm_eps", "norm_type") if key in vision},
        image_size=[side, side],
        patch_size=[patch, patch],
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
        use_mean_pooling=True,  # no norm after the last layer
    )
    return InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_seq_length=int((side // patch * ratio) ** 2),
        downsample_ratio=ratio,
        vision_feature_layer=raw.get("select_layer", -1),
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any, config: Any, raw: Raw) -> Any:
    most = raw.get("max_dynamic_patch", 12) if raw.get("dynamic_image_size", True) else 1
    tiles = (raw.get("min_dynamic_patch", 1), most)
    return tile_processor(tokenizer, config.vision_config.image_size[0], tiles, config.image_seq_length)


_TOWER, _BLOCK = "model.vision_tower.", r"model.vision_tower.encoder.layer.\1."
_VIT = r"vision_model\.encoder\.layers\.(\d+)\."

# model_type of the original config.json -> layout
LAYOUTS: dict[str, Layout] = {
    "bunny-phi": Layout(
        host="phi",
        text="",
        rules=(
            (r"model\.vision_tower\.vision_tower\.vision_model\.(.+)", (_TOWER + r"\1",)),
            (r"model\.mm_projector\.0\.(weight|bias)", (r"model.multi_modal_projector.linear_1.\1",)),
            (r"model\.mm_projector\.2\.(weight|bias)", (r"model.multi_modal_projector.linear_2.\1",)),
            (r"model\.((?:embed_tokens|layers|final_layernorm)\..+)", (r"model.language_model.\1",)),
            (r"(lm_head\.weight)", (r"\1",)),
        ),
        image_tokens={"image_token": "<image>"},
        new_token="<image>",
        end="<|endoftext|>",
        required={
            "mm_projector_type": "mlp2x_gelu",
            "image_aspect_ratio": "pad",
            "use_s2": False,
            "qk_layernorm": False,
            "tie_word_embeddings": False,
        },
        build=_bunny_config,
        processor=lambda tokenizer, config, raw: square_processor(
            tokenizer, config.vision_config.image_size, (0.5,) * 3, (0.5,) * 3, config.vision_config.patch_size, False
        ),
    ),
    "internvl_chat": Layout(
        host="phi3",
        text="llm_config",
        rules=(
            (r"vision_model\.embeddings\.class_embedding", (_TOWER + "embeddings.cls_token",)),
            (r"vision_model\.embeddings\.position_embedding", (_TOWER + "embeddings.position_embeddings",)),
            (
                r"vision_model\.embeddings\.patch_embedding\.(weight|bias)",
                (_TOWER + r"embeddings.patch_embeddings.projection.\1",),
            ),
            (_VIT + r"ls([12])", (_BLOCK + r"lambda_\2",)),
            (_VIT + r"norm1\.(weight|bias)", (_BLOCK + r"layernorm_before.\2",)),
            (_VIT + r"norm2\.(weight|bias)", (_BLOCK + r"layernorm_after.\2",)),
            (_VIT + r"attn\.qkv\.(weight|bias)", tuple(_BLOCK + rf"attention.{part}_proj.\2" for part in "qkv")),
            (_VIT + r"attn\.proj\.(weight|bias)", (_BLOCK + r"attention.projection_layer.\2",)),
            (_VIT + r"attn\.([qk]_norm)\.weight", (_BLOCK + r"attention.\2.weight",)),
            (_VIT + r"(mlp\.fc[12]\.(?:weight|bias))", (_BLOCK + r"\2",)),
            (r"mlp1\.0\.(weight|bias)", (r"model.multi_modal_projector.layer_norm.\1",)),
            (r"mlp1\.1\.(weight|bias)", (r"model.multi_modal_projector.linear_1.\1",)),
            (r"mlp1\.3\.(weight|bias)", (r"model.multi_modal_projector.linear_2.\1",)),
            (r"language_model\.(lm_head\.weight)", (r"\1",)),
            (r"language_model\.model\.(.+)", (r"model.language_model.\1",)),
        ),
        image_tokens={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",  # the stock processor asks for one
        },
        new_token="<video>",
        end="<|end|>",
        required={
            "template": "phi3-chat",
            "llm_config.model_type": "phi3",
            "llm_config.tie_word_embeddings": False,
            "ps_version": "v2",
            "pad2square": False,
            "use_thumbnail": True,
            "use_llm_lora": 0,
            "use_backbone_lora": 0,
        },
        build=_internvl_config,
        processor=_internvl_processor,
    ),
}
