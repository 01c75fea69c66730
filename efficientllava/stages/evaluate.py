"""Evaluation as a stage: answers through the cache, scores, judges, and the quantized twin of every model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..record import STAGES
from ..runtime import processes
from ..runtime.console import say
from ..runtime.content import digest
from ..runtime.errors import UserError
from ..runtime.store import Entry, source_digest
from ..settings.schema import JUDGED
from .context import Context


class Evaluation:
    """The evaluations of a run's models.

    Args:
        context: What the stages share.

    Attributes:
        metrics: Metrics by stage and benchmark; a quantized twin has a stage of its own, such as ``pruned_int8``.
        answers: Answer and score of every record of the first benchmark, by stage.
        losses: Answer loss on the records that no choice of the run sees, in nats per token, by stage.
        judged: What judges did, by benchmark and stage.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.metrics: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, float] = {}
        self.answers: dict[str, list[tuple[str, float | None]]] = {}
        self.judged: dict[str, dict[str, Any]] = {}

    def __call__(self, stage: str, checkpoint: Any) -> None:
        """Answer and score all benchmarks.

        Args:
            stage: ``base``, ``pruned`` or ``recovered``.
            checkpoint: The stage's checkpoint.
        """
        from ..evaluation.scorers.averages import study

        started = time.perf_counter()
        self.metrics[stage] = {}
        if self._context.reported:
            self.losses[stage] = self._loss(checkpoint)
            say(f"{stage:<10} loss on {len(self._context.reported)} unseen records: {self.losses[stage]:.4f}")
        for task in self._context.tasks:
            entry = self._answer(stage, checkpoint, task)
            scored = self._score(stage, task, entry) if processes.rank() == 0 else None
            self.metrics[stage][task.name] = processes.from_first(scored)
            self._tell(stage, task, entry.reused)
        if self._context.settings.evaluate.lmms_eval.tasks:
            self._lmms_eval(stage, checkpoint)
        try:
            self.metrics[stage] |= study(self.metrics[stage], self.metrics["base"])
        except UserError as error:
            say(f"{stage:<10} {error}")
        self._context.seconds["evaluate"] += time.perf_counter() - started
        kind = self._context.settings.evaluate.quantization
        if kind != "none" and stage in STAGES:
            from ..evaluation.efficiency import quantized

            made_by = f"{kind}-torchao-{metadata.version('torchao')}-{source_digest('evaluation/efficiency.py')}"
            twin = {"model": quantized(checkpoint.model, kind), "content": f"{checkpoint.digest}-{made_by}"}
            self(f"{stage}_{kind}", replace(checkpoint, **twin))

    def _loss(self, checkpoint: Any) -> float:
        """Answer loss of a model on the records that no choice has seen."""
        from ..data.stamps import image_contents
        from ..evaluation.answers import mean_loss

        context = self._context

        def compute(_folder: Path, _work: Path) -> dict[str, Any]:
            size = context.settings.calibration.batch_size
            model = checkpoint.model.to(context.device)
            loss = mean_loss(model, context.reported, context.collate, size, context.features)
            model.to(context.home)
            return {"loss": loss}

        questions = [[r.id, [[turn.question, turn.answer] for turn in r.turns]] for r in context.reported]
        contents = image_contents(context.reported, context.store.memo) if processes.rank() == 0 else None
        entry = context.stage(
            "evaluate",
            compute,
            model=checkpoint.digest,
            task=["loss", context.settings.calibration.batch_size, context.settings.data.max_length],
            questions=digest(questions),
            images=processes.from_first(contents),
        )
        return entry.record["loss"]

    def _answer(self, stage: str, checkpoint: Any, task: Any) -> Entry:
        """A model's answers to a benchmark, as a file in the cache; an interrupted call goes on where it was."""
        from ..data.stamps import image_stamps
        from ..evaluation.answers import answer

        config = self._context.settings.evaluate

        def compute(folder: Path, work: Path) -> dict[str, Any]:
            from ..evaluation.answers import write

            trainer = self._context.trainer(logger=False, what=f"{stage} {task.name}")
            model, processor = checkpoint.model, checkpoint.processor
            lines = answer(model, processor, task, trainer, config, self._context.features, work, checkpoint.digest)
            model.to(self._context.home)
            if processes.rank() == 0:
                write(lines, folder / "predictions.jsonl")
            return {"n": len(lines)}

        records = task.records()
        questions = [[r.id, r.turns[0].question, dict(r.details)] for r in records]
        stamps = image_stamps(records) if processes.rank() == 0 else None
        entry = self._context.entries[f"evaluate/{stage}/{task.name}"] = self._context.stage(
            "evaluate",
            compute,
            model=checkpoint.digest,
            task=[task.name, task.facts, task.max_new_tokens, task.stop],
            questions=digest(questions),
            images=processes.from_first(stamps and digest(stamps)),
        )
        return entry

    def _score(self, stage: str, task: Any, entry: Entry) -> dict[str, float]:
        """Metrics of a benchmark's answers, which are put into the run's folder; on the first process only."""
        from ..evaluation import judges
        from ..evaluation.answers import read

        context, name = self._context, f"{task.name}.jsonl"
        config, cache = context.settings.evaluate, Path(context.settings.paths.cache_dir) / "verdicts"
        file = context.folder / "predictions" / stage / name
        file.parent.mkdir(parents=True, exist_ok=True)
        context.store.share(entry.folder / "predictions.jsonl", file)
        records = read(file)
        scores: Any = None
        if task.name in JUDGED:
            export = context.folder / "requests" / stage / name
            judgement = judges.score(records, task.name, config.judge, cache, config.protocol, export)
            self.judged.setdefault(task.name, {})[stage] = judgement.info
            scores = None if judgement.missing else judgement
        scores = scores or task.score(records)
        right = [outcome.score for outcome in scores.outcomes] or [None] * len(records)
        self.answers.setdefault(stage, list(zip((r["prediction"] for r in records), right, strict=True)))
        return scores.metrics

    def _tell(self, stage: str, task: Any, reused: bool) -> None:
        metrics = self.metrics[stage][task.name]
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in task.headline if name in metrics)
        said = shown or f"{metrics['n']} answers, no score"
        say(f"{stage:<10} {task.name}: {said}" + ("  (from cache)" if reused else ""))

    def _lmms_eval(self, stage: str, checkpoint: Any) -> None:
        """Score a model on the tasks that lmms-eval runs."""
        from ..evaluation import lmms

        config = self._context.settings.evaluate

        def compute(folder: Path, _work: Path) -> dict[str, Any]:
            metrics, samples = lmms.evaluate(checkpoint.model, checkpoint.processor, config, self._context.features)
            for task, rows in samples.items():
                lines = (json.dumps(row, default=str) + "\n" for row in rows)
                (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            return {"metrics": processes.from_first(metrics)}

        entry = self._context.stage(
            "evaluate",
            compute,
            model=checkpoint.digest,
            lmms=[*lmms.facts(config), source_digest("evaluation/lmms")],
        )
        self._context.entries[f"evaluate/{stage}/lmms_eval"] = entry
        for task, metrics in entry.record["metrics"].items():
            if processes.rank() == 0:
                file = self._context.folder / "predictions" / stage / "lmms_eval" / f"{task}.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                self._context.store.share(entry.folder / file.name, file)
            self.metrics[stage][f"lmms_eval/{task}"] = metrics
            shown = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
            say(f"{stage:<10} lmms_eval/{task}: {shown}" + ("  (from cache)" if entry.reused else ""))
