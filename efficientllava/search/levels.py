"""Level tables: everything that depends on one gene and one level, computed once for all policies.

A table is a folder. ``table.json`` holds amounts, removed counts, errors and norms; a safetensors file per layer holds
what a level changes: index lists and changed weights, nothing else. All statistics come from the dense prefix, so that
levels of different layers do not depend on each other. What a level is, is up to a recipe:
`efficientllava.search.recipes.Structured` or `efficientllava.search.recipes.Masks`.

From the norms comes the *generalization gap* of a policy, without a forward pass. EfficientLLaVA adds such a term to
the loss on the samples (structural risk minimization, arXiv 2503.15369, abstract); its formula is not public. The terms
here are known bounds written for a pruned model, with ``N`` samples and the linear layers ``j`` of the decoder: dense
weights ``W_j``, ``n_j`` of them, mask ``M_j``, pruned and compensated weights ``What_j``. Constants of a bound that are
equal for all policies stay, so that runs with different ``N`` compare. A new term is one function with the signature of
`Gap` and an entry in `GAPS`.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.anatomy import layers_of
from ..pruning.gradients import sensitivity
from ..pruning.plan import LayerPlan
from ..pruning.statistics import layer_statistics
from ..pruning.stream import Calibration, CalibrationStream
from ..runtime.errors import UserError
from ..runtime.processes import rank
from ..runtime.store import Store
from .recipes import TINY, LinearNorms, Recipe
from .space import Gene, Policy

RECORD = "table.json"


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
        self._record: list[dict[str, Any]] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["genes"]
        self.genes = tuple(Gene(g["layer"], g["kind"], tuple(g["amounts"])) for g in self._record)
        self._components = [component for layer in layers_of(model) for component in layer.components]
        self.recipe, self.folder, self._limit = recipe, folder, limit_bytes
        self._modules: OrderedDict[tuple[int, int], tuple[nn.Module, int]] = OrderedDict()

    def removed(self, gene: int, level: int) -> int:
        """Parameters that a level cuts off (structured), or weights that it sets to zero (masks)."""
        return self._record[gene]["removed"][level]

    def norms(self, gene: int, level: int) -> tuple[LinearNorms, ...]:
        """Norms of the gene's linear layers, readers first, writer last; fused projections are one."""
        return tuple(LinearNorms(int(n), *squares) for n, *squares in self._record[gene]["norms"][level])

    def errors(self) -> list[list[float]] | None:
        """Output error of every gene at every level, in one unit; None where the recipe does not know it."""
        known = [gene["errors"] for gene in self._record]
        return None if any(error is None for errors in known for error in errors) else known

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
        if not self.removed(gene, level):
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
    model: nn.Module,
    recipe: Recipe,
    calibration: Calibration,
    root: Path,
    identity: Mapping[str, str],
    reuse: bool = True,
) -> LevelTable:
    """Take a table from the store, or make it; searches that want the same one wait for the first.

    Args:
        model: The dense model in eval mode.
        recipe: What a level is.
        calibration: Batches and how to run them.
        root: The folder of tables in a store; each has a subfolder named by its content.
        identity: What else decides the content: digest of the checkpoint, of the calibration records, their folds …
        reuse: Whether a table that is there is taken.
    """
    dtype = str(layers_of(model)[0].mlp.writer.weight.dtype).removeprefix("torch.")
    key = {"granularity": recipe.granularity, **asdict(recipe), "dtype": dtype, **identity}
    entry = Store(root.parent, reuse).entry(
        root.name, key, lambda folder, _: fill_table(model, recipe, calibration, folder) or {}
    )
    return LevelTable(model, recipe, entry.folder)


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
    stream = CalibrationStream(model, calibration, recipe.tokens)
    felt = sensitivity(stream, 0) if recipe.granularity == "structured" else None
    layers, hidden, genes = layers_of(model), stream.start(), []
    for index, layer in enumerate(layers):
        inputs = [recipe.inputs(component) for component in layer.components]
        weigh, outputs = (felt.weigh(stream, index), felt.outputs[index]) if felt else (None, (None, None))
        grams = layer_statistics(stream, layer, index, hidden, [linear for some in inputs for linear in some], weigh)
        tensors: dict[str, Tensor] = {}
        for component, some, feels in zip(layer.components, inputs, outputs, strict=True):
            levels = list(recipe.levels(component, [grams.pop(0) for _ in some], feels))
            for number, level in enumerate(levels):
                prefix = f"{component.kind}.{number}"
                tensors |= {f"{prefix}.{name}": t.cpu().contiguous() for name, t in level.tensors.items()}
            genes.append(
                {
                    "layer": index,
                    "kind": component.kind,
                    "amounts": recipe.amounts(component),
                    "removed": [level.removed for level in levels],
                    "errors": [level.error for level in levels],
                    "norms": [[astuple(norms) for norms in level.norms] for level in levels],
                }
            )
        if rank() == 0:
            save_file(tensors, _layer_file(folder, index))
        stream.tick("level table", index + 1, len(layers))
    if rank() == 0:
        (folder / RECORD).write_text(json.dumps({"genes": genes}) + "\n", encoding="utf-8")


CONFIDENCE = 0.05  # delta of the PAC-Bayes bound: it holds with probability 1 - delta

Gap = Callable[[Sequence[LinearNorms], Sequence[LinearNorms], int], float]

Norms = Callable[[int, int], Sequence[LinearNorms]]  # of a gene at a level


def frobenius(norms: Sequence[LinearNorms], _uniform: Sequence[LinearNorms], samples: int) -> float:
    """``N^(-1/2) sum_j a_j ||W_j * M_j|| / ||W_j||`` with ``a_j = n_j / sum_i n_i``.

    A sum in place of the product of layer norms in the Rademacher bound of arXiv 1712.06541; norms of the masked dense
    weights, since compensation hides how much went.

    Args:
        norms: Every linear layer under the policy.
        _uniform: Not used.
        samples: ``N``.
    """
    total = sum(linear.weights for linear in norms)
    return sum(linear.weights * linear.kept for linear in norms) / total / math.sqrt(samples)


def frobenius_product(norms: Sequence[LinearNorms], _uniform: Sequence[LinearNorms], samples: int) -> float:
    """``N^(-1/2) exp(1/J sum_j ln(||W_j * M_j|| / ||W_j||))``, the geometric mean over ``J`` layers.

    The product of layer norms in the Rademacher bound of arXiv 1712.06541, its ``J``-th root taken.

    Args:
        norms: Every linear layer under the policy.
        _uniform: Not used.
        samples: ``N``.
    """
    return math.exp(statistics.fmean(math.log(max(linear.kept, TINY)) for linear in norms)) / math.sqrt(samples)


def distance(norms: Sequence[LinearNorms], uniform: Sequence[LinearNorms], samples: int) -> float:
    """``sqrt((D^2 / (2 s^2) + ln(2 sqrt(N) / delta)) / (2 N))`` with ``D^2 = sum_j ||What_j - W_j||^2 / ||W_j||^2``.

    PAC-Bayes bound around the dense weights, which know nothing of the samples (McAllester's bound in Maurer's form,
    cs/0411099, with Gaussians of variance ``s^2``). ``s^2`` is ``J / 2`` times the median of ``||What_j - W_j||^2 /
    ||W_j||^2`` under the uniform policy, over the layers that it changes.

    Args:
        norms: Every linear layer under the policy.
        uniform: Every linear layer under the uniform policy of the same budget.
        samples: ``N``.
    """
    changed = [linear.distance for linear in uniform if linear.change > 0]
    variance = len(norms) / 2 * statistics.median(changed) if changed else 1.0
    divergence = sum(linear.distance for linear in norms) / (2 * variance)
    return math.sqrt((divergence + math.log(2 * math.sqrt(samples) / CONFIDENCE)) / (2 * samples))


GAPS: dict[str, Gap] = {"fro": frobenius, "fro_logprod": frobenius_product, "dist": distance}


def gap_of(kind: str, norms: Norms, uniform: Policy, samples: int) -> Callable[[Policy], float]:
    """Bind a term to a level table.

    Args:
        kind: A key of `GAPS`.
        norms: ``table.norms``.
        uniform: The uniform policy of the budget.
        samples: Number of samples that the empirical risk comes from, >= 1.

    Returns:
        The gap of a policy.

    Raises:
        UserError: The term is unknown.
    """
    if kind not in GAPS:
        raise UserError(f"search.gap={kind}: unknown; choose one of {', '.join(GAPS)}")

    def linears(policy: Policy) -> list[LinearNorms]:
        return [linear for gene, level in enumerate(policy) for linear in norms(gene, level)]

    reference = linears(uniform)
    return lambda policy: GAPS[kind](linears(policy), reference, samples)
