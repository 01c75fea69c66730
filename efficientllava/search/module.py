"""The policy search as a Lightning module: run it with ``trainer.predict`` and read `plan`, `pruned` and `record`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from ..models.anatomy import language_parameters, layers_of, projector_of
from ..models.forward import Batch, FeatureCache, to_device
from ..pruning.module import chunked
from ..pruning.obs import DAMPING
from ..pruning.plan import PruningPlan
from ..pruning.pruner import PruneReport, apply_plan, block_influences
from ..pruning.selection import Space, uniform_candidates
from ..pruning.self_text import positions_of
from ..pruning.stream import CHOSEN, Beginning, Calibration, CalibrationStream, silent
from ..pruning.surgery import reinitialise
from ..runtime import processes
from ..runtime.console import Tick
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..settings.schema import PruneConfig, SearchConfig
from .budget import Clock, asked_share, budget_of
from .change import choose, evolve_projector, mask, plan_of
from .evaluator import Evaluator
from .evolution import Risk, Search
from .knapsack import KnapsackSearch, affordable
from .levels import LevelTable, gap_of, open_table
from .recipes import Masks, Structured
from .space import Policy, SearchSpace, ShapeSpace

COLOURED = 40  # policies whose loss on held-out samples is measured for the plots
TOLD = 8  # of them between two signs of progress


@dataclass(frozen=True)
class SearchInputs:
    """What a search looks at, and where it keeps what outlives it.

    Args:
        records: The samples.
        holdout: Samples that the search never sees; only plots use them.
        collate: Turns records into a batch.
        batch_size: Records per batch.
        identity: Digests of checkpoint and samples by name; tables and states of another search are refused.
        tables: Folder of level tables, shared by searches.
        work: Folder of the state of a killed search.
        write: Has the dense model write text that joins the samples, see `efficientllava.pruning.self_text`.
        written_share: Share of the statistics that this text decides, (0, 1).
        clock: See `efficientllava.search.budget.budget_of`.
        reuse: Whether a level table that is there is taken.
    """

    records: Sequence[Any]
    holdout: Sequence[Any]
    collate: Any
    batch_size: int
    identity: Mapping[str, str]
    tables: Path
    work: Path
    write: Callable[[nn.Module, tuple[int, int]], list[Batch]] | None = None
    written_share: float = 0.5
    clock: Clock | None = None
    reuse: bool = True


class SearchModule(LightningModule):
    """Samples to a level table, candidates to risks, the best policy to a plan, and the plan to a smaller model.

    Every process sees all samples; the candidates of a generation are split over the processes.

    Args:
        model: The model to prune; consumed.
        inputs: Samples and folders.
        prune: Ratio, refit and damping.
        search: Budget, objective and evolution.
        seed: Seed of all draws.
        features: Vision features by image.
        tick: Progress.

    Attributes:
        plan: What the chosen policy keeps.
        pruned: The smaller model.
        report: Losses as searched (``loss_searched``) and as cut (``loss_pruned``) in the terms of every pruner.
        record: Every policy with its risk and gap; plain values for ``search.json``.
        table: Folder of the level table.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: SearchInputs,
        prune: PruneConfig,
        search: SearchConfig,
        seed: int = 0,
        features: FeatureCache | None = None,
        tick: Tick = silent,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan: PruningPlan | None = None
        self.pruned: nn.Module | None = None
        self.report: PruneReport | None = None
        self.record: dict[str, Any] = {}
        self.table: Path | None = None
        self._inputs, self._prune, self._config, self._seed = inputs, prune, search, seed
        self._features, self._tick = features or FeatureCache(model), tick
        self._share, _ = asked_share(prune, search)
        # The gap term that is recorded, also where the objective has none.
        self._gap = search.term or "fro"
        self._beginning = Beginning()
        self._folds: list[int] = []
        # Beside images policies are judged without written text, which sees none; the cut model is refitted with it.
        self._shows = any(record.image is not None for record in inputs.records)
        self._read = 0  # batches of the records; those of the written text follow
        self._batches: list[dict[str, Any]] = []

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All samples on every process, then the held-out ones."""
        size, holdout = self._inputs.batch_size, list(self._inputs.holdout)
        chunks, self._folds = chunked(self._inputs.records, size)
        chunks += [holdout[i : i + size] for i in range(0, len(holdout), size)]
        return DataLoader(chunks, batch_size=None, collate_fn=self._inputs.collate)  # pyright: ignore[reportArgumentType]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep a batch, already on the device."""
        self._batches.append(batch)

    def on_predict_epoch_end(self) -> None:
        """Build the table, search, cut."""
        self._inputs.work.mkdir(parents=True, exist_ok=True)
        every, holdout = self._batches[: len(self._folds)], self._batches[len(self._folds) :]
        image: int = self.model.config.image_token_id  # pyright: ignore
        self._beginning = Beginning.of(every[processes.rank() :: processes.world_size()], image)
        every = self._with_written(every)
        apart = self._config.gap == "held_out" and 1 in self._folds

        def part(*folds: int) -> Calibration:
            chosen = [i for i, fold in enumerate(self._folds) if fold in folds and (i < self._read or not self._shows)]
            more: dict[str, Any] = {"written": self._written(chosen), "written_share": CHOSEN}
            batches = [every[i] for i in chosen]
            return Calibration(batches, self._features, tick=self._tick, beginning=self._beginning, **more)

        # The last fold is for the choice among the best, which none of them has seen. Levels are fitted to all other
        # samples, on which policies are judged, or to none of those.
        fitted, judged = ((0,), (1,)) if apart else ((0, 1), (0, 1))
        stream = CalibrationStream(self.model, part(*judged), self._prune.tokens)
        table = self._table(part(*fitted), fitted)
        self.table = table.folder
        space = self._space(table, stream)
        evaluator = Evaluator(self.model, table, stream)
        search = self._search(space, table, stream, evaluator)
        self._evolve(search, space, table, stream.batches, evaluator)
        self.record = self._describe(search, space, evaluator.dense)
        if holdout:
            self.record["holdout"] = self._holdout(search, table, stream, evaluator, holdout)
        self._cut(search, space, table, every)
        self._batches = []

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _with_written(self, batches: Sequence[Batch]) -> list[Batch]:
        """The samples and what the model writes itself, of which every fold gets its part."""
        text = self._inputs.write(self.model, (0, 1)) if self._inputs.write else []
        self._read = len(batches)
        self._folds += [(0, 1, 2, 0)[i % 4] if max(self._folds) else 0 for i in range(len(text))]
        device = next(self.model.parameters()).device
        return [*batches, *(to_device(batch, device) for batch in text)]

    def _written(self, chosen: Iterable[int]) -> list[int]:
        """Places of the written text among some of the batches."""
        return [place for place, index in enumerate(chosen) if index >= self._read]

    def _table(self, calibration: Calibration, folds: Sequence[int]) -> LevelTable:
        prune, granularity = self._prune, self._config.granularity
        recipe = Structured(prune.damping or DAMPING, prune.tokens, prune.round_to)
        if self._config.uniform:
            channels = {channels for _, channels in self._shapes()}
            recipe = replace(recipe, channels=tuple(sorted(channels, reverse=True)))
        if granularity != "structured":
            recipe = Masks(None if granularity == "2:4" else self._share, prune.damping or DAMPING, prune.tokens)
        identity = {**self._inputs.identity, "folds": str(folds)}
        return open_table(self.model, recipe, calibration, self._inputs.tables, identity, self._inputs.reuse)

    def _shapes(self) -> list[tuple[int, int]]:
        if len({(layer.attention.units, layer.mlp.units) for layer in layers_of(self.model)}) > 1:
            raise UserError("search.uniform=true: the layers of this model differ; set search.uniform=false")
        return uniform_candidates(Space.of(self.model, round_to=self._prune.round_to), self._share)

    def _space(self, table: LevelTable, stream: CalibrationStream) -> SearchSpace:
        file = self._inputs.work / "latency.json"
        budget = budget_of(self.model, table, stream, self._prune, self._config, file, self._inputs.clock)
        if not self._config.uniform:
            return SearchSpace(table.genes, budget)
        groups, channels = (
            {len(table.units(gene, level)): level for level in range(table.genes[gene].levels)} for gene in range(2)
        )
        shapes = tuple((groups[g], channels[c]) * stream.depth for g, c in self._shapes())
        return ShapeSpace(table.genes, budget, shapes)

    def _search(self, space: SearchSpace, table: LevelTable, stream: CalibrationStream, evaluator: Evaluator) -> Search:
        def evaluate(policies: Sequence[Policy], share: float) -> list[Risk]:
            first = range(max(1, math.ceil(share * len(stream.batches))))
            return evaluator.evaluate(policies, first, keep=search.state.archive)

        errors, kind = table.errors(), Search
        influence = block_influences(stream, range(stream.depth), self._prune)
        floor = max(influence) * 1e-3 or 1.0
        shaped = space.shaped([math.sqrt(max(value, floor)) for value in influence])
        if self._config.method == "knapsack":
            tokens = positions_of(stream.batches)
            evolved = affordable(self._config, 2.0 * tokens * language_parameters(self.model))
            kind = partial(KnapsackSearch, errors or _changes(table, influence), evolved)
        search = kind(
            space,
            evaluate,
            gap_of(self._gap, table.norms, space.uniform(), len(self._inputs.records)),
            self._config,
            self._seed,
            [space.uniform(), shaped, *([space.ranked(errors)] if errors else [])],
            self._inputs.work / "search.json",
            processes.rank() == 0,
            self._tick,
        )
        return search

    def _evolve(
        self, search: Search, space: SearchSpace, table: LevelTable, samples: Sequence[Any], evaluator: Evaluator
    ) -> None:
        """Run the rounds; between them the projector evolves, and a killed search takes up the one it had."""
        config, state = self._config, search.state
        if state.theta:
            projector_of(self.model).load_state_dict(load_file(self._projector_file(state.theta)))
            evaluator.restart()
        while not search.finished:
            search.run_round()
            kept = False
            if config.projector and state.round + 1 < config.rounds:
                rng = random.Random(f"{self._seed}/projector/{state.round}")
                policies = [*state.archive, *(space.random(rng) for _ in state.archive)]
                how = (config, self._seed + state.round, self._tick)
                step = evolve_projector(self.model, table, evaluator, samples, self._features, policies, *how)
                state.projector.append(step)
                kept = step["kept"]
            if kept and processes.rank() == 0:
                with whole_file(self._projector_file(state.theta + 1)) as file:
                    save_file(projector_of(self.model).state_dict(), file)
            search.end_round(changed=kept)

    def _projector_file(self, theta: int) -> Path:
        return self._inputs.work / f"projector_{theta}.safetensors"

    def _describe(self, search: Search, space: SearchSpace, dense: Risk) -> dict[str, Any]:
        return {
            **self.record,
            "settings": asdict(self._config),
            "budget": {"resource": space.budget.resource, "target": space.budget.target},
            "genes": [asdict(gene) for gene in space.genes],
            "dense": asdict(dense),
            "best": list(search.best),
            "history": search.state.history,
            "policies": search.state.record,
            **({"projector": search.state.projector} if self._config.projector else {}),
            "gap": self._gap,
        }

    def _holdout(
        self,
        search: Search,
        table: LevelTable,
        stream: CalibrationStream,
        evaluator: Evaluator,
        holdout: Sequence[Any],
    ) -> list[dict[str, Any]]:
        """Risk on the samples, gap and loss on held-out samples of some policies, all under the final projector."""
        seen = {tuple(entry["policy"]): entry["gap"] for entry in search.state.record if entry["share"] == 1.0}
        chosen = sorted(list(dict.fromkeys([*search.state.archive, *seen]))[:COLOURED])
        unseen = Evaluator(self.model, table, stream.over(holdout))
        points = []
        for start in range(0, len(chosen), TOLD):
            part = chosen[start : start + TOLD]
            older = [policy for policy in part if policy not in search.risks]  # scored under another projector
            risks = {**search.risks, **dict(zip(older, evaluator.evaluate(older), strict=True))}
            points += [
                {"policy": list(policy), "risk": asdict(risks[policy]), "gap": seen[policy], "holdout_loss": other.loss}
                for policy, other in zip(part, unseen.evaluate(part), strict=True)
            ]
            self._tick("look at held-out samples", len(points), len(chosen))
        return points

    def _chosen(
        self, search: Search, space: SearchSpace, table: LevelTable, calibration: Calibration
    ) -> tuple[Policy, PruneReport]:
        """The best policy, or the one among the best and the plain ones that loses least as it will be cut."""
        config = self._config
        if config.finalists == 1 or config.granularity != "structured":
            return search.best, PruneReport(loss_dense=self.record["dense"]["loss"])
        plain = search.plain
        finalists = list(dict.fromkeys([*search.state.archive[: config.finalists], plain]))
        distances = [space.distance(plain, policy) for policy in finalists]
        best, report, self.record["finalists"] = choose(
            self.model, table, finalists, distances, calibration, self._prune
        )
        return finalists[best], report

    def _cut(self, search: Search, space: SearchSpace, table: LevelTable, samples: Sequence[Any]) -> None:
        ids = tuple(record.id for record in self._inputs.records)
        requested = self._share if self._config.budget.resource == "params" else None
        mine = slice(processes.rank(), None, processes.world_size())
        held, last = ([i for i, fold in enumerate(self._folds[mine]) if fold == kind] for kind in (1, 2))
        calibration = Calibration(
            samples[mine],
            self._features,
            processes.sum_over,
            tick=self._tick,
            beginning=self._beginning,
            compared=last,
            held=held,
            validated=last,
            written=self._written(range(len(samples))[mine]),
            written_share=self._inputs.written_share,
        )
        chosen, found = self._chosen(search, space, table, calibration)
        self.plan = replace(plan_of(self.model, table, chosen, requested), calibration_ids=ids)
        if self._config.granularity == "structured":
            self.pruned, cut = apply_plan(self.model, self.plan, calibration, self._prune)
        else:
            self.pruned, cut = mask(self.model, table.recipe, chosen, calibration, self._prune)
        if self._prune.reinitialise:
            reinitialise(self.pruned, self._seed)
        entries = reversed(search.state.record)
        searched = next(e["loss"] for e in entries if e["policy"] == list(chosen) and e["share"] == 1.0)
        self.report = replace(found, loss_searched=searched, loss_pruned=cut.loss_pruned, errors=cut.errors)


def _changes(table: LevelTable, influence: Sequence[float]) -> list[list[float]]:
    """Costs of levels whose error is not known: how far their weights move, by the influence of their layer."""

    def change(gene: int, level: int) -> float:
        return influence[table.genes[gene].layer] * sum(norms.distance for norms in table.norms(gene, level))

    return [[change(index, level) for level in range(gene.levels)] for index, gene in enumerate(table.genes)]
