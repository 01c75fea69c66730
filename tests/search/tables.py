"""Tables of tiny models, and what they must agree with, from plain rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from efficientllava.models.anatomy import Component, layers_of
from efficientllava.pruning.scores import Calibration
from efficientllava.pruning.statistics import CalibrationStream
from efficientllava.search.levels import LevelTable, build_table
from efficientllava.search.recipe import Recipe
from tests.conftest import make_batches

IDENTITY = {"model": "m", "calibration": "c"}


def make_table(model: Any, recipe: Recipe, folder: Path, **options: Any) -> LevelTable:
    batches = make_batches(dtype=next(model.parameters()).dtype)
    return build_table(model, recipe, Calibration(batches), folder / "table", IDENTITY, **options)


def steps(table: LevelTable) -> Iterator[tuple[int, int]]:
    """Every gene with every level."""
    return ((gene, level) for gene, entry in enumerate(table.genes) for level in range(entry.levels))


def components(model: Any) -> list[Component]:
    """One per gene."""
    return [component for layer in layers_of(model) for component in layer.components]


def linears(component: Component) -> list[nn.Linear]:
    return [*dict.fromkeys(reader.linear for reader in component.readers), component.writer]


@torch.no_grad()
def gram_of_inputs(model: Any, modules: list[nn.Linear], tokens: str = "all") -> list[torch.Tensor]:
    """``E[x x^T]`` of linear layers in a plain pass of the dense model over the counted positions."""
    stream = CalibrationStream(model, make_batches(dtype=next(model.parameters()).dtype), tokens)
    rows: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}
    batch = 0

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows[module].append(args[0][stream.counted[batch]].double())

    handles = [module.register_forward_pre_hook(note) for module in modules]
    hidden = stream.start()
    for values in rows.values():
        values.clear()
    for batch in range(len(hidden)):
        state = hidden[batch]
        for index, layer in enumerate(layers_of(model)):
            state = stream.call(layer.module, index, batch, state)
    for handle in handles:
        handle.remove()
    stacked = [torch.cat(rows[module]) for module in modules]
    return [x.T @ x / len(x) for x in stacked]
