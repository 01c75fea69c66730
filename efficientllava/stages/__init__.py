"""What the result of a stage depends on: the one place that cache, identity of a run, and dry run read.

`inputs_of` has two halves. The settings are known from the configuration alone: whole nodes, without what is named here
as deciding nothing, so that a new field counts until somebody says otherwise. What they lead to (weights, records,
images) is content, which only a look at files tells. The cache fills in all of it, a run's identity what is found
without torch, and a dry run, which looks at nothing, the places where it lies (`asked` and `places`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..runtime import library_versions, source_digest
from ..settings.schema import RunConfig

# Settings that decide no number of any stage: how fast, how often saved, where weights wait, what an option is called.
NEUTRAL = (
    "data.image_layout",
    "data.num_workers",
    "evaluate.num_workers",
    "prune.offload",
    "recover.save_every",
    "recover.teacher.offload",
    "evaluate.judge.concurrency",
    "evaluate.judge.key_env",
    "evaluate.judge.retries",
    "evaluate.judge.timeout",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.num_sanity_val_steps",
)
# Of the trainer, what says where and in how many processes; that is `device` and `processes`.
MACHINE = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")
# Callbacks that watch.
WATCHERS = ("LearningRateMonitor", "ProgressBar", "ModelSummary", "DeviceStatsMonitor")
# What is the same in however many processes: each has all of it, or shares whole records out.
UNDIVIDED = ("search", "targets")
# Fields that lead to content, and count as that.
PLACES = ("path", "image_root")
# Of the evaluation, what is in the task or in the model, and what is done with answers or beside them.
NOT_ANSWERS = (
    *("tasks", "root", "namespace", "protocol", "prose", "quantization", "lmms_eval"),
    *("judge", "efficiency", "repeats", "new_tokens", "speed_batches"),
)
# Of the data, what no training reads; which records are usable, their images' stamps say.
NOT_TRAINED = (*PLACES, "test_questions", "max_bad_fraction")
# Code that makes a stage's result where that is not the module of its name; what it imports counts, too.
SOURCES = {"search": "search.module", "targets": "recovery.caching"}


def inputs_of(stage: str, settings: RunConfig, **content: Any) -> dict[str, Any]:
    """Everything that decides the result of a stage; plain values.

    Args:
        stage: ``evaluate``, ``prune``, ``search`` (its level tables), ``recover`` or ``targets`` (a teacher's answers).
        settings: The checked configuration.
        **content: What the stage's function says, and for all stages:
            ``model``, the content of the checkpoint that it starts from;
            ``device`` (``cpu`` or ``cuda``) and ``processes``, which decide the order of sums.
    """
    shared = {
        "source": source_digest(SOURCES.get(stage, f"stages.{stage}")),
        "libraries": library_versions(),
        "dtype": settings.model.dtype,
        "threads": settings.threads,
        "trainer": _trainer(settings, training=stage == "recover"),
    }
    known = {"model": None, "device": None, "processes": None}
    found = {"stage": stage, **shared, **known, **_STAGES[stage](settings), **content}
    return found | ({"processes": None} if stage in UNDIVIDED else {})


def _evaluate(settings: RunConfig) -> dict[str, Any]:
    """Answers of a model to a benchmark.

    Of its node what decides answers: how many are asked at once (the padding of a batch decides rounding), how many in
    all, how long an answer may be.
    Content: ``task``, the benchmark with its protocol and stop texts; ``questions``, their ids, texts, answers and
    details; ``images``, the stamps of their files; ``base``, the answers whose distributions these are compared with.
    """
    return {
        "evaluate": _node(settings, "evaluate", NOT_ANSWERS),
        "callbacks": _callbacks(settings),
        "task": None,
        "questions": None,
        "images": None,
        "base": None,
    }


def _prune(settings: RunConfig) -> dict[str, Any]:
    """The plan and the pruned checkpoint.

    The nodes of pruning, of the search where there is one, and of the calibration; the longest record; the seed; the
    data's kind, which says whether a search has held-out samples to plot. Content: ``records``, the ids of the
    calibration records in their order; ``files``, the data that they come from; ``images``, their whole content;
    ``written``, how many sequences the model writes itself, and their seed.
    """
    return {
        "prune": _node(settings, "prune"),
        "search": _node(settings, "search") if settings.prune.method == "auto" else None,
        "calibration": _node(settings, "calibration", PLACES),
        "data": {"name": settings.data.name, "max_length": settings.data.max_length},
        "seed": settings.seed,
        "records": None,
        "files": None,
        "images": None,
        "written": None,
    }


def _search(settings: RunConfig) -> dict[str, Any]:
    """Level tables: batches of calibration records through the dense model. A table's recipe is added by the search.

    Content as of ``prune``.
    """
    return {
        "calibration": _node(settings, "calibration", PLACES),
        "max_length": settings.data.max_length,
        "records": None,
        "files": None,
        "images": None,
        "written": None,
    }


def _recover(settings: RunConfig) -> dict[str, Any]:
    """The recovered checkpoint.

    The node of the recovery; what is drawn of the data, in which batches and order, and how long a record may be; the
    seed; callbacks that do more than watch. Where a loss needs no teacher, nothing of the teacher. Content:
    ``original_layers``, which of its layers teach; ``teacher``, its checkpoint; ``files``, the data; ``images``, the
    stamps of the files of all drawn records.
    """
    recover = _node(settings, "recover")
    teacher = recover.pop("teacher")
    if settings.recover.taught:
        # Its place is content; it is of one type with the model unless somebody says otherwise.
        recover["teacher"] = {key: teacher[key] for key in ("dtype", "source", "top_k")}
    return {
        "recover": recover,
        "data": {"name": settings.data.name, **_node(settings, "data", NOT_TRAINED)},
        "data_frac": settings.data_frac,
        "seed": settings.seed,
        "callbacks": _callbacks(settings),
        "original_layers": None,
        "teacher": None,
        "files": None,
        "images": None,
    }


def _targets(settings: RunConfig) -> dict[str, Any]:
    """What a teacher says about records; recoveries that draw other records, or want more of it, share them.

    Content: ``model``, the base checkpoint of the student, which prepares images; ``teacher``; ``files``, the data. The
    stamps of a record's images are kept with its answer.
    """
    return {
        "teacher_dtype": settings.recover.teacher.dtype,
        "data": {"name": settings.data.name, "max_length": settings.data.max_length},
        "teacher": None,
        "files": None,
    }


_STAGES: dict[str, Callable[[RunConfig], dict[str, Any]]] = {
    "evaluate": _evaluate,
    "prune": _prune,
    "search": _search,
    "recover": _recover,
    "targets": _targets,
}


def asked(settings: RunConfig) -> dict[str, Any]:
    """Which questions the evaluations of a run ask, in place of ``task`` and of what is read of it."""
    config = settings.evaluate
    fields = ("tasks", "root", "namespace", "protocol", "quantization")
    lmms = asdict(config.lmms_eval)
    return {
        **{name: getattr(config, name) for name in fields},
        "prose": config.prose.path,
        "lmms": lmms,
        "digits": settings.data.test_questions,
    }


def places(settings: RunConfig, stage: str) -> dict[str, Any]:
    """Where the content of a stage lies, in place of that content: a checkpoint, records, a teacher."""
    data, calibration, teacher = settings.data, settings.calibration, settings.recover.teacher
    files: dict[str, Any] = {"files": [data.name, data.path, data.image_root]}
    if stage == "prune":
        files["files"] += [calibration.path, calibration.image_root]
    if stage == "targets" or (stage == "recover" and settings.recover.taught):
        files["teacher"] = [teacher.path, teacher.revision]
    return files


def checkpoint(settings: RunConfig) -> list[Any]:
    """Where the checkpoint of a run lies, and what is made of it when it is opened."""
    model = settings.model
    return [model.path, model.revision, model.protocol, model.system]


def numbers(settings: RunConfig) -> dict[str, Any]:
    """The whole configuration without what is `NEUTRAL`."""
    return _without(asdict(settings), NEUTRAL)


def _node(settings: RunConfig, name: str, but: Sequence[str] = ()) -> dict[str, Any]:
    """A node without the name of its option, which decides nothing, and but for some fields."""
    return {key: value for key, value in numbers(settings)[name].items() if key not in ("name", *but)}


def _trainer(settings: RunConfig, training: bool) -> dict[str, Any]:
    trainer = _without({"trainer": dict(settings.trainer)}, (*NEUTRAL, *MACHINE))["trainer"]
    # Nothing but a training shares a model out.
    return trainer if training else {key: value for key, value in trainer.items() if key != "strategy"}


def _callbacks(settings: RunConfig) -> list[Any]:
    configured = [dict(callback) for callback in (settings.callbacks or {}).values()]
    return [each for each in configured if not str(each.get("_target_", "")).endswith(WATCHERS) and each]


def _without(tree: Mapping[str, Any], keys: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """A nested mapping without some dotted keys."""
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if f"{prefix}{name}" not in keys
    }
