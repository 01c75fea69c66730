"""Evaluation under a Lightning Trainer: every rank answers its share, every rank gets all answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from .. import processes
from ..data.collator import Collator, GenerationCollator
from ..data.conversations import Record
from ..models.forward import FeatureCache, feature_cache
from ..schema import EvaluateConfig
from .generation import generate, length_batches, reference_losses
from .predictions import Line, as_record, keep, line, resume
from .scorers import Scores
from .tasks import Task


class EvaluationModule(LightningModule):
    """Answers questions; run it with ``trainer.predict(module)``, then read `lines`.

    It shards by itself: use a Trainer with ``use_distributed_sampler=False``.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        task: How to answer.
        records: The questions: records of exactly one turn, with distinct ids.
        cfg: ``batch_size``, ``max_new_tokens``, ``num_workers``.
        cache: Vision features by image; see `feature_cache`.
        model_id: Which model, for the lines.
        keep: Called with the lines of every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        task: Task,
        records: Sequence[Record],
        cfg: EvaluateConfig,
        cache: FeatureCache,
        model_id: str = "",
        keep: Callable[[list[Line]], None] = lambda lines: None,
    ) -> None:
        super().__init__()
        # A rank may have no batch when there are fewer questions than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self.lines: list[Line] = []
        self._processor, self._task, self._records, self._cfg = processor, task, records, cfg
        self._cache, self._model_id, self._keep = cache, model_id, keep
        self._prompts = GenerationCollator(processor)
        self._answers = Collator(processor, pack=False) if task.answer_loss else None

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's batches, longest questions first."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = length_batches(self._records, self._cfg.batch_size, rank, world)
        workers = self._cfg.num_workers
        return DataLoader(batches, batch_size=None, collate_fn=self._collate, num_workers=workers)  # pyright: ignore[reportArgumentType]

    def _collate(self, indices: list[int]) -> dict[str, Any]:
        """Prompts for generation and, where asked for, prompts with their reference answers."""
        chosen = [self._records[i] for i in indices]
        batch: dict[str, Any] = {"indices": indices, "prompts": self._prompts(chosen)}
        if self._answers is not None:
            # The same images as in the prompts, which hold their pixels.
            batch["answers"] = {k: v for k, v in self._answers(chosen).items() if k != "pixel_values"}
        return batch

    def on_predict_start(self) -> None:
        """Forget what an earlier run answered."""
        self.lines = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Line]:
        """Answer one batch.

        Args:
            batch: A batch of `predict_dataloader`.
            batch_idx: Its number on this rank.

        Returns:
            Its answers; they are kept in `lines` as well.
        """
        prompts, task = batch["prompts"], self._task
        # Lightning predicts in inference mode; features made there could not be used for training later.
        with torch.inference_mode(False):
            features = self._cache(prompts)
        limit = self._cfg.max_new_tokens or task.max_new_tokens
        texts = generate(self.model, self._processor.tokenizer, prompts, features, limit, task.stop)
        known: list[dict[str, Any]] = [{} for _ in texts]
        if "answers" in batch:
            answers = {**batch["answers"], "pixel_values": prompts.get("pixel_values")}
            losses = zip(*reference_losses(self.model, answers, features), strict=True)
            known = [{"loss": loss, "tokens": tokens} for loss, tokens in losses]
        asked = (self._records[index] for index in batch["indices"])
        answered = zip(asked, texts, known, strict=True)
        lines = [line(record, text, self._model_id, **more) for record, text, more in answered]
        self._keep(lines)
        self.lines += lines
        return lines


def in_order(lines: Sequence[Line], records: Sequence[Record], partial: bool = False) -> list[Line]:
    """Bring answers into the order of their questions, and see that each question was answered once.

    Args:
        lines: In any order.
        records: The questions.
        partial: Allow questions without an answer (a Trainer told to stop early).

    Returns:
        The lines in the order of ``records``.

    Raises:
        RuntimeError: If a question has several answers, or none although it should.
    """
    counts = Counter(item["answer_id"] for item in lines)
    twice = [key for key, count in counts.items() if count > 1]
    missing = [] if partial else [record.id for record in records if record.id not in counts]
    if twice or missing:
        raise RuntimeError(
            f"{len(twice)} questions were answered more than once and {len(missing)} never "
            f"(first: {(twice + missing)[0]}); questions need distinct ids, the Trainer use_distributed_sampler=False"
        )
    by_id = {item["answer_id"]: item for item in lines}
    return [by_id[record.id] for record in records if record.id in by_id]


def answer(
    model: nn.Module,
    processor: Any,
    task: Task,
    trainer: Trainer,
    cfg: EvaluateConfig,
    cache: FeatureCache | None = None,
    work: Path | None = None,
    model_id: str = "",
) -> list[Line]:
    """Let a model answer a task's questions.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        task: From `efficientllava.evaluation.tasks.load`.
        trainer: With ``use_distributed_sampler=False``; its processes share the questions.
        cfg: ``limit``, ``batch_size``, ``max_new_tokens``, ``num_workers``.
        cache: From `feature_cache`, shared by the models of a run; None makes one for this call.
        work: Folder that keeps answers as they come, and gives those that an interrupted call has left.
        model_id: Which model, for the lines.

    Returns:
        One line per question in the task's order, the same on every rank. The model may have been moved by the
        Trainer's teardown.
    """
    records = list(task.records())[: cfg.limit]
    rank = processes.rank()
    lines: list[Line] = processes.from_first(resume(work) if work and rank == 0 else [])
    done = {item["answer_id"] for item in lines}
    lines += [line(record, "", model_id) for record in records if _skipped(record) and record.id not in done]
    asked = [record for record in records if not _skipped(record) and record.id not in done]
    partial = False
    if asked:
        kept = (lambda found: keep(found, work, rank)) if work else (lambda found: None)
        cache = cache or feature_cache(model)
        module = EvaluationModule(model, processor, task, asked, cfg, cache, model_id, kept)
        trainer.predict(module, return_predictions=False)
        lines += [item for part in processes.gather(module.lines) for item in part]
        # An integer is a number of batches, a float a share of them.
        limit = trainer.limit_predict_batches
        partial = isinstance(limit, int) or limit < 1
    return in_order(lines, records, partial)


def _skipped(record: Record) -> bool:
    return bool(record.details.get("skipped"))


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one task on one model.

    Attributes:
        scores: The task's metrics, and what became of every answer.
        lines: One answer per question, in the task's order; the same on every rank.
    """

    scores: Scores
    lines: list[Line]


def evaluate(
    model: nn.Module,
    processor: Any,
    task: Task,
    trainer: Trainer,
    cfg: EvaluateConfig,
    cache: FeatureCache | None = None,
) -> Evaluation:
    """Let a model answer a task's questions and score the answers; the arguments are those of `answer`."""
    lines = answer(model, processor, task, trainer, cfg, cache)
    return Evaluation(task.score([as_record(item) for item in lines]), lines)
