"""Decoders as llama.cpp knows them: which of its architectures holds which shapes, its metadata and its tensors.

``llama`` holds Llama, Mistral, Qwen2 and Phi3 of one shape; ``deci`` is the same computation with a number of heads and
a width per layer. Both turn neighbouring channels of a head by one angle, where transformers turns channels half a head
apart: rows of the query and key projections, and their biases, are written in the other order.

A file is written tensor by tensor, in the type that is asked for where a row has a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.anatomy import (
    Component,
    Layer,
    Reader,
    decoder_of,
    final_norm_of,
    host_type,
    layers_of,
)
from ..runtime import UserError
from ..settings.schema import BLOCKS

PARTS = {"attention": ("attn_q", "attn_k", "attn_v"), "mlp": ("ffn_gate", "ffn_up"), "plain": ("ffn_up",)}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "phi3")
REFUSED = {
    "gemma3_text": "the runtime fixes which layers see a window of tokens and lets image tokens look both ways",
    "qwen2_5_vl_text": "its image positions in two dimensions are not exported",
    "qwen3_vl_text": "its image positions in two dimensions and its DeepStack features are not exported",
}
OTHERS = {  # one shape for all layers: the runtime's name, and what helps where they have several
    "phi": ("phi2", "drop layers with prune=layerwise, or protect all heads with prune.protect_attention"),
    "qwen3": ("qwen3", "choose prune=layerwise, or prune=widthwise with prune.selection=shape"),
}
ACTIVATIONS = {"phi": ("gelu_new",)}  # of the others: silu
EMPTY = 32  # channels of zeros that stand for an MLP that is gone: a layer without any would lose its attention

BLOCK = 32  # weights of a row that share a scale, of all types of files in BLOCKS
FALLBACK = "f16"  # of a tensor whose rows are no whole number of blocks
HEAD = "q8_0"  # of the embedding and the head where the others have fewer bits, as llama-quantize keeps them wider

Tensors = Iterator[tuple[str, Callable[[], Tensor]]]


@dataclass(frozen=True)
class Decoder:
    """What a GGUF file says of a decoder.

    Args:
        architecture: llama.cpp's name for the computation.
        layers: The layers.
        model: The image-text-to-text model that they belong to.
        context: Largest number of tokens.
    """

    architecture: str
    layers: list[Layer]
    model: Any
    context: int

    def metadata(self) -> dict[str, Any]:
        """Sizes, as keys of a GGUF file; without those of rotary factors, which are tensors."""
        config, layers, name = decoder_of(self.model).config, self.layers, self.architecture
        head_dim = layers[0].head_dim
        groups = [_groups(index, layer) for index, layer in enumerate(layers)]
        heads = [count * layer.heads_per_group for count, layer in zip(groups, layers, strict=True)]
        widths = [layer.mlp.units or EMPTY for layer in layers]
        per_layer = name == "deci"
        keys = {
            "context_length": self.context,
            "embedding_length": config.hidden_size,
            "block_count": len(layers),
            "attention.head_count": heads if per_layer else heads[0],
            "attention.head_count_kv": groups if per_layer else groups[0],
            "feed_forward_length": widths if per_layer else widths[0],
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "vocab_size": decoder_of(self.model).embed_tokens.num_embeddings,
            "rope.dimension_count": _rotated(config, head_dim),
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        }
        norm = "layer_norm_epsilon" if name == "phi2" else "layer_norm_rms_epsilon"
        keys[f"attention.{norm}"] = float(config.layer_norm_eps if name == "phi2" else config.rms_norm_eps)
        return {f"{name}.{key}": value for key, value in (keys | _rope_keys(self.model)).items()}

    def tensors(self) -> Tensors:
        """Names and, when called, tensors; one at a time, so that there is never a second copy of all."""
        model = self.model
        embedding, head, norm = decoder_of(model).embed_tokens, model.lm_head, final_norm_of(model)
        yield "token_embd.weight", lambda: embedding.weight
        for name, factors in _rope_factors(model).items():
            yield name, lambda factors=factors: factors
        for index, layer in enumerate(self.layers):
            yield from ((f"blk.{index}.{name}", made) for name, made in self._layer(index, layer))
        yield from affine("output_norm", norm)
        if head.weight is not embedding.weight or self.architecture == "phi2":
            yield from affine("output", head)
        if self.architecture == "phi2" and head.bias is None:
            yield "output.bias", lambda: torch.zeros(head.out_features)  # which the runtime does not do without

    def _layer(self, index: int, layer: Layer) -> Tensors:
        module: Any = layer.module
        permuted = self.architecture in ("llama", "deci")
        if groups := _groups(index, layer):
            yield from affine("attn_norm", module.input_layernorm)
        if self.architecture != "phi2":  # attention and MLP of Phi read the same norm
            yield from affine("ffn_norm", module.post_attention_layernorm)
        if self.architecture == "qwen3":
            yield from affine("attn_q_norm", module.self_attn.q_norm)
            yield from affine("attn_k_norm", module.self_attn.k_norm)
        if layer.attention.units:
            yield from _component(layer.attention, PARTS["attention"], "attn_output", layer.head_dim * permuted)
        elif groups:
            heads = layer.heads_per_group * layer.head_dim
            yield from _zeros(layer.attention.writer, PARTS["attention"], "attn_output", (heads, *[layer.head_dim] * 2))
        if layer.mlp.units:
            kind = "mlp" if len(layer.mlp.readers) == 2 else "plain"
            yield from _component(layer.mlp, PARTS[kind], "ffn_down")
        else:
            yield from _zeros(layer.mlp.writer, PARTS["mlp"], "ffn_down", (EMPTY, EMPTY))


def _groups(index: int, layer: Layer) -> int:
    """KV groups; where there is none, one of zeros if something of it is needed: the bias, or a first layer's sizes."""
    return layer.attention.units or int(index == 0 or layer.attention.writer.bias is not None)


def _zeros(writer: Any, parts: tuple[str, ...], name: str, rows: tuple[int, ...]) -> Tensors:
    """Weights that write nothing but the bias, in place of those that are gone."""
    width, bias = writer.out_features, writer.bias
    for part, count in zip(parts, rows, strict=True):
        yield f"{part}.weight", lambda count=count: torch.zeros(count, width)
    yield f"{name}.weight", lambda: torch.zeros(width, rows[0])
    if bias is not None:
        yield f"{name}.bias", lambda: bias


def affine(name: str, module: Any) -> Tensors:
    """Weight and, where there is one, bias of a module."""
    yield f"{name}.weight", lambda: module.weight
    if getattr(module, "bias", None) is not None:
        yield f"{name}.bias", lambda: module.bias


def _component(component: Component, parts: tuple[str, ...], writer: str, permuted: int = 0) -> Tensors:
    for name, reader in zip(parts, component.readers, strict=True):
        head = permuted if name in ("attn_q", "attn_k") else 0
        yield f"{name}.weight", lambda reader=reader, head=head: _rows(reader.linear.weight, reader, component, head)
        if reader.linear.bias is not None:
            yield f"{name}.bias", lambda reader=reader, head=head: _rows(reader.linear.bias, reader, component, head)
    yield from affine(writer, component.writer)


def _rows(tensor: Any, reader: Reader, component: Component, head_dim: int) -> Tensor:
    """Rows of one part; those of query and key heads in the order of the runtime's rotation where ``head_dim`` > 0."""
    rows = tensor.detach()[reader.offset : reader.offset + component.units * reader.width]
    if not head_dim:
        return rows
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def _rotated(config: Any, head_dim: int) -> int:
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _rope_keys(model: Any) -> dict[str, Any]:
    rotary = decoder_of(model).rotary_emb
    keys: dict[str, Any] = {}
    if rotary.attention_scaling != 1.0:
        keys["rope.scaling.attn_factor"] = float(rotary.attention_scaling)
    if rotary.rope_type == "longrope":
        keys["rope.scaling.type"] = "longrope"
        keys["rope.scaling.original_context_length"] = rotary.config.rope_parameters["original_max_position_embeddings"]
    return keys


def _rope_factors(model: Any) -> dict[str, Tensor]:
    """What the runtime divides each rotary frequency by: read off the frequencies that the model computes with."""
    rotary = decoder_of(model).rotary_emb
    parameters = rotary.config.rope_parameters
    if rotary.rope_type == "longrope":
        names = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
        return {name: torch.tensor(parameters[key], dtype=torch.float32) for name, key in names.items()}
    found = rotary.inv_freq.detach().cpu().double()
    plain = float(parameters["rope_theta"]) ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
    factors = (plain / found).float()
    return {} if torch.allclose(factors, torch.ones_like(factors), atol=1e-6) else {"rope_freqs.weight": factors}


def describe(model: Any, some: Sequence[int] | None = None) -> Decoder:
    """How llama.cpp holds a decoder.

    Args:
        model: An image-text-to-text model.
        some: The layers that it has; None: all.

    Raises:
        UserError: It holds it in no way; says why.
    """
    layers = layers_of(model)
    layers = layers if some is None else [layers[index] for index in some]
    name = architecture(model, [(layer.attention.units, layer.mlp.units) for layer in layers])
    return Decoder(name, layers, model, _context(decoder_of(model).config))


def architecture(model: Any, shapes: Sequence[tuple[int, int]]) -> str:
    """The runtime's name for a decoder whose layers have been cut to some shapes.

    Args:
        model: The model, before or after; of it counts what no cut changes.
        shapes: KV groups and MLP channels of every layer that is kept.

    Raises:
        UserError: The runtime holds it in no way; says why.
    """
    config, first, rope = decoder_of(model).config, layers_of(model)[0], decoder_of(model).rotary_emb.rope_type
    host = host_type(config)
    uniform, whole = len({*shapes}) == 1, all(groups and channels for groups, channels in shapes)
    llama = "llama" if uniform and whole else "deci"
    name, fix = (llama, "") if host in LLAMA_LIKE else OTHERS.get(host, ("", ""))
    heads = name == "phi2" and shapes[0][0] * first.attention.width != config.hidden_size
    problems = {
        REFUSED.get(host, "no architecture of the runtime is known to hold it"): not name,
        f"the runtime's {name} has one shape for all layers; {fix}": host in OTHERS and not uniform,
        f"the runtime's phi2 keeps all heads; {fix}": heads,
        f"the runtime's {name} has no activation {config.hidden_act!r}": (
            config.hidden_act not in ACTIVATIONS.get(host, ("silu", "swish"))
        ),
        f"the runtime's {name} rotates whole heads, this one a part of each": (
            name != "phi2" and _rotated(config, first.head_dim) != first.head_dim
        ),
        f"rope_type {rope!r} is none that the runtime's {name} computes": (
            rope == "dynamic" or (name == "phi2" and rope != "default")
        ),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"deploy=gguf: a {host} decoder of this shape is not exported: {problem}")
    return name


def _context(config: Any) -> int:
    """Most tokens for which the runtime computes the same: it knows no sliding window in these architectures."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))


def storage(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Type that a tensor is stored in.

    Args:
        name: Its name in the file.
        shape: Its shape; the last dimension is that of a row.
        kind: One of `efficientllava.settings.schema.GGUF_TYPES`, that of the file.
    """
    if len(shape) < 2 or name.startswith("rope_") or "position_embd" in name:
        return "f32"  # norms, biases, positions and rotary factors: the runtime adds and multiplies nothing else
    if kind not in BLOCKS:
        return kind
    if len(shape) > 2 or shape[-1] % BLOCK:
        return FALLBACK
    return HEAD if name in ("token_embd.weight", "output.weight") else kind


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Callable[[], Tensor]]],
    kind: str,
) -> list[str]:
    """Write one file.

    Args:
        path: The file.
        architecture: ``general.architecture``.
        metadata: Further keys; lists and bytes are arrays.
        tensors: Names, and what makes the tensors.
        kind: One of `efficientllava.settings.schema.GGUF_TYPES`.

    Returns:
        Names of the tensors that are stored in `FALLBACK`, since their rows are no whole number of blocks.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "tokenizer.ggml.precompiled_charsmap":
            writer.add_precompiled_charsmap(value)
        else:
            number = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, number)
    whole = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_uint32("general.file_type", int(gguf.LlamaFileType[whole]))
    writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    made = [(name, make, storage(name, tuple(make().shape), kind)) for name, make in tensors]
    for name, make, stored in made:
        tensor, code = make(), gguf.GGMLQuantizationType[stored.upper()]
        count, size = gguf.GGML_QUANT_SIZES[code]
        writer.add_tensor_info(
            name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // count * size, raw_dtype=code
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make, stored in made:
        array = make().detach().cpu().float().numpy()
        writer.write_tensor_data(gguf.quants.quantize(array, gguf.GGMLQuantizationType[stored.upper()]))
    writer.close()
    return [name for name, make, stored in made if kind in BLOCKS and stored == FALLBACK and make().ndim == 2]
