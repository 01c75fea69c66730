"""Tables of tiny models, and what they must agree with, from plain rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientllava.models.anatomy import Component, layers_of
from efficientllava.pruning.gradients import sensitivity
from efficientllava.pruning.stream import Calibration
from efficientllava.search.levels import LevelTable, fill_table
from efficientllava.search.recipes import Recipe

from ..conftest import make_batches, stream_of

IDENTITY = {"model": "m", "calibration": "c"}


def make_table(model: Any, recipe: Recipe, folder: Path, calibration: Calibration | None = None) -> LevelTable:
    """A table of its own in ``folder / "table"``."""
    calibration = calibration or Calibration(make_batches(dtype=next(model.parameters()).dtype))
    (folder / "table").mkdir(parents=True)
    fill_table(model, recipe, calibration, folder / "table")
    return LevelTable(model, recipe, folder / "table")


def steps(table: LevelTable) -> Iterator[tuple[int, int]]:
    """Every gene with every level."""
    return ((gene, level) for gene, entry in enumerate(table.genes) for level in range(entry.levels))


def components(model: Any) -> list[Component]:
    """One per gene."""
    return [component for layer in layers_of(model) for component in layer.components]


def linears(component: Component) -> list[nn.Linear]:
    return [*dict.fromkeys(reader.linear for reader in component.readers), component.writer]


@torch.no_grad()
def gram_of_inputs(
    model: Any, modules: list[nn.Linear], tokens: str = "all", structured: bool = False
) -> list[torch.Tensor]:
    """``E[x x^T]`` of linear layers in a plain pass of the dense model over the counted positions.

    A position weighs the inverse power of the residual stream behind the component that the linear layer is part of;
    in a structured table, how much the answers feel an error of that component there.
    """
    stream = stream_of(model, make_batches(dtype=next(model.parameters()).dtype), tokens)
    felt = sensitivity(stream, 0) if structured else None
    rows: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}
    hidden, seen = stream.start(), dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]()

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[module] = args[0], output

    layers = layers_of(model)
    handles = [module.register_forward_hook(note) for module in {*modules, *(la.attention.writer for la in layers)}]
    for batch, state in enumerate(hidden):
        counted = stream.counted[batch]
        for index, layer in enumerate(layers):
            before, state = state, stream.call(layer.module, index, batch, state)
            middle = before + seen[layer.attention.writer][1]
            for component, residual in zip(layer.components, (middle, state), strict=True):
                owner = component.module
                weights = 1 / residual[counted].double().square().mean(1)
                if felt is not None:
                    weights = felt.positions[index][component.kind == "mlp"][batch].double()
                for module in set(modules) & set(owner.modules()):
                    inputs = seen[module][0][counted].double()
                    rows[module].append(torch.cat([inputs * weights.sqrt()[:, None], weights[:, None]], 1))
    for handle in handles:
        handle.remove()
    stacked = [torch.cat(rows[module]) for module in modules]
    return [x[:, :-1].T @ x[:, :-1] / x[:, -1].sum() for x in stacked]
