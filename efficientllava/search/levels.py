"""Level tables: everything that depends on one gene and one level, computed once for all policies.

A table is a folder. ``table.json`` says what it was made from and holds amounts, removed counts and norms; one
safetensors file per layer holds what a level changes: index lists and changed weights, nothing else. All statistics
come from the dense prefix, so that levels of different layers do not depend on each other. What a level is, is up to a
recipe: `efficientllava.search.structured.Structured` or `efficientllava.search.masks.Masks`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.anatomy import Layer, layers_of
from ..pruning.plan import LayerPlan
from ..pruning.scores import Calibration, layer_statistics, open_stream
from ..pruning.sensitivity import sensitivity
from ..runtime.errors import UserError
from ..runtime.files import whole_folder
from ..runtime.processes import barrier, rank
from ..runtime.store import Store
from .generalization import LinearNorms
from .recipe import Recipe
from .space import Gene, Policy

FORMAT = 3  # version of the files; a table of another version is refused
RECORD = "table.json"


class LevelTable:
    """Components of a model at every level, made when asked for.

    Args:
        model: The dense model, in eval mode; it stays as it is.
        recipe: What the table was made with.
        folder: The table's folder.
        record: Content of ``table.json``.
        limit_bytes: Modules beyond this size are made anew when asked for again.

    Attributes:
        recipe: What a level is.
        folder: As given.
        genes: All genes; gene ``2 l`` is the attention of layer ``l``, ``2 l + 1`` its MLP.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, folder: Path, record: Mapping[str, Any], limit_bytes: int
    ) -> None:
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


def table_key(model: nn.Module, recipe: Recipe, identity: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a table depends on, as plain JSON values.

    Args:
        model: The dense model.
        recipe: What a level is.
        identity: What else decides the content: digest of the checkpoint, of the calibration records ...
    """
    dtype = str(layers_of(model)[0].mlp.writer.weight.dtype).removeprefix("torch.")
    fields: dict[str, Any] = asdict(recipe)  # pyright: ignore[reportArgumentType]
    return {"format": FORMAT, "granularity": recipe.granularity, **fields, "dtype": dtype, **identity}


@torch.no_grad()
def build_table(
    model: nn.Module,
    recipe: Recipe,
    calibration: Calibration,
    folder: str | Path,
    identity: Mapping[str, str],
    limit_bytes: int = 4 << 30,
) -> LevelTable:
    """Make a table in one calibration pass; every layer is written before the next one is looked at.

    With several processes all compute the same from summed statistics, and the first one writes.

    Args:
        model: The dense model in eval mode.
        recipe: What a level is.
        calibration: Batches and how to run them.
        folder: The table's folder; appears when the table is whole.
        identity: See `table_key`.
        limit_bytes: See `LevelTable`.

    Raises:
        UserError: The folder exists, the disk is full, or no calibration token counts.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists; delete it to make the level table anew, or choose another folder")
    barrier()  # none may create the folder before all have looked
    with whole_folder(folder) if rank() == 0 else contextlib.nullcontext(folder) as partial:
        _fill(model, recipe, calibration, partial, identity)
    barrier()
    return load_table(model, recipe, folder, identity, limit_bytes)


def _fill(
    model: nn.Module, recipe: Recipe, calibration: Calibration, folder: Path, identity: Mapping[str, str]
) -> None:
    """Compute a table on all processes; the first one writes it into a folder."""
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
        record = {"key": table_key(model, recipe, identity), "genes": genes}
        (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


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


def load_table(
    model: nn.Module,
    recipe: Recipe,
    folder: str | Path,
    identity: Mapping[str, str],
    limit_bytes: int = 4 << 30,
) -> LevelTable:
    """Open a table that `build_table` has made.

    Args:
        model: The model that it was made for.
        recipe: What a level is.
        folder: The table's folder.
        identity: See `table_key`.
        limit_bytes: See `LevelTable`.

    Raises:
        UserError: There is no table, or it was made from something else.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        found = record["key"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no level table ({error}); delete the folder, it is made anew") from error
    wanted = json.loads(json.dumps(table_key(model, recipe, identity)))
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{folder}: this level table was made with {name}={found.get(name)}, the search has "
                f"{name}={wanted.get(name)}; delete the folder or choose another one"
            )
    return LevelTable(model, recipe, folder, record, limit_bytes)


def open_table(
    model: nn.Module,
    recipe: Recipe,
    calibration: Calibration,
    root: str | Path,
    identity: Mapping[str, str],
    limit_bytes: int = 4 << 30,
) -> LevelTable:
    """Take a table from the store, or make it; searches that want the same one wait for the first.

    Args:
        model: The dense model in eval mode.
        recipe: What a level is.
        calibration: Batches and how to run them.
        root: The folder of tables in a store; each has a subfolder named by its content.
        identity: See `table_key`.
        limit_bytes: See `LevelTable`.

    Raises:
        UserError: See `build_table`.
    """

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        _fill(model, recipe, calibration, folder, identity)
        return {}

    root = Path(root)
    entry = Store(root.parent).entry(root.name, table_key(model, recipe, identity), compute)
    return load_table(model, recipe, entry.folder, identity, limit_bytes)
