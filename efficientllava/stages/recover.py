"""Recovery as a stage: training with its teacher, exported and shared through the store."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint
from ..data.records import image_stamps
from ..record import CURVE, read_logs, write_curve
from ..recovery.losses import describe
from ..recovery.recover import RESUME_POINT
from ..recovery.recover import recover as train
from ..recovery.teacher import open_teacher, teacher_digest
from ..runtime import digest, processes, remove, say
from .run import Made, Run


def recover(run: Run, before: Made) -> Made:
    """Give a checkpoint its skill back; its model is consumed."""
    settings, student = run.settings, before.checkpoint
    config, data, recovery = settings.recover, settings.data, run.recovery
    assert recovery is not None
    samples = len(recovery.records)
    say(
        f"recovery minimises [bold]{describe(config)}[/bold], trains {config.train}, "
        f"{samples} samples (data_frac {settings.data_frac:g})"
    )

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        run.require_space(folder, run.expected.resume)
        if processes.rank() == 0 and not (work / RESUME_POINT).exists():
            for log in run.folder.glob("logs/**/metrics.csv"):
                remove(log)  # of another training, whose steps are no part of this one's curve
        stats = train(
            student.model,
            recovery,
            config,
            partial(run.trainer, training=True),
            work,
            batch_size=data.batch_size,
            global_batch_size=data.global_batch_size,
            teacher=_teacher(run, student, teacher) if teacher else None,
            original_layers=student.original_layers,
            seed=settings.seed,
        )
        processes.release_memory()  # what the training held, before the checkpoint is written
        run.export(folder / "recovered", student.after(student.model, {**stats.step, "samples": samples}))
        if processes.rank() == 0:
            write_curve(read_logs(run.folder), folder / CURVE)
        return {"seconds": stats.seconds, "stats": asdict(stats)}

    teacher = None
    if config.taught:
        teacher = processes.on_first(lambda: teacher_digest(config.teacher, student.base, run.store.memo))
    entry = run.entry(
        "recover",
        compute,
        model=student.digest,
        original_layers=student.original_layers,
        teacher=teacher,
        files=run.files["recover"],
        images=processes.on_first(lambda: digest(image_stamps(recovery.records))),
    )
    student.model = student.model.to("meta")
    return run.made("recovered", entry)


def _teacher(run: Run, student: Checkpoint, content: str) -> Any:
    """The teacher's model, or where its answers are kept."""
    config = run.settings.recover.teacher
    # The student's base prepares the images, and its tower may be the teacher's.
    known = {"model": run.base.digest, "teacher": content, "files": run.files["recover"]}
    folder = run.store.place("targets", run.inputs("targets", **known))
    if config.source == "cached":
        folder.mkdir(parents=True, exist_ok=True)
        run.mark(folder)
    return open_teacher(config, student.base, run.device, folder, run.store.memo)
