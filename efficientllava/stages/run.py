"""What the stages of a run are given, and the value that each gives to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar

from ..checkpoint.export import reload_gate, round_weights, write
from ..checkpoint.folder import Checkpoint, compute_dtype, load
from ..data.collator import Collator, prompt
from ..data.datamodule import RecoveryData
from ..data.records import Record, open_image
from ..data.splits import load_split
from ..models.anatomy import sizes
from ..models.forward import stock_inputs
from ..models.offload import Disk, Offload
from ..pruning.self_text import sequences
from ..record import CURVE
from ..runtime import RESULTS, Entry, Store, UserError, is_remote, keeping, peek_json, processes, remove
from ..settings.compose import instantiate
from ..settings.schema import RunConfig, WandbConfig
from . import inputs_of
from .request import made

# What a run's folder gets of a stage, which a run without it does not leave there.
GIVEN = {
    "pruned": ("pruned", "plan.json"),
    "searched": ("search.json", "search.png"),
    "recovered": ("recovered", CURVE),
    "gguf": ("gguf",),
    "evaluated": ("predictions", "samples.png"),  # which every run writes anew, from the cache where they are known
}


def require_apart(settings: RunConfig, folder: Path) -> None:
    """Refuse a model, teacher or data that lie where a run puts its own, and would be gone when they are read.

    Raises:
        UserError: Names the first.
    """
    places = {"model": settings.model, "recover.teacher": settings.recover.teacher}
    places |= {"data": settings.data, "calibration": settings.calibration}
    taken = [folder.resolve() / name for names in GIVEN.values() for name in names]
    for key, node in places.items():
        path = None if node.path is None or is_remote(node.path) else Path(node.path).expanduser().resolve()
        if path and any(path.is_relative_to(place) for place in taken):
            raise UserError(
                f"{key}.path={node.path}: lies in this run's own folder, where its results go; give the run another "
                "folder, such as hydra.run.dir=outputs/next"
            )


def require_own(folder: Path) -> None:
    """Refuse a folder where no run has been, and that has what one would remove or write over.

    Raises:
        UserError: Names the first.
    """
    if not any((folder / name).exists() for name in (RESULTS, keeping.LOCK)):
        for name in (*chain.from_iterable(GIVEN.values()), "logs"):
            if (folder / name).exists():
                raise UserError(
                    f"{folder / name}: is of no run and would be lost; give the run another folder, such as "
                    "hydra.run.dir=outputs/next"
                )


def clear(settings: RunConfig, folder: Path, key: str) -> None:
    """Remove from a run's folder what another run has left there, its results first, and this one does not make.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        key: This run's, see `efficientllava.stages.request.run_key`.
    """
    if peek_json(folder / RESULTS).get("run_key") != key:
        remove(folder / RESULTS)
    own = [*made(settings), *(["searched"] if settings.prune.method == "auto" else []), settings.deploy.name]
    for name in (name for stage, names in GIVEN.items() if stage not in own for name in names):
        remove(folder / name)


@dataclass(frozen=True)
class Expected:
    """What the run will make, as far as its stages have to know.

    Args:
        checkpoint: Bytes of the pruned checkpoint.
        resume: Bytes that a killed recovery goes on from.
        shapes: KV groups and channels of every layer, for each plan that may come out.
    """

    checkpoint: int
    resume: int
    shapes: Sequence[Any]


class Made:
    """What a stage has made.

    Args:
        stage: ``base``, ``pruned`` or ``recovered``.
        checkpoint: Its checkpoint; the next stage consumes the model.
        entry: Its result in the store; None for the base.
    """

    def __init__(self, stage: str, checkpoint: Checkpoint, entry: Entry | None = None) -> None:
        self.stage, self.checkpoint, self.entry = stage, checkpoint, entry
        self.sizes = sizes(checkpoint.model)  # now: on the meta device tied weights are no longer one


@dataclass(frozen=True)
class Run:
    """Everything that a run has opened; the stages read it, and change nothing in it.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        store: Finished stages by content.
        device: Where models run.
        base: The checkpoint to start from. Once it is pruned, only the shapes of its model remain.
        files: By stage, the digest of the data behind its records.
        tasks: Benchmarks.
        collate: Turns records into batches.
        features: Vision features by image.
        calibration: Records that pruning looks at.
        reported: Records that no choice of the run sees, for the losses of its checkpoints.
        recovery: Data that recovery trains on, or None.
        expected: What will come out.
    """

    settings: RunConfig
    folder: Path
    store: Store
    device: str
    base: Checkpoint
    files: dict[str, str]
    tasks: Sequence[Any]
    collate: Collator
    features: Any
    calibration: Sequence[Record]
    reported: Sequence[Record]
    recovery: RecoveryData | None
    expected: Expected

    @property
    def home(self) -> str:
        """Where whole models are between stages: with offload, one that is too large for the GPU is on the host."""
        return "cpu" if self.settings.prune.offload else self.device

    @cached_property
    def offload(self) -> Offload | None:
        """Where the weights are that nothing computes with, if not on the device."""
        if self.settings.prune.offload == "disk":
            storage = self.base.storage
            return Disk(compute_dtype(self.settings.model.dtype, storage, self.device), storage, self.store.root)
        return Offload(self.device) if self.settings.prune.offload else None

    @property
    def disk(self) -> Disk | None:
        """The same, if it is files."""
        return self.offload if isinstance(self.offload, Disk) else None

    @contextmanager
    def on_device(self, model: Any) -> Iterator[Any]:
        """Have a whole model where it runs: on the device, or of one in files a layer at a time in memory."""
        with self.disk.running(model) if self.disk else nullcontext():
            yield model.to(self.device)
        model.to(self.home)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the calibration records, row by row."""
        return [length for record in self.calibration for length in self.collate.check(record)]

    @property
    def longest(self) -> int | None:
        """The most of them; None where there are none."""
        return max(self.lengths, default=None)

    @cached_property
    def written(self) -> int:
        """Sequences that the dense model writes for the statistics; first asked for while it is there."""
        context = int(self.base.processor.tokenizer.model_max_length)
        known = (sum(self.lengths), self.base.model, context, any(record.images for record in self.calibration))
        return sequences(self.settings.calibration, self.settings.prune, *known)

    def trainer(self, **arguments: Any) -> Any:
        """A Lightning trainer, see `efficientllava.stages.run.make_trainer`."""
        return make_trainer(self.settings, self.folder, **arguments)

    def inputs(self, stage: str, **content: Any) -> dict[str, Any]:
        """What a stage depends on, see `efficientllava.stages.inputs_of`; where it runs is added here."""
        where = {"device": self.device.partition(":")[0], "processes": processes.world_size()}
        return inputs_of(stage, self.settings, **where, **content)

    def entry(self, stage: str, compute: Callable[[Path, Path], dict[str, Any]], **content: Any) -> Entry:
        """A stage's result through the store; its checkpoint and plan are put into the run's folder.

        Args:
            stage: ``evaluate``, ``prune`` or ``recover``.
            compute: See `efficientllava.runtime.Store.entry`.
            **content: See `efficientllava.stages.inputs_of`.
        """
        return self.store.entry(stage, self.inputs(stage, **content), compute, self._take)

    def _take(self, entry: Path) -> None:
        self.mark(entry)
        for name in chain.from_iterable(GIVEN.values()):
            if (entry / name).exists():
                self.store.share(entry / name, self.folder / name)

    def mark(self, entry: Path) -> None:
        """Say that an entry of the store stays, if this run keeps its checkpoints."""
        if self.settings.keep == "all" and processes.rank() == 0:
            keeping.mark(entry)

    def require_space(self, folder: Path, resume: int = 0) -> None:
        """Refuse a stage that has no room for its checkpoint.

        Args:
            folder: The entry of the store that the stage will fill.
            resume: Bytes of what it goes on from after a kill; a new one is whole before the old one goes.

        Raises:
            UserError: There is too little space; says what is needed.
        """
        needed = self.expected.checkpoint
        changed = needed if self.disk else 0  # what was cut waits in a file of its own
        keeping.require_space(folder.parent, resume + max(resume, needed) + changed, folder.parent.name)
        if folder.parent.stat().st_dev != self.folder.stat().st_dev:  # where there are no links, but copies
            keeping.require_space(self.folder, needed, folder.parent.name)

    def export(self, folder: Path, made: Checkpoint) -> None:
        """Round, save, and compare with what a fresh process loads."""
        if self.disk:
            self.disk.settle(made.model)
        round_weights(made.model.to(self.home), made.storage)
        if processes.rank() == 0:
            folder.mkdir()
            write(made, folder, memo=self.store.memo)
            reload_gate(folder, made.model, self.probe, self.disk)

    @cached_property
    def probe(self) -> dict[str, Any]:
        """A prompt, with an image if any record has one, as a stock forward pass takes it."""
        records = self.calibration or [record for task in self.tasks for record in task.records()]
        if not records:
            records = [(self.recovery.records if self.recovery else load_split(self.settings.data, "train"))[0]]
        record = next((r for r in records if r.image is not None), records[0])
        turn = next((t for t in record.turns if t.sees_image), record.turns[0])
        asked = prompt(self.base.processor, turn.question, open_image(record) if turn.sees_image else None)
        return stock_inputs(self.base.model, asked)

    def made(self, stage: str, entry: Entry) -> Made:
        """The checkpoint of a finished stage, loaded from the run's folder."""
        processes.barrier()
        settings = self.settings
        where = (self.device, settings.prune.offload, self.folder / stage)
        checkpoint = load_checkpoint(self.store, *where, settings.model.dtype)
        if checkpoint.base["digest"] == self.base.base["digest"]:
            checkpoint.provenance["base"] = self.base.base  # the store may name a copy that another run had
        self.features.follow(checkpoint.model)  # the one before is consumed, or not kept
        return Made(stage, checkpoint, entry)


def load_checkpoint(
    store: Store, device: str, offload: bool | str, path: str | Path, dtype: str, *more: Any
) -> Checkpoint:
    """A checkpoint on a run's device, with the digest of its content; for ``offload`` see `load`."""
    checkpoint = load(str(path), dtype, device, *more, offload=offload, memo=store.memo)
    checkpoint.content = processes.on_first(lambda: checkpoint.digest)
    return checkpoint


# The report reads the CSV file; the curves of W&B's run are drawn beside it.
TRACKED = {"_target_": "efficientllava.report.dashboard.TrackedCSVLogger", "name": "", "version": ""}


class StageProgressBar(RichProgressBar):
    """A bar that carries the name of stage and benchmark where Lightning says "Predicting".

    Args:
        what: The name.
        **options: Those of Lightning's bar.
    """

    def __init__(self, what: str = "Predicting", **options: Any) -> None:
        super().__init__(**options)
        self.what = what

    @property
    def predict_description(self) -> str:
        """The name."""
        return self.what


def make_trainer(
    settings: RunConfig,
    folder: Path,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    training: bool = False,
    what: str | None = None,
    **overrides: Any,
) -> Any:
    """Make a Trainer from the configuration's node.

    Args:
        settings: The run's configuration.
        folder: The run's folder.
        quiet: No progress bar, no logger and no configured callbacks.
        callbacks: Added to the configured ones.
        training: Whether weights train; only then is a model shared out over processes.
        what: What the progress bar calls a pass without training.
        **overrides: Arguments that the stage decides.
    """
    node = dict(settings.trainer)
    if processes.sharded(node) and not training:
        node["strategy"] = "ddp"
    if processes.launched():
        node["num_nodes"] = processes.nodes(node)
        node["devices"] = processes.world_size() // node["num_nodes"]
    options = {"default_root_dir": str(folder), "enable_checkpointing": False, "use_distributed_sampler": False}
    if not node.get("plugins"):
        options["plugins"] = processes.environment()
    if quiet:
        options |= {"logger": False, "enable_progress_bar": False, **overrides}
        return instantiate(node, callbacks=[*callbacks], **options)
    options |= overrides
    if "logger" not in options:
        options["logger"] = make_logger(settings, folder)
    configured = [dict(callback) for callback in (settings.callbacks or {}).values() if callback.get("_target_")]
    if not options["logger"]:
        configured = [callback for callback in configured if not callback["_target_"].endswith("LearningRateMonitor")]
    for callback in configured if what else ():
        if callback["_target_"].endswith("StageProgressBar"):
            callback["what"] = what
    return instantiate(node, callbacks=[*map(instantiate, configured), *callbacks], **options)


def make_logger(settings: RunConfig, folder: Path) -> Any:
    """Make the configured logger, writing below ``logs/`` in the run's folder.

    Returns:
        A Lightning logger, or False for none. A CSV file of an earlier process stays, since a killed training goes on.
    """
    node = dict(TRACKED if isinstance(settings.logger, WandbConfig) else settings.logger or {})
    if not node.get("_target_"):
        return False
    logs = folder / "logs"
    if node["_target_"].endswith("CSVLogger") and (logs / "metrics.csv").exists():
        node["version"] = f"part{len([*logs.glob('part*')]) + 1}"
    return instantiate(node, save_dir=str(logs))
