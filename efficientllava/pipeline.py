"""The stages in order; the only module that knows them all.

A run loads a checkpoint, prunes it, recovers it, evaluates base, pruned and recovered alike, and writes
``results.json``. Every stage goes through the content cache, so a killed or repeated run continues where it can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from . import processes
from .cache import Entry, StageCache, file_digest, link, source_digest
from .config import check, digest, instantiate, typed
from .console import Ticker, progress, quiet_libraries, say
from .errors import UserError
from .schema import RunConfig


def run(config: DictConfig, output_dir: str, overrides: Sequence[str] = ()) -> float | None:
    """Run everything that a configuration asks for.

    Args:
        config: The composed configuration.
        output_dir: The run's folder.
        overrides: What the user typed.

    Returns:
        The value of ``optimized_metric``, or None.

    Raises:
        UserError: A fault that the user can mend.
    """
    settings = typed(config)
    check(settings, overrides)
    if settings.pretrain:
        return _pretrain(settings, Path(output_dir))
    count = processes.wanted(settings.trainer)
    if count > 1 and not processes.launched():
        code = processes.relaunch(count, overrides, output_dir)
        if code:
            error = UserError(f"trainer.devices={count}: the run failed in its processes; see the messages above")
            error.exit_code = 2 if code == 2 else 1
            raise error
        return _objective(settings, Path(output_dir))
    processes.connect(settings.trainer)
    folder = Path(processes.from_first(output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    Run(settings, folder, overrides).execute()
    return _objective(settings, folder)


def _objective(settings: RunConfig, folder: Path) -> float | None:
    from .results import lookup, read

    if settings.optimized_metric is None:
        return None
    try:
        return lookup(read(folder / "results.json"), settings.optimized_metric)
    except UserError as error:
        error.exit_code = 1
        raise


def _pretrain(settings: RunConfig, folder: Path) -> float | None:
    from .models.pretraining import pretrain
    from .schema import PretrainConfig

    try:
        recipe = PretrainConfig(**settings.pretrain)
    except TypeError as error:
        raise UserError(f"pretrain: {error}; see efficientllava/models/pretraining.py") from error
    scores = pretrain(recipe, folder / recipe.name)
    say(
        f"test accuracy {scores['all']['accuracy']:.4f} over {scores['all']['n']:.0f} questions: {folder / recipe.name}"
    )
    return float(scores["all"]["accuracy"])


class Run:
    """One run, from the base checkpoint to ``results.json``.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        overrides: What the user typed.
    """

    def __init__(self, settings: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
        import torch

        from .checkpoint import load

        quiet_libraries()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder, self.overrides = settings, folder, list(overrides)
        self.cache = StageCache(Path(settings.paths.cache_dir), settings.reuse)
        accelerator = str(settings.trainer.get("accelerator", "auto"))
        on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        self.device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        self.load = lambda path, dtype="auto": load(str(path), dtype, self.device)
        self.base = load(settings.model.path, settings.model.dtype, self.device, settings.model.revision)
        self.models: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.seconds = {"prune": 0.0, "recover": 0.0, "evaluate": 0.0}
        self.samples = {"calibration": 0, "recovery": 0}
        self.answers: dict[str, list[str]] = {}

    def execute(self) -> None:
        """Run all stages and write the record."""
        from lightning.pytorch import seed_everything

        from .loggers import finish_loggers
        from .models.forward import feature_cache

        settings = self.settings
        self._prepare()
        seed_everything(settings.seed, verbose=False)
        self.features = feature_cache(self.base.model)
        try:
            self._stages()
        except UserError as error:
            error.exit_code = 1
            raise
        finally:
            finish_loggers()
            processes.finish()

    def _prepare(self) -> None:
        """Open whatever a stage will need, so that a fault is found before the first one."""
        from .data.collator import Collator
        from .data.datamodule import RecoveryData
        from .data.splits import calibration_records
        from .evaluation import tasks
        from .pruning.pruner import require_plannable

        settings, processor = self.settings, self.base.processor
        self.tasks = [tasks.load(name, settings.data) for name in settings.evaluate.tasks]
        self.collate = Collator(processor, settings.data.max_length)
        self.calibration = []
        if settings.prune.method != "none":
            require_plannable(self.base.model, settings.prune)
            self.calibration = calibration_records(settings.calibration, settings.data, settings.seed)
            for record in self.calibration:
                self.collate.check(record)
        self.recovery = None
        if settings.recover.name != "none":
            self.recovery = RecoveryData(settings.data, processor, settings.data_frac, settings.seed)
            self.samples["recovery"] = len(self.recovery.records)
        self.samples["calibration"] = len(self.calibration)

    def _stages(self) -> None:
        settings = self.settings
        say(f"[bold]{settings.name}[/bold]  {self.base.path}  on {self.device}, seed {settings.seed}")
        self._evaluate("base", self.base)
        current = self.base
        if settings.prune.method != "none":
            current = self._prune()
            self._evaluate("pruned", current)
        if settings.recover.name != "none":
            current = self._recover(current)
            self._evaluate("recovered", current)
        self._finish()

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _inputs(self, stage: str, **more: Any) -> dict[str, Any]:
        """What every stage's result depends on."""
        sources = {"evaluate": "evaluation", "prune": "pruning", "recover": "recovery"}
        shared = ("models", "data", "checkpoint.py")
        return {
            "source": source_digest(sources[stage], *shared),
            "dtype": self.settings.model.dtype,
            "device": self.device.partition(":")[0],
            "processes": processes.world_size(),
            "precision": self.settings.trainer.get("precision"),
            "threads": self.settings.threads,
            **more,
        }

    def trainer(self, quiet: bool = False, callbacks: Sequence[Any] = (), **overrides: Any) -> Any:
        """Make a Trainer from the configuration's node.

        Args:
            quiet: No progress bar and no logger of Lightning's.
            callbacks: Added to the configured ones.
            **overrides: Arguments that the stage decides.
        """
        settings = self.settings
        node = dict(settings.trainer)
        if processes.launched():
            node["devices"] = processes.world_size() // int(node.get("num_nodes", 1))
        configured = [] if quiet else [instantiate(c) for c in (settings.callbacks or {}).values() if c.get("_target_")]
        if quiet:
            overrides = {"logger": False, "enable_progress_bar": False, **overrides}
        elif "logger" not in overrides:
            overrides["logger"] = self._logger()
        if not overrides.get("logger"):
            configured = [c for c in configured if type(c).__name__ != "LearningRateMonitor"]
        fixed = {"default_root_dir": str(self.folder), "enable_checkpointing": False, "use_distributed_sampler": False}
        return instantiate(node, callbacks=[*configured, *callbacks], **{**fixed, **overrides})

    def _logger(self) -> Any:
        from .loggers import make_logger

        return make_logger(self.settings, self.folder)

    def _evaluate(self, stage: str, checkpoint: Any) -> None:
        from .evaluation.module import evaluate

        started = time.perf_counter()
        self.metrics[stage] = {}
        for task in self.tasks:

            def compute(folder: Path, _work: Path, task: Any = task) -> dict[str, Any]:
                trainer = self.trainer(logger=False)
                outcome = evaluate(
                    checkpoint.model, checkpoint.processor, task, trainer, self.settings.evaluate, self.features
                )
                checkpoint.model.to(self.device)
                if processes.rank() == 0:
                    lines = (json.dumps(prediction) + "\n" for prediction in outcome.predictions)
                    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
                return {"metrics": outcome.metrics}

            relevant = ("limit", "max_new_tokens", "batch_size")
            inputs = self._inputs(
                "evaluate",
                model=checkpoint.digest,
                task=task.name,
                evaluate={key: getattr(self.settings.evaluate, key) for key in relevant},
                questions=digest([r.id for r in task.records("test")]),
            )
            entry = self.cache.stage("evaluate", inputs, compute)
            self.entries[f"evaluate/{stage}/{task.name}"] = entry
            self.metrics[stage][task.name] = entry.record["metrics"]
            rows = [json.loads(line) for line in (entry.folder / "predictions.jsonl").read_text("utf-8").splitlines()]
            self.answers.setdefault(stage, [row["prediction"] for row in rows])
            score = entry.record["metrics"].get("accuracy")
            say(f"{stage:<10} {task.name}: accuracy {score:.4f}" + ("  (from cache)" if entry.reused else ""))
        self.seconds["evaluate"] += time.perf_counter() - started

    def _prune(self) -> Any:
        from .pruning.module import PruningModule

        settings = self.settings

        def compute(folder: Path, _work: Path) -> dict[str, Any]:
            started = time.perf_counter()
            with progress() as display:
                module = PruningModule(
                    self.base.model,
                    self.calibration,
                    self.collate,
                    settings.prune,
                    settings.calibration.batch_size,
                    settings.seed,
                    self.features,
                    Ticker(display),
                )
                self.trainer(quiet=True, inference_mode=False).predict(module, return_predictions=False)
            assert module.pruned is not None and module.plan is not None and module.report is not None
            plan = module.plan
            self._export(folder, "pruned", module.pruned.to(self.device), self.base, plan.step, plan.kept_layers)
            if processes.rank() == 0:
                (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
            return {"seconds": time.perf_counter() - started, "report": module.report.to_dict()}

        inputs = self._inputs(
            "prune",
            model=self.base.digest,
            prune={k: v for k, v in asdict(settings.prune).items() if k != "name"},
            calibration=[asdict(settings.calibration), digest([r.id for r in self.calibration])],
            files=[file_digest(settings.calibration.path), file_digest(settings.data.path)],
            images=settings.data.image_root,
            max_length=settings.data.max_length,
            seed=settings.seed,
        )
        return self._adopt("prune", "pruned", self.cache.stage("prune", inputs, compute))

    def _recover(self, student: Any) -> Any:
        from .checkpoint import digest as digest_of
        from .checkpoint import resolve
        from .recovery.objective import describe
        from .recovery.recover import recover

        settings = self.settings
        assert self.recovery is not None
        say(
            f"recovery minimises [bold]{describe(settings.recover)}[/bold], trains {settings.recover.train}, "
            f"{self.samples['recovery']} samples (data_frac {settings.data_frac:g})"
        )
        weights = settings.recover.weights
        teacher_path = settings.recover.teacher.path or student.base["path"]

        def compute(folder: Path, work: Path) -> dict[str, Any]:
            teacher = None
            if weights.logit or weights.hidden:
                teacher = self.load(teacher_path, settings.recover.teacher.dtype).model
            stats = recover(
                student.model,
                self.recovery,  # pyright: ignore[reportArgumentType]
                settings.recover,
                self.trainer,
                work,
                batch_size=settings.data.batch_size,
                global_batch_size=settings.data.global_batch_size,
                teacher=teacher,
                original_layers=student.original_layers,
                seed=settings.seed,
            )
            step = {"stage": "recover", "loss": stats.loss, "train": stats.train, "steps": stats.steps}
            step["samples"] = self.samples["recovery"]
            self._export(folder, "recovered", student.model.to(self.device), student, step, None)
            return {"seconds": stats.seconds, "stats": asdict(stats)}

        inputs = self._inputs(
            "recover",
            model=student.digest,
            teacher=student.base["digest"]
            if settings.recover.teacher.path is None
            else digest_of(resolve(teacher_path)),
            recover={k: v for k, v in asdict(settings.recover).items() if k != "name"},
            data=[asdict(settings.data), settings.data_frac, file_digest(settings.data.path)],
            seed=settings.seed,
        )
        return self._adopt("recover", "recovered", self.cache.stage("recover", inputs, compute))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _export(
        self, folder: Path, name: str, model: Any, source: Any, step: dict[str, Any], kept: Sequence[int] | None
    ) -> None:
        """Round, save, and compare with what a fresh process loads."""
        from .checkpoint import round_weights, write
        from .reload import reload_gate

        round_weights(model, source.storage)
        if processes.rank():
            return
        target = folder / name
        target.mkdir()
        write(source.after(model, step, kept), target)
        reload_gate(target, model, self._probe())

    def _probe(self) -> dict[str, Any]:
        """A prompt with an image, as a stock forward pass takes it."""
        from .data.collator import prompt
        from .data.conversations import open_image
        from .data.splits import load_split

        records = self.calibration or [record for task in self.tasks for record in task.records("test")]
        if not records:
            records = [load_split(self.settings.data, "train")[0]]
        record = next((r for r in records if r.image is not None), records[0])
        turn = next((t for t in record.turns if t.sees_image), record.turns[0])
        return prompt(self.base.processor, turn.question, open_image(record) if turn.sees_image else None)

    def _adopt(self, stage: str, name: str, entry: Entry) -> Any:
        """Link a finished checkpoint into the run and load it from there."""
        self.entries[stage] = entry
        self.seconds[stage] = entry.record["seconds"]
        if processes.rank() == 0:
            for path in entry.folder.iterdir():
                if path.name in (name, "plan.json"):
                    link(path, self.folder / path.name)
        processes.barrier()
        checkpoint = self.load(self.folder / name, self.settings.model.dtype)
        self.models[name] = checkpoint.model
        return checkpoint

    # ---- the record -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        from .report.tables import tabulate
        from .results import build, write

        stages = self._efficiency()
        plan = self._plan()
        for stage, metrics in self.metrics.items():
            stages.setdefault(stage, {})["metrics"] = metrics
        results = build(
            stages,
            ratio={"requested": plan.requested if plan else 0.0, "achieved": plan.achieved if plan else 0.0},
            samples=self.samples,
            seconds=self.seconds,
            seed=self.settings.seed,
            config_digest=digest(self.settings),
            overrides=self.overrides,
            reused=[name for name, entry in self.entries.items() if entry.reused],
            name=self.settings.name,
            model=self.base.path,
            reports={name: entry.record for name, entry in self.entries.items() if name in ("prune", "recover")},
        )
        if processes.rank() == 0:
            write(results, self.folder / "results.json")
            self._samples()
            say("", tabulate(results), "")
            self._closing_lines(plan)
        processes.barrier()

    def _plan(self) -> Any:
        from .pruning.plan import PruningPlan

        path = self.folder / "plan.json"
        return PruningPlan.read(path) if path.exists() else None

    def _efficiency(self) -> dict[str, dict[str, Any]]:
        """Sizes and speeds of all stages, measured together so that drift of the machine cancels."""
        from .checkpoint import resolve
        from .evaluation.efficiency import checkpoint_bytes, measure, sizes

        if processes.rank():
            return {}
        models = {"base": self.load(self.settings.model.path, self.settings.model.dtype).model, **self.models}
        if self.settings.evaluate.efficiency:
            stages = measure(models, self._probe(), self.settings.evaluate)
        else:
            stages = {name: sizes(model) for name, model in models.items()}
        folders = {"base": resolve(self.settings.model.path, self.settings.model.revision)}
        for name, stage in stages.items():
            stage["checkpoint_bytes"] = checkpoint_bytes(folders.get(name, self.folder / name))
        return stages

    def _samples(self) -> None:
        from .report.samples import draw_samples

        task = self.tasks[0] if self.tasks else None
        if task is not None and self.answers:
            records = list(task.records("test"))[: self.settings.evaluate.limit]
            draw_samples(records, self.answers, self.folder / "samples.png")

    def _closing_lines(self, plan: Any) -> None:
        from .card import usage

        last = "recovered" if "recovered" in self.models else "pruned" if "pruned" in self.models else None
        say(f"everything lies in [bold]{self.folder}[/bold]")
        if last:
            say("", usage(str(self.folder / last), plan is not None and not plan.uniform))
