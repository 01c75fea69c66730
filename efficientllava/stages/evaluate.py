"""Evaluation as a stage: answers through the store, scores, judges, and the quantized twin of every model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..data.records import image_contents, image_stamps, text_contents
from ..evaluation import judges, lmms
from ..evaluation.answers import answer, mean_loss
from ..evaluation.divergence import collect
from ..evaluation.efficiency import quantized
from ..evaluation.score import read
from ..evaluation.tasks.published import study
from ..runtime import Entry, UserError, digest, json_lines, processes, say, source_digest
from ..settings.schema import JUDGED
from .run import Made, Run

CACHED = "  (from cache)"


@dataclass
class Scored:
    """What the evaluation of a model has found.

    Args:
        stage: ``base``, ``pruned`` or ``recovered``; a quantized twin has one of its own, such as ``pruned_int8``.
        metrics: By benchmark.
        loss: Answer loss on the records that no choice of the run sees, in nats per token; None without such records.
        answers: Answer and score of every record of the first benchmark.
        judged: What judges did, by benchmark.
        entries: Answers in the store, by benchmark.
        seconds: How long it took.
    """

    stage: str
    metrics: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    answers: list[tuple[str, float | None]] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    seconds: float = 0.0


def evaluate(run: Run, made: Made, base: Scored | None = None) -> list[Scored]:
    """Answer and score all benchmarks.

    Args:
        run: What is opened.
        made: The model.
        base: What was found of the base model; None: this is it.

    Returns:
        What was found of the model, and of its quantized twin if there is to be one.
    """
    checkpoint, kind = made.checkpoint, run.settings.evaluate.quantization
    found = [_evaluate(run, Scored(made.stage), checkpoint, base)]
    if kind != "none":
        made_by = f"{kind}-torchao-{metadata.version('torchao')}-{source_digest('evaluation.efficiency')}"
        twin = {"model": quantized(checkpoint.model, kind), "content": f"{checkpoint.digest}-{made_by}"}
        scored = Scored(f"{made.stage}_{kind}")
        found.append(_evaluate(run, scored, replace(checkpoint, **twin), base or found[0]))
    return found


def _evaluate(run: Run, scored: Scored, checkpoint: Checkpoint, base: Scored | None) -> Scored:
    started, stage = time.perf_counter(), scored.stage
    if run.reported:
        scored.loss = _loss(run, checkpoint)
        say(f"{stage:<10} loss on {len(run.reported)} unseen records: {scored.loss:.4f}")
    for task in run.tasks:
        entry = scored.entries[task.name] = _answer(run, stage, checkpoint, task, base)
        metrics = scored.metrics[task.name] = processes.on_first(lambda task=task: _score(run, scored, task))
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in task.headline if name in metrics)
        shown = shown or f"{metrics['n']} answers, no score"
        say(f"{stage:<10} {task.name}: {shown}" + CACHED * entry.reused)
    if run.settings.evaluate.lmms_eval.tasks:
        _lmms_eval(run, scored, checkpoint)
    try:
        scored.metrics |= study(scored.metrics, (base or scored).metrics)
    except UserError as error:
        say(f"{stage:<10} {error}")
    scored.seconds = time.perf_counter() - started
    return scored


def _loss(run: Run, checkpoint: Checkpoint) -> float:
    """Answer loss of a model on the records that no choice has seen."""
    records, size = run.reported, run.settings.calibration.batch_size

    def compute(_folder: Path, _work: Path) -> dict[str, Any]:
        with run.on_device(checkpoint.model) as model:
            return {"loss": mean_loss(model, records, run.collate, size, run.features)}

    entry = run.entry(
        "evaluate",
        compute,
        model=checkpoint.digest,
        task=["loss", size, run.settings.data.max_length],
        questions=text_contents(records),
        images=processes.on_first(lambda: image_contents(records, run.store.memo)),
    )
    return entry.record["loss"]


def _answer(run: Run, stage: str, checkpoint: Checkpoint, task: Any, base: Scored | None) -> Entry:
    """A model's answers to a benchmark, as a file in the store; an interrupted call goes on where it was."""
    compared = base.entries[task.name].folder if base and task.divergence else None

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        trainer = run.trainer(logger=False, what=f"{stage} {task.name}")
        model, config = checkpoint.model, run.settings.evaluate
        asked = (model, checkpoint.processor, task, trainer, config, run.features, work, checkpoint.digest)
        lines = answer(*asked, compared)
        model.to(run.home)
        if processes.rank() == 0:
            (folder / "predictions.jsonl").write_text(json_lines(lines), encoding="utf-8")
            collect(work, folder)
        return {"n": len(lines)}

    records = task.records()
    return run.entry(
        "evaluate",
        compute,
        model=checkpoint.digest,
        task=[task.name, task.facts(), task.max_new_tokens, task.stop],
        questions=text_contents(records),
        images=processes.on_first(lambda: digest(image_stamps(records))),
        base=compared and compared.name,
    )


def _score(run: Run, scored: Scored, task: Any) -> dict[str, float]:
    """Metrics of a benchmark's answers, which are put into the run's folder; on the first process only."""
    config = run.settings.evaluate
    file = _shared(run, scored.entries[task.name], "predictions.jsonl", f"{scored.stage}/{task.name}.jsonl")
    records, scores = read(file), None
    if task.name in JUDGED:
        export = run.folder / "requests" / scored.stage / file.name
        cache = run.store.root / "verdicts"
        judgement = judges.score(records, task.name, config.judge, cache, config.protocol, export)
        scored.judged[task.name] = judgement.info
        scores = None if judgement.missing else judgement
    scores = scores or task.score(records)
    right = [outcome.score for outcome in scores.outcomes] or [None] * len(records)
    scored.answers = scored.answers or list(zip((r["prediction"] for r in records), right, strict=True))
    return scores.metrics


def _shared(run: Run, entry: Entry, name: str, target: str) -> Path:
    """A file of answers, put among the run's own."""
    file = run.folder / "predictions" / target
    file.parent.mkdir(parents=True, exist_ok=True)
    run.store.share(entry.folder / name, file)
    return file


def _lmms_eval(run: Run, scored: Scored, checkpoint: Checkpoint) -> None:
    """Score a model on the tasks that lmms-eval runs."""
    config = run.settings.evaluate

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        metrics, samples = lmms.evaluate(checkpoint.model, checkpoint.processor, config, run.features)
        for task, rows in samples.items():
            (folder / f"{task}.jsonl").write_text(json_lines(rows, default=str), encoding="utf-8")
        return {"metrics": processes.from_first(metrics)}

    source = source_digest("evaluation.lmms.adapter")
    entry = run.entry("evaluate", compute, model=checkpoint.digest, lmms=[*lmms.facts(config), source])
    scored.entries["lmms_eval"] = entry
    for task, metrics in entry.record["metrics"].items():
        if processes.rank() == 0:
            _shared(run, entry, f"{task}.jsonl", f"{scored.stage}/lmms_eval/{task}.jsonl")
        scored.metrics[f"lmms_eval/{task}"] = metrics
        shown = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        say(f"{scored.stage:<10} lmms_eval/{task}: {shown}" + CACHED * entry.reused)
