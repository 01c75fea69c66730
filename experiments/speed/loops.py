"""Speed of answering and of training against loops by hand, of cached teachers, and of kept vision features."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientllava.data.collator import GenerationCollator
from efficientllava.data.datamodule import RecoveryData
from efficientllava.evaluation.answers import answer, length_batches
from efficientllava.evaluation.generation import greedy_config, unadvised
from efficientllava.evaluation.score import as_record
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.models.forward import answer_loss, feature_cache, to_device
from efficientllava.recovery.recover import recover
from efficientllava.recovery.student import prepare, trainable
from efficientllava.recovery.teacher import open_teacher
from efficientllava.runtime.content import Memo
from efficientllava.settings.schema import DataConfig, EvaluateConfig, RecoverConfig, TeacherConfig, WeightsConfig
from experiments.speed.rows import Row, quiet_trainer, seconds

STEPS = 12  # of the trainings
SFT = RecoverConfig("sft", WeightsConfig(sft=1.0), steps=STEPS, save_every=10**6)
KD_BOTH = RecoverConfig("kd_both", WeightsConfig(0.5, 0.5, 0.5), steps=STEPS, save_every=10**6)


def evaluation_row(checkpoint: Any, questions: int = 64) -> Row:
    """Answering questions in a batch against one by one; vision features are computed beforehand."""
    task, cache = digits_vqa(questions), feature_cache(checkpoint.model)

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
    batches, cache = list(training_data(checkpoint, count).train_dataloader()), feature_cache(checkpoint.model)

    @torch.no_grad()
    def run(features: Callable[[Any], Tensor | None]) -> None:
        for batch in batches:
            answer_loss(checkpoint.model, batch, features(batch))

    times = seconds(lambda: run(cache), lambda: run(lambda _: None))
    return Row("forward pass: kept vision features / tower", *times, "s", "< 1")
