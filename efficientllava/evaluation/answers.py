"""From questions to answers: records, batches of like length, tokens, texts, lines of a file.

It runs under a Lightning Trainer: every process answers its share and gets all answers. A line is an object of JSON in
LLaVA's answer format: ``question_id``, ``prompt``, ``text``, ``answer_id`` (ours: unique in the file), ``model_id`` and
``metadata``, which holds the reference and whatever else a scorer wants. Lines are written as the answers come, so that
a killed evaluation goes on where it was; `efficientllava.evaluation.score` reads them and makes scores of them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.collator import Collator, GenerationCollator
from ..data.records import Record
from ..models.forward import ANSWERS, Batch, FeatureCache, forward_hidden, supervised_positions, to_device
from ..runtime import Lines, processes, require_finite
from ..settings.schema import EvaluateConfig
from .divergence import FILE, Divergence
from .generation import generate
from .tasks import Task

log = logging.getLogger(__name__)
Line = dict[str, Any]


def answer(
    model: nn.Module,
    processor: Any,
    task: Task,
    trainer: Trainer,
    cfg: EvaluateConfig,
    cache: FeatureCache | None = None,
    work: Path | None = None,
    model_id: str = "",
    base: Path | None = None,
) -> list[Line]:
    """Let a model answer a task's questions.

    Args:
        model: An image-text-to-text model; the Trainer's teardown may move it.
        processor: Its processor.
        task: From `efficientllava.evaluation.tasks.load`.
        trainer: With ``use_distributed_sampler=False``; its processes share the questions.
        cfg: ``limit``, ``batch_size``, ``max_new_tokens``, ``num_workers``.
        cache: From `FeatureCache`, shared by the models of a run; None makes one for this call.
        work: Folder that keeps answers as they come, and gives those that an interrupted call has left.
        model_id: Which model, for the lines.
        base: Folder with the base model's distributions, see `efficientllava.evaluation.divergence`; None: this is it.

    Returns:
        One line per question in the task's order, the same on every rank.
    """
    records = list(task.records())[: cfg.limit]
    lines: list[Line] = processes.on_first(lambda: resume(work) if work else [])
    done = {item["answer_id"] for item in lines}
    skipped = [record for record in records if record.details.get("skipped") and record.id not in done]
    lines += [line(record, "", model_id, protocol=cfg.protocol) for record in skipped]
    done |= {record.id for record in skipped}
    asked, partial = [record for record in records if record.id not in done], False
    if asked:
        module = EvaluationModule(
            model, processor, task, asked, cfg, cache or FeatureCache(model), work, model_id, base
        )
        batches = trainer.predict(module) or []
        lines += [item for part in processes.gather(batches) for batch in part for item in batch]
        # An integer is a number of batches, a float a share of them.
        limit = trainer.limit_predict_batches
        partial = isinstance(limit, int) or limit < 1
    return in_order(lines, records, partial)


def resume(work: Path) -> list[Line]:
    """What the processes of an interrupted evaluation have answered; the folder is made if it is not there.

    A line that was being written is not among them.
    """
    work.mkdir(parents=True, exist_ok=True)
    return [line for path in sorted(work.glob("answers-*.jsonl")) for line in Lines(path).new()]


class EvaluationModule(LightningModule):
    """Answers questions; ``trainer.predict(module)`` gives the lines of every batch.

    It shards by itself: use a Trainer with ``use_distributed_sampler=False``.

    Args:
        model: An image-text-to-text model.
        processor: Its processor.
        task: How to answer.
        records: The questions, with distinct ids.
        cfg: ``batch_size``, ``max_new_tokens``, ``num_workers``.
        cache: Vision features by image; see `FeatureCache`.
        work: Folder that keeps the lines of every batch, for `resume`.
        model_id: Which model, for the lines.
        base: Folder with the base model's distributions, where ``task`` asks for a divergence; None: this is the base.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        task: Task,
        records: Sequence[Record],
        cfg: EvaluateConfig,
        cache: FeatureCache,
        work: Path | None = None,
        model_id: str = "",
        base: Path | None = None,
    ) -> None:
        super().__init__()
        # A rank may have no batch when there are fewer questions than processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model, self._cache, self._work = model, cache, work
        self._task, self._records, self._cfg, self._model_id = task, records, cfg, model_id
        self._file = Lines(work / f"answers-{processes.rank()}.jsonl") if work else None
        self._tokenizer, self._prompts = processor.tokenizer, GenerationCollator(processor)
        self._answers = Collator(processor, pack=False) if task.answer_loss else None
        self._told = False
        self._base = safe_open(base / FILE, "pt") if base and task.divergence else None

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This rank's batches, longest questions first."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = length_batches(self._records, self._cfg.batch_size, rank, world)
        workers = self._cfg.num_workers
        return DataLoader(batches, batch_size=None, collate_fn=self._collate, num_workers=workers)  # pyright: ignore[reportArgumentType]

    def _collate(self, indices: list[int]) -> dict[str, Any]:
        """Prompts for generation and prompts with their reference answers, where each is asked for."""
        chosen = [self._records[i] for i in indices]
        batch: dict[str, Any] = {"indices": indices}
        if self._task.max_new_tokens:
            batch["prompts"] = self._prompts(chosen)
        if self._answers is not None:
            # The same images as in the prompts, which hold their pixels.
            again = ("pixel_values",) if "prompts" in batch else ()
            batch["answers"] = {k: v for k, v in self._answers(chosen).items() if k not in again}
        return batch

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Line]:
        """Answer a batch of `predict_dataloader`, and keep the lines."""
        shown: dict[str, Any] = batch["prompts" if "prompts" in batch else "answers"]
        count = len(batch["indices"])
        texts, known = [""] * count, [{} for _ in range(count)]
        # Lightning predicts in inference mode; features made there could not be used for training later.
        with torch.inference_mode(False):
            features = self._cache(shown)
        if "prompts" in batch:
            self._look_for_context(shown)
            limit = self._cfg.max_new_tokens or self._task.max_new_tokens
            texts = generate(self.model, self._tokenizer, shown, features, limit, self._task.stop)
        if "answers" in batch:
            known = self._known({**batch["answers"], "pixel_values": shown.get("pixel_values")}, features)
        asked, answered = {"protocol": self._cfg.protocol}, zip(batch["indices"], texts, known, strict=True)
        lines = [line(self._records[index], text, self._model_id, **asked, **more) for index, text, more in answered]
        if self._file:
            self._file.append(lines)
        return lines

    def _look_for_context(self, prompts: Batch) -> None:
        """Tell, once, of a prompt that is longer than what the model was made for."""
        lengths, context = prompts["attention_mask"].sum(1), int(self._tokenizer.model_max_length)
        if not self._told and int(lengths.max()) > context:
            longest = prompts["ids"][int(lengths.argmax())]
            log.warning(
                "%s: the prompt of %s has %d tokens, the model's context is %d; what it answers there means little",
                *(self._task.name, longest, int(lengths.max()), context),
            )
            self._told = True

    def _known(self, answers: Batch, features: Tensor | None) -> list[dict[str, Any]]:
        """Of every reference answer its loss, its tokens and, where asked for, its divergence."""
        look = Divergence(self._base, answers["ids"]) if self._task.divergence else None
        losses, counts = reference_losses(self.model, answers, features, look)
        known = [{"loss": loss, "tokens": tokens} for loss, tokens in zip(losses, counts, strict=True)]
        if look and (found := look.done(counts, self._work)):
            known = [{**each, "kl": kl} for each, kl in zip(known, found, strict=True)]
        return known


def length_batches(records: Sequence[Record], batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Batches of questions of like length, longest first; a rank's share of them.

    Questions with and without an image do not mix, except in one batch at most. The order depends on the records alone.

    Args:
        records: Questions: records of one turn.
        batch_size: Most questions per batch; smaller where several ranks would else get nothing to do.
        rank: This process.
        world: Number of processes.

    Returns:
        Indices into ``records``. Over all ranks every index occurs exactly once.
    """

    def length(index: int) -> tuple[bool, int]:
        # The prompt's own length would need its tokens; characters order the questions nearly as well.
        return records[index].image is not None, len(records[index].turns[0].question)

    order = sorted(range(len(records)), key=length, reverse=True)
    size = max(1, min(batch_size, math.ceil(len(order) / world)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches[rank::world]


def mean_loss(
    model: nn.Module, records: Sequence[Record], collate: Collator, batch_size: int, features: FeatureCache
) -> float:
    """Mean cross-entropy of the answers of records, in nats per token; processes share the records.

    Args:
        model: An image-text-to-text model in eval mode, on the device that computes.
        records: The same on all processes.
        collate: Turns records into a batch.
        batch_size: Records of a batch.
        features: Vision features by image.

    Raises:
        NotFiniteError: Names a record whose loss is not finite.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(records), batch_size)[processes.rank() :: processes.world_size()]:
        batch = to_device(collate(list(records[start : start + batch_size])), next(model.parameters()).device)
        total += torch.tensor([sum(part) for part in reference_losses(model, batch, features(batch))]).double()
    total = processes.sum_over(total)
    return float(total[0] / total[1])


@torch.inference_mode()
def reference_losses(
    model: nn.Module, batch: Batch, features: Tensor | None, look: Callable[[Tensor], None] | None = None
) -> tuple[list[float], list[int]]:
    """Cross-entropy of the reference answers, teacher-forced.

    Args:
        model: An image-text-to-text model in eval mode.
        batch: A batch of `efficientllava.data.collator.Collator` with one question per row.
        features: As in `generate`.
        look: Is shown the logits of supervised tokens, some at a time, in their order.

    Returns:
        Per row the sum over its supervised tokens in nats, and their number.

    Raises:
        NotFiniteError: Names a record whose loss is not finite.
    """
    mask, targets = supervised_positions(batch["labels"])
    rows = forward_hidden(model, batch, features)[mask]
    found: list[Tensor] = []
    # In parts: the logits of a large vocabulary are the largest tensors here.
    for some, wanted in zip(rows.split(ANSWERS), targets.split(ANSWERS), strict=True):
        logits = model.lm_head(some).float()  # pyright: ignore[reportCallIssue]
        found.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
        if look:
            look(logits)
    losses = torch.cat(found)
    sums = torch.zeros(len(mask), dtype=torch.float64).index_add_(0, mask.nonzero()[:, 0].cpu(), losses.double().cpu())
    for name, loss in zip(batch["ids"], sums, strict=True):
        require_finite(loss, f"record {name!r}: the loss of the reference answer")
    return sums.tolist(), mask.sum(1).tolist()


def line(record: Record, text: str, model_id: str, **metadata: Any) -> Line:
    """One answer.

    Args:
        record: The question, a record of one turn; of a conversation the first is shown.
        text: What the model said.
        model_id: Which model.
        **metadata: Added to what the record says about itself.
    """
    turn = record.turns[0]
    details = dict(record.details)
    official = details.pop("id", record.id)
    # A benchmark's details are its own columns, the question without instructions and all answers among them.
    known = details or {"question": turn.question, "answer": turn.answer, "kind": turn.kind}
    return {
        "question_id": official,
        "prompt": turn.question,
        "text": text,
        "answer_id": record.id,
        "model_id": model_id,
        "metadata": {"benchmark": record.source, "has_image": record.image is not None, **known, **metadata},
    }


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
