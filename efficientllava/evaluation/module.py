"""Evaluation under a Lightning Trainer: every rank answers its share, every rank gets all answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ..data.collator import Collator, GenerationCollator
from ..data.conversations import Record
from ..models.forward import FeatureCache, feature_cache
from ..schema import EvaluateConfig
from .generation import generate, length_batches, reference_losses
from .tasks import Prediction, Task


class EvaluationModule(LightningModule):
    """Answers questions; run it with ``trainer.predict(module)``, then read `predictions`.

    It shards by itself: use a Trainer with ``use_distributed_sampler=False``.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        records: Questions: records of exactly one turn, with distinct ids.
        cfg: ``batch_size`` and ``max_new_tokens``.
        cache: Vision features by image; see `feature_cache`.
        answer_loss: Also compute the loss of the reference answers.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        records: Sequence[Record],
        cfg: EvaluateConfig,
        cache: FeatureCache,
        answer_loss: bool = True,
    ) -> None:
        super().__init__()
        # A rank may have no batch when there are fewer questions than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self.predictions: list[Prediction] = []
        self._processor = processor
        self._records = records
        self._cfg = cfg
        self._cache = cache
        self._prompts = GenerationCollator(processor)
        self._answers = Collator(processor, pack=False) if answer_loss else None

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's batches, longest questions first."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = length_batches(self._records, self._cfg.batch_size, rank, world)
        return DataLoader(batches, batch_size=None, collate_fn=self._collate)  # pyright: ignore[reportArgumentType]

    def _collate(self, indices: list[int]) -> dict[str, Any]:
        """Prompts for generation and, where asked for, prompts with their reference answers."""
        chosen = [self._records[i] for i in indices]
        batch: dict[str, Any] = {"indices": indices, "prompts": self._prompts(chosen)}
        if self._answers is not None:
            # The same images as in the prompts, which hold their pixels.
            batch["answers"] = {k: v for k, v in self._answers(chosen).items() if k != "pixel_values"}
        return batch

    def on_predict_start(self) -> None:
        """Forget what an earlier run predicted."""
        self.predictions = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        """Answer one batch.

        Args:
            batch: A batch of `predict_dataloader`.
            batch_idx: Its number on this rank.

        Returns:
            Its predictions; they are kept in `predictions` as well.
        """
        prompts = batch["prompts"]
        # Lightning predicts in inference mode; features made there could not be used for training later.
        with torch.inference_mode(False):
            features = self._cache(prompts)
        texts = generate(self.model, self._processor.tokenizer, prompts, features, self._cfg.max_new_tokens)
        losses = None
        if "answers" in batch:
            answers = {**batch["answers"], "pixel_values": prompts.get("pixel_values")}
            losses = reference_losses(self.model, answers, features)
        items: list[Prediction] = []
        for row, (index, text) in enumerate(zip(batch["indices"], texts, strict=True)):
            record = self._records[index]
            (turn,) = record.turns
            item = Prediction(id=record.id, question=turn.question, kind=turn.kind, answer=turn.answer, prediction=text)
            if losses is not None:
                item["loss"], item["tokens"] = losses[0][row], losses[1][row]
            items.append(item)
        self.predictions += items
        return items


def gather(predictions: list[Prediction]) -> list[Prediction]:
    """Collect the predictions of all ranks on every rank.

    Args:
        predictions: Those of this rank.

    Returns:
        Those of all ranks, by rank; the argument where there is one process.
    """
    if not dist.is_initialized():
        return predictions
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, predictions)
    return [item for part in parts for item in part]


def in_order(predictions: Sequence[Prediction], records: Sequence[Record], partial: bool = False) -> list[Prediction]:
    """Bring predictions into the order of their questions, and see that each question was answered once.

    Args:
        predictions: In any order.
        records: The questions.
        partial: Allow questions without an answer (a Trainer told to stop early).

    Returns:
        The predictions in the order of ``records``.

    Raises:
        RuntimeError: If a question has several answers, or none although it should.
    """
    counts = Counter(item["id"] for item in predictions)
    twice = [key for key, count in counts.items() if count > 1]
    missing = [] if partial else [record.id for record in records if record.id not in counts]
    if twice or missing:
        raise RuntimeError(
            f"{len(twice)} questions were answered more than once and {len(missing)} never "
            f"(first: {(twice + missing)[0]}); questions need distinct ids, the Trainer use_distributed_sampler=False"
        )
    by_id = {item["id"]: item for item in predictions}
    return [by_id[record.id] for record in records if record.id in by_id]


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one task on one model.

    Attributes:
        metrics: What the task scores.
        predictions: One per question, in the task's order; the same on every rank.
    """

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    model: nn.Module,
    processor: Any,
    task: Task,
    trainer: Trainer,
    cfg: EvaluateConfig,
    cache: FeatureCache | None = None,
    split: str = "test",
) -> Evaluation:
    """Let a model answer a task's questions and score the answers.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        task: From `efficientllava.evaluation.tasks.load`.
        trainer: With ``use_distributed_sampler=False``; its processes share the questions.
        cfg: ``limit``, ``batch_size``, ``max_new_tokens``.
        cache: From `feature_cache`, shared by the models of a run; None makes one for this call.
        split: Split of the task.

    Returns:
        Metrics and predictions, the same on every rank. The model may have been moved by the Trainer's teardown.
    """
    records = list(task.records(split))[: cfg.limit]
    cache = cache or feature_cache(model)
    module = EvaluationModule(model, processor, records, cfg, cache, task.answer_loss)
    trainer.predict(module, return_predictions=False)
    limit = trainer.limit_predict_batches
    # An integer is a number of batches, a float a share of them.
    partial = isinstance(limit, int) or limit < 1
    predictions = in_order(gather(module.predictions), records, partial)
    return Evaluation(task.score(predictions), predictions)
