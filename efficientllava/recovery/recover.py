"""The recovery stage: a pruned model, a datamodule and a configuration in; the recovered model and its numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from ..errors import UserError
from ..models.anatomy import decoder_of
from ..models.forward import feature_cache
from .alignment import Match, match_layers
from .caching import TargetCache, TargetStats, cached_teacher
from .losses import HiddenStateKDLoss
from .module import RecoveryModule
from .objective import Term, build_terms, describe
from .sharding import Sharding
from .stream import RESUME_POINT, BatchStream, ResumePoint, used_records
from .targets import Wanted
from .teacher import Teacher, check_teacher
from .trainable import prepare, trainable


@dataclass(frozen=True)
class RecoveryStats:
    """What a recovery did.

    Attributes:
        loss: What was minimised, such as ``0.5 x CE + 0.5 x L2(hidden)``.
        train: ``projector``, ``lora`` or ``full``.
        trainable_parameters: Number of parameters that trained.
        steps: Optimiser steps.
        samples: Records seen, counted with repetition, over all processes.
        tokens: Supervised tokens seen by this process.
        seconds: Training time, over resumed runs, without loading and set-up.
        final_losses: Mean of each unweighted loss over the last 20 micro-batches, by name (sft, logit, hidden).
        targets: What a cached teacher took; None for a live one and for none.
    """

    loss: str
    train: str
    trainable_parameters: int
    steps: int
    samples: int
    tokens: int
    seconds: float
    final_losses: dict[str, float]
    targets: TargetStats | None = None

    @property
    def step(self) -> dict[str, Any]:
        """Its line of the provenance."""
        return {"stage": "recover", "loss": self.loss, "train": self.train, "steps": self.steps}


def recover(
    student: nn.Module,
    datamodule: L.LightningDataModule,
    cfg: Any,
    trainer_factory: Callable[..., L.Trainer],
    workdir: Path,
    *,
    batch_size: int,
    global_batch_size: int | None = None,
    teacher: nn.Module | TargetCache | None = None,
    original_layers: Sequence[int] | None = None,
    seed: int = 0,
) -> RecoveryStats:
    """Train a pruned model; goes on from ``workdir/last.ckpt`` where that exists, with the same result.

    Args:
        student: The pruned model; changed in place, adapters merged at the end, storage types kept.
        datamodule: Gives the training loader: map-style, its batch sampler sharded over processes and, where it has
            ``set_epoch``, in an order of the epoch's own.
        cfg: A `efficientllava.schema.RecoverConfig`.
        trainer_factory: Makes a trainer from keyword arguments: ``callbacks`` (to be added to the user's own),
            ``max_epochs``, ``default_root_dir``, ``enable_checkpointing``, ``use_distributed_sampler``.
        workdir: Folder of the resume point; only the caller knows when it may be deleted.
        batch_size: Records per process and micro-batch.
        global_batch_size: Records per optimiser step over all processes; None: ``batch_size`` times the processes.
        teacher: The original model, frozen in place, or where its answers are kept (``recover.teacher.source=cached``);
            needed when a distillation loss has weight.
        original_layers: Index of each of the student's layers in the teacher; None when no layer was dropped.
        seed: Seed of adapters and of dropout within them.

    Returns:
        Numbers for the record.

    Raises:
        UserError: A faulty configuration, a teacher that does not fit, or a loss that is not finite.
    """
    terms = build_terms(cfg)
    distils = any(loss.needs_hidden or loss.needs_teacher_logits for _, loss in terms)
    matches = _matches(student, teacher, terms, original_layers) if distils else ()
    # The two towers are compared before adapters change the student.
    live = Teacher(teacher, student, cfg.teacher.offload) if distils and isinstance(teacher, nn.Module) else None
    trainer = trainer_factory(
        callbacks=[ResumePoint(workdir, cfg.save_every)],
        max_epochs=1,
        default_root_dir=workdir,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    if isinstance(trainer.strategy, Sharding):
        decoder_of(student).layers.to("cpu")  # they go to their device in shares
    finish = prepare(student, cfg, seed, train_head=any(loss.needs_logits for _, loss in terms))
    count = sum(p.numel() for p in trainable(student))
    datamodule.trainer = trainer
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    accumulate = accumulation(batch_size, global_batch_size, trainer.world_size)
    trainer.accumulate_grad_batches = accumulate
    steps = optimiser_steps(cfg.steps, cfg.epochs, len(loader), accumulate)
    source, targets, features = live, None, feature_cache(student)
    if distils and isinstance(teacher, TargetCache):
        wanted, used = _wanted(cfg, terms, matches, teacher), used_records(loader, steps * accumulate)
        source, targets = cached_teacher(teacher, wanted, student, loader, used, batch_size, features, trainer)
    # Parity counts padding too, which is no property of a record.
    elif live is not None and len(loader) < steps * accumulate and cfg.parity is None:
        live.remember()
    module = RecoveryModule(student, cfg, steps, source, matches, seed, features)
    workdir.mkdir(parents=True, exist_ok=True)
    resume = workdir / RESUME_POINT
    stream = BatchStream(loader, steps * accumulate)
    trainer.fit(module, stream, ckpt_path=resume if resume.exists() else None, weights_only=True)
    finish()
    return RecoveryStats(
        loss=describe(cfg),
        train=cfg.train,
        trainable_parameters=count,
        steps=trainer.global_step,
        samples=trainer.global_step * accumulate * batch_size * trainer.world_size,
        tokens=module.tokens,
        seconds=module.seconds,
        final_losses=module.final_losses(),
        targets=targets,
    )


def accumulation(batch_size: int, global_batch_size: int | None, processes: int) -> int:
    """Micro-batches per optimiser step and process.

    Args:
        batch_size: Records per process and micro-batch.
        global_batch_size: Records per optimiser step over all processes; None: one micro-batch each.
        processes: Number of processes.

    Returns:
        A number >= 1.

    Raises:
        UserError: The global batch is no multiple of what one round of all processes holds.
    """
    if global_batch_size is None:
        return 1
    groups, rest = divmod(global_batch_size, batch_size * processes)
    if rest or not groups:
        raise UserError(
            f"data.global_batch_size={global_batch_size}: must be a multiple of data.batch_size x processes "
            f"= {batch_size} x {processes}; change one of them"
        )
    return groups


def optimiser_steps(steps: int | None, epochs: float | None, batches_per_epoch: int, accumulate: int) -> int:
    """Number of optimiser steps of a run.

    Args:
        steps: Given directly, >= 1, or None.
        epochs: Passes over the data, > 0; None where ``steps`` are given.
        batches_per_epoch: Micro-batches per process and epoch.
        accumulate: Micro-batches per optimiser step.

    Returns:
        ``steps``, or what ``epochs`` amount to, rounded up.
    """
    return steps if epochs is None else math.ceil(epochs * batches_per_epoch / accumulate)  # pyright: ignore[reportReturnType]


def _matches(
    student: nn.Module, teacher: nn.Module | TargetCache | None, terms: Sequence[Term], original: Sequence[int] | None
) -> tuple[Match, ...]:
    """Pairs of compared layers, after a check that the teacher fits."""
    hidden = [loss for _, loss in terms if isinstance(loss, HiddenStateKDLoss)]
    if teacher is None:
        raise UserError("recover.weights: distillation needs a teacher; set recover.teacher.path to the original model")
    check_teacher(teacher, student, any(loss.needs_teacher_logits for _, loss in terms), bool(hidden))
    depth: int = teacher.config.get_text_config().num_hidden_layers  # pyright: ignore
    layers = len(decoder_of(student).layers)
    kept = list(range(layers)) if original is None else list(original)
    if len(kept) != layers or kept[-1] >= depth or (original is None and layers != depth):
        raise UserError(
            f"recover.teacher.path: the teacher's {depth} layers do not match the student's {layers}, "
            f"which are taken to be its layers {kept}; give the checkpoint that was pruned"
        )
    return match_layers(hidden[0].layers, kept, depth) if hidden else ()


def _wanted(cfg: Any, terms: Sequence[Term], matches: Sequence[Match], teacher: TargetCache) -> Wanted:
    """What is read of a cached teacher."""
    inner = tuple(sorted(match.teacher for match in matches if not match.final))
    final = any(match.final for match in matches)
    if not any(loss.needs_teacher_logits for _, loss in terms):
        return Wanted(inner, final)
    vocabulary = teacher.config.get_text_config().vocab_size
    return Wanted(inner, final, min(cfg.teacher.top_k, vocabulary), cfg.temperature)
