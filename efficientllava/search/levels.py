"""Level tables: everything that depends on one gene and one level, computed once for all policies.

A table is a folder. ``table.json`` says what it was made from and holds amounts, removed counts and norms; one
safetensors file per layer holds what a level changes: index lists and changed weights, nothing else. All statistics
come from the dense prefix, so that levels of different layers do not depend on each other. What a level is, is up to a
recipe: `efficientllava.search.structured.Structured` or `efficientllava.search.masks.Masks`.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.anatomy import Component, Layer, layers_of
from ..pruning.plan import LayerPlan
from ..pruning.scores import Calibration, layer_statistics, open_stream
from ..pruning.sensitivity import sensitivity
from ..runtime.processes import rank
from ..runtime.store import Store
from .generalization import LinearNorms
from .space import Gene, Policy

RECORD = "table.json"


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


class LevelTable:
    """Components of a model at every level, made when asked for.

    Args:
        model: The dense model, in eval mode; it stays as it is.
        recipe: What the table was made with.
        folder: The table's folder, as `fill_table` has left it.
        limit_bytes: Modules beyond this size are made anew when asked for again.

    Attributes:
        recipe: What a level is.
        folder: As given.
        genes: All genes; gene ``2 l`` is the attention of layer ``l``, ``2 l + 1`` its MLP.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, folder: Path, limit_bytes: int = 4 << 30) -> None:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        self.genes = tuple(Gene(g["layer"], g["kind"], tuple(g["amounts"])) for g in record["genes"])
        self._removed: list[list[int]] = [gene["removed"] for gene in record["genes"]]
        self._norms: list[list[list[list[float]]]] = [gene["norms"] for gene in record["genes"]]
        self._errors: list[list[float | None]] = [gene["errors"] for gene in record["genes"]]
        self._components = [component for layer in layers_of(model) for component in layer.components]
        self.recipe, self.folder, self._limit = recipe, folder, limit_bytes
        self._modules: OrderedDict[tuple[int, int], tuple[nn.Module, int]] = OrderedDict()

    def removed(self, gene: int, level: int) -> int:
        """Parameters that a level cuts off (structured), or weights that it sets to zero (masks)."""
        return self._removed[gene][level]

    def norms(self, gene: int, level: int) -> tuple[LinearNorms, ...]:
        """Norms of the gene's linear layers, readers first, writer last; fused projections are one."""
        return tuple(LinearNorms(int(n), *squares) for n, *squares in self._norms[gene][level])

    def errors(self) -> list[list[float]] | None:
        """Output error of every gene at every level, in one unit; None where the recipe does not know it."""
        known = [[error for error in errors if error is not None] for errors in self._errors]
        return known if list(map(len, known)) == list(map(len, self._errors)) else None

    def tensors(self, gene: int, level: int) -> dict[str, Tensor]:
        """What is stored of a level, on the device of the gene's weights."""
        prefix = f"{self.genes[gene].kind}.{level}."
        file = _layer_file(self.folder, self.genes[gene].layer)
        device = str(self._components[gene].writer.weight.device)
        with safe_open(file, "pt", device=device) as stored:
            return {key.removeprefix(prefix): stored.get_tensor(key) for key in stored.keys() if key.startswith(prefix)}  # noqa: SIM118

    def units(self, gene: int, level: int) -> tuple[int, ...]:
        """Kept KV groups or channels, ascending; masks keep all of them."""
        stored = self.tensors(gene, level).get("units")
        return tuple(range(self._components[gene].units)) if stored is None else tuple(stored.tolist())

    def plan(self, policy: Policy) -> tuple[LayerPlan, ...]:
        """The kept units of a policy, as surgery takes them."""
        kept = [self.units(gene, level) for gene, level in enumerate(policy)]
        return tuple(LayerPlan(i, *kept[2 * i : 2 * i + 2]) for i in range(len(kept) // 2))

    def module(self, gene: int, level: int) -> nn.Module:
        """The attention or MLP at a level, to be called in place of the model's own.

        Args:
            gene: Index of the gene.
            level: Its level.

        Returns:
            The model's own module where nothing is removed; else a frozen one that shares with it all that is equal.
        """
        if not self._removed[gene][level]:
            return self._components[gene].module
        key = (gene, level)
        if key not in self._modules:
            self._modules[key] = self._make(gene, level)
            while sum(size for _, size in self._modules.values()) > self._limit and len(self._modules) > 1:
                self._modules.popitem(last=False)
        self._modules.move_to_end(key)
        return self._modules[key][0]

    @torch.no_grad()
    def _make(self, gene: int, level: int) -> tuple[nn.Module, int]:
        """A module and the bytes that it does not share with the model."""
        component = self._components[gene]
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in component.module.parameters()
        }
        own = {id(p) for p in shared.values()}
        shared |= {id(buffer): buffer for buffer in component.module.buffers()}
        shared |= {id(part.config): part.config for part in component.module.modules() if hasattr(part, "config")}
        twin = copy.deepcopy(component, shared)
        for part in twin.module.modules():
            vars(part).pop("forward", None)  # the original may be replayed at this moment
        self.recipe.assemble(twin, self.tensors(gene, level))
        return twin.module, sum(p.nbytes for p in twin.module.parameters() if id(p) not in own)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.safetensors"


def open_table(
    model: nn.Module, recipe: Recipe, calibration: Calibration, root: Path, identity: Mapping[str, str]
) -> LevelTable:
    """Take a table from the store, or make it; searches that want the same one wait for the first.

    Args:
        model: The dense model in eval mode.
        recipe: What a level is.
        calibration: Batches and how to run them.
        root: The folder of tables in a store; each has a subfolder named by its content.
        identity: What else decides the content: digest of the checkpoint, of the calibration records ...
    """

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        fill_table(model, recipe, calibration, folder)
        return {}

    dtype = str(layers_of(model)[0].mlp.writer.weight.dtype).removeprefix("torch.")
    fields: dict[str, Any] = asdict(recipe)  # pyright: ignore[reportArgumentType]
    key = {"granularity": recipe.granularity, **fields, "dtype": dtype, **identity}
    return LevelTable(model, recipe, Store(root.parent).entry(root.name, key, compute).folder)


@torch.no_grad()
def fill_table(model: nn.Module, recipe: Recipe, calibration: Calibration, folder: Path) -> None:
    """Make a table in one calibration pass; every layer is written before the next one is looked at.

    With several processes all compute the same from summed statistics, and the first one writes.

    Args:
        model: The dense model in eval mode.
        recipe: What a level is.
        calibration: Batches and how to run them.
        folder: Where the files go.

    Raises:
        UserError: No calibration token counts.
    """
    stream = open_stream(model, calibration, recipe)
    structured = recipe.granularity == "structured"
    felt = sensitivity(stream, 0, calibration.reduce, calibration.tick) if structured else None
    layers, hidden, genes = layers_of(model), stream.start(), []
    for index, layer in enumerate(layers):
        linears = [linear for component in layer.components for linear in recipe.inputs(component)]
        weigh, outputs = (felt.weigh(stream, index), felt.outputs[index]) if felt else (None, (None, None))
        grams = layer_statistics(stream, layer, index, hidden, calibration.reduce, linears, weigh)
        tensors: dict[str, Tensor] = {}
        genes += _layer_genes(recipe, index, layer, grams, outputs, tensors)
        if rank() == 0:
            save_file(tensors, _layer_file(folder, index))
        calibration.tick("level table", index + 1, len(layers))
    if rank() == 0:
        (folder / RECORD).write_text(json.dumps({"genes": genes}) + "\n", encoding="utf-8")


def _layer_genes(
    recipe: Recipe,
    index: int,
    layer: Layer,
    grams: list[Tensor],
    outputs: tuple[Tensor | None, Tensor | None],
    tensors: dict[str, Tensor],
) -> Iterator[dict[str, Any]]:
    """Records of a layer's two genes; fills what is stored of them."""
    for component, felt in zip(layer.components, outputs, strict=True):
        mine = [grams.pop(0) for _ in recipe.inputs(component)]
        levels = []
        for number, level in enumerate(recipe.levels(component, mine, felt)):
            stored = {f"{component.kind}.{number}.{name}": t.cpu().contiguous() for name, t in level.tensors.items()}
            tensors.update(stored)
            levels.append(level)
        yield {
            "layer": index,
            "kind": component.kind,
            "amounts": recipe.amounts(component),
            "removed": [level.removed for level in levels],
            "errors": [level.error for level in levels],
            "norms": [[[n.weights, n.dense, n.masked, n.change] for n in level.norms] for level in levels],
        }
