"""The pruning plan: what is kept, as frozen data, and how the order in which units go becomes one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import (
    Component,
    decoder_of,
    describe_layer,
    language_parameters,
    layers_of,
)
from ..runtime.errors import UserError


@dataclass(frozen=True)
class LayerPlan:
    """What one kept layer keeps.

    Args:
        index: Index of the layer in the checkpoint that is pruned.
        groups: Kept KV groups, ascending. A group is one key/value head with the query heads that share it. None: the
            attention is off.
        channels: Kept MLP channels, ascending; none: the MLP is off.
        heads: Kept query heads, ascending, equally many of every KV group; empty: all of the kept groups'. Where some
            go, all groups stay.
    """

    index: int
    groups: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Number of kept groups and of kept channels."""
        return len(self.groups), len(self.channels)


@dataclass(frozen=True)
class PruningPlan:
    """Which layers, KV groups and MLP channels of a checkpoint are kept.

    Args:
        method: ``none``, ``layerwise``, ``widthwise`` or ``auto``.
        layers: Kept layers in ascending order.
        source_layers: Number of layers before pruning.
        heads_per_group: Query heads per KV group.
        requested: Requested share of language-model parameters to remove; None where no share was asked for.
        achieved: Share of language-model parameters that the plan removes.
        calibration_ids: Records the plan was made from.
        details: What ``results.json`` says of the ratio beside these two: a nominal share or number of layers, or a
            share of zeros.
        source_units: KV groups and MLP channels of every layer before pruning; empty in plans of earlier versions.
    """

    method: str
    layers: tuple[LayerPlan, ...]
    source_layers: int
    heads_per_group: int
    requested: float | None
    achieved: float
    calibration_ids: tuple[str, ...] = ()
    details: dict[str, Any] | None = None
    source_units: tuple[tuple[int, int], ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether all kept layers have the same shape, so that a stock class can hold them."""
        return len({(layer.shape, len(layer.heads)) for layer in self.layers}) == 1

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the kept layers."""
        return tuple(layer.index for layer in self.layers)

    @property
    def step(self) -> dict[str, Any]:
        """What a checkpoint's provenance says of a plan that was applied to it."""
        achieved = round(self.achieved, 6)
        return {"stage": "prune", "method": self.method, "requested": self.requested, "achieved": achieved}

    def to_json(self) -> str:
        """Serialise; `from_json` restores an equal plan."""
        return json.dumps(asdict(self), indent=None, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Restore a plan.

        Raises:
            UserError: The text is no plan.
        """
        try:
            raw = json.loads(text)
            layers = tuple(
                LayerPlan(v["index"], tuple(v["groups"]), tuple(v["channels"]), tuple(v.get("heads", ())))
                for v in raw.pop("layers")
            )
            units = tuple((groups, channels) for groups, channels in raw.pop("source_units", ()))
            return cls(layers=layers, calibration_ids=tuple(raw.pop("calibration_ids")), source_units=units, **raw)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"plan.json: not a pruning plan ({error}); write one with PruningPlan.to_json") from error

    @classmethod
    def read(cls, path: str | Path) -> PruningPlan:
        """Read a plan from a file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Ranking:
    """Removal order of one component.

    Args:
        order: All units, first to go first.
        costs: Marginal cost of each removal, in this order.
        groups: See `efficientllava.models.anatomy.Component`: so many units go at a removal. None: one.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]
    groups: int | None = None

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that the last ``count`` removals take, ascending."""
        return tuple(sorted(self.order[len(self.order) - count * (self.groups or 1) :]))

    @classmethod
    def from_scores(cls, scores: Tensor, groups: int | None = None) -> Ranking:
        """Rank by score, lowest first; ties go by index.

        Args:
            scores: ``(units,)``.
            groups: See the class; units are ranked within their group.
        """
        by_group = scores.double().cpu().view(groups or 1, -1)
        order = torch.sort(by_group, stable=True)
        first = torch.arange(len(by_group)).unsqueeze(1) * by_group.shape[1]
        units = (order.indices + first).T.flatten()
        return cls(tuple(units.tolist()), tuple(order.values.sum(0).tolist()), groups)


def ranked_plan(
    counts: Sequence[tuple[int, int]], rankings: Sequence[tuple[Ranking, Ranking]]
) -> tuple[LayerPlan, ...]:
    """Keep the highest-ranked units of every layer.

    Args:
        counts: Kept groups, or query heads of each group, and channels of every layer.
        rankings: Removal orders of the attention's units and of channels of every layer.
    """
    return tuple(
        _layer_plan(index, *kept, *pair) for index, (kept, pair) in enumerate(zip(counts, rankings, strict=True))
    )


def _layer_plan(index: int, heads: int, channels: int, attention: Ranking, mlp: Ranking) -> LayerPlan:
    units = attention.kept(heads)
    if attention.groups is None or not units:
        return LayerPlan(index, units, mlp.kept(channels))
    some = units if len(units) < len(attention.order) else ()
    return LayerPlan(index, tuple(range(attention.groups)), mlp.kept(channels), some)


Kept = tuple[Component, Sequence[int]]


def kept_units(module: nn.Module, text_config: Any, plan: LayerPlan) -> tuple[Kept, Kept]:
    """Attention and MLP of a layer as it is, each with the units that a plan keeps.

    Args:
        module: The layer.
        text_config: See `efficientllava.models.anatomy.describe_layer`.
        plan: The layer's plan.
    """
    layer = describe_layer(module, text_config, "query" if plan.heads else "group")
    return (layer.attention, plan.heads or plan.groups), (layer.mlp, plan.channels)


def plan_for(
    model: nn.Module,
    method: str,
    layers: Sequence[LayerPlan],
    requested: float | None,
    biased: bool = False,
    **more: Any,
) -> PruningPlan:
    """The plan that keeps given units, with the sizes of the model that it is for.

    Args:
        model: The checkpoint before pruning.
        method: ``layerwise``, ``widthwise`` or ``auto``.
        layers: Kept layers in ascending order.
        requested: Requested share of language-model parameters to remove; None where no share was asked for.
        biased: Whether all linear layers of the cut model will have biases.
        **more: Further fields of `PruningPlan`.
    """
    found = layers_of(model)
    return PruningPlan(
        method=method,
        layers=tuple(layers),
        source_layers=len(found),
        heads_per_group=found[0].heads_per_group,
        requested=requested,
        achieved=plan_ratio(model, layers, biased),
        source_units=tuple((layer.attention.units, layer.mlp.units) for layer in found),
        **more,
    )


def whole_layers(model: nn.Module) -> tuple[LayerPlan, ...]:
    """The plan that keeps everything."""
    return tuple(
        LayerPlan(i, tuple(range(layer.attention.units)), tuple(range(layer.mlp.units)))
        for i, layer in enumerate(layers_of(model))
    )


def plan_ratio(model: nn.Module, plans: Sequence[LayerPlan], biased: bool = False) -> float:
    """Share of language-model parameters that a plan removes, biases that it adds subtracted; without cutting."""
    layers = layers_of(model)
    by_index = {plan.index: plan for plan in plans}
    removed = 0
    for index, layer in enumerate(layers):
        plan = by_index.get(index)
        if plan is None:
            removed += sum(p.numel() for p in layer.module.parameters())
            continue
        for component, kept in kept_units(layer.module, decoder_of(model).config, plan):
            removed += (component.units - len(kept)) * component.unit_price(biased)
        removed -= sum(component.added_biases(component.units) for component in layer.components) if biased else 0
    return removed / language_parameters(model)
