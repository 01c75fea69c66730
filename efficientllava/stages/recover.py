"""Recovery as a stage: training with its teacher, exported and shared through the cache."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .. import processes
from ..cache import library_versions, source_digest
from ..config import digest
from ..console import say
from ..curves import CURVE, read_curve, write_curve
from .context import Context

TARGET_SOURCES = ("alignment", "caching", "losses", "targets", "teacher")  # what cached targets depend on


def recover(context: Context, student: Any) -> Any:
    """Give a checkpoint its skill back.

    Args:
        context: What the stages share.
        student: The checkpoint to train; its model is consumed.

    Returns:
        The recovered checkpoint, loaded from the run's folder.
    """
    from ..data.splits import data_digest
    from ..forecast import resume_bytes
    from ..recovery.objective import describe
    from ..recovery.recover import recover as train

    config, data, seed = context.settings.recover, context.settings.data, context.settings.seed
    say(
        f"recovery minimises [bold]{describe(config)}[/bold], trains {config.train}, "
        f"{context.samples['recovery']} samples (data_frac {context.settings.data_frac:g})"
    )

    taught = config.weights.logit or config.weights.hidden

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        context.require_space(folder, resume_bytes(context.forecast))
        stats = train(
            student.model,
            context.recovery,
            config,
            partial(context.trainer, training=True),
            work,
            batch_size=data.batch_size,
            global_batch_size=data.global_batch_size,
            teacher=_teacher(context, student) if taught else None,
            original_layers=student.original_layers,
            seed=seed,
        )
        step = {**stats.step, "samples": context.samples["recovery"]}
        context.export(folder / "recovered", student.model, student, step)
        if processes.rank() == 0:
            write_curve(read_curve(context.folder), folder / CURVE)
        return {"seconds": stats.seconds, "stats": asdict(stats)}

    entry = context.stage(
        "recover",
        compute,
        model=student.digest,
        original_layers=student.original_layers,
        teacher=_teacher_digest(context, student),
        recover=asdict(replace(config, name="")),
        data=[asdict(data), context.settings.data_frac, data_digest(data)],
        seed=seed,
    )
    return context.adopt("recover", "recovered", entry)


def _teacher_digest(context: Context, student: Any) -> str:
    from ..checkpoint import resolve
    from ..hub import digest as digest_of

    config = context.settings.recover.teacher
    return digest_of(resolve(config.path, config.revision)) if config.path else student.base["digest"]


def _teacher(context: Context, student: Any) -> Any:
    """The teacher's model, or where its answers are kept."""
    from ..data.splits import data_digest
    from ..recovery.caching import open_teacher

    settings, config, data = context.settings, context.settings.recover.teacher, context.settings.data
    content = {
        "teacher": [_teacher_digest(context, student), config.dtype],
        "student": [context.base.digest, settings.model.dtype],  # how images are prepared, and the tower's type
        "data": [data.name, data_digest(data), data.max_length],
        "source": source_digest("models", "data", *(f"recovery/{name}.py" for name in TARGET_SOURCES)),
        "libraries": library_versions(),
        "device": [context.device.partition(":")[0], settings.trainer.get("precision")],
    }
    folder = Path(settings.paths.cache_dir) / "targets" / digest(content)
    if config.source == "cached":
        folder.mkdir(parents=True, exist_ok=True)
        context.mark(folder)
    return open_teacher(config, student.base, context.device, folder)
