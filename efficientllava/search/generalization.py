"""Generalization gap of a policy, from norms that a level table holds: no forward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearNorms:
    """Norms of one linear of a gene at one level; fused projections are one linear.

    Args:
        weights: Number of weights ``n``.
        dense: ``||W||^2`` of the dense weights.
        masked: ``||W * M||^2`` of the dense weights that the level keeps.
        change: ``||What - W||^2``, what the level changes, compensation included; removed weights count as zeros.
    """

    weights: int
    dense: float
    masked: float
    change: float
