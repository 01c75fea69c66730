"""Evaluation under a Lightning Trainer: every rank answers its share, every rank gets all answers.

Greedy answers and reference losses of one batch, with vision features computed elsewhere.

Files of predictions: LLaVA's answer format, one JSON object per line, written as the answers come.

``question_id``, ``prompt``, ``text``, ``answer_id`` (ours: unique in the file), ``model_id`` and ``metadata``, which
holds the reference and whatever else a scorer wants. Files of other tools, in that format or in ours, are read as well.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..data.collator import Collator, GenerationCollator
from ..data.records import Record
from ..data.sources import DECODER, BadRecordError
from ..models.forward import (
    Batch,
    FeatureCache,
    decoder_inputs,
    feature_cache,
    forward_hidden,
    supervised_positions,
    to_device,
)
from ..runtime import processes
from ..runtime.errors import UserError
from ..runtime.finite import NotFiniteError, require_finite
from ..runtime.lines import Lines
from ..runtime.processes import rank, sum_over, world_size
from ..settings.schema import EvaluateConfig
from .scorers import Scores
from .tasks import Task

ANSWERS = 512  # supervised tokens whose logits are held at once
# Fields of a generation configuration that change no greedy answer, and special tokens, which are obeyed.
MEANINGLESS = {
    *("_from_model_config", "transformers_version", "use_cache", "cache_implementation", "cache_config"),
    *("max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size", "low_memory"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


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


def greedy_config(model: nn.Module, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops at the model's own end tokens, whatever else its folder suggests.

    Args:
        model: The model; its ``generation_config`` names the end tokens.
        tokenizer: Names the end and padding token where the model does not.
        max_new_tokens: Longest answer.

    Returns:
        The configuration for ``model.generate``, to be used with `unadvised`.
    """
    end = model.generation_config.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    end = tokenizer.eos_token_id if end is None else end
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=padding
    )


@contextmanager
def unadvised(model: nn.Module) -> Iterator[None]:
    """Set what a model's folder suggests for generation aside: ``generate`` fills every field that is not set from it.

    Args:
        model: Its ``generation_config`` is back in place afterwards.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        model.generation_config = own


def set_aside(model: nn.Module) -> dict[str, Any]:
    """What a model's folder suggests for generation beside its special tokens, and answers are made without."""
    suggested = model.generation_config.to_diff_dict()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return {name: value for name, value in suggested.items() if value not in (None, False) and name not in MEANINGLESS}


class StopTexts(StoppingCriteria):
    """Ends the rows in which a text has appeared; transformers' own criterion fails on word-level tokenizers.

    Args:
        tokenizer: The model's tokenizer.
        stop: Texts, none of them empty.
        start: Length of the prompts.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        self._window = max(map(len, stop))  # tokens, since none of them is shorter than a character

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One boolean per row."""
        tails = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._window :])
        ended = [any(mark in tail for mark in self._stop) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


class FiniteLogits(LogitsProcessor):
    """Refuses to choose a token by logits that are not finite.

    Args:
        ids: Name of each row's record.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The scores as they are.

        Raises:
            NotFiniteError: Names the first record whose largest logit is NaN or infinite.
        """
        bad = ~scores.amax(-1).isfinite()  # single tokens may be ruled out by minus infinity
        if bad.any():
            raise NotFiniteError(
                f"record {self._ids[int(bad.nonzero()[0])]!r}: the model's logits are not finite; evaluate in another "
                "type with model.dtype, or look at the checkpoint"
            )
        return scores


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    batch: Batch,
    features: Tensor | None,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[str]:
    """Answer left-padded prompts through the stock ``generate``.

    Args:
        model: An image-text-to-text model in eval mode.
        tokenizer: Its tokenizer.
        batch: A batch of `efficientllava.data.collator.GenerationCollator` on the model's device.
        features: Output of `efficientllava.models.forward.vision_features` for the batch's images, or None.
        max_new_tokens: Longest answer.
        stop: Texts that end an answer; they and what follows are cut off.

    Returns:
        Text per row, without special tokens, stripped.

    Raises:
        NotFiniteError: Names a record for which the logits are not finite.
    """
    config, start = greedy_config(model, tokenizer, max_new_tokens), batch["input_ids"].shape[1]
    criteria = StoppingCriteriaList([StopTexts(tokenizer, stop, start)] if stop else [])
    checks = LogitsProcessorList([FiniteLogits(batch["ids"])])
    inputs = decoder_inputs(model, batch, features)
    with unadvised(model):
        tokens = model.generate(  # pyright: ignore[reportCallIssue]
            **inputs, generation_config=config, logits_processor=checks, stopping_criteria=criteria
        )
    answers = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [_until(answer, stop).strip() for answer in answers]


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]


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
    for start in range(0, len(records), batch_size)[rank() :: world_size()]:
        batch = to_device(collate(list(records[start : start + batch_size])), next(model.parameters()).device)
        total += torch.tensor([sum(part) for part in reference_losses(model, batch, features(batch))]).double()
    total = sum_over(total)
    return float(total[0] / total[1])


@torch.inference_mode()
def reference_losses(model: nn.Module, batch: Batch, features: Tensor | None) -> tuple[list[float], list[int]]:
    """Cross-entropy of the reference answers, teacher-forced.

    Args:
        model: An image-text-to-text model in eval mode.
        batch: A batch of `efficientllava.data.collator.Collator` with one question per row.
        features: As in `generate`.

    Returns:
        Per row the sum over its supervised tokens in nats, and their number.

    Raises:
        NotFiniteError: Names a record whose loss is not finite.
    """
    mask, targets = supervised_positions(batch["labels"])
    rows = forward_hidden(model, batch, features)[mask]
    parts = zip(rows.split(ANSWERS), targets.split(ANSWERS), strict=True)
    # In parts: the logits of a large vocabulary are the largest tensors here.
    found = [nn.functional.cross_entropy(model.lm_head(r).float(), t, reduction="none") for r, t in parts]  # pyright: ignore[reportCallIssue]
    losses = torch.cat(found)
    sums = torch.zeros(len(mask), dtype=torch.float64).index_add_(0, mask.nonzero()[:, 0].cpu(), losses.double().cpu())
    for name, loss in zip(batch["ids"], sums, strict=True):
        require_finite(loss, f"record {name!r}: the loss of the reference answer")
    return sums.tolist(), mask.sum(1).tolist()


# What others call our keys; the first that is there counts.
ALIASES = {
    "id": ("id", "question_id", "questionId", "pid"),
    "question": ("question", "prompt"),
    "prediction": ("prediction", "text", "response"),
    "answer": ("answer", "answers", "ground_truth", "label"),
    "verdict": ("verdict", "content"),
}
GOLD_ALIASES = ALIASES | {"question": ("question", "text"), "prediction": ()}

Line = dict[str, Any]


def line(record: Record, text: str, model_id: str, **metadata: Any) -> Line:
    """One answer.

    Args:
        record: The question, a record of one turn.
        text: What the model said.
        model_id: Which model.
        **metadata: Added to what the record says about itself.
    """
    (turn,) = record.turns
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


def as_record(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]] = ALIASES) -> dict[str, Any]:
    """What scorers read: a line with its ``metadata`` spread out and our keys beside its own; the id is a text.

    Args:
        row: A line, with some kind of id.
        aliases: Our keys, and the names under which they may be found.
    """
    flat = _flat(row)
    found = {key: flat[name] for key, names in aliases.items() for name in reversed(names) if name in flat}
    return flat | found | {"id": str(found["id"])}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata")
    return {**metadata, **row} if isinstance(metadata, dict) else dict(row)


def read(path: Path, aliases: Mapping[str, Sequence[str]] = ALIASES) -> list[dict[str, Any]]:
    """Read a file of predictions or references.

    Args:
        path: JSON lines, a JSON list of objects, or a JSON object of objects by id.
        aliases: Our keys, and the names under which they may be found.

    Returns:
        The objects as scorers read them, see `as_record`.

    Raises:
        UserError: If the file cannot be read, is no JSON, is empty, or holds something without an id.
    """
    try:
        content = _parse(path, path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a JSON or JSON-lines file") from error
    if isinstance(content, dict):
        nested = all(isinstance(item, dict) for item in content.values())
        content = [{"id": key, **item} for key, item in content.items()] if nested else [content]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: holds no objects; give one JSON object per line")
    for number, item in enumerate(content, 1):
        known = _flat(item) if isinstance(item, dict) else {}
        if not {*known} & {*aliases["id"]}:
            raise UserError(f"{path}: object {number} has no id; it needs one of {', '.join(aliases['id'])}")
    return [as_record(item, aliases) for item in content]


def _parse(path: Path, content: str) -> Any:
    try:
        return DECODER.decode(content)
    except BadRecordError as error:
        raise UserError(f"{path}: {error}; leave one of them out") from error
    except (ValueError, RecursionError):
        items = []
    for number, text in enumerate(content.split("\n"), 1):
        try:
            items += [DECODER.decode(text)] if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON ({error})") from error
    return items


def write(lines: Sequence[Line], path: Path) -> None:
    """Write lines."""
    with path.open("w", encoding="utf-8") as file:
        file.write("".join(json.dumps(item) + "\n" for item in lines))


def keep(lines: Sequence[Line], folder: Path, rank: int) -> None:
    """Keep what a process has answered for `resume`; it is on file when this returns."""
    Lines(folder / f"answers-{rank}.jsonl", shared=False).append(lines)


def resume(folder: Path) -> list[Line]:
    """What an interrupted evaluation has answered.

    Args:
        folder: Where its processes called `keep`; made if it is not there.

    Returns:
        The finished lines; one that was being written is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [line for path in sorted(folder.glob("answers-*.jsonl")) for line in Lines(path, shared=False).new()]


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
