"""Policies, their budget, and the moves between them. No tensors, no model."""

from __future__ import annotations

from dataclasses import dataclass

Policy = tuple[int, ...]  # one level per gene


@dataclass(frozen=True)
class Gene:
    """The attention or the MLP of one decoder layer; gene ``2 l`` is the attention of layer ``l``, ``2 l + 1`` its MLP.

    Args:
        layer: Index of the layer.
        kind: ``attention`` or ``mlp``.
        amounts: Share of the gene's units (structured) or weights (masks) that each level removes, ascending, [0, 1).
    """

    layer: int
    kind: str
    amounts: tuple[float, ...]

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.amounts)
