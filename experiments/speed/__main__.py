"""Ratios of time and memory of this project against simpler ways of the same: ``python -m experiments.speed``.

Answering and training against loops by hand, cached teachers, kept vision features, and the policy search.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator, GenerationCollator
from efficientllava.data.datamodule import RecoveryData
from efficientllava.data.embedded.digits import Digits
from efficientllava.evaluation.answers import answer, length_batches
from efficientllava.evaluation.generation import greedy_config, unadvised
from efficientllava.evaluation.score import as_record
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.models.anatomy import language_parameters
from efficientllava.models.forward import FeatureCache, answer_loss, to_device
from efficientllava.pruning.plan import PruningPlan, plan_ratio
from efficientllava.pruning.pruner import apply_plan
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.recovery.recover import recover
from efficientllava.recovery.student import prepare, trainable
from efficientllava.recovery.teacher import open_teacher
from efficientllava.runtime import Memo, UserError, exit_code, quiet_libraries
from efficientllava.search.budget import removed_costs
from efficientllava.search.change import assembled
from efficientllava.search.evaluator import Evaluator
from efficientllava.search.evolution import Risk, Search
from efficientllava.search.levels import LevelTable, fill_table
from efficientllava.search.recipes import Structured
from efficientllava.search.space import Budget, Policy, SearchSpace
from efficientllava.settings.schema import (
    DataConfig,
    EvaluateConfig,
    PruneConfig,
    RecoverConfig,
    SearchConfig,
    TeacherConfig,
    WeightsConfig,
)
from experiments.speed.rows import Row, memory_rows, quiet_trainer, seconds, table
from experiments.tiny_models.tiny import initialise, tiny_llava

STEPS = 12  # of the trainings
SFT = RecoverConfig("sft", WeightsConfig(sft=1.0), steps=STEPS, save_every=10**6)
KD_BOTH = RecoverConfig("kd_both", WeightsConfig(0.5, 0.5, 0.5), steps=STEPS, save_every=10**6)
DEPTH, SAMPLES, BATCH, RATIO = 12, 64, 8, 0.5
PARENTS, CHILDREN = 8, 6
SINGLE, NAIVE = 4, 16  # every how many children are also evaluated one by one, and the naive way
PRUNE = PruneConfig("widthwise", "widthwise", RATIO, refit=True)
ROUND_TO = 8  # widths that matrix products like, as at full size


def evaluation_row(checkpoint: Any, questions: int = 64) -> Row:
    """Answering questions in a batch against one by one; vision features are computed beforehand."""
    task, cache = digits_vqa(questions), FeatureCache(checkpoint.model)

    def run(size: int) -> Callable[[], Any]:
        config = EvaluateConfig(batch_size=size)
        return lambda: answer(checkpoint.model, checkpoint.processor, task, quiet_trainer(), config, cache)

    return Row(f"evaluation: batch of {questions} / one by one", *seconds(run(questions), run(1), 1), "s", "< 0.5")


def generation_row(checkpoint: Any, questions: int = 192, size: int = 48) -> Row:
    """An evaluation from records to scores against a loop by hand over the same batches: tower, generate, decode."""
    task = replace(digits_vqa(questions), answer_loss=False)
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    records, collate = task.records(), GenerationCollator(checkpoint.processor)
    config = greedy_config(model, tokenizer, task.max_new_tokens)

    @torch.inference_mode()
    def bare() -> None:
        for indices in length_batches(records, size):
            batch = collate([records[index] for index in indices])
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
            with unadvised(model):
                tokens = model.generate(**inputs, generation_config=config)
            tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ours() -> None:
        lines = answer(model, checkpoint.processor, task, quiet_trainer(), EvaluateConfig(batch_size=size))
        task.score([as_record(line) for line in lines])

    return Row("evaluation / bare loop of generate", *seconds(ours, bare), "s", "< 1.15")


def training_data(checkpoint: Any, count: int = STEPS) -> RecoveryData:
    """Recovery data of which every batch is used once."""
    return RecoveryData(DataConfig("digits_vqa", images=8 * count, batch_size=8), checkpoint.processor)


def recovery_row(load: Callable[[], Any]) -> Row:
    """A recovery step against a plain loop with the same forward and backward pass, clipping and optimiser."""
    checkpoint = load()
    data = training_data(checkpoint)
    for batch in data.train_dataloader():
        answer_loss(checkpoint.model, batch)  # the first pass over the data fills caches of both sides
    ours, plain = ours_seconds(checkpoint, data, SFT), plain_seconds(load().model, data)
    return Row("recovery step: ours / plain torch loop", ours, plain, "s", "near 1")


def ours_seconds(checkpoint: Any, data: RecoveryData, config: RecoverConfig, teacher: Any = None) -> float:
    """Seconds of a recovery, loading and set-up apart."""
    with tempfile.TemporaryDirectory() as work:
        model = checkpoint.model
        return recover(model, data, config, quiet_trainer, Path(work), batch_size=8, teacher=teacher).seconds


def plain_seconds(model: Any, data: RecoveryData) -> float:
    """Seconds of supervised training written by hand: every batch once, decoder and projector train."""
    prepare(model, SFT)
    optimizer = torch.optim.AdamW(list(trainable(model)), lr=1e-3, fused=True)
    started = time.perf_counter()
    for batch in data.train_dataloader():
        answer_loss(model, to_device(batch, "cpu")).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(model)), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def teacher_row(load: Callable[[], Any]) -> Row:
    """A distillation step with cached answers, which were asked for beforehand, against one with a live teacher."""
    data, times = training_data(load()), {}
    with tempfile.TemporaryDirectory() as targets:
        for source in ("live", "cached"):
            student = load()
            teacher = open_teacher(TeacherConfig(source=source), student.base, "cpu", Path(targets), Memo())
            times[source] = ours_seconds(student, data, KD_BOTH, teacher)
    return Row("distillation step: cached / live teacher", times["cached"], times["live"], "s", "< 1")


def vision_row(checkpoint: Any, count: int = 6) -> Row:
    """A pass over batches with kept vision features against running the tower again."""
    batches, cache = list(training_data(checkpoint, count).train_dataloader()), FeatureCache(checkpoint.model)

    @torch.no_grad()
    def run(features: Callable[[Any], Tensor | None]) -> None:
        for batch in batches:
            answer_loss(checkpoint.model, batch, features(batch))

    times = seconds(lambda: run(cache), lambda: run(lambda _: None))
    return Row("forward pass: kept vision features / tower", *times, "s", "< 1")


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
    records: Any = Digits("calibration", samples)
    calibration = Calibration([*DataLoader(records, BATCH, collate_fn=Collator(processor))], FeatureCache(model))
    return setting_of(model, calibration, folder, ROUND_TO)


def setting_of(model: Any, calibration: Calibration, folder: Path, round_to: int) -> Setting:
    """Level table and search space of a model.

    Args:
        model: The model, in eval mode.
        calibration: Its samples.
        folder: Becomes the table's folder.
        round_to: Kept channels of a level are a multiple of it.
    """
    recipe = Structured(round_to=round_to)
    folder.mkdir()
    fill_table(model, recipe, calibration, folder)
    table = LevelTable(model, recipe, folder)
    costs = removed_costs(table, language_parameters(model))
    space = SearchSpace(table.genes, Budget("params", RATIO, costs))
    evaluator = Evaluator(model, table, CalibrationStream(model, calibration, PRUNE.tokens))
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
        calls.append((search.state.archive if calls else [], list(policies)))
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
    return timeit(function, timer=time.process_time, number=1) / count


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


def main() -> None:
    """Measure everything on one CPU thread and print one table.

    Raises:
        UserError: There are arguments; none are known.
    """
    if sys.argv[1:]:
        raise UserError("usage: python -m experiments.speed (measures for some minutes on one CPU thread)")
    torch.set_num_threads(1)
    quiet_libraries()
    fresh = partial(load, "builtin:tiny_llava")
    with redirect_stdout(StringIO()):
        rows, checkpoint = memory_rows(), fresh()
        rows += [evaluation_row(checkpoint), generation_row(checkpoint), recovery_row(fresh), teacher_row(fresh)]
        rows += [vision_row(checkpoint), *search_rows()]
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
