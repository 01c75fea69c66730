"""Speed of training against a loop by hand, of cached teachers, and of kept vision features."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientllava.data.datamodule import RecoveryData
from efficientllava.models.forward import answer_loss, feature_cache, to_device
from efficientllava.settings.schema import (
    DataConfig,
    RecoverConfig,
    TeacherConfig,
    WeightsConfig,
)
from experiments.speed.rows import Row, quiet_trainer, seconds


def training_batches(checkpoint: Any, count: int) -> tuple[RecoveryData, list[dict[str, Any]]]:
    """Recovery data of which every batch is used once, and its batches."""
    data = RecoveryData(DataConfig("digits_vqa", images=8 * count, batch_size=8), checkpoint.processor)
    return data, list(data.train_dataloader())


def recovery_row(load: Callable[[], Any], steps: int = 12) -> Row:
    """A recovery step against a plain loop with the same forward and backward pass, clipping and optimiser."""
    from efficientllava.recovery.recover import recover

    checkpoint = load()
    data, batches = training_batches(checkpoint, steps)
    config = RecoverConfig("sft", WeightsConfig(sft=1.0), steps=steps, save_every=10**6)
    for batch in batches:
        answer_loss(checkpoint.model, batch)  # the first pass over the data fills caches of both sides
    with tempfile.TemporaryDirectory() as work:
        stats = recover(checkpoint.model, data, config, quiet_trainer, Path(work), batch_size=8)
    return Row("recovery step: ours / plain torch loop", stats.seconds, plain_loop(load().model, data), "s", "near 1")


def teacher_row(load: Callable[[], Any], steps: int = 12) -> Row:
    """A distillation step with cached answers, which were asked for beforehand, against one with a live teacher."""
    from efficientllava.recovery.caching import open_teacher
    from efficientllava.recovery.recover import recover

    config = RecoverConfig("kd_both", WeightsConfig(0.5, 0.5, 0.5), steps=steps, save_every=10**6)
    data, times = training_batches(load(), steps)[0], {}
    with tempfile.TemporaryDirectory() as work:
        for source in ("live", "cached"):
            student = load()
            teacher = open_teacher(TeacherConfig(source=source), student.base, "cpu", Path(work) / "targets")
            folder = Path(work) / source
            stats = recover(student.model, data, config, quiet_trainer, folder, batch_size=8, teacher=teacher)
            times[source] = stats.seconds
    return Row("distillation step: cached / live teacher", times["cached"], times["live"], "s", "< 1")


def plain_loop(model: Any, data: RecoveryData) -> float:
    """Seconds of supervised training written by hand: every batch once, decoder and projector train."""
    from efficientllava.recovery.trainable import prepare, trainable

    prepare(model, RecoverConfig("sft", WeightsConfig(sft=1.0), steps=1), 0, train_head=True)
    optimizer = torch.optim.AdamW(list(trainable(model)), lr=1e-3, fused=True)
    started = time.perf_counter()
    for batch in data.train_dataloader():
        answer_loss(model, to_device(batch, "cpu")).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(model)), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def vision_row(checkpoint: Any, count: int = 6) -> Row:
    """A pass over batches with kept vision features against running the tower again."""
    _, batches = training_batches(checkpoint, count)
    cache = feature_cache(checkpoint.model)

    @torch.no_grad()
    def run(features: Callable[[Any], Tensor | None]) -> None:
        for batch in batches:
            answer_loss(checkpoint.model, batch, features(batch))

    return Row(
        "forward pass: kept vision features / tower",
        *seconds(lambda: run(cache), lambda: run(lambda _: None)),
        "s",
        "< 1",
    )
