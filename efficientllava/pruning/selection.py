"""Select: a requested ratio becomes kept counts, and with a ranking a plan. The achieved ratio is solved for."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..models.anatomy import Component, language_parameters, layers_of
from ..runtime.errors import UserError

TOLERANCE = 0.01  # widthwise plans meet the request within one point


@dataclass(frozen=True)
class Space:
    """What a widthwise plan can remove from a model.

    Args:
        groups: KV groups of every layer, or query heads of each group.
        channels: MLP channels of every layer.
        group_cost: Parameters of one KV group, or of one query head of every group, per layer.
        channel_cost: Parameters of one channel, per layer.
        total: Parameters of the language model, embeddings and head included.
        whole_attention: Layers whose heads are protected.
        whole_mlp: Layers whose channels are protected.
        round_to: Kept channels are a multiple of this, or all.
        added: Parameters of the biases that all layers get.
        off: Whether a layer can lose all heads, or all channels (arXiv 2501.17771).
        off_cost: Parameters that go with the last unit of an attention beside its own, per layer: where units are query
            heads, keys and values; empty: none.
    """

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    group_cost: tuple[int, ...]
    channel_cost: tuple[int, ...]
    total: int
    whole_attention: frozenset[int] = frozenset()
    whole_mlp: frozenset[int] = frozenset()
    round_to: int = 1
    added: int = 0
    off: bool = False
    off_cost: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        protect_attention: Sequence[int] = (),
        protect_mlp: Sequence[int] = (),
        round_to: int = 1,
        biased: bool = False,
        heads: str = "group",
        off: bool = False,
    ) -> Space:
        """Read the space off a model.

        Args:
            model: An image-text-to-text model; may live on the meta device.
            protect_attention: Layers whose heads stay; negative indices count from the end.
            protect_mlp: Layers whose channels stay.
            round_to: See the class.
            biased: Whether all linear layers of the cut model have biases.
            heads: Units of attentions, see `efficientllava.models.anatomy.describe_layer`.
            off: See the class.

        Raises:
            UserError: A protected layer does not exist.
        """
        layers = layers_of(model, heads)
        attention, mlp = [layer.attention for layer in layers], [layer.mlp for layer in layers]

        def price(component: Component) -> int:
            return component.unit_price(biased) * (component.groups or 1)

        whole = [layer.attention for layer in layers_of(model)]
        return cls(
            tuple(component.steps for component in attention),
            tuple(component.steps for component in mlp),
            tuple(map(price, attention)),
            tuple(component.unit_price(biased) for component in mlp),
            language_parameters(model),
            _indices("prune.protect or prune.protect_attention", protect_attention, len(layers)),
            _indices("prune.protect or prune.protect_mlp", protect_mlp, len(layers)),
            round_to,
            sum(c.added_biases(c.units) for layer in layers_of(model) for c in layer.components) if biased else 0,
            off,
            tuple(w.steps * price(w) - a.steps * price(a) for w, a in zip(whole, attention, strict=True)),
        )

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.groups)

    def removed(self, counts: Sequence[tuple[int, int]]) -> int:
        """Parameters that go when layer ``l`` keeps ``counts[l] = (groups, channels)``; added biases are subtracted."""
        return -self.added + sum(
            self.price(i, 0, self.groups[i], groups) + self.price(i, 1, self.channels[i], channels)
            for i, (groups, channels) in enumerate(counts)
        )

    def price(self, layer: int, kind: int, before: int, after: int) -> int:
        """Parameters that go when a layer's attention (kind 0) or MLP (kind 1) keeps ``after`` of ``before`` units."""
        last = self.off_cost[layer] if self.off_cost and kind == 0 and before > after == 0 else 0
        return (before - after) * (self.group_cost, self.channel_cost)[kind][layer] + last

    def ratio(self, counts: Sequence[tuple[int, int]]) -> float:
        """Share of language-model parameters that go, see `removed`."""
        return self.removed(counts) / self.total

    def counts(self, groups: int, channels: int) -> list[tuple[int, int]]:
        """Kept counts of every layer when all unprotected layers keep the same; already smaller layers stay so."""
        return [
            (
                self.groups[i] if i in self.whole_attention else min(groups, self.groups[i]),
                self.channels[i] if i in self.whole_mlp else min(channels, self.channels[i]),
            )
            for i in range(self.depth)
        ]

    @property
    def smallest(self) -> list[tuple[int, int]]:
        """The least that layers keep: one KV group, or query head of each, and ``round_to`` channels, or nothing."""
        return self.counts(0, 0) if self.off else self.counts(1, self.round_to)

    @property
    def allowed_channels(self) -> list[int]:
        """Numbers of channels that unprotected layers may keep, ascending."""
        widest = max(self.channels)
        return [*range(self.round_to, widest, self.round_to), widest]


def _indices(key: str, values: Sequence[int], depth: int) -> frozenset[int]:
    bad = [v for v in values if not -depth <= v < depth]
    if bad:
        raise UserError(f"{key}={list(values)}: the model has layers 0..{depth - 1}; remove {bad}")
    return frozenset(v % depth for v in values)


def scaled_protection(depth: int) -> tuple[list[int], list[int]]:
    """Layers that the published widthwise models leave whole, scaled to a depth.

    Of 32 layers, heads are pruned in 3-30 and channels in 4-29 (arXiv 2604.24380, released code's 2024 defaults).

    Returns:
        Protected layers of the attention and of the MLP.
    """

    def outer(first: int, last: int) -> list[int]:
        head, tail = math.ceil(first * depth / 32), math.ceil(last * depth / 32)
        return [*range(head), *range(depth - tail, depth)]

    return outer(3, 1), outer(4, 2)


def require_feasible(space: Space, ratio: float) -> None:
    """Refuse a ratio that no widthwise plan reaches.

    Raises:
        UserError: Names the feasible maximum.
    """
    largest = space.ratio(space.smallest)
    if ratio > largest + TOLERANCE:
        some = "one KV group and prune.round_to channels stay in every unprotected layer"
        least = "protected layers, embeddings and norms stay" if space.off else some
        raise UserError(
            f"prune.ratio={ratio:g}: at most {largest:.3f} can be removed widthwise ({least}); lower prune.ratio"
        )


def uniform_candidates(space: Space, ratio: float) -> list[tuple[int, int]]:
    """All shapes ``(groups, channels)``, the same for every unprotected layer, that meet the ratio within one point.

    Args:
        space: What can be removed.
        ratio: Requested share of language-model parameters, (0, 1).

    Returns:
        Shapes with the number of groups ascending; for each number of groups the best number of channels.

    Raises:
        UserError: No shape meets the ratio.
    """
    require_feasible(space, ratio)
    shapes = _shapes(space, ratio)
    result = [shape for shape in shapes if _miss(space, ratio, shape) <= TOLERANCE]
    if not result:
        nearest = space.ratio(space.counts(*min(shapes, key=lambda shape: _miss(space, ratio, shape))))
        ask = f"is {nearest:.3f}; ask for that, or" if nearest > 0 else "removes nothing;"
        raise UserError(
            f"prune.ratio={ratio:g}: the nearest ratio that prune.round_to={space.round_to} allows {ask} lower "
            "prune.round_to"
        )
    return list({tuple(space.counts(*shape)): shape for shape in result}.values())


def _shapes(space: Space, ratio: float) -> list[tuple[int, int]]:
    """For each number of groups the number of channels that comes nearest to a ratio."""
    return [(groups, _channels_for(space, ratio, groups)) for groups in range(1, max(space.groups) + 1)]


def _miss(space: Space, ratio: float, shape: tuple[int, int]) -> float:
    return abs(space.ratio(space.counts(*shape)) - ratio)


def _channels_for(space: Space, ratio: float, groups: int) -> int:
    """The allowed number of channels that comes nearest to a ratio beside ``groups`` kept groups.

    The ratio falls with every channel that is kept, but not by the same amount where layers are of different sizes.
    """
    allowed = space.allowed_channels
    first = bisect.bisect_left(allowed, -ratio, key=lambda channels: -space.ratio(space.counts(groups, channels)))
    near = allowed[max(first - 1, 0) : first + 1]
    return min(near, key=lambda channels: abs(space.ratio(space.counts(groups, channels)) - ratio))


def local_shape(space: Space, ratio: float) -> tuple[int, int]:
    """The shape that removes the same share of groups and of channels, as nearly as whole groups allow.

    Args:
        space: What can be removed.
        ratio: Requested share of language-model parameters.

    Returns:
        Kept ``(groups, channels)`` of every unprotected layer.
    """
    return min(uniform_candidates(space, ratio), key=lambda shape: imbalance(space, shape))


def typical_shape(space: Space, ratio: float) -> tuple[int, int]:
    """A shape that removes about as much as a ratio asks for: `local_shape`, also where none meets the ratio."""
    shapes = _shapes(space, ratio)
    missed = [max(_miss(space, ratio, shape), TOLERANCE) for shape in shapes]
    return min(zip(missed, shapes, strict=True), key=lambda pair: (pair[0], imbalance(space, pair[1])))[1]


def floor_shape(space: Space, ratio: float) -> tuple[int, int]:
    """The shape that loses a share of its groups, rounded down as in released code; channels make up the rest.

    The share is the one of all that can be removed, as if groups and channels could be parted at will.

    Args:
        space: What can be removed.
        ratio: Requested share of language-model parameters.

    Returns:
        Kept ``(groups, channels)`` of every unprotected layer.
    """
    shapes, groups = dict(uniform_candidates(space, ratio)), max(space.groups)
    share = ratio * space.total / (space.removed(space.counts(0, 0)) + space.added)
    kept = min(shapes, key=lambda count: abs(count - (groups - int(share * groups + 1e-9))))
    return kept, shapes[kept]


def imbalance(space: Space, shape: tuple[int, int]) -> float:
    """Distance between the kept shares of groups and of channels."""
    return abs(shape[0] / max(space.groups) - shape[1] / max(space.channels))


def nominal_shape(space: Space, share: float, head_dim: int, heads_per_group: int) -> tuple[int, int]:
    """Kept counts for a nominal share per pruned layer, with the published rounding.

    Removed channels are ``C - int(C (1 - share))``; removed heads are the same count over all head channels, divided by
    the head width and rounded down (arXiv 2604.24380, released code). With GQA whole groups of heads go. One group and
    one channel always stay.
    """
    groups, channels = max(space.groups), max(space.channels)
    width = groups * heads_per_group * head_dim
    removed_heads = (width - int(width * (1 - share))) // head_dim
    return max(1, groups - removed_heads // heads_per_group), max(1, int(channels * (1 - share)))


def global_counts(
    space: Space, ratio: float, costs: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> list[tuple[int, int]]:
    """Rank heads and channels of all layers together, by cost per parameter removed, and remove the cheapest.

    Args:
        space: What can be removed.
        ratio: Requested share of language-model parameters.
        costs: Per layer, marginal costs of its groups and of its channels in removal order, in one common unit.
            Those of `flap` are scores times parameters: what is ranked is the score itself, as published (AL-AM).

    Returns:
        Kept groups and channels of every layer.

    Raises:
        UserError: The ratio is infeasible.
    """
    require_feasible(space, ratio)
    kept = [list(pair) for pair in zip(space.groups, space.channels, strict=True)]
    steps = (1, space.round_to)
    least = (0, 0) if space.off else steps
    protected = (space.whole_attention, space.whole_mlp)
    heap: list[tuple[float, int, int]] = []

    def push(layer: int, kind: int) -> None:
        step = kept[layer][kind] % steps[kind] or steps[kind]
        start = len(costs[layer][kind]) - kept[layer][kind]
        if layer not in protected[kind] and kept[layer][kind] - step >= least[kind]:
            price = space.price(layer, kind, kept[layer][kind], kept[layer][kind] - step)
            cost = sum(costs[layer][kind][start : start + step]) / price
            heapq.heappush(heap, (cost, layer, kind))

    for layer in range(space.depth):
        push(layer, 0)
        push(layer, 1)
    missing = ratio * space.total + space.added
    while heap and missing > 0:
        _, layer, kind = heapq.heappop(heap)
        step = kept[layer][kind] % steps[kind] or steps[kind]
        price = space.price(layer, kind, kept[layer][kind], kept[layer][kind] - step)
        beyond = price - missing
        if beyond > missing or (heap and beyond > TOLERANCE * space.total):
            continue  # overshoots by more than it closes, or where something smaller may not
        kept[layer][kind] -= step
        missing -= price
        push(layer, kind)
    return [(groups, channels) for groups, channels in kept]


def layers_to_drop(layer_parameters: Sequence[int], total: int, ratio: float) -> int:
    """Number of blocks whose removal comes nearest to a ratio.

    Args:
        layer_parameters: Parameters of every block.
        total: Parameters of the language model.
        ratio: Requested share, [0, 1).

    Raises:
        UserError: The nearest number is 0 although more was asked for, or no block would stay.
    """
    if ratio == 0:
        return 0
    block = sum(layer_parameters) / len(layer_parameters) / total
    count = math.floor(ratio / block + 0.5)
    largest = len(layer_parameters) - 1
    if not largest:
        raise UserError(f"prune.ratio={ratio:g}: the model has one block, which stays; choose prune=widthwise")
    if count < 1 or count > largest:
        raise UserError(
            f"prune.ratio={ratio:g}: layerwise pruning removes whole blocks of {block:.3f} each, so the ratio must be "
            f"0 or between {block / 2:.3f} and {(largest + 0.5) * block:.3f} here; "
            "change prune.ratio or set prune.drop_layers"
        )
    return count
