"""Outline: what is certain of a plan before any data is seen. Scores only decide which units fill it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..models.anatomy import (
    Layer,
    decoder_of,
    language_parameters,
    layers_of,
    names_of,
    pinned_layers,
    writer_without_bias,
)
from ..runtime.errors import UserError
from ..settings.schema import PruneConfig
from .selection import (
    TOLERANCE,
    Space,
    floor_shape,
    imbalance,
    layers_to_drop,
    local_shape,
    nominal_shape,
    require_feasible,
    scaled_protection,
    typical_shape,
    uniform_candidates,
)

FREE = ("global", "two_stage")  # selections in which the data decide the shape of every layer
Counts = tuple[tuple[int, int], ...]  # kept KV groups, or query heads of each, and channels, layer by layer


@dataclass(frozen=True)
class Outline:
    """Sizes of a plan.

    Args:
        options: Kept KV groups, or query heads of each, and channels of every kept layer, for each shape that the data
            choose from; the first one takes most alike of both. One option is exact.
        total: Parameters of the language model before.
        removed: Fewest and most parameters of it that go.
        largest: Largest share of language-model parameters that could be asked for in this way.
        free: Whether the data also decide the shape of each layer; ``options`` then holds one that removes as much.
    """

    options: tuple[Counts, ...]
    total: int
    removed: tuple[int, int]
    largest: float
    free: bool = False

    @property
    def exact(self) -> bool:
        """Whether the shape of every kept layer is known."""
        return len(self.options) == 1 and not self.free

    @property
    def achieved(self) -> tuple[float, float]:
        """Smallest and largest share of language-model parameters that go."""
        return self.removed[0] / self.total, self.removed[1] / self.total


def outline(model: nn.Module, config: PruneConfig) -> Outline:
    """Say what every plan for a model has in common, and refuse what none can meet.

    Args:
        model: The model; only its sizes are looked at, it may live on the meta device.
        config: Method (``none``, ``layerwise`` or ``widthwise``), ratio, selection, protected layers.

    Raises:
        UserError: Names the feasible range.
    """
    layers = layers_of(model, config.heads)
    whole: Counts = tuple((layer.attention.steps, layer.mlp.steps) for layer in layers)
    total = language_parameters(model)
    if config.method == "layerwise":
        count, sizes = blocks_to_drop(model, config), sorted(_droppable(model, layers))
        removed = (sum(sizes[:count]), sum(sizes[len(sizes) - count :]))
        return Outline((whole[: len(whole) - count],), total, removed, sum(sizes[1:]) / total, len(set(whole)) > 1)
    if config.method == "none":
        return Outline((whole,), total, (0, 0), 0.0)
    space = prune_space(model, config)
    largest = space.ratio(space.smallest)
    if config.ratio == 0 and config.share is None:
        return Outline((whole,), total, (0, 0), largest)
    free = config.selection in FREE and config.share is None
    ragged = free or config.protect or config.protect_mlp or config.protect_scaled
    if ragged and names_of(model).stock_only:
        raise UserError(
            f"prune: a {decoder_of(model).config.model_type} decoder has one width for all layers; set "
            "prune.selection=shape, local or floor, and protect no layer"
        )
    shapes = candidate_shapes(space, layers[0], config)
    if shapes:
        shapes.sort(key=lambda shape: imbalance(space, shape))
        options = tuple(tuple(space.counts(*shape)) for shape in shapes)
        sizes = [space.removed(option) for option in options]
        return Outline(options, total, (min(sizes), max(sizes)), largest)
    ratio = config.ratio or 0.0
    require_feasible(space, ratio)
    # The last unit may miss the ratio by half of what it holds.
    heads = [space.price(layer, 0, 1, 0) for layer in range(space.depth)] if space.off else space.group_cost
    slack = max(max(*heads, space.round_to * max(space.channel_cost)) / 2, TOLERANCE * total)
    removed = (max(0, int(ratio * total - slack)), int(min(ratio * total + slack, largest * total)))
    return Outline((tuple(space.counts(*typical_shape(space, ratio))),), total, removed, largest, True)


def candidate_shapes(space: Space, first: Layer, config: PruneConfig) -> list[tuple[int, int]]:
    """Kept groups, or query heads of each, and channels of unprotected layers that a widthwise plan chooses from.

    Args:
        space: What can be removed.
        first: A layer, for its heads.
        config: Share, selection, ratio.

    Returns:
        One shape where the configuration alone decides, several where the calibration loss does, none where each layer
        gets its own (see `FREE`).

    Raises:
        UserError: No shape meets the ratio.
    """
    if config.share is not None:
        together = first.attention.groups or first.heads_per_group
        return [nominal_shape(space, config.share, first.head_dim, together)]
    if config.selection == "local":
        return [local_shape(space, config.ratio or 0.0)]
    if config.selection == "floor":
        return [floor_shape(space, config.ratio or 0.0)]
    return uniform_candidates(space, config.ratio or 0.0) if config.selection == "shape" else []


def prune_space(model: nn.Module, config: PruneConfig) -> Space:
    """What a configuration lets a widthwise plan remove."""
    attention, mlp = [*config.protect, *config.protect_attention], [*config.protect, *config.protect_mlp]
    if config.protect_scaled:
        heads, channels = scaled_protection(len(layers_of(model)))
        attention, mlp = attention + heads, mlp + channels
    if names_of(model).stock_only:
        attention = list(range(len(layers_of(model))))
    writer = writer_without_bias(model) if config.biased else None
    if writer:
        raise UserError(
            f"prune.bias=true: the {writer} of a {decoder_of(model).config.model_type} decoder can have no bias; set "
            "prune.bias=false"
        )
    off = config.selection == "two_stage" or (config.selection == "global" and config.importance == "obs")
    return Space.of(model, attention, mlp, config.round_to, config.biased, config.heads, off)


def blocks_to_drop(model: nn.Module, config: PruneConfig) -> int:
    """Number of blocks that a layerwise plan removes.

    Raises:
        UserError: No number meets the ratio, or more blocks are asked for than there are.
    """
    sizes = _droppable(model, layers_of(model))
    if config.drop_layers is None:
        return layers_to_drop(sizes, language_parameters(model), config.ratio or 0.0)
    if not 0 <= config.drop_layers < len(sizes):
        raise UserError(
            f"prune.drop_layers={config.drop_layers}: the model has {len(sizes)} layers that can be dropped; allowed: "
            f"0..{len(sizes) - 1}"
        )
    return config.drop_layers


def _droppable(model: nn.Module, layers: Sequence[Layer]) -> list[int]:
    """Parameters of every layer that may be dropped."""
    return [sum(p.numel() for p in layer.module.parameters()) for layer in layers[pinned_layers(model) :]]
