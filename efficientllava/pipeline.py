"""The stages in order; the only module that knows them all.

A run loads a checkpoint, prunes it, recovers it, evaluates base, pruned and recovered alike, and writes
``results.json``. Every stage goes through the content cache, so a killed or repeated run continues where it can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from . import processes
from .cache import Entry, StageCache, library_versions, link, source_digest
from .checks import check
from .config import digest, typed
from .console import Tick, progress, quiet_libraries, say
from .errors import UserError
from .results import STAGES
from .schema import JUDGED, RunConfig

TARGET_SOURCES = ("alignment", "caching", "losses", "targets", "teacher")  # what cached targets depend on


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
    folder = Path(output_dir)
    if settings.pretrain:
        return _pretrain(settings, folder)
    if settings.dry_run:
        from .dry_run import dry_run

        dry_run(settings, folder)
        return None
    if settings.reuse and not processes.launched() and _finished(settings, folder):
        say(f"{folder} is finished: nothing to do (reuse=false does it again)")
        return _objective(settings, folder)
    processes.on_gpu(settings.trainer)  # refuses what is not there
    count = processes.wanted(settings.trainer)
    if count > 1 and not processes.launched():
        code = processes.relaunch(count, overrides, output_dir)
        if code:
            error = UserError(f"trainer.devices={count}: the run failed in its processes; see the messages above")
            error.exit_code = 2 if code == 2 else 1
            raise error
    else:
        processes.connect(settings.trainer)
        folder = Path(processes.from_first(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        Run(settings, folder, overrides).execute()
    return _objective(settings, folder)


def run_key(settings: RunConfig) -> str:
    """Digest of all that decides the numbers of a run, wherever it lies: configuration, model, data, source, libraries.

    Args:
        settings: The checked configuration.
    """
    from .checkpoint import digest as digest_of
    from .checkpoint import resolve
    from .data.splits import sources_digest

    plain = {**asdict(settings), "paths": None, "sweep": None}
    files = sources_digest(settings)
    model = digest_of(resolve(settings.model.path, settings.model.revision))
    return digest([plain, files, model, source_digest("."), library_versions()])


def _finished(settings: RunConfig, folder: Path) -> bool:
    """Whether a folder holds the results of this very run."""
    from .results import read

    file = folder / "results.json"
    return file.exists() and read(file).get("run_key") == run_key(settings)


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
    score = pretrain(recipe, folder / recipe.name)["all"]
    say(f"test accuracy {score['accuracy']:.4f} over {score['n']:.0f} questions: {folder / recipe.name}")
    return score["accuracy"]


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
        from .data.splits import open_data
        from .evaluation import judges, tasks
        from .evaluation.efficiency import sizes
        from .forecast import forecast
        from .loggers import make_trainer
        from .memory import require_least

        quiet_libraries()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder, self.overrides = settings, folder, list(overrides)
        self.cache = StageCache(Path(settings.paths.cache_dir), settings.reuse)
        self.device = f"cuda:{torch.cuda.current_device()}" if processes.on_gpu(settings.trainer) else "cpu"
        # Where whole models are between stages: with offload, a model that is too large for the GPU is on the host.
        self.home = "cpu" if settings.prune.offload else self.device
        host = settings.prune.offload
        self.load = lambda path, dtype, *rest: load(str(path), dtype, self.device, *rest, host=host)
        self.trainer = partial(make_trainer, settings, folder)
        require_least(forecast(settings))
        open_data(settings)  # before the weights, which take their time at full size
        self.tasks = [tasks.load(name, settings.data, settings.evaluate) for name in settings.evaluate.tasks]
        for task in self.tasks:
            task.records()
            judges.prepare(task.name, settings.evaluate.judge)
        model = settings.model
        self.base = self.load(model.path, model.dtype, model.revision, model.protocol)
        self.models: dict[str, Any] = {"base": self.base.model}
        self.sizes = {"base": sizes(self.base.model)}
        self.entries: dict[str, Entry] = {}
        self.metrics: dict[str, dict[str, Any]] = {}
        self.seconds = {"prune": 0.0, "recover": 0.0, "evaluate": 0.0}
        self.answers: dict[str, list[tuple[str, float | None]]] = {}
        self.judged: dict[str, dict[str, Any]] = {}

    def execute(self) -> None:
        """Run all stages and write the record."""
        from lightning.pytorch import seed_everything

        from .loggers import finish_loggers

        settings = self.settings
        self._prepare()
        seed_everything(settings.seed, verbose=False)
        say(f"[bold]{settings.name}[/bold]  {self.base.path}  on {self.device}, seed {settings.seed}")
        try:
            current = self.base
            self._evaluate("base", current)
            if settings.prune.method != "none":
                current = self._prune()
                self._evaluate("pruned", current)
            if settings.recover.name != "none":
                current = self._recover(current)
                self._evaluate("recovered", current)
            if processes.rank() == 0:
                self._report()
            processes.barrier()
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
        from .evaluation import lmms
        from .evaluation.quantization import require_groups
        from .models.forward import feature_cache

        settings, processor = self.settings, self.base.processor
        if settings.evaluate.quantization == "int4":
            require_groups(self.base.model)
        self.features = feature_cache(self.base.model)
        lmms.prepare(settings.evaluate)
        self.collate = Collator(processor, settings.data.max_length)
        self.calibration = []
        if settings.prune.method != "none":
            self.calibration = calibration_records(settings.calibration, settings.data, settings.seed, self.collate)
            self._require_memory()
        self.recovery: Any = None
        if settings.recover.name != "none":
            self.recovery = RecoveryData(settings.data, processor, settings.data_frac, settings.seed)
        drawn = len(self.recovery.records) if self.recovery else 0
        self.samples = {"calibration": len(self.calibration), "recovery": drawn}

    def _require_memory(self) -> None:
        """Refuse what the GPU cannot hold."""
        import torch

        from .pruning.memory import CalibrationSize, pruning_memory, require_memory

        settings, model = self.settings, self.base.model
        if self.device == "cpu" or settings.prune.method == "auto":
            return
        tokens = max(map(self.collate.check, self.calibration))
        size = CalibrationSize(len(self.calibration), tokens, settings.calibration.batch_size)
        memory = pruning_memory(model, settings.prune, size)
        offload, free = settings.prune.offload, torch.cuda.mem_get_info(self.device)[0]
        fix = "lower calibration.batch_size or data.max_length" + ("" if offload else ", or set prune.offload=true")
        require_memory(memory.peak, free if offload else free + memory.model, "prune", fix)
        if offload and (settings.evaluate.tasks or settings.evaluate.efficiency or settings.recover.name != "none"):
            fix = "with prune.offload=true also set evaluate=none evaluate.efficiency=false recover=none"
            require_memory(memory.model, free, "the whole model", fix)

    # ---- stages -----------------------------------------------------------------------------------------------------

    def _stage(self, name: str, compute: Callable[[Path, Path], dict[str, Any]], **inputs: Any) -> Entry:
        """A stage's result through the cache; ``inputs`` is what it depends on beside what all stages do."""
        answering = tuple(f"evaluation/{part}.py" for part in ("generation", "module", "predictions"))
        sources = {"evaluate": answering, "prune": ("pruning",), "recover": ("recovery",)}[name]
        shared = {
            "source": source_digest(*sources, "models", "data", "checkpoint.py"),
            "dtype": self.settings.model.dtype,
            "device": self.device.partition(":")[0],
            "processes": processes.world_size(),
            "precision": self.settings.trainer.get("precision"),
            "threads": self.settings.threads,
        }
        return self.cache.stage(name, {**shared, **inputs}, compute)

    def _evaluate(self, stage: str, checkpoint: Any) -> None:
        from .evaluation.scorers.averages import study

        started = time.perf_counter()
        self.metrics[stage] = {}
        for task in self.tasks:
            entry = self._answer(stage, checkpoint, task)
            scored = self._score(stage, task, entry) if processes.rank() == 0 else None
            self.metrics[stage][task.name] = processes.from_first(scored)
            self._tell(stage, task, entry.reused)
        if self.settings.evaluate.lmms_eval.tasks:
            self._lmms_eval(stage, checkpoint)
        try:
            self.metrics[stage] |= study(self.metrics[stage], self.metrics["base"])
        except UserError as error:
            say(f"{stage:<10} {error}")
        self.seconds["evaluate"] += time.perf_counter() - started
        kind = self.settings.evaluate.quantization
        if kind != "none" and stage in STAGES:
            from .evaluation.quantization import quantized

            made_by = f"{kind}-torchao-{metadata.version('torchao')}"
            twin = {"model": quantized(checkpoint.model, kind), "digest": f"{checkpoint.digest}-{made_by}"}
            self._evaluate(f"{stage}_{kind}", replace(checkpoint, **twin))

    def _answer(self, stage: str, checkpoint: Any, task: Any) -> Entry:
        """A model's answers to a benchmark, as a file in the cache; an interrupted call goes on where it was."""
        from .evaluation.module import answer

        config = self.settings.evaluate

        def compute(folder: Path, work: Path) -> dict[str, Any]:
            from .evaluation.predictions import write

            trainer = self.trainer(logger=False)
            model, processor = checkpoint.model, checkpoint.processor
            lines = answer(model, processor, task, trainer, config, self.features, work, checkpoint.digest)
            model.to(self.home)
            if processes.rank() == 0:
                write(lines, folder / "predictions.jsonl")
            return {"n": len(lines)}

        questions = [[r.id, r.turns[0].question, dict(r.details)] for r in task.records()]
        entry = self.entries[f"evaluate/{stage}/{task.name}"] = self._stage(
            "evaluate",
            compute,
            model=checkpoint.digest,
            task=[task.name, task.facts, task.max_new_tokens, task.stop],
            evaluate=[config.limit, config.max_new_tokens, config.batch_size],
            questions=digest(questions),
        )
        return entry

    def _score(self, stage: str, task: Any, entry: Entry) -> dict[str, float]:
        """Metrics of a benchmark's answers, which are linked into the run; on the first process only."""
        from .evaluation import judges
        from .evaluation.predictions import read

        config, name = self.settings.evaluate, f"{task.name}.jsonl"
        file = self.folder / "predictions" / stage / name
        file.parent.mkdir(parents=True, exist_ok=True)
        link(entry.folder / "predictions.jsonl", file)
        records = read(file)
        scores: Any = None
        if task.name in JUDGED:
            cache, export = Path(self.settings.paths.cache_dir) / "verdicts", self.folder / "requests" / stage / name
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
        from .evaluation import lmms

        config = self.settings.evaluate

        def compute(folder: Path, _work: Path) -> dict[str, Any]:
            metrics, samples = lmms.evaluate(checkpoint.model, checkpoint.processor, config, self.features)
            for task, rows in samples.items():
                lines = (json.dumps(row, default=str) + "\n" for row in rows)
                (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
            return {"metrics": processes.from_first(metrics)}

        entry = self._stage(
            "evaluate",
            compute,
            model=checkpoint.digest,
            lmms=[*lmms.facts(config), source_digest("evaluation/lmms")],
            evaluate=[config.limit, config.batch_size],
        )
        self.entries[f"evaluate/{stage}/lmms_eval"] = entry
        for task, metrics in entry.record["metrics"].items():
            self.metrics[stage][f"lmms_eval/{task}"] = metrics
            shown = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
            say(f"{stage:<10} lmms_eval/{task}: {shown}" + ("  (from cache)" if entry.reused else ""))

    def _prune(self) -> Any:
        from .data.splits import data_digest

        settings = self.settings
        searches = settings.prune.method == "auto"

        def compute(folder: Path, work: Path) -> dict[str, Any]:
            started = time.perf_counter()
            with progress() as tick:
                module = self._searcher(work, tick) if searches else self._pruner(tick)
                self.trainer(quiet=True, inference_mode=False).predict(module, return_predictions=False)
            plan, pruned, report = module.plan, module.pruned, module.report
            assert plan is not None and pruned is not None and report is not None
            self._export(folder / "pruned", pruned, self.base, plan.step, plan.kept_layers)
            if processes.rank() == 0:
                (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
                if searches:
                    from .report.search import draw_search

                    (folder / "search.json").write_text(json.dumps(module.record) + "\n", encoding="utf-8")
                    draw_search(module.record, folder / "search.png")
            return {"seconds": time.perf_counter() - started, "report": report.to_dict()}

        entry = self._stage(
            "prune",
            compute,
            model=self.base.digest,
            prune=asdict(replace(settings.prune, name="", offload=False)),
            search=[asdict(replace(settings.search, name="")), source_digest("search")] if searches else None,
            calibration=[asdict(settings.calibration), digest([r.id for r in self.calibration])],
            files=data_digest(settings.data, settings.calibration),
            max_length=settings.data.max_length,
            seed=settings.seed,
        )
        pruned = self._adopt("prune", "pruned", entry)
        # The pruned model takes the base's place; of the base only shapes are still looked at.
        self.features.follow(pruned.model)
        self.models.pop("base", None)
        self.base.model = self.base.model.to("meta")
        return pruned

    def _pruner(self, tick: Tick) -> Any:
        from .pruning.module import PruningModule

        settings, model = self.settings, self.models.pop("base")
        size = settings.calibration.batch_size
        return PruningModule(
            model, self.calibration, self.collate, settings.prune, size, settings.seed, self.features, tick, self.device
        )

    def _searcher(self, work: Path, tick: Tick) -> Any:
        from .data.splits import data_digest, load_split
        from .data.splits import digest as digest_of
        from .search.module import SearchInputs, SearchModule

        settings = self.settings
        files = data_digest(settings.data, settings.calibration)
        # Only the embedded data have held-out samples of their own; no training corpus is opened for a plot.
        holdout = load_split(settings.data, "minival") if settings.data.name == "digits_vqa" else []
        inputs = SearchInputs(
            self.calibration,
            [holdout[index] for index in range(min(len(self.calibration), len(holdout)))],
            self.collate,
            settings.calibration.batch_size,
            {"model": self.base.digest, "samples": digest([digest_of(self.calibration), files])},
            Path(settings.paths.cache_dir) / "levels",
            work,
        )
        model = self.models.pop("base")
        return SearchModule(model, inputs, settings.prune, settings.search, settings.seed, self.features, tick)

    def _recover(self, student: Any) -> Any:
        from .data.splits import data_digest
        from .recovery.objective import describe
        from .recovery.recover import recover

        config, data, seed = self.settings.recover, self.settings.data, self.settings.seed
        say(
            f"recovery minimises [bold]{describe(config)}[/bold], trains {config.train}, "
            f"{self.samples['recovery']} samples (data_frac {self.settings.data_frac:g})"
        )

        taught = config.weights.logit or config.weights.hidden

        def compute(folder: Path, work: Path) -> dict[str, Any]:
            stats = recover(
                student.model,
                self.recovery,
                config,
                partial(self.trainer, training=True),
                work,
                batch_size=data.batch_size,
                global_batch_size=data.global_batch_size,
                teacher=self._teacher(student) if taught else None,
                original_layers=student.original_layers,
                seed=seed,
            )
            step = {**stats.step, "samples": self.samples["recovery"]}
            self._export(folder / "recovered", student.model, student, step)
            return {"seconds": stats.seconds, "stats": asdict(stats)}

        entry = self._stage(
            "recover",
            compute,
            model=student.digest,
            original_layers=student.original_layers,
            teacher=self._teacher_digest(student),
            recover=asdict(replace(config, name="")),
            data=[asdict(data), self.settings.data_frac, data_digest(data)],
            seed=seed,
        )
        return self._adopt("recover", "recovered", entry)

    def _teacher_digest(self, student: Any) -> str:
        from .checkpoint import digest as digest_of
        from .checkpoint import resolve

        path = self.settings.recover.teacher.path
        return digest_of(resolve(path)) if path else student.base["digest"]

    def _teacher(self, student: Any) -> Any:
        """The teacher's model, or where its answers are kept."""
        from .data.splits import data_digest
        from .recovery.caching import open_teacher

        settings, config, data = self.settings, self.settings.recover.teacher, self.settings.data
        content = {
            "teacher": [self._teacher_digest(student), config.dtype],
            "student": [self.base.digest, settings.model.dtype],  # how images are prepared, and the tower's type
            "data": [data.name, data_digest(data), data.max_length],
            "source": source_digest("models", "data", *(f"recovery/{name}.py" for name in TARGET_SOURCES)),
            "libraries": library_versions(),
            "device": [self.device.partition(":")[0], settings.trainer.get("precision")],
        }
        folder = Path(settings.paths.cache_dir) / "targets" / digest(content)
        return open_teacher(config.path or student.base["path"], config, self.device, folder)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _export(
        self, folder: Path, model: Any, source: Any, step: dict[str, Any], kept: Sequence[int] | None = None
    ) -> None:
        """Round, save, and compare with what a fresh process loads."""
        from .checkpoint import round_weights, write
        from .reload import reload_gate

        round_weights(model.to(self.home), source.storage)
        if processes.rank() == 0:
            folder.mkdir()
            write(source.after(model, step, kept), folder)
            reload_gate(folder, model, self._probe())

    def _probe(self) -> dict[str, Any]:
        """A prompt with an image, as a stock forward pass takes it."""
        from .data.collator import prompt
        from .data.conversations import open_image
        from .data.splits import load_split
        from .models.forward import stock_inputs

        records = self.calibration or [record for task in self.tasks for record in task.records()]
        if not records:
            records = [(self.recovery.records if self.recovery else load_split(self.settings.data, "train"))[0]]
        record = next((r for r in records if r.image is not None), records[0])
        turn = next((t for t in record.turns if t.sees_image), record.turns[0])
        asked = prompt(self.base.processor, turn.question, open_image(record) if turn.sees_image else None)
        return stock_inputs(self.base.model, asked)

    def _adopt(self, stage: str, name: str, entry: Entry) -> Any:
        """Link a finished checkpoint into the run and load it from there."""
        from .evaluation.efficiency import sizes

        self.entries[stage] = entry
        self.seconds[stage] = entry.record["seconds"]
        if processes.rank() == 0:
            for path in entry.folder.iterdir():
                if path.name in (name, "plan.json", "search.json", "search.png"):
                    link(path, self.folder / path.name)
        processes.barrier()
        checkpoint = self.load(self.folder / name, self.settings.model.dtype)
        if not self.settings.evaluate.efficiency:
            self.models.clear()  # nothing will be measured side by side
        self.models[name] = checkpoint.model
        self.sizes[name] = sizes(checkpoint.model)
        return checkpoint

    # ---- the record -------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        """Measure sizes and speeds, write ``results.json`` and ``samples.png``, and print the table."""
        from .card import usage
        from .models.pruned import is_per_layer
        from .pruning.plan import PruningPlan
        from .report.samples import draw_samples
        from .report.tables import tabulate, tabulate_quantized
        from .results import build, write

        stages = self._efficiency()
        for stage, metrics in self.metrics.items():
            stages[stage]["metrics"] = metrics
        file = self.folder / "plan.json"
        plan = PruningPlan.read(file) if file.exists() else None
        results = build(
            stages,
            ratio={
                "requested": plan.requested if plan else 0.0,
                "achieved": plan.achieved if plan else 0.0,
                **((plan and plan.details) or {}),  # share of zeros, where a search masked weights
            },
            samples=self.samples,
            seconds=self.seconds,
            seed=self.settings.seed,
            config_digest=digest(self.settings),
            run_key=run_key(self.settings),
            overrides=self.overrides,
            reused=[name for name, entry in self.entries.items() if entry.reused],
            name=self.settings.name,
            model=self.base.path,
            benchmarks={task.name: {**task.facts, "headline": task.headline} for task in self.tasks},
            judges=self.judged,
            reports={name: entry.record for name, entry in self.entries.items() if name in ("prune", "recover")},
        )
        write(results, self.folder / "results.json")
        if self.answers:
            records = list(self.tasks[0].records())[: self.settings.evaluate.limit]
            shown = {stage: answers for stage, answers in self.answers.items() if stage in STAGES}
            draw_samples(records, shown, self.folder / "samples.png")
        say("", tabulate(results), *tabulate_quantized(results), "", f"everything lies in [bold]{self.folder}[/bold]")
        last = next((name for name in ("recovered", "pruned") if name in self.models), None)
        if last:
            per_layer = is_per_layer(self.models[last].config.get_text_config())
            say("", usage(str(self.folder / last), per_layer))

    def _efficiency(self) -> dict[str, dict[str, Any]]:
        """Sizes and speeds of all stages, measured together so that drift of the machine cancels.

        With offload one model at a time is on the device: two may not fit.
        """
        from .checkpoint import resolve
        from .evaluation.efficiency import checkpoint_bytes, measure
        from .evaluation.quantization import quantized

        model, stages, kind = self.settings.model, self.sizes, self.settings.evaluate.quantization
        if kind != "none":
            stages = {**stages, **{f"{name}_{kind}": dict(size) for name, size in stages.items()}}
        if self.settings.evaluate.efficiency:
            # The pruner consumes the model that it works on.
            base = self.models.get("base") or self.load(model.path, model.dtype, model.revision).model
            models = {"base": base, **self.models}
            if kind != "none":
                models |= {f"{name}_{kind}": quantized(each, kind) for name, each in models.items()}
            if self.home == self.device:
                stages = measure(models, self._probe(), self.settings.evaluate)
            else:
                stages = {}
                for name, each in models.items():
                    stages |= measure({name: each.to(self.device)}, self._probe(), self.settings.evaluate)
                    each.to(self.home)
        folders = {"base": resolve(model.path, model.revision)}
        for name in stages:
            if name in STAGES:
                stages[name]["checkpoint_bytes"] = checkpoint_bytes(folders.get(name, self.folder / name))
            elif "flops" in stages[name]:  # the same products; the counter does not see into quantized ones
                stages[name]["flops"] = stages[name.removesuffix(f"_{kind}")]["flops"]
        return stages
