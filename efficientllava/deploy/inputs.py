"""What a decoder is fed by, as llama.cpp knows it: tokenizers, and the image side (``mmproj``) of ``clip``.

A tokenizer is tokens, types, scores, merges and the name of the rule that splits text first; an image side a vision
tower and a projector.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..models.anatomy import projector_of
from ..models.chat import template_of
from ..runtime import UserError
from .decoders import Tensors, affine

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # what SentencePiece writes for a space
MARKER, CLOSED = "<__media_", "__>"  # how a text begins and ends that the server puts into a message for an image

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How text is split -> the name that the runtime has for it. "bytes" stands for the rule of GPT-2.
SPLITS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
}

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


def vocabulary(processor: Any, size: int, end: Sequence[int]) -> dict[str, Any]:
    """Keys of a GGUF file that make its tokenizer; its chat template is among them.

    Args:
        processor: The checkpoint's processor.
        size: Rows of the embedding: tokens that the tokenizer does not know are written as unused.
        end: Tokens that end an answer, the first one first.

    Raises:
        UserError: The runtime has no such tokenizer, the embedding has fewer rows than it has tokens, or nothing ends
            an answer.
    """
    tokenizer = processor.tokenizer
    if not end:
        raise UserError("deploy=gguf: nothing says which token ends an answer; name it in generation_config.json")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(texts) >= size:
        raise UserError(
            f"deploy=gguf: the tokenizer has token {max(texts)}, the embedding has {size} rows; mend either"
        )
    kind = raw["model"]["type"]
    if kind not in _KINDS:
        raise UserError(f"deploy=gguf: the runtime has no {kind} tokenizer; it has {', '.join(_KINDS)}")
    tokens = [texts.get(index, f"[unused{index}]") for index in range(size)]
    types = [NORMAL if index in texts else UNUSED for index in range(size)]
    for added in raw["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    keys = _KINDS[kind](raw, tokens, types)
    found = tokenizer("a").input_ids
    keys |= {
        "add_bos_token": tokenizer.bos_token_id is not None and found[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer.eos_token_id is not None and found[-1] == tokenizer.eos_token_id,
        "eos_token_id": end[0],
        "bos_token_id": tokenizer.bos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "eot_token_id": end[1] if len(end) > 1 else None,
        "eom_token_id": end[2] if len(end) > 2 else None,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return named | {"tokenizer.chat_template": chat_template(processor)}


def chat_template(processor: Any) -> str:
    """The processor's chat template, for a server that replaces images by a text of its own before it applies it.

    What the template writes behind an image, such as a line break, is written behind that text: in a content of parts,
    and in one text, which the server makes of them where a template takes both.
    """
    template = template_of(processor)

    def show(messages: list[dict[str, Any]]) -> str:
        words = {"bos_token": "", "eos_token": "", "add_generation_prompt": False}
        return processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **words)

    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": MARKER}]}]
    before = show(image).partition(MARKER)[0]
    plain = [{"role": "user", "content": [{"type": "text", "text": MARKER}]}]
    behind = before.removeprefix(show(plain).partition(MARKER)[0])
    behind = re.sub(r"^(<[^<>]+>)+", "", behind)
    for text in ("m['content']", "c['text']"):
        marked = f"{text}.replace('{CLOSED}', {json.dumps(CLOSED + behind)}) if '{MARKER}' in {text} else {text}"
        template = template.replace(f"{{{{ {text} }}}}", f"{{{{ {marked} }}}}") if behind else template
    blank = "" if before.startswith("<") else lead(processor.tokenizer)
    return f"{{{{ '{blank}' }}}}{template}" if blank else template


def _bytes(raw: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Byte-level BPE, or BPE as SentencePiece does it."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
    if raw["model"].get("byte_fallback"):
        return _pieces(raw, merges, tokens, types)
    split = tuple(_splits(raw["pre_tokenizer"]))
    if split not in SPLITS:
        raise UserError(f"deploy=gguf: the runtime has no name for a tokenizer that splits text by {split}")
    return {"model": "gpt2", "pre": SPLITS[split], "tokens": tokens, "token_type": types, "merges": merges}


def _splits(node: Mapping[str, Any] | None) -> list[str]:
    kind = (node or {}).get("type")
    if node is None or kind is None:
        return []
    if kind == "Sequence":
        return [rule for each in node["pretokenizers"] for rule in _splits(each)]
    if kind == "ByteLevel":
        return ["bytes"] if node.get("use_regex", True) else []
    if kind == "Digits" and node["individual_digits"]:
        return ["digits"]
    if kind == "Split":
        return [str(node["pattern"].get("Regex", node["pattern"]))]
    return [str(kind)]


def _pieces(raw: Mapping[str, Any], merges: list[str], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece's BPE joins the two neighbours whose piece comes first among the merges."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    for index, token in enumerate(tokens):
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[index] = BYTE
    unknown = raw["model"].get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": [-float(rank.get(token, len(merges))) for token in tokens],
        "add_space_prefix": _blank(raw) == "always",
    }


def _blank(raw: Mapping[str, Any]) -> str:
    """Where a blank is put before text: ``always`` (also behind special tokens), ``first`` or ``never``."""
    nodes = [raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}]
    nodes += [part for node in nodes for part in node.get("normalizers", [])]
    if any(node.get("type") == "Prepend" for node in nodes):
        return "always"
    return next((node["prepend_scheme"] for node in nodes if "prepend_scheme" in node), "never")


def lead(tokenizer: Any) -> str:
    """What has to stand before a text so that the runtime splits it as the tokenizer does.

    SentencePiece tokenizers that put a blank before the first text alone are written without: the runtime would put one
    behind every special token.
    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    return " " if raw["model"].get("byte_fallback") and _blank(raw) == "first" else ""


def _whole_words(raw: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Words between blanks, and single marks: a unigram tokenizer in which every word is one piece.

    A word that is in no vocabulary may become a known beginning and an unknown rest.
    """
    marks = set()
    for rule in _splits(raw["pre_tokenizer"]):
        if not re.fullmatch(r"WhitespaceSplit|\[[^\]\\^-]+\]", rule):
            raise UserError(f"deploy=gguf: the runtime has no whole-word tokenizer that splits text by {rule!r}")
        marks |= {*rule[1:-1]} if rule.startswith("[") else set()
    for index, token in enumerate(tokens):
        if token in marks:
            types[index] = USER_DEFINED
        elif types[index] == NORMAL:
            tokens[index] = SPACE + token
    unknown = tokens.index(raw["model"]["unk_token"])
    types[unknown] = UNKNOWN
    return {
        "model": "t5",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": [0.0] * len(tokens),
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "precompiled_charsmap": _blanks(),
    }


def _blanks(blanks: bytes = b"\t\n\v\f\r") -> bytes:
    """SentencePiece's table of replacements (a trie as a double array joined by XOR), which makes blanks of them."""
    root, child, value = 256, 128, 0
    nodes = [0] * 512
    nodes[0] = root << 10
    for byte in blanks:
        nodes[root ^ byte] = child << 10 | 1 << 8 | byte
        nodes[root ^ byte ^ child] = 1 << 31 | value
    packed = struct.pack(f"<{len(nodes)}I", *nodes)
    return struct.pack("<I", len(packed)) + packed + b" \0"


_KINDS = {"BPE": _bytes, "WordLevel": _whole_words}


# ---- the image side --------------------------------------------------------------------------------------------------


def image_side(model: Any, processor: Any) -> ImageSide:
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
