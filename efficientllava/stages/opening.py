"""Whatever a run will need is opened before its first stage, so that a fault is found early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import Checkpoint
from ..data.collator import Collator
from ..data.datamodule import RecoveryData
from ..data.splits import calibration_records, keep_back, open_data
from ..deploy import export
from ..evaluation import judges, lmms, tasks
from ..evaluation.tasks import prose
from ..models.forward import FeatureCache, require_images
from ..recovery.recover import accumulation
from ..recovery.student import require_trainable
from ..recovery.teacher import require_teacher
from ..runtime import ConfigError, Store, UserError, processes, say
from ..runtime.keeping import require_space
from ..settings.schema import RunConfig
from .run import Expected, Run, load_checkpoint


def device_of(settings: RunConfig) -> str:
    """Where the models of a run are, ``cpu`` or a GPU such as ``cuda:0``."""
    return f"cuda:{torch.cuda.current_device()}" if processes.on_gpu(settings.trainer) else "cpu"


def open_run(settings: RunConfig, folder: Path, expected: Expected) -> Run:
    """Open whatever a stage will need, so that a fault is found before the first one.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        expected: What will come out.

    Raises:
        UserError: Something that a stage will need is not there.
    """
    store, device = Store(Path(settings.paths.cache_dir), settings.reuse), device_of(settings)
    files = open_data(settings)  # before the weights, which take their time at full size
    asked = _benchmarks(settings)
    model = settings.model
    known = (model.path, model.dtype, model.revision, model.protocol, model.system)
    base = load_checkpoint(store, device, settings.prune.offload, *known)
    features, collate = FeatureCache(base.model), Collator(base.processor, settings.data.max_length)
    lmms.prepare(settings.evaluate)
    for task in asked if settings.evaluate.prose.path else ():
        if task.divergence:
            prose.require_whole(task.records()[: settings.evaluate.limit], base.processor)
    calibration = []
    if settings.prune.method != "none":
        calibration = calibration_records(settings.calibration, settings.data, settings.seed, collate)
    calibration, reported = keep_back(settings, calibration, collate)
    opened = (settings, folder, store, device, base, files, asked, collate, features, calibration, reported)
    run = Run(*opened, _recovery(settings, base), expected)
    if run.disk and settings.prune.solves and settings.calibration.generate:
        raise UserError(
            "prune.offload=disk: the dense model writes no text for the statistics, it is never whole in memory; set "
            "calibration.generate=0"
        )
    if "pixel_values" in run.probe:
        require_images(base.model, run.probe)
    if open_data(settings) != files:
        raise UserError("data.path, or calibration.path: has changed while it was opened; run again")
    return run


def _benchmarks(settings: RunConfig) -> list[Any]:
    """The benchmarks of a run, with their questions and judges looked for."""
    found = [tasks.load(name, settings.data, settings.evaluate) for name in settings.evaluate.tasks]
    problems = []
    for task in found:
        try:
            task.records()
            judges.prepare(task.name, settings.evaluate.judge)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def _recovery(settings: RunConfig, base: Checkpoint) -> RecoveryData | None:
    """The data of the recovery, which its teacher and what trains can use."""
    config, data = settings.recover, settings.data
    if config.name == "none":
        return None
    require_teacher(config, base.base, base.model)
    accumulation(data.batch_size, data.global_batch_size, processes.world_size())
    recovery = RecoveryData(data, base.processor, settings.data_frac, settings.seed)
    require_trainable(recovery.records, config.train)
    return recovery


def prepare(run: Run) -> None:
    """Refuse, before the first stage, what could not be exported after the last one; warn of files that would grow.

    Raises:
        UserError: Says why, and what would help.
    """
    config, model = run.settings.deploy, run.base.model
    export.describe(run.base, config)
    needed = export.needed_bytes(model, config, export.compared(run.settings))
    require_space(run.folder, needed, "deploy=gguf", "export fewer deploy.types")
    for remark in export.foresee(model, run.expected.shapes, config):
        say(remark)
