"""Speed of the policy search against simpler ways of the same."""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits
from efficientllava.models.anatomy import language_parameters
from efficientllava.models.forward import answer_loss, feature_cache
from efficientllava.pruning.plan import PruningPlan
from efficientllava.pruning.pruner import apply_plan, plan_ratio
from efficientllava.pruning.scores import Calibration, open_stream
from efficientllava.search.evaluator import Evaluator
from efficientllava.search.evolution import Risk, Search
from efficientllava.search.levels import LevelTable, fill_table
from efficientllava.search.projector import assembled
from efficientllava.search.space import Budget, Policy, SearchSpace
from efficientllava.search.structured import Structured
from efficientllava.settings.schema import PruneConfig, SearchConfig
from experiments.speed.rows import Row
from experiments.tiny_models.pretraining import initialise
from experiments.tiny_models.tiny import tiny_llava

DEPTH, SAMPLES, BATCH, RATIO = 12, 64, 8, 0.5
PARENTS, CHILDREN = 8, 6
SINGLE, NAIVE = 4, 16  # every how many children are also evaluated one by one, and the naive way
PRUNE = PruneConfig("widthwise", "widthwise", RATIO, refit=True)
ROUND_TO = 8  # widths that matrix products like, as at full size


@dataclass(frozen=True)
class Setting:
    """A deep random model with everything that a search of its policies needs."""

    model: Any
    calibration: Calibration
    table: LevelTable
    space: SearchSpace
    evaluator: Evaluator


def make_setting(folder: Path, depth: int = DEPTH, samples: int = SAMPLES) -> Setting:
    """Level table and search space of tiny_llava with other weights and another number of layers, on digits.

    Args:
        folder: Becomes the table's folder.
        depth: Number of decoder layers.
        samples: Number of samples.
    """
    shallow, processor = tiny_llava()
    shallow.config.text_config.num_hidden_layers = depth
    model = type(shallow)(shallow.config).eval()
    initialise(model, seed=0)
    records, collate = Digits("calibration", samples), Collator(processor)
    batches = [collate([records[i] for i in range(at, min(at + BATCH, samples))]) for at in range(0, samples, BATCH)]
    calibration = Calibration(batches, feature_cache(model))
    recipe = Structured(round_to=ROUND_TO)
    folder.mkdir()
    fill_table(model, recipe, calibration, folder)
    table = LevelTable(model, recipe, folder)
    whole = language_parameters(model)
    costs = [[table.removed(i, level) / whole for level in range(gene.levels)] for i, gene in enumerate(table.genes)]
    space = SearchSpace(table.genes, Budget("params", RATIO, tuple(map(tuple, costs))))
    evaluator = Evaluator(model, table, open_stream(model, calibration, PRUNE))
    return Setting(model, calibration, table, space, evaluator)


def exchange_children(space: SearchSpace, count: int, each: int) -> tuple[list[Policy], list[Policy]]:
    """Random parents, and for each some children that differ from it by one exchange of levels."""
    rng = random.Random(0)
    parents = [space.random(rng) for _ in range(count)]
    return parents, [space.exchange(parent, rng, 1) for parent in parents for _ in range(each)]


def default_children(space: SearchSpace) -> tuple[list[Policy], list[Policy]]:
    """Archive and children of the first generation of a search with default settings; risks are drawn."""
    calls: list[tuple[list[Policy], list[Policy]]] = []

    def evaluate(policies: Sequence[Policy], _share: float) -> list[Risk]:
        calls.append((search.archive if calls else [], list(policies)))
        return [Risk(random.Random(str(policy)).random(), 0.0, 0.0) for policy in policies]

    search = Search(space, evaluate, lambda _: 0.0, SearchConfig("bench", generations=1))
    search.run_round()
    return calls[-1]


@torch.no_grad()
def plain_loss(model: Any, calibration: Calibration) -> float:
    """Answer loss of all samples by the model's own forward pass, summed over batches."""
    features = calibration.features or (lambda _: None)
    return sum(float(answer_loss(model, batch, features(batch))) for batch in calibration.batches)


def assembled_loss(setting: Setting, policy: Policy) -> float:
    """Loss of an assembled candidate that shares nothing with others."""
    with assembled(setting.model, setting.table, policy):
        return plain_loss(setting.model, setting.calibration)


def naive_loss(setting: Setting, policy: Policy) -> float:
    """Loss of a candidate that is copied, refitted and cut as a pruned model is, and looks at its images itself."""
    alone = replace(setting.calibration, features=None)
    layers = setting.table.plan(policy)
    ratio = plan_ratio(setting.model, layers)
    plan = PruningPlan("widthwise", layers, len(layers), 1, RATIO, ratio, alone.ids)
    pruned, _ = apply_plan(copy.deepcopy(setting.model), plan, alone, PRUNE)
    return plain_loss(pruned, alone)


def per_policy(function: Callable[[], Any], count: int) -> float:
    """CPU seconds of one call per policy; other programs change them less than wall time."""
    started = time.process_time()
    function()
    return (time.process_time() - started) / count


def generation_seconds(setting: Setting, parents: Sequence[Policy], children: Sequence[Policy]) -> tuple[float, float]:
    """Seconds per child: by the evaluator with the parents' activations kept, and assembled one by one."""
    evaluate = setting.evaluator.evaluate
    evaluate(parents, keep=parents)
    evaluate(children)  # makes all modules
    ours = per_policy(lambda: evaluate(children, keep=parents), len(children))
    some = children[::SINGLE]
    single = per_policy(lambda: [assembled_loss(setting, child) for child in some], len(some))
    evaluate([], keep=[])
    return ours, single


def search_rows(depth: int = DEPTH, samples: int = SAMPLES) -> list[Row]:
    """Seconds per candidate on one generation of exchange children, and of the default mix."""
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(Path(folder) / "table", depth, samples)
        parents, children = exchange_children(setting.space, PARENTS, CHILDREN)
        ours, single = generation_seconds(setting, parents, children)
        some = children[::NAIVE]
        naive = per_policy(lambda: [naive_loss(setting, child) for child in some], len(some))
        mixed, mixed_single = generation_seconds(setting, *default_children(setting.space))
    return [
        Row("search candidate: exchange children / copy, refit, cut, forward", ours, naive, "s", "< 0.1"),
        Row("search candidate: exchange children / assembled one by one", ours, single, "s", "< 0.67"),
        Row("search candidate: default mix / assembled one by one", mixed, mixed_single, "s", "low"),
    ]
