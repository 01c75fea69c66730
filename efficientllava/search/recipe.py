"""What a level of a gene is: the one thing in which structured search and mask search differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import Component
from .generalization import LinearNorms


@dataclass(frozen=True)
class Level:
    """One level of one gene, as a recipe makes it.

    Args:
        removed: Parameters cut off (structured) or weights set to zero (masks).
        norms: Norms of every linear layer of the gene, readers first.
        tensors: What `Recipe.assemble` needs, by name; empty where nothing is removed.
        error: Rise of the divergence from the dense model by what the gene writes, up to a common factor; None where
            the recipe does not know it.
    """

    removed: int
    norms: tuple[LinearNorms, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    error: float | None = None


class Recipe(Protocol):
    """What a level is. Recipes are frozen dataclasses: their fields are part of a table's identity."""

    @property
    def granularity(self) -> str:
        """``structured``, ``unstructured`` or ``2:4``."""
        ...

    @property
    def tokens(self) -> str:
        """Positions that enter the statistics, see `efficientllava.pruning.statistics.counted_positions`."""
        ...

    def amounts(self, component: Component) -> tuple[float, ...]:
        """Share removed by each level, ascending."""
        ...

    def inputs(self, component: Component) -> list[nn.Linear]:
        """Linear layers whose input statistics `levels` needs."""
        ...

    def levels(self, component: Component, grams: list[Tensor], felt: Tensor | None = None) -> Iterator[Level]:
        """Make all levels in order.

        Args:
            component: A whole component.
            grams: Gram matrices of `inputs`; used up.
            felt: How much the answers feel an error of each output, see `efficientllava.pruning.sensitivity`.
        """
        ...

    def assemble(self, twin: Component, tensors: Mapping[str, Tensor]) -> None:
        """Turn a whole component, which shares its weights with the model's, into one at a level, by new parameters."""
        ...


def squares(weight: Tensor, dim: int | None = None) -> Tensor:
    """Sum of squares in float64, of a whole matrix or along one dimension."""
    return torch.linalg.vector_norm(weight.detach(), dim=dim, dtype=torch.float64).square()
