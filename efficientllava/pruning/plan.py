"""The pruning plan: what is kept, as frozen data. No tensors, no model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError


@dataclass(frozen=True)
class LayerPlan:
    """What one kept layer keeps.

    Args:
        index: Index of the layer in the checkpoint that is pruned.
        groups: Kept KV groups, ascending. A group is one key/value head with the query heads that share it.
        channels: Kept MLP channels, ascending.
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
