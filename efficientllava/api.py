"""The lines of the Python interface: load, plan, prune, recover, save, and files for llama.cpp.

import efficientllava as ev

checkpoint = ev.load("builtin:tiny_llava")
plan = ev.plan(checkpoint, ratio=0.5)
smaller = ev.prune(checkpoint, plan)
ev.recover(smaller, data_frac=0.05)
ev.save(smaller, "tiny_llava_half")
ev.to_gguf(smaller, "tiny_llava_half/gguf")
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from .checkpoint.export import require_weights, round_weights, save, weights_digest
from .checkpoint.folder import Checkpoint, load
from .data.collator import Collator
from .data.datamodule import RecoveryData
from .data.records import Record, image_stamps
from .data.splits import calibration_records, open_data
from .models.chat import template_of
from .models.forward import to_device
from .pruning.memory import micro_batch
from .pruning.module import chunked, with_roles
from .pruning.plan import PruningPlan
from .pruning.pruner import apply_plan, make_plan
from .pruning.self_text import positions_of, sequences, write_text
from .pruning.stream import Beginning, Calibration
from .recovery.recover import RecoveryStats
from .recovery.recover import recover as run_recovery
from .recovery.student import require_trainable
from .recovery.teacher import open_teacher, teacher_digest
from .runtime import Store, UserError, digest, growing, of_another_type, quiet_libraries, remove
from .runtime.processes import environment
from .settings.checks import require_valid
from .settings.compose import own_length
from .settings.schema import (
    BLOCKS,
    CalibrationConfig,
    DataConfig,
    DeployConfig,
    PruneConfig,
    RecoverConfig,
    RunConfig,
    WeightsConfig,
)
from .stages import inputs_of

__all__ = ["load", "plan", "prune", "recover", "save", "to_gguf"]

quiet_libraries()  # from the first use of the interface on

DIGITS = DataConfig(name="digits_vqa")
WIDTHWISE = PruneConfig(name="widthwise", method="widthwise", ratio=0.5, refit=True)
KD_HIDDEN = RecoverConfig(name="kd_hidden", weights=WeightsConfig(sft=0.5, hidden=0.5), steps=150)


def _with(config: Any, options: dict[str, Any], key: str) -> Any:
    known = {field.name for field in fields(config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"{key}: unknown option {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    given = {}
    for name, value in options.items():
        group = getattr(config, name)
        if is_dataclass(group) and isinstance(value, dict):
            value = _with(group, value, f"{key}.{name}")
        elif is_dataclass(group) and not isinstance(value, type(group)):
            raise UserError(f"{key}: {name} must be a {type(group).__name__}, or a dict of its fields")
        given[name] = value
    try:
        return OmegaConf.to_object(OmegaConf.structured(replace(config, **given)))
    except ValidationError as error:
        told = f"{key}: {error.full_key}={given[str(error.full_key)]!r}"
        raise UserError(of_another_type(error, told)) from error


def _pruning(options: dict[str, Any], key: str, calibration: CalibrationConfig, seed: int) -> PruneConfig:
    config = _with(WIDTHWISE, options, key)
    config = replace(config, round_to=BLOCKS.get(str(config.round_to), config.round_to))
    require_valid(RunConfig(seed=seed, prune=config, calibration=calibration), "")
    if config.method not in ("layerwise", "widthwise"):
        raise UserError(f"prune.method={config.method}: must be layerwise or widthwise; a search is a run of its own")
    return config


def _calibration(
    checkpoint: Checkpoint, records: Sequence[Record] | None, config: CalibrationConfig, seed: int, prune: PruneConfig
) -> Calibration:
    """What a run would look at, in the same roles."""
    if records is None:
        records = calibration_records(config, DIGITS, seed)
    records = list(records)
    if not all(isinstance(record, Record) for record in records):
        raise UserError("records: give records, such as efficientllava.data.table.read_conversations(<json>) has")
    if not records:
        raise UserError("records: there are none; give some, or None for the embedded digits")
    model, processor = checkpoint.model, checkpoint.processor
    require_weights(model)
    collate, device = Collator(processor), next(model.parameters()).device
    chunks, folds = chunked(records, micro_batch(prune, config.batch_size))
    batches = [to_device(collate(chunk), device) for chunk in chunks]
    known = (positions_of(batches), model, processor.tokenizer.model_max_length)
    count = sequences(config, prune, *known)
    how = (count, config.generate_length, seed, config.batch_size)
    text = write_text(model, processor, *how) if count else []
    beginning = Beginning.of(batches, model.config.image_token_id)  # pyright: ignore
    return with_roles(batches, folds, text, 2 in folds, beginning=beginning, written_share=config.generate_share)


def plan(
    checkpoint: Checkpoint,
    records: Sequence[Record] | None = None,
    samples: int = 64,
    seed: int = 0,
    generate: int | None = None,
    **options: Any,
) -> PruningPlan:
    """Decide what a checkpoint keeps; the model is unchanged.

    Args:
        checkpoint: From `load`.
        records: Calibration records; None draws them from the embedded digits.
        samples: Number of calibration records drawn where none are given.
        seed: Seed of the draw and of random importance.
        generate: Sequences that the model writes itself beside them, as ``calibration.generate``.
        **options: Fields of `PruneConfig`: ``ratio``, ``method``, ``importance``, ``selection`` …

    Returns:
        The plan.

    Raises:
        UserError: An unknown option, a value out of its range or an infeasible ratio.
    """
    calibration = CalibrationConfig(samples=samples, generate=generate)
    config = _pruning(options, "plan", calibration, seed)
    return make_plan(checkpoint.model, _calibration(checkpoint, records, calibration, seed, config), config, seed)[0]


def prune(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    records: Sequence[Record] | None = None,
    samples: int = 64,
    seed: int = 0,
    generate: int | None = None,
    **options: Any,
) -> Checkpoint:
    """Cut a checkpoint by a plan, refitting what is kept.

    Args:
        checkpoint: The checkpoint that the plan was made for; its model is consumed.
        plan: From `plan`.
        records: Calibration records of the refit; None draws them from the embedded digits.
        samples: Number of calibration records drawn where none are given.
        seed: Seed of the draw.
        generate: As for `plan`; they are written anew.
        **options: Fields of `efficientllava.settings.schema.PruneConfig` that concern the refit.

    Returns:
        The smaller checkpoint, its weights rounded to the storage type.

    Raises:
        UserError: An unknown option or a value out of its range.
        ValueError: The plan was made for another model, or the checkpoint has been pruned already.
    """
    calibration = CalibrationConfig(samples=samples, generate=generate)
    config = _pruning(options, "prune", calibration, seed)
    known = _calibration(checkpoint, records, calibration, seed, config)
    model, _ = apply_plan(checkpoint.model, plan, known, config)
    round_weights(model, checkpoint.storage)
    return checkpoint.after(model, plan.step, plan.kept_layers)


def recover(
    checkpoint: Checkpoint,
    data: DataConfig = DIGITS,
    data_frac: float = 1.0,
    seed: int = 0,
    workdir: str | Path | None = None,
    **options: Any,
) -> RecoveryStats:
    """Give a pruned checkpoint its skill back, in place.

    Args:
        checkpoint: A pruned checkpoint.
        data: Recovery data; the embedded digits by default.
        data_frac: Fraction of the data, (0, 1].
        seed: Seed of the draw and of the order.
        workdir: Folder of what a killed recovery goes on from, and of a cached teacher's answers, both by all that they
            depend on; a temporary one by default.
        **options: Fields of `efficientllava.settings.schema.RecoverConfig`: ``weights``, ``train``, ``lr``, ``steps`` …

    Returns:
        What was minimised, for how long, and the final losses.

    Raises:
        UserError: An unknown option or a value out of its range.
        BaseException: Whatever ends a training half-way; the checkpoint's weights are gone then.
    """
    from lightning.pytorch import Trainer

    if not isinstance(data, DataConfig):
        raise UserError(f"recover: data={data!r}: give a DataConfig(name='conversations', path=<json>)")
    config = own_length(_with(KD_HIDDEN, options, "recover"), options)
    require_valid(RunConfig(seed=seed, data_frac=data_frac, data=data), "")
    recovery = RecoveryData(data, checkpoint.processor, data_frac, seed)
    require_trainable(recovery.records, config.train)
    settings = RunConfig(seed=seed, data_frac=data_frac, data=data, recover=config)
    with tempfile.TemporaryDirectory(prefix="efficientllava-") as scratch:
        store, teacher = Store(_workdir(workdir or scratch), together=False), None
        work, targets = _places(store, checkpoint, recovery, settings)
        if config.taught:
            teacher = open_teacher(config.teacher, checkpoint.base, "cpu", targets, store.memo)
        with growing(work, store.memo):
            try:
                stats = run_recovery(
                    checkpoint.model,
                    recovery,
                    config,
                    lambda **arguments: Trainer(
                        logger=False, enable_model_summary=False, devices=1, plugins=environment(), **arguments
                    ),
                    work,
                    batch_size=data.batch_size,
                    global_batch_size=data.global_batch_size,
                    teacher=teacher,
                    original_layers=checkpoint.original_layers,
                    seed=seed,
                )
            except BaseException:
                if checkpoint.model.training:  # half trained, with adapters: nobody is to take it for a checkpoint
                    checkpoint.model.to("meta")
                raise
            remove(work)
    round_weights(checkpoint.model, checkpoint.storage)
    checkpoint.provenance = checkpoint.after(checkpoint.model, stats.step).provenance
    return stats


def _workdir(given: str | Path) -> Path:
    folder = Path(given).expanduser()
    if folder.is_file():
        raise UserError(f"workdir={given}: is a file; give a folder")
    return folder


def _places(store: Store, checkpoint: Checkpoint, recovery: RecoveryData, settings: RunConfig) -> tuple[Path, Path]:
    """Where a recovery keeps what it goes on from, and a teacher's answers."""
    teacher = teacher_digest(settings.recover.teacher, checkpoint.base, store.memo) if settings.recover.taught else None
    processor: Any = checkpoint.processor
    tokenizer = processor.tokenizer
    read = [template_of(processor), tokenizer.get_vocab(), tokenizer.model_max_length]
    content = {"teacher": teacher, "files": open_data(settings)["recover"], "computed_in": str(checkpoint.model.dtype)}
    content |= {"processor": digest([*read, processor.image_processor.to_dict()])}
    targets = inputs_of("targets", settings, model=checkpoint.base["digest"], **content)
    content |= {"images": digest(image_stamps(recovery.records)), "original_layers": checkpoint.original_layers}
    own = inputs_of("recover", settings, model=weights_digest(checkpoint.model), **content)
    return store.place("recover", own), store.place("targets", targets)


def to_gguf(
    checkpoint: Checkpoint, folder: str | Path, dense: Checkpoint | None = None, **options: Any
) -> dict[str, Any]:
    """Write a checkpoint as files for llama.cpp, compare them in the installed runtime, and measure them there.

    Args:
        checkpoint: What to export, on the CPU in float32.
        folder: Where the files go.
        dense: The checkpoint that it was pruned from, measured beside it.
        **options: Fields of `DeployConfig`: ``types``, ``mmproj``, ``check``, ``measure`` …

    Returns:
        What was written and found, see `efficientllava.deploy.export.deploy`.

    Raises:
        UserError: It cannot be exported, or the runtime computes something else.
    """
    from .deploy.export import deploy

    require_weights(checkpoint.model)
    return deploy(
        checkpoint,
        Path(folder).expanduser(),
        _with(DeployConfig(name="gguf"), options, "to_gguf"),
        dense and (lambda: dense),
    )
