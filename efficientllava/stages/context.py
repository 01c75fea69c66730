"""What the stages of a run share: where things are, what was opened, the store, and how checkpoints are exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..record import CURVE
from ..runtime import keeping, processes
from ..runtime.console import quiet_libraries
from ..runtime.errors import ConfigError, UserError
from ..runtime.store import Entry, Store
from ..settings.schema import RunConfig
from .inputs import inputs_of

# What a run's folder gets of a stage.
TAKEN = ("pruned", "recovered", "plan.json", "search.json", "search.png", CURVE)


class Context:
    """Everything that a run has opened, before its first stage.

    Args:
        settings: The checked configuration.
        folder: The run's folder.

    Attributes:
        store: Finished stages by content.
        forecast: Sizes of what the run will make.
        device: Where models run.
        home: Where whole models are between stages: with offload, one that is too large for the GPU is on the host.
        trainer: Makes a Lightning trainer; see `efficientllava.report.tracking.make_trainer`.
        base: The checkpoint to start from. Once it is pruned, only the shapes of its model remain.
        tasks: Benchmarks.
        models: Models by stage, as long as something will still be measured on them.
        sizes: Parameters by stage.
        entries: Results of the finished stages.
        seconds: Seconds spent by kind of stage.
        features: Vision features by image.
        collate: Turns records into batches.
        calibration: Records that pruning looks at.
        reported: Records that no choice of the run sees, for the losses of its checkpoints.
        recovery: Data that recovery trains on, or None.
        files: By stage, the digest of the data behind its records.
        samples: Number of records that calibration and recovery use.

    Raises:
        UserError: Something that a stage will need is not there.
    """

    def __init__(self, settings: RunConfig, folder: Path) -> None:
        import torch

        from ..checkpoint.folder import load
        from ..data.splits import open_data
        from ..estimate.forecast import forecast
        from ..estimate.memory import require_memory
        from ..evaluation import judges, tasks
        from ..evaluation.efficiency import sizes
        from ..report.tracking import make_trainer

        quiet_libraries()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings, self.folder = settings, folder
        self.store = Store(Path(settings.paths.cache_dir), settings.reuse)
        self.device = f"cuda:{torch.cuda.current_device()}" if processes.on_gpu(settings.trainer) else "cpu"
        # Where whole models are between stages: with offload, a model that is too large for the GPU is on the host.
        self.home = "cpu" if settings.prune.offload else self.device
        host = settings.prune.offload
        memo = self.store.memo
        self.load = lambda path, dtype, *rest: load(str(path), dtype, self.device, *rest, host=host, memo=memo)
        self.trainer = partial(make_trainer, settings, folder)
        self.forecast = forecast(settings)
        require_memory(self.forecast, self.device)
        self.files = open_data(settings)  # before the weights, which take their time at full size
        self.tasks = [tasks.load(name, settings.data, settings.evaluate) for name in settings.evaluate.tasks]
        problems = []
        for task in self.tasks:
            try:
                task.records()
                judges.prepare(task.name, settings.evaluate.judge)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        model = settings.model
        self.base = _digested(self.load(model.path, model.dtype, model.revision, model.protocol, model.system))
        self.models: dict[str, Any] = {"base": self.base.model}
        self.sizes = {"base": sizes(self.base.model)}
        self.entries: dict[str, Entry] = {}
        self.seconds = {"prune": 0.0, "recover": 0.0, "evaluate": 0.0}
        self._prepare()

    def _prepare(self) -> None:
        """Open whatever a stage will need, so that a fault is found before the first one."""
        from ..data.collator import Collator
        from ..data.datamodule import RecoveryData
        from ..data.splits import calibration_records, keep_back, open_data
        from ..estimate.memory import require_memory
        from ..evaluation import lmms
        from ..models.forward import feature_cache, require_images
        from ..recovery.caching import require_teacher
        from ..recovery.recover import accumulation
        from ..recovery.trainable import require_trainable

        settings, processor = self.settings, self.base.processor
        self.features = feature_cache(self.base.model)
        lmms.prepare(settings.evaluate)
        self.collate = Collator(processor, settings.data.max_length)
        self.calibration = []
        if settings.prune.method != "none":
            self.calibration = calibration_records(settings.calibration, settings.data, settings.seed, self.collate)
        self.calibration, self.reported = keep_back(settings, self.calibration, self.collate)
        if self.calibration and settings.prune.method != "auto":
            require_memory(self.forecast, self.device, max(map(self.collate.check, self.calibration)))
        self.recovery: Any = None
        if settings.recover.name != "none":
            require_teacher(settings.recover, self.base.base, self.base.model)
            accumulation(settings.data.batch_size, settings.data.global_batch_size, processes.world_size())
            self.recovery = RecoveryData(settings.data, processor, settings.data_frac, settings.seed)
            require_trainable(self.recovery.records, settings.recover.train)
        if "pixel_values" in (shown := self.probe()):
            require_images(self.base.model, shown)
        if open_data(settings) != self.files:
            raise UserError("data.path, or calibration.path: has changed while it was opened; run again")
        if settings.deploy.name != "none":
            from .deploy import prepare

            prepare(self)
        drawn = len(self.recovery.records) if self.recovery else 0
        self.samples = {"calibration": len(self.calibration), "report": len(self.reported), "recovery": drawn}

    def inputs(self, stage: str, **content: Any) -> dict[str, Any]:
        """What a stage depends on, see `efficientllava.stages.inputs.inputs_of`; where it runs is added here."""
        where = {"device": self.device.partition(":")[0], "processes": processes.world_size()}
        return inputs_of(stage, self.settings, **where, **content)

    def stage(self, name: str, compute: Callable[[Path, Path], dict[str, Any]], **content: Any) -> Entry:
        """A stage's result through the store; its checkpoint and plan are put into the run's folder.

        Args:
            name: ``evaluate``, ``prune`` or ``recover``.
            compute: See `efficientllava.runtime.store.Store.entry`.
            **content: See `efficientllava.stages.inputs.inputs_of`.
        """
        return self.store.entry(name, self.inputs(name, **content), compute, self._take)

    def _take(self, entry: Path) -> None:
        self.mark(entry)
        for name in TAKEN:
            if (entry / name).exists():
                self.store.share(entry / name, self.folder / name)

    def mark(self, entry: Path) -> None:
        """Say that an entry of the cache stays, if this run keeps its checkpoints."""
        if self.settings.keep == "all" and processes.rank() == 0:
            keeping.mark(entry)

    def require_space(self, folder: Path, resume: int = 0) -> None:
        """Refuse a stage that has no room for its checkpoint.

        Args:
            folder: The entry of the cache that the stage will fill.
            resume: Bytes of what it goes on from after a kill; a new one is whole before the old one goes.

        Raises:
            UserError: There is too little space; says what is needed.
        """
        from ..estimate.forecast import weight_bytes

        stage, checkpoint = folder.parent.name, weight_bytes(self.forecast.pruned, self.forecast.storage)
        keeping.require_space(folder.parent, resume + max(resume, checkpoint), stage)
        if folder.parent.stat().st_dev != self.folder.stat().st_dev:  # where there are no links, but copies
            keeping.require_space(self.folder, checkpoint, stage)

    def export(
        self, folder: Path, model: Any, source: Any, step: dict[str, Any], kept: Sequence[int] | None = None
    ) -> None:
        """Round, save, and compare with what a fresh process loads."""
        from ..checkpoint.folder import round_weights, write
        from ..checkpoint.reload import reload_gate

        round_weights(model.to(self.home), source.storage)
        if processes.rank() == 0:
            folder.mkdir()
            write(source.after(model, step, kept), folder, memo=self.store.memo)
            reload_gate(folder, model, self.probe())

    def probe(self) -> dict[str, Any]:
        """A prompt with an image, as a stock forward pass takes it."""
        from ..data.collator import prompt
        from ..data.records import open_image
        from ..data.splits import load_split
        from ..models.forward import stock_inputs

        records = self.calibration or [record for task in self.tasks for record in task.records()]
        if not records:
            records = [(self.recovery.records if self.recovery else load_split(self.settings.data, "train"))[0]]
        record = next((r for r in records if r.image is not None), records[0])
        turn = next((t for t in record.turns if t.sees_image), record.turns[0])
        asked = prompt(self.base.processor, turn.question, open_image(record) if turn.sees_image else None)
        return stock_inputs(self.base.model, asked)

    def adopt(self, stage: str, name: str, entry: Entry) -> Any:
        """Load the checkpoint of a finished stage from the run's folder."""
        from ..evaluation.efficiency import sizes

        self.entries[stage] = entry
        self.seconds[stage] = entry.record["seconds"]
        processes.barrier()
        checkpoint = _digested(self.load(self.folder / name, self.settings.model.dtype))
        if checkpoint.base["digest"] == self.base.base["digest"]:
            checkpoint.provenance["base"] = self.base.base  # the cache may name a copy that another run had
        if not self.settings.evaluate.efficiency:
            self.models.clear()  # nothing will be measured side by side
        self.models[name] = checkpoint.model
        self.sizes[name] = sizes(checkpoint.model)
        return checkpoint


def _digested(checkpoint: Any) -> Any:
    """The same checkpoint with the digest of its content, which the first process finds out for all."""
    checkpoint.content = processes.from_first(checkpoint.digest if processes.rank() == 0 else None)
    return checkpoint
