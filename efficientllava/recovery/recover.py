"""The recovery stage: a pruned model, a datamodule and a configuration in; the recovered model and its numbers out.

A training stream that can stop anywhere and go on at the same batch, and the files it goes on from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from torch import nn
from torch.utils.data import DataLoader

from ..models.anatomy import decoder_of
from ..models.forward import FeatureCache
from ..runtime.errors import UserError
from ..runtime.files import put
from ..runtime.processes import gather
from ..settings.checks import require_valid
from ..settings.schema import RecoverConfig
from .caching import TargetStats, Wanted, cached_teacher
from .losses import describe
from .module import RecoveryModule
from .student import Sharding, prepare, trainable
from .teacher import Match, TargetCache, Teacher, check_teacher, match_layers

RESUME_POINT = "last.ckpt"


def _endless(sampler: Any, start: int) -> Iterator[list[int]]:
    """Index batches of all epochs from a position on."""
    epoch, skip = divmod(start, len(sampler))
    for number in itertools.count(epoch):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        yield from itertools.islice(iter(sampler), skip, None)
        skip = 0


def used_records(loader: DataLoader, total: int) -> list[int]:
    """Indices of the records that a `BatchStream` of ``total`` batches serves on any process, ascending."""
    batches = itertools.islice(_endless(loader.batch_sampler, 0), min(total, len(loader)))
    mine = {index for batch in batches for index in batch}
    return sorted(set().union(*gather(mine)))


class BatchStream:
    """A given number of batches, over as many epochs as that takes, resumable by the global batch index.

    Lightning sees one epoch of ``total`` batches and saves the position with its own loop state. Skipped batches are
    never collated.

    Args:
        loader: A map-style loader whose batch sampler yields the order of one epoch; where it has ``set_epoch``, that
            is called before each epoch.
        total: Number of batches.
    """

    def __init__(self, loader: DataLoader, total: int) -> None:
        self._loader = loader
        self._total = total
        self._position = 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        batches = DataLoader(
            loader.dataset,
            batch_sampler=_endless(loader.batch_sampler, self._position),  # pyright: ignore[reportArgumentType]
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
        for batch in itertools.islice(batches, self._total - self._position):
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches of ``state``."""
        self._position = state["position"]


class ResumePoint(L.Callback):
    """Saves what a killed run goes on from, under a temporary name that is renamed when whole.

    Args:
        folder: Folder of the file ``last.ckpt``.
        every: Optimiser steps between saves, >= 1.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._path = folder / RESUME_POINT
        self._every = every
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The step that a run goes on from is saved; in the middle of the next one its gradients would be missing."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save after every ``every``-th optimiser step, once."""
        step = trainer.global_step
        if step == self._saved or step % self._every:
            return
        self._saved = step
        part = self._path.with_name(f".{RESUME_POINT}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            put(part, self._path)  # sharded strategies write folders
        trainer.strategy.barrier("resume point")


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
    cfg: RecoverConfig,
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
        cfg: What is minimised, and how.
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
    require_valid(cfg, "recover.")
    matches = _matches(student, teacher, cfg, original_layers) if cfg.taught else ()
    # The two towers are compared before adapters change the student.
    live = Teacher(teacher, student, cfg.teacher.offload) if cfg.taught and isinstance(teacher, nn.Module) else None
    timer = Timer()
    trainer = trainer_factory(
        callbacks=[ResumePoint(workdir, cfg.save_every), timer],
        max_epochs=1,
        default_root_dir=workdir,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    if isinstance(trainer.strategy, Sharding):
        decoder_of(student).layers.to("cpu")  # they go to their device in shares
    finish = prepare(student, cfg, seed)
    count = sum(p.numel() for p in trainable(student))
    datamodule.trainer = trainer
    loader = datamodule.train_dataloader()
    accumulate = accumulation(batch_size, global_batch_size, trainer.world_size)
    trainer.accumulate_grad_batches = accumulate
    steps = optimiser_steps(cfg.steps, cfg.epochs, len(loader), accumulate)
    source, targets, features = live, None, FeatureCache(student)
    if cfg.taught and isinstance(teacher, TargetCache):
        logits, used = cfg.looks("logits", "teacher"), used_records(loader, steps * accumulate)
        tokens = min(cfg.teacher.top_k, teacher.config.get_text_config().vocab_size) if logits else 0
        wanted = Wanted(tuple(match.teacher for match in matches), tokens, cfg.temperature)
        source, targets = cached_teacher(teacher, wanted, student, loader, used, batch_size, features, trainer)
    # Parity counts padding too, which is no property of a record.
    elif live is not None and len(loader) < steps * accumulate and cfg.parity is None:
        live.remember()
    module = RecoveryModule(student, cfg, steps, features, source, matches, seed)
    workdir.mkdir(parents=True, exist_ok=True)
    resume = workdir / RESUME_POINT
    stream = BatchStream(loader, steps * accumulate)
    trainer.fit(module, stream, ckpt_path=resume if resume.exists() else None, weights_only=True)
    finish()
    student.zero_grad()  # of trained parameters, in the type that they trained in
    datamodule.trainer = None  # it would keep what the optimiser holds
    return RecoveryStats(
        loss=describe(cfg),
        train=cfg.train,
        trainable_parameters=count,
        steps=trainer.global_step,
        samples=trainer.global_step * accumulate * batch_size * trainer.world_size,
        tokens=module.tokens,
        seconds=timer.time_elapsed("train"),
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
    student: nn.Module,
    teacher: nn.Module | TargetCache | None,
    cfg: RecoverConfig,
    original: Sequence[int] | None,
) -> tuple[Match, ...]:
    """Pairs of compared layers, after a check that the teacher fits."""
    if teacher is None:
        raise UserError("recover.weights: distillation needs a teacher; set recover.teacher.path to the original model")
    config: Any = teacher.config
    check_teacher(config, student, cfg)
    depth, layers = config.get_text_config().num_hidden_layers, len(decoder_of(student).layers)
    kept = list(range(layers)) if original is None else list(original)
    if len(kept) != layers or kept[-1] >= depth or (original is None and layers != depth):
        raise UserError(
            f"recover.teacher.path: the teacher's {depth} layers do not match the student's {layers}, "
            f"which are taken to be its layers {kept}; give the checkpoint that was pruned"
        )
    return match_layers(cfg.hidden_layers, kept, depth) if cfg.looks("hidden") else ()
