"""Text configurations of pruned decoders, and the registered classes that build a decoder layer by layer.

Two formats leave this project. *Uniform*: every layer has the same heads and channels, and a stock class loads it; a
Llama whose head count does not divide its hidden size is written as Mistral with an explicit ``head_dim``, which
computes the same function. *Per layer*: transformers' own field ``per_layer_config`` inside one of our registered text
configurations, ``pruned_<host>``; loading needs ``import efficientllava``. There a layer may lack heads or channels:
its linear layers are empty.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..runtime.errors import UserError
from .anatomy import (
    ALWAYS,
    DECODERS,
    PER_LAYER_PREFIX,
    describe_layer,
    host_type,
)


class LayerShape(NamedTuple):
    """Sizes of one decoder layer.

    Args:
        heads: Query heads; 0: the attention is off.
        groups: Key/value heads.
        channels: MLP channels; 0: the MLP is off.
    """

    heads: int
    groups: int
    channels: int

    def overrides(self) -> dict[str, int]:
        """The configuration fields that these sizes go into."""
        return {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.channels,
        }


def is_per_layer(config: Any) -> bool:
    """Whether a text configuration is one of ours."""
    return str(config.model_type).startswith(PER_LAYER_PREFIX)


def text_config_for(
    source: Any, kept: Sequence[int], shapes: Sequence[LayerShape], head_dim: int, biased: bool = False
) -> Any:
    """Build the text configuration of a pruned decoder.

    Args:
        source: Text configuration before pruning; stays unchanged.
        kept: Indices of the kept layers.
        shapes: Sizes of the kept layers.
        head_dim: Width of one head; does not change.
        biased: Whether all linear layers have biases, see `efficientllava.models.anatomy.DecoderNames.biases`.

    Returns:
        A stock configuration where all shapes are equal and a stock class can hold them, else a per-layer one.

    Raises:
        UserError: The decoder can have no per-layer configuration and needs one.
    """
    fields: dict[str, Any] = {**copy.deepcopy(source.to_dict()), "num_hidden_layers": len(kept), "head_dim": head_dim}
    for name in ("model_type", "per_layer_config", "allow_global_per_layer_attribute_access", "transformers_version"):
        fields.pop(name, None)
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][i] for i in kept]
    host = host_type(source)
    if biased:
        fields |= {name: True for name in DECODERS[host].biases if name not in (None, ALWAYS)}
    stock: Any = CONFIG_MAPPING
    whole = LayerShape(source.num_attention_heads, source.num_key_value_heads, shapes[0].channels)
    if DECODERS[host].stock_only and set(shapes) != {whole}:
        raise UserError(
            f"model: a {host} decoder keeps its heads and has one width for all layers; drop layers, or cut channels "
            "alone with prune.selection=shape, local or floor and without prune.protect"
        )
    if len(set(shapes)) == 1 and all(shapes[0]):
        fields |= shapes[0].overrides()
        # Some validators take hidden_size / heads for the width of a head even when head_dim is explicit.
        with contextlib.suppress(StrictDataclassError):
            return stock[host](**fields)
        if host == "llama" and not (fields["attention_bias"] or fields["mlp_bias"]):
            shared = {name: fields[name] for name in stock["mistral"].__annotations__ if name in fields}
            return stock["mistral"](**{**shared, "sliding_window": None})
    widest = {name: max(shape.overrides()[name] for shape in shapes) for name in shapes[0].overrides()}
    config = per_layer_classes(host)[0](**(fields | widest))
    config.per_layer_config = {
        index: changed
        for index, shape in enumerate(shapes)
        if (changed := {name: value for name, value in shape.overrides().items() if value != widest[name]})
    }
    config.allow_global_per_layer_attribute_access = True
    return config


@functools.cache
def per_layer_classes(host: str) -> tuple[Any, Any]:
    """Make the registered configuration and model class of a host decoder.

    Args:
        host: Stock ``model_type``, a key of `efficientllava.models.anatomy.DECODERS`.

    Returns:
        ``(configuration class, model class)``.
    """
    base: Any = CONFIG_MAPPING[host]

    def validate_architecture(self: Any) -> None:
        """Check what per-layer sizes must satisfy; the host's rule (hidden size % heads == 0) does not apply."""
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def validate_rope(self: Any) -> None:
        """Check the rotary embedding by the common rules; Phi-3's own take hidden size / heads for the head's width."""
        super(base, self).validate_rope()

    def __iter__(self: Any) -> Any:
        """Names of the fields that all layers share; who walks over all of them does not look at the others."""
        return (name for name in super(base, self).__iter__() if name not in (self.per_layer_attributes or ()))

    namespace = {
        "__doc__": f"Text configuration of a pruned {host} decoder whose layers differ in size.",
        "__module__": __name__,
        "model_type": PER_LAYER_PREFIX + host,
        "validate_architecture": validate_architecture,
        "validate_rope": validate_rope,
        "__iter__": __iter__,
    }
    config_class = type(f"Pruned{base.__name__}", (base,), namespace)
    return config_class, _model_class(host, config_class)


def _model_class(host: str, config_class: Any) -> Any:
    base: Any = MODEL_MAPPING[CONFIG_MAPPING[host]]
    layer_class = getattr(sys.modules[base.__module__], DECODERS[host].layer)

    def __init__(self: Any, config: Any) -> None:
        # The host's constructor builds everything but the layers, so that no full-size layer is ever allocated.
        empty = copy.deepcopy(config)
        empty.num_hidden_layers = 0
        empty.per_layer_config = {}
        base.__init__(self, empty)
        config._attn_implementation = empty._attn_implementation
        self.config = config
        self.layers = nn.ModuleList(
            _layer(layer_class, config.per_layer_config[index], index) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # `set_attn_implementation` changes the decoder's configuration only; masks and layers must agree.
        for layer in self.layers:
            layer.self_attn.config._attn_implementation_internal = self.config._attn_implementation
        return base.forward(self, *args, **kwargs)

    namespace = {
        "__doc__": f"A {host} decoder built from one configuration per layer.",
        "__module__": __name__,
        "__init__": __init__,
        "forward": forward,
        "config_class": config_class,
    }
    return type(f"Pruned{base.__name__}", (base,), namespace)


def _layer(layer_class: Any, config: Any, index: int) -> nn.Module:
    """A decoder layer of the host's class; without heads or channels, some of its linear layers are empty."""
    if config.num_attention_heads and config.intermediate_size:
        return layer_class(config, index)
    some = copy.copy(config)
    if not config.num_attention_heads:
        some.num_attention_heads = some.num_key_value_heads = 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        layer = layer_class(some, index)
        if not config.num_attention_heads:
            layer.self_attn.config = config
            attention = describe_layer(layer, config).attention
            for linear in {reader.linear for reader in attention.readers}:
                linear.__init__(linear.in_features, 0, linear.bias is not None)
            attention.writer.__init__(0, attention.writer.out_features, attention.writer.bias is not None)
            switch_off(layer.self_attn, attention.writer)
    return layer


def switch_off(attention: Any, writer: nn.Module) -> None:
    """Let an attention whose linear layers are empty write nothing but the writer's bias."""
    name = next(name for name, part in attention.named_children() if part is writer)
    attention.__class__ = _without_heads(type(attention), name)


@functools.cache
def _without_heads(host: Any, writer: str) -> Any:
    def forward(self: Any, hidden_states: Tensor, *_: Any, **given: Any) -> Any:
        cache = given.get("cache", given.get("past_key_values"))  # as transformers called it once
        if cache is not None:  # what has no keys would count as no position
            positions = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(positions, positions, self.layer_idx)
        return getattr(self, writer)(hidden_states[..., :0]), None

    return type(f"{host.__name__}WithoutHeads", (host,), {"__module__": __name__, "forward": forward})


def _admit(composite: str) -> None:
    """Let a composite configuration that names the class of its text configuration take a per-layer one as well."""
    host: Any = CONFIG_MAPPING[composite]
    stock = host.__post_init__

    def __post_init__(self: Any, **kwargs: Any) -> None:
        text = self.text_config
        if isinstance(text, dict) and str(text.get("model_type")).startswith(PER_LAYER_PREFIX):
            self.text_config = AutoConfig.for_model(**text)
        stock(self, **kwargs)

    host.__post_init__ = __post_init__


def register() -> None:
    """Register the per-layer classes of every supported decoder with transformers; calling it again does nothing."""
    for host, names in DECODERS.items():
        name = PER_LAYER_PREFIX + host
        if name in CONFIG_MAPPING or names.stock_only:
            continue
        if names.composite:
            _admit(names.composite)
        config_class, model_class = per_layer_classes(host)
        AutoConfig.register(name, config_class)
        AutoModel.register(config_class, model_class)


def require_supported(config: Any) -> None:
    """Refuse a text configuration whose decoder is in no table row, before any weight is read.

    Raises:
        UserError: Names the decoder and the file where a row is added.
    """
    host = host_type(config)
    if host == "phi" and getattr(config, "qk_layernorm", False):
        raise UserError("model: phi with qk_layernorm=True is not supported: its norms are as wide as the attention")


register()
