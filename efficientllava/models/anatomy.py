"""Where a backbone keeps its decoder, heads, channels and projector: the only place that knows attribute names.

A decoder layer has two prunable *components*: ``attention``, whose units are KV groups (one key/value head with all the
query heads that share it) or query heads (of which one of every group goes at a time), and ``mlp``, whose units are
channels. A component is described by its *readers* (linear layers whose rows belong to the units; fused projections
appear once per part, as row offsets) and its *writer* (the linear layer whose columns belong to the units). Scoring,
refit and surgery are written against components alone.

To support another decoder, add one row to `DECODERS`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime.errors import UserError

PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")


@dataclass(frozen=True)
class DecoderNames:
    """Attribute names of one decoder family.

    Args:
        layer: Class name of a decoder layer in the family's modelling file.
        qkv: Query, key and value projections, or the one fused projection.
        attention_out: Writer of the attention.
        mlp_in: Gate and up projections, the one plain input projection, or the one fused projection.
        mlp_out: Writer of the MLP.
        gated: Whether the MLP has a gate.
        post_norms: Whether a norm stands between a writer and the residual stream.
        composite: ``model_type`` of the only model that has this decoder, where its configuration names the decoder's.
        stock_only: Whether the stock class alone can hold the decoder, and its heads and a width for all layers.
        biases: Configuration fields that give the linear layers of the attention, and of the MLP, biases; `ALWAYS`:
            they have them anyway, None: the writer can have none.
    """

    layer: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    attention_out: str = "o_proj"
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: str = "down_proj"
    gated: bool = True
    post_norms: bool = False
    composite: str | None = None
    stock_only: bool = False
    biases: tuple[str | None, str | None] = (None, None)


ALWAYS = "always"

# model_type of the text configuration -> names
DECODERS: dict[str, DecoderNames] = {
    "llama": DecoderNames("LlamaDecoderLayer", biases=("attention_bias", "mlp_bias")),
    "mistral": DecoderNames("MistralDecoderLayer"),
    "qwen2": DecoderNames("Qwen2DecoderLayer"),
    "qwen3": DecoderNames("Qwen3DecoderLayer", biases=("attention_bias", None)),
    "phi": DecoderNames(
        "PhiDecoderLayer",
        attention_out="dense",
        mlp_in=("fc1",),
        mlp_out="fc2",
        gated=False,
        biases=(ALWAYS, ALWAYS),
    ),
    "phi3": DecoderNames("Phi3DecoderLayer", qkv=("qkv_proj",), mlp_in=("gate_up_proj",)),
    "gemma3_text": DecoderNames(
        "Gemma3DecoderLayer", post_norms=True, composite="gemma3", biases=("attention_bias", None)
    ),
    "qwen2_5_vl_text": DecoderNames("Qwen2_5_VLDecoderLayer", stock_only=True),
    "qwen3_vl_text": DecoderNames("Qwen3VLTextDecoderLayer", composite="qwen3_vl", biases=("attention_bias", None)),
}
PER_LAYER_PREFIX = "pruned_"  # model_type of our registered per-layer configurations: prefix + host type


class Reader(NamedTuple):
    """Rows of a linear layer that belong to the units of a component.

    Args:
        linear: The projection.
        offset: First row of unit 0.
        width: Rows per unit.
    """

    linear: nn.Linear
    offset: int
    width: int


@dataclass(frozen=True)
class Component:
    """The attention or the MLP of one decoder layer.

    Args:
        kind: ``attention`` or ``mlp``.
        module: The module that owns the projections.
        readers: Projections whose rows belong to the units.
        writer: Projection whose columns belong to the units.
        units: Number of KV groups, query heads or channels.
        width: Columns of the writer per unit.
        groups: Where the units are query heads: KV groups, each with as many successive ones. One head of every group
            goes at a time, so that the grouping stays. None: units go one by one.
    """

    kind: str
    module: nn.Module
    readers: tuple[Reader, ...]
    writer: nn.Linear
    units: int
    width: int
    groups: int | None = None

    @property
    def steps(self) -> int:
        """How often units can go: `units` times, or once for each query head of a KV group."""
        return self.units // (self.groups or 1)

    def added_biases(self, units: int) -> int:
        """Parameters that biases of all linear layers add where the component keeps a number of units."""
        rows = sum(r.width * units for r in self.readers if r.linear.bias is None)
        return rows + (self.writer.out_features if self.writer.bias is None else 0)

    def unit_price(self, biased: bool = False) -> int:
        """Parameters that go with one unit, biases of the readers included, which all have some if ``biased``."""
        rows = sum(r.width * (r.linear.in_features + (biased or r.linear.bias is not None)) for r in self.readers)
        return rows + self.width * self.writer.out_features

    @property
    def axes(self) -> dict[Tensor, int]:
        """Weights with the axis that belongs to units: 0, rows, for readers, and 1, columns, for the writer."""
        return {self.writer.weight: 1, **{reader.linear.weight: 0 for reader in self.readers}}

    def columns(self, units: Sequence[int]) -> Tensor:
        """Columns of the writer that belong to ``units``, ``(len(units) * width,)``."""
        return expand(torch.as_tensor(units, dtype=torch.long), self.width)

    def reduce(self, lines: Mapping[Tensor, Tensor]) -> Tensor:
        """Sum scores of all rows, or columns, of weights, see `axes`, to per-unit scores ``(units,)``."""
        total = self.reduce_columns(lines[self.writer.weight])
        for reader in self.readers:
            rows = lines[reader.linear.weight][reader.offset : reader.offset + self.units * reader.width]
            total = total + rows.view(self.units, reader.width).sum(1)
        return total

    def reduce_columns(self, scores: Tensor) -> Tensor:
        """Sum per-column scores ``(in_features,)`` of the writer to per-unit scores ``(units,)``."""
        return scores.view(self.units, self.width).sum(1)


def expand(units: Tensor, width: int) -> Tensor:
    """Rows or columns of units, ``(len(units) * width,)``."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def reader_rows(component: Component, units: Sequence[int]) -> Iterator[tuple[nn.Linear, Tensor]]:
    """Yield every distinct reader of a component with the rows that belong to ``units``, in order.

    Fused projections are yielded once, their parts concatenated as they lie in memory.
    """
    rows: dict[int, tuple[nn.Linear, list[Tensor]]] = {}
    for reader in component.readers:
        own = reader.offset + expand(torch.as_tensor(units, dtype=torch.long), reader.width)
        rows.setdefault(id(reader.linear), (reader.linear, []))[1].append(own)
    for linear, parts in rows.values():
        yield linear, torch.cat(parts)


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Args:
        module: The layer.
        attention: Its attention component.
        mlp: Its MLP component; units are channels.
        heads_per_group: Query heads per KV group.
        head_dim: Width of one head.
    """

    module: nn.Module
    attention: Component
    mlp: Component
    heads_per_group: int
    head_dim: int

    @property
    def components(self) -> tuple[Component, Component]:
        """Attention and MLP, in this order."""
        return self.attention, self.mlp


def projector_of(model: nn.Module) -> nn.Module:
    """Return the vision projector of an image-text-to-text model."""
    for name in PROJECTORS:
        with contextlib.suppress(AttributeError):
            return operator.attrgetter(name)(model.model)
    raise UserError(f"model {type(model).__name__}: no vision projector among {PROJECTORS}; add its name to {__name__}")


def decoder_of(model: nn.Module) -> Any:
    """Return the bare decoder (embeddings, ``layers``, final norm) of an image-text-to-text model."""
    return model.get_decoder()  # pyright: ignore[reportCallIssue]


def final_norm_of(model: nn.Module) -> nn.Module:
    """Return the norm between the last decoder layer and the head."""
    decoder = decoder_of(model)
    return decoder.final_layernorm if hasattr(decoder, "final_layernorm") else decoder.norm


def names_of(model: nn.Module) -> DecoderNames:
    """Return the table row of a model's decoder."""
    return DECODERS[host_type(decoder_of(model).config)]


def writer_without_bias(model: nn.Module) -> str | None:
    """Name of a writer that can have no bias in the classes that load the model's decoder; None where both can."""
    names = names_of(model)
    writers = zip((names.attention_out, names.mlp_out), names.biases, strict=True)
    return next((writer for writer, field in writers if field is None), None)


def pinned_layers(model: nn.Module) -> int:
    """Count the first layers that may not be dropped: DeepStack adds image features after each of them."""
    vision = getattr(model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def host_type(text_config: Any) -> str:
    """Return the stock ``model_type`` of a text configuration, also of a per-layer one.

    Raises:
        UserError: The decoder is in no row of `DECODERS`.
    """
    name = str(text_config.model_type).removeprefix(PER_LAYER_PREFIX)
    if name not in DECODERS:
        raise UserError(
            f"model: decoder {name!r} is not supported; supported: {', '.join(sorted(DECODERS))}; "
            "a row in efficientllava/models/anatomy.py adds one"
        )
    return name


def parameters(model: nn.Module) -> int:
    """All parameters: of a model its vision tower, projector and language model; tied weights once."""
    return sum(p.numel() for p in model.parameters())


def language_parameters(model: nn.Module) -> int:
    """Count the language model: embeddings, decoder layers, final norm and head; tied weights once."""
    return parameters(nn.ModuleList([decoder_of(model), model.lm_head]))  # pyright: ignore[reportArgumentType]


def sizes(model: nn.Module) -> dict[str, int]:
    """What is known of a model without running it: ``parameters`` and ``language_parameters``."""
    return {"parameters": parameters(model), "language_parameters": language_parameters(model)}


def layers_of(model: nn.Module, heads: str = "group") -> list[Layer]:
    """Describe every decoder layer as it is now; sizes are read off the weights, so pruned models are seen as cut.

    Args:
        model: The model.
        heads: Units of attentions, see `describe_layer`.
    """
    decoder = decoder_of(model)
    return [describe_layer(module, decoder.config, heads) for module in decoder.layers]


def describe_layer(module: Any, text_config: Any, heads: str = "group") -> Layer:
    """Describe one decoder layer.

    Args:
        module: A decoder layer; need not be part of a model.
        text_config: The decoder's configuration; only its ``model_type`` is read.
        heads: ``group``: units of the attention are KV groups; ``query``: query heads, where a group has several.
    """
    names = DECODERS[host_type(text_config)]
    attention, mlp = module.self_attn, module.mlp
    head_dim, per_group = int(attention.head_dim), int(attention.num_key_value_groups)
    writer, mlp_writer = getattr(attention, names.attention_out), getattr(mlp, names.mlp_out)
    groups, channels = writer.in_features // (per_group * head_dim), mlp_writer.in_features
    qkv = _readers(attention, names.qkv, (per_group * head_dim, head_dim, head_dim), groups)
    unit = Component("attention", attention, qkv, writer, groups, per_group * head_dim)
    if heads == "query" and per_group > 1:
        queries = (Reader(qkv[0].linear, 0, head_dim),)
        unit = Component("attention", attention, queries, writer, groups * per_group, head_dim, groups)
    inputs = _readers(mlp, names.mlp_in, (1,) * (1 + names.gated), channels)
    return Layer(module, unit, Component("mlp", mlp, inputs, mlp_writer, channels, 1), per_group, head_dim)


def _readers(owner: Any, names: tuple[str, ...], widths: Sequence[int], units: int) -> tuple[Reader, ...]:
    """Projections, each with its rows per unit; where one is all of them, their parts lie one behind the other."""
    fused = len(names) < len(widths)
    linears = [getattr(owner, name) for name in (names[:1] * len(widths) if fused else names)]
    offsets = [units * sum(widths[:part]) if fused else 0 for part in range(len(widths))]
    return tuple(Reader(*each) for each in zip(linears, offsets, widths, strict=True))
