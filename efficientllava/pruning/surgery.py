"""Cut: tensors become physically smaller, and the model becomes an instance of the class that will load it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import (
    Component,
    decoder_of,
    layers_of,
    reader_rows,
)
from ..models.pruned import LayerShape, switch_off, text_config_for
from .plan import PruningPlan, kept_units


def cut_component(component: Component, units: Sequence[int], writer_weight: Tensor | None = None) -> None:
    """Keep ``units`` of a component, in place.

    Args:
        component: An attention or MLP, as `efficientllava.models.anatomy.layers_of` describes it. The description is
            stale afterwards.
        units: Kept units, ascending; without any it is off.
        writer_weight: Refitted columns of the writer, ``(out_features, len(units) * width)``; None keeps the old ones.
    """
    gone = sorted({*range(component.units)} - {*units})
    for linear, rows in reader_rows(component, gone):  # a fused projection may have rows that belong to no unit
        stay = torch.ones(linear.out_features, dtype=torch.bool)
        stay[rows] = False
        index = stay.nonzero().squeeze(1).to(linear.weight.device)
        linear.weight = nn.Parameter(linear.weight.detach()[index], requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[index], requires_grad=linear.bias.requires_grad)
        linear.out_features = len(index)
    writer = component.writer
    if writer_weight is None:
        writer_weight = writer.weight.detach()[:, component.columns(units).to(writer.weight.device)]
    writer.weight = nn.Parameter(writer_weight.to(writer.weight.dtype), requires_grad=writer.weight.requires_grad)
    writer.in_features = writer_weight.shape[1]
    if component.kind == "attention":
        attention: Any = component.module
        heads, groups = writer.in_features // attention.head_dim, component.groups or len(units)
        # Phi3 slices its fused projection by the head counts of its configuration, so every layer gets its own copy.
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads, attention.config.num_key_value_heads = heads, groups
        if not groups:
            switch_off(attention, writer)
            return
        attention.num_key_value_groups = heads // groups
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = groups


def add_bias(component: Component, written: Tensor) -> None:
    """Give all linear layers of a whole component a bias, in place: zeros where there was none.

    Args:
        component: See `cut_component`.
        written: What is added to the writer's bias, ``(out_features,)``.
    """
    for linear in component.module.modules():
        if isinstance(linear, nn.Linear) and linear.bias is None:
            zeros = linear.weight.new_zeros(linear.out_features)
            linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    bias: nn.Parameter = component.writer.bias
    with torch.no_grad():  # not through `data`: offloading looks at the version
        bias.add_(written.to(bias))


def cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Apply a plan without refit.

    Args:
        model: An image-text-to-text model; consumed.
        plan: A plan that was made for this checkpoint.

    Returns:
        The smaller model; an instance of the class that loads its checkpoint.

    Raises:
        ValueError: The plan was made for other sizes.
    """
    check_plan(model, plan)
    decoder = decoder_of(model)
    for entry in plan.layers:
        for component, units in kept_units(decoder.layers[entry.index], decoder.config, entry):
            if len(units) < component.units:
                cut_component(component, units)
    return rebuild(model, plan.kept_layers)


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        ValueError: Names the first unit that the model lacks.
    """
    decoder = decoder_of(model)
    if len(decoder.layers) != plan.source_layers or not plan.layers:
        raise ValueError(f"plan is for {plan.source_layers} layers, the model has {len(decoder.layers)}")
    for entry in plan.layers:
        for component, units in kept_units(decoder.layers[entry.index], decoder.config, entry):
            if list(units) != sorted({*units} & {*range(component.units)}):
                raise ValueError(
                    f"plan: {component.kind} of layer {entry.index} keeps some of 0..{component.units - 1}, ascending"
                )
            groups = component.groups or 1
            found = Counter(unit // (component.units // groups) for unit in units)
            if component.groups and (len(found) < groups or len({*found.values()}) > 1 or len(entry.groups) < groups):
                raise ValueError(
                    f"plan: layer {entry.index} must keep as many query heads of each of {groups} KV groups"
                )


def pruned_config(
    model: nn.Module,
    kept: Sequence[int],
    counts: Sequence[tuple[int, int]],
    biased: bool = False,
    heads: str = "group",
) -> Any:
    """The configuration of the model that a plan leaves.

    Args:
        model: The model before, also on the meta device; unchanged.
        kept: Indices of the kept layers.
        counts: Their KV groups, or query heads of each, and channels.
        biased: Whether the plan gives all linear layers biases.
        heads: Units of attentions, see `efficientllava.models.anatomy.describe_layer`.

    Raises:
        UserError: The decoder can have no configuration with these sizes.
    """
    layers, shapes = layers_of(model, heads), []
    for index, (count, channels) in zip(kept, counts, strict=True):
        groups = layers[index].attention.groups
        per_group = layers[index].heads_per_group if groups is None else count
        shapes.append(LayerShape(per_group * (groups or count), groups or count, channels))
    return _config_of(model, kept, shapes, biased)


def _config_of(model: nn.Module, kept: Sequence[int], shapes: Sequence[LayerShape], biased: bool) -> Any:
    config: Any = copy.deepcopy(model.config)
    text = text_config_for(config.get_text_config(), kept, shapes, layers_of(model)[0].head_dim, biased)
    text._attn_implementation = decoder_of(model).config._attn_implementation
    config.text_config = text
    return config


def rebuild(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Turn a model with cut layers into an instance of the class that its checkpoint loads as.

    The weights move, nothing is copied: the new model is made on the meta device and takes over the tensors.

    Args:
        model: A model whose layers have been cut in place; consumed.
        kept: Indices of the layers to keep.

    Returns:
        The model that `transformers.AutoModelForImageTextToText.from_pretrained` would give for its saved folder.
    """
    layers = layers_of(model)
    units = [(layers[i].attention.units, layers[i].mlp.units, layers[i].heads_per_group) for i in kept]
    shapes = [LayerShape(groups * per_group, groups, channels) for groups, channels, per_group in units]
    config = _config_of(model, kept, shapes, all(c.writer.bias is not None for c in layers[kept[0]].components))
    decoder = decoder_of(model)
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    with torch.device("meta"):
        fresh: Any = type(model)(config)
    fresh.load_state_dict(model.state_dict(), strict=True, assign=True)
    if fresh.config.tie_word_embeddings:
        fresh.tie_weights()
    _take_buffers(fresh, model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(flags[name])
    fresh.generation_config = model.generation_config
    decoder.layers = nn.ModuleList()  # who still holds the old model for its tower holds no layer's weights
    return fresh.train(model.training)


def _take_buffers(fresh: nn.Module, model: nn.Module) -> None:
    # Non-persistent buffers (rotary frequencies, position ids) are in no state dict.
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        target = fresh.get_submodule(owner)
        if leaf not in target._buffers:
            raise RuntimeError(f"rebuild: {type(fresh).__name__} has no buffer {name}")
        target._buffers[leaf] = buffer
    missing = [name for name, buffer in fresh.named_buffers() if buffer.is_meta]
    missing += [name for name, parameter in fresh.named_parameters() if parameter.is_meta]
    if missing:
        raise RuntimeError(f"rebuild: without values: {missing}")


@torch.no_grad()
def reinitialise(model: nn.Module, seed: int) -> None:
    """Give a pruned language model fresh weights and leave vision tower and projector as they are, in place.

    Matrices are drawn with variance 1 / fan-in, embeddings with unit norm on average, norms become the identity.

    Args:
        model: An image-text-to-text model.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in (decoder_of(model), model.lm_head):
        for module in owner.modules():  # pyright: ignore[reportAttributeAccessIssue]
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None:
                continue
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                drawn = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
                weight.copy_(drawn)
            if bias is not None:
                bias.zero_()
