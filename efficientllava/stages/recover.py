"""Recovery as a stage: training with its teacher, exported and shared through the cache."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..record import CURVE, read_curve, write_curve
from ..runtime import processes
from ..runtime.console import say
from ..runtime.content import digest
from .context import Context
from .inputs import taught


def recover(context: Context, student: Any) -> Any:
    """Give a checkpoint its skill back.

    Args:
        context: What the stages share.
        student: The checkpoint to train; its model is consumed.

    Returns:
        The recovered checkpoint, loaded from the run's folder.
    """
    from ..data.stamps import image_stamps
    from ..estimate.forecast import resume_bytes
    from ..recovery.caching import teacher_digest
    from ..recovery.losses import describe
    from ..recovery.recover import recover as train

    config, data, seed = context.settings.recover, context.settings.data, context.settings.seed
    say(
        f"recovery minimises [bold]{describe(config)}[/bold], trains {config.train}, "
        f"{context.samples['recovery']} samples (data_frac {context.settings.data_frac:g})"
    )

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
            teacher=_teacher(context, student, teacher) if teacher else None,
            original_layers=student.original_layers,
            seed=seed,
        )
        step = {**stats.step, "samples": context.samples["recovery"]}
        context.export(folder / "recovered", student.model, student, step)
        if processes.rank() == 0:
            write_curve(read_curve(context.folder), folder / CURVE)
        return {"seconds": stats.seconds, "stats": asdict(stats)}

    first = processes.rank() == 0
    teacher = processes.from_first(
        teacher_digest(config.teacher, student.base, context.store.memo) if first and taught(context.settings) else None
    )
    entry = context.stage(
        "recover",
        compute,
        model=student.digest,
        original_layers=student.original_layers,
        teacher=teacher,
        files=context.files["recover"],
        images=processes.from_first(digest(image_stamps(context.recovery.records)) if first else None),
    )
    return context.adopt("recover", "recovered", entry)


def _teacher(context: Context, student: Any, content: str) -> Any:
    """The teacher's model, or where its answers are kept."""
    from ..recovery.caching import open_teacher

    config = context.settings.recover.teacher
    # The student's base prepares the images, and its tower may be the teacher's.
    known = {"model": context.base.digest, "teacher": content, "files": context.files["recover"]}
    folder = context.store.place("targets", context.inputs("targets", **known))
    if config.source == "cached":
        folder.mkdir(parents=True, exist_ok=True)
        context.mark(folder)
    return open_teacher(config, student.base, context.device, folder, context.store.memo)
