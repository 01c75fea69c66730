"""Small checkpoints in the published layouts, and what their models compute, written out in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaTokenizer

Weights = dict[str, Tensor]
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
BUNNY: dict[str, Any] = {
    "architectures": ["BunnyPhiForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_bunny_phi.BunnyPhiConfig"},
    "model_type": "bunny-phi",
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "google/siglip-tiny",
    "tokenizer_model_max_length": 2048,
}
INTERNVL: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 28,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "phi3-chat",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "llm_config": {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "model_type": "phi3",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 5.0]},
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "drop_path_rate": 0.1,
    },
}


def _linear(w: Weights, name: str, rows: int, columns: int, bias: bool = True) -> None:
    w[f"{name}.weight"] = torch.randn(rows, columns) / math.sqrt(4 * columns)
    if bias:
        w[f"{name}.bias"] = 0.3 * torch.randn(rows)


def _norm(w: Weights, name: str, width: int, bias: bool = True) -> None:
    w[f"{name}.weight"] = 1 + 0.3 * torch.randn(width)
    if bias:
        w[f"{name}.bias"] = 0.3 * torch.randn(width)


def bunny_weights(vocabulary: int, tower_layers: int = 2) -> Weights:
    """Names and shapes as published; the released tower lacks its last layer and the pooling head."""
    w: Weights = {}
    hidden, inner, width = BUNNY["hidden_size"], BUNNY["intermediate_size"], TOWER["hidden_size"]
    top = "model.vision_tower.vision_tower.vision_model."
    w[f"{top}embeddings.patch_embedding.weight"] = 0.1 * torch.randn(width, 3, 14, 14)
    w[f"{top}embeddings.patch_embedding.bias"] = torch.randn(width)
    w[f"{top}embeddings.position_embedding.weight"] = torch.randn(4, width)
    for i in range(tower_layers):
        layer = f"{top}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(w, f"{layer}self_attn.{name}", width, width)
        _norm(w, f"{layer}layer_norm1", width)
        _norm(w, f"{layer}layer_norm2", width)
        _linear(w, f"{layer}mlp.fc1", TOWER["intermediate_size"], width)
        _linear(w, f"{layer}mlp.fc2", width, TOWER["intermediate_size"])
    _norm(w, f"{top}post_layernorm", width)
    _linear(w, "model.mm_projector.0", hidden, width)
    _linear(w, "model.mm_projector.2", hidden, hidden)
    w["model.embed_tokens.weight"] = torch.randn(vocabulary, hidden)
    for i in range(BUNNY["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            _linear(w, f"{layer}self_attn.{name}", hidden, hidden)
        _linear(w, f"{layer}mlp.fc1", inner, hidden)
        _linear(w, f"{layer}mlp.fc2", hidden, inner)
        _norm(w, f"{layer}input_layernorm", hidden)
    _norm(w, "model.final_layernorm", hidden)
    _linear(w, "lm_head", vocabulary, hidden, bias=False)
    return w


def internvl_weights(vocabulary: int) -> Weights:
    """Names, shapes and fused projections as published."""
    w: Weights = {}
    vision, text = INTERNVL["vision_config"], INTERNVL["llm_config"]
    width, hidden, inner = vision["hidden_size"], text["hidden_size"], text["intermediate_size"]
    w["vision_model.embeddings.class_embedding"] = torch.randn(1, 1, width)
    w["vision_model.embeddings.position_embedding"] = torch.randn(1, 17, width)
    w["vision_model.embeddings.patch_embedding.weight"] = 0.1 * torch.randn(width, 3, 7, 7)
    w["vision_model.embeddings.patch_embedding.bias"] = torch.randn(width)
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}."
        w[f"{layer}ls1"], w[f"{layer}ls2"] = torch.randn(width), torch.randn(width)
        _norm(w, f"{layer}norm1", width)
        _norm(w, f"{layer}norm2", width)
        _linear(w, f"{layer}attn.qkv", 3 * width, width)
        _linear(w, f"{layer}attn.proj", width, width)
        _linear(w, f"{layer}mlp.fc1", vision["intermediate_size"], width)
        _linear(w, f"{layer}mlp.fc2", width, vision["intermediate_size"])
    _norm(w, "mlp1.0", 4 * width)
    _linear(w, "mlp1.1", hidden, 4 * width)
    _linear(w, "mlp1.3", hidden, hidden)
    w["language_model.model.embed_tokens.weight"] = torch.randn(vocabulary, hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        _linear(w, f"{layer}self_attn.qkv_proj", (6 + 2 * 3) * 8, hidden, bias=False)
        _linear(w, f"{layer}self_attn.o_proj", hidden, 6 * 8, bias=False)
        _linear(w, f"{layer}mlp.gate_up_proj", 2 * inner, hidden, bias=False)
        _linear(w, f"{layer}mlp.down_proj", hidden, inner, bias=False)
        _norm(w, f"{layer}input_layernorm", hidden, bias=False)
        _norm(w, f"{layer}post_attention_layernorm", hidden, bias=False)
    _norm(w, "language_model.model.norm", hidden, bias=False)
    _linear(w, "language_model.lm_head", vocabulary, hidden, bias=False)
    return w


def bunny_tokenizer(folder: Path, size: int = 0) -> int:
    """GPT-2's kind of tokenizer, without an image token; returns the size of the vocabulary, ``size`` or more."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġa"]
    words += [f"w{number}" for number in range(size - len(words) - 1)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("h", "e"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {**names, "tokenizer_class": "CodeGenTokenizer", "model_max_length": 2048, "add_prefix_space": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def internvl_tokenizer(folder: Path, size: int = 0) -> int:
    """Llama's kind of tokenizer with Phi-3's and InternVL's added tokens; returns the size of the vocabulary."""
    tokenizer = llama_tokenizer(size - len(ADDED), ADDED)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def llama_tokenizer(size: int, added: Sequence[str], sentence: str = "") -> LlamaTokenizer:
    """Llama's kind of tokenizer of letters and bytes, filled up to a size, and tokens that are added behind.

    The words of a sentence are one token each.
    """
    letters = "▁abcdefghijklmnopqrstuvwxyzAIPY.-?3"
    starts = {f"▁{word[:end]}": None for word in sentence.split() for end in range(1, len(word) + 1)}
    words = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *"".join(sentence.split())]
    )
    words |= starts | {f"w{number}": None for number in range(size - len(words) - len(starts))}
    merges = [(start[:-1], start[-1]) for start in starts]
    tokenizer = LlamaTokenizer({word: i for i, word in enumerate(words)}, merges, model_max_length=8192)
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return tokenizer


ADDED = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def sentencepiece_tokenizer(folder: Path) -> int:
    """``tokenizer.model`` and what stands beside it, as Mini-InternVL is published; returns the vocabulary's size."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the red house has two doors", "a door is red or blue", "where is the house?"] * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2},
        **{"remove_extra_whitespaces": False, "hard_vocab_limit": False},
    )
    (folder / "tokenizer.vocab").unlink()
    rows = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    kept = {"lstrip": False, "normalized": False, "single_word": False, "special": True}
    chat = {name: name.startswith("<|") and name != ADDED[0] for name in ADDED}
    tokens = {str(rows + i): {"content": name, "rstrip": chat[name], **kept} for i, name in enumerate(ADDED)}
    settings = {"added_tokens_decoder": tokens, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return rows + len(ADDED)


def write_shards(folder: Path, weights: Weights, suffix: str = "safetensors", count: int = 2) -> None:
    """Write weights as published: numbered shards with an index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names, places = list(weights), {}
    for number in range(count):
        part = {
            name: weights[name] for name in names[number * len(names) // count : (number + 1) * len(names) // count]
        }
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_original(
    folder: Path, kind: str, suffix: str = "safetensors", dtype: torch.dtype = torch.float32, **changes: Any
) -> Weights:
    """Write a checkpoint of ``bunny`` or ``internvl``; ``changes`` go into config.json and the weights' arguments."""
    folder.mkdir()
    torch.manual_seed(0)
    layers = changes.pop("tower_layers", 2)
    if kind == "bunny":
        rows = bunny_tokenizer(folder)
        weights = bunny_weights(rows, layers)
        config = {**BUNNY, "vocab_size": rows, **changes}
        config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), rows - 1)
    else:
        rows = changes.pop("tokenizer", internvl_tokenizer)(folder)
        config = {**INTERNVL, **changes}
        weights = internvl_weights(rows)
        config["llm_config"] = {**config["llm_config"], "vocab_size": rows}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, weights, suffix)
    return weights


# ---- what the models compute ----------------------------------------------------------------------------------------


def _fc(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _ln(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _rms(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of ``(seq, heads, width)`` tensors, head by head; query heads share the key heads evenly."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out[:, head] = scores.softmax(-1) @ v[:, shared]
    return out.flatten(1)


def _rotate(x: Tensor, angles: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate the leading pairs ``(i, i + n)`` of ``(seq, heads, width)`` by ``angles`` ``(seq, n)``."""
    n = angles.shape[1]
    cos, sin = scale * angles.cos().unsqueeze(1), scale * angles.sin().unsqueeze(1)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _patches(w: Weights, name: str, image: Tensor) -> Tensor:
    weight = w[f"{name}.weight"]
    side = weight.shape[-1]
    blocks = image.unfold(1, side, side).unfold(2, side, side)
    flat = blocks.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    return flat @ weight.flatten(1).T + w[f"{name}.bias"]


def bunny_image(w: Weights, image: Tensor, layers: int) -> Tensor:
    """Projected features of one image ``(3, side, side)``: the states after ``layers`` layers of SigLIP."""
    top = "model.vision_tower.vision_tower.vision_model."
    x = _patches(w, f"{top}embeddings.patch_embedding", image) + w[f"{top}embeddings.position_embedding.weight"]
    for i in range(layers):
        layer = f"{top}encoder.layers.{i}."
        y = _ln(w, f"{layer}layer_norm1", x, 1e-6)
        q, k, v = (_fc(w, f"{layer}self_attn.{n}_proj", y).unflatten(-1, (4, 6)) for n in "qkv")
        x = x + _fc(w, f"{layer}self_attn.out_proj", _attend(q, k, v, False))
        y = F.gelu(_fc(w, f"{layer}mlp.fc1", _ln(w, f"{layer}layer_norm2", x, 1e-6)), approximate="tanh")
        x = x + _fc(w, f"{layer}mlp.fc2", y)
    return _fc(w, "model.mm_projector.2", F.gelu(_fc(w, "model.mm_projector.0", x)))


def bunny_logits(w: Weights, ids: list[int], image: Tensor, at: int, layers: int = 2) -> Tensor:
    """Logits of text with an image before position ``at``, as Bunny splices it in."""
    table = w["model.embed_tokens.weight"]
    x = torch.cat([table[ids[:at]], bunny_image(w, image, layers), table[ids[at:]]])
    angles = torch.arange(len(x)).unsqueeze(1) / 10000 ** (torch.arange(0, 8, 2) / 8)
    for i in range(BUNNY["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = _ln(w, f"{layer}input_layernorm", x, 1e-5)
        q, k, v = (_fc(w, f"{layer}self_attn.{n}_proj", y).unflatten(-1, (4, 20)) for n in "qkv")
        attended = _attend(_rotate(q, angles), _rotate(k, angles), v, True)
        inner = F.gelu(_fc(w, f"{layer}mlp.fc1", y), approximate="tanh")
        x = x + _fc(w, f"{layer}self_attn.dense", attended) + _fc(w, f"{layer}mlp.fc2", inner)
    return _fc(w, "lm_head", _ln(w, "model.final_layernorm", x, 1e-5))


def internvl_image(w: Weights, image: Tensor) -> Tensor:
    """Projected features of one tile."""
    patches = _patches(w, "vision_model.embeddings.patch_embedding", image)
    x = torch.cat([w["vision_model.embeddings.class_embedding"][0], patches])
    x = x + w["vision_model.embeddings.position_embedding"][0]
    for i in range(INTERNVL["vision_config"]["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}."
        qkv = _fc(w, f"{layer}attn.qkv", _ln(w, f"{layer}norm1", x, 1e-6)).unflatten(-1, (3, 4, 6))
        x = x + w[f"{layer}ls1"] * _fc(w, f"{layer}attn.proj", _attend(*qkv.unbind(1), False))
        y = F.gelu(_fc(w, f"{layer}mlp.fc1", _ln(w, f"{layer}norm2", x, 1e-6)))
        x = x + w[f"{layer}ls2"] * _fc(w, f"{layer}mlp.fc2", y)
    grid = x[1:].unflatten(0, (4, 4))
    corners: Callable[[int, int], list[Tensor]] = lambda r, c: [grid[r + i, c + j] for i in (0, 1) for j in (0, 1)]  # noqa: E731
    shuffled = torch.stack([torch.cat(corners(r, c)) for r in (0, 2) for c in (0, 2)])
    y = F.gelu(_fc(w, "mlp1.1", _ln(w, "mlp1.0", shuffled, 1e-5)))
    return _fc(w, "mlp1.3", y)


def internvl_logits(w: Weights, ids: list[int], tiles: Tensor, context: int) -> Tensor:
    """Logits of text whose ``context`` tokens are replaced by the features of the tiles."""
    text, top = INTERNVL["llm_config"], "language_model.model."
    x = w[f"{top}embed_tokens.weight"][ids].clone()
    x[torch.tensor(ids) == context] = torch.cat([internvl_image(w, tile) for tile in tiles])
    original, scaling = text["original_max_position_embeddings"], text["rope_scaling"]
    factors = torch.tensor(scaling["long_factor" if len(ids) > original else "short_factor"])
    angles = torch.arange(len(ids)).unsqueeze(1) / (factors * 10000 ** (torch.arange(0, 8, 2) / 8))
    scale = math.sqrt(1 + math.log(text["max_position_embeddings"] / original) / math.log(original))
    for i in range(text["num_hidden_layers"]):
        layer = f"{top}layers.{i}."
        qkv = _fc(w, f"{layer}self_attn.qkv_proj", _rms(w, f"{layer}input_layernorm", x, 1e-5))
        q, k, v = qkv.unflatten(-1, (12, 8)).split([6, 3, 3], 1)
        attended = _attend(_rotate(q, angles, scale), _rotate(k, angles, scale), v, True)
        x = x + _fc(w, f"{layer}self_attn.o_proj", attended)
        gate, up = _fc(w, f"{layer}mlp.gate_up_proj", _rms(w, f"{layer}post_attention_layernorm", x, 1e-5)).chunk(2, -1)
        x = x + _fc(w, f"{layer}mlp.down_proj", F.silu(gate) * up)
    return _fc(w, "language_model.lm_head", _rms(w, f"{top}norm", x, 1e-5))
