"""The one Lightning module that recovers a pruned model: any weighted sum of the losses in `losses`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ..models.anatomy import projector_of
from ..models.forward import FeatureCache
from ..runtime.errors import NotFiniteError, UserError
from ..settings.schema import RecoverConfig
from .losses import build_terms, divisors, positions, term_sums
from .student import parameter_groups, trainable, weights_of
from .teacher import FINAL, Match, Teacher, TeacherSource, hidden_states

RECENT = 20
# Under 16-mixed, whose scaler would start far too high, sums go backwards in these units, which fit fp16's range.
UNIT = 2.0**-12


def learning_rate_factor(step: int, total: int, warmup: float, scheduler: str) -> float:
    """Learning rate of an optimiser step as a share of the peak.

    Args:
        step: Number of steps done, from 0.
        total: Number of steps of the run.
        warmup: Share of the steps with linearly rising rate; the first of them is not 0.
        scheduler: What follows the warm-up: ``cosine`` or ``linear`` to 0, or ``constant``.

    Returns:
        A number in [0, 1].
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, total - rising))
    if scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if scheduler == "linear" else 1.0


class RecoveryModule(L.LightningModule):
    """Trains a student against data, a teacher, or both.

    The loss is a mean over *all* supervised tokens of a global batch: micro-batches back-propagate sums, and gradients
    are divided once per optimiser step by the number of tokens of all micro-batches and processes. With
    ``recover.parity=vlmcompression`` each micro-batch is reduced on its own, as arXiv 2604.24380 does: cross-entropy by
    its token mean, KL by the batch size, L2 by all elements, both over all positions, padding included.

    Args:
        student: The pruned model, after `student.prepare`.
        cfg: What is minimised, and how.
        total_steps: Optimiser steps of the whole run, for the schedule.
        features: Kept vision features of the student.
        teacher: The frozen teacher, or its cached answers; needed by the distillation losses.
        matches: Pairs of layers of the hidden-state loss, from `teacher.match_layers`.
        seed: Seeds what is random in a step (the dropout of adapters), so that a resumed run repeats it.
    """

    def __init__(
        self,
        student: nn.Module,
        cfg: RecoverConfig,
        total_steps: int,
        features: FeatureCache,
        teacher: TeacherSource | None = None,
        matches: Sequence[Match] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.student: Any = student
        self.cfg, self.terms = cfg, build_terms(cfg)
        self.teacher, self.matches = teacher, matches
        self.total_steps = total_steps
        self.tokens = 0
        self.recent: deque[Tensor] = deque(maxlen=RECENT)
        # Taken now: while weights are sharded, names and shapes are others.
        self._shapes = {name: p.shape for name, p in self.named_parameters() if p.requires_grad}
        self._groups = parameter_groups(student, cfg.lr, cfg.projector_lr, cfg.weight_decay)
        self._features, self._seed = features, seed
        self._group = torch.zeros(1 + len(self.terms))  # of an optimiser step: tokens, and the sum of every loss

    # Loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a micro-batch: a sum over its tokens, or in parity mode a mean.

        Returns:
            Scalar loss, connected to every trainable parameter.
        """
        if self.cfg.lora.dropout and self.cfg.train == "lora":
            torch.manual_seed(((self._seed * 1_000_003 + batch_idx) * 8191 + self.global_rank) % 2**63)
        sums = self._sums(batch)
        weights = torch.tensor([term.weight for term in self.terms], device=sums.device)
        values = sums / divisors(self.terms, batch["labels"], self.cfg.parity).clamp_min(1)
        total = (weights * (sums if self.cfg.parity is None else values)).sum()
        tokens = (batch["labels"][:, 1:] != -100).sum()
        self.tokens += int(tokens)
        self._group = self._group.to(total.device) + torch.cat([tokens.float()[None], sums.detach()])
        self.recent.append(values.detach())
        self.log("recover/loss", (weights * values.detach()).sum(), prog_bar=True, batch_size=1)
        named = {f"recover/{term.name}": value for term, value in zip(self.terms, values.detach(), strict=True)}
        self.log_dict({**named, "recover/tokens": float(self.tokens)}, batch_size=1)
        return total

    def _sums(self, batch: Mapping[str, Any]) -> Tensor:
        """Unweighted loss sums of a micro-batch, in the order of `terms`, connected to all trainable parameters."""
        mask, targets = positions(batch["labels"], self.cfg.parity)
        features, logits, pairs = self._features(batch), None, []
        ours = hidden_states(self.student, batch, features, [match.student for match in self.matches], mask)
        if self.teacher is not None:
            theirs, logits = self.teacher(batch, features, [match.teacher for match in self.matches], mask)
            pairs = [(ours[match.student], theirs[match.teacher]) for match in self.matches]
        rows = ours[FINAL]
        sums = term_sums(self.terms, rows, targets, self.student.lm_head, logits, pairs, self.cfg.chunk)
        # Text-only batches and losses on inner layers leave parameters out; DDP needs a gradient for each.
        sums = sums + 0.0 * rows.float().sum()
        if features is None:
            sums = sums + 0.0 * torch.stack([p.float().sum() for p in weights_of(projector_of(self.student))]).sum()
        return sums

    # Optimisation

    def configure_optimizers(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """AdamW or SGD over the parameter groups, with a schedule by optimiser step."""
        if self.cfg.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self._groups, momentum=0.9)
        else:
            # The fused step hides its unscaled gradients from clipping under fp16.
            optimizer = torch.optim.AdamW(self._groups, fused=self.trainer.precision != "16-mixed")
        total, warmup, name = self.total_steps, self.cfg.warmup, self.cfg.scheduler
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total, warmup, name)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Go backwards, in small units where a sum would leave fp16's range."""
        super().backward(loss * self._unit, *args, **kwargs)

    @property
    def _unit(self) -> float:
        return UNIT if self.cfg.parity is None and self.trainer.precision == "16-mixed" else 1.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into the mean over all tokens of the global batch."""
        tokens, *sums = self.trainer.strategy.reduce(self._group, reduce_op="sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self._group = torch.zeros_like(self._group)
        for term, value in zip(self.terms, sums, strict=True):
            self._require(value, f"the loss {term.name}, {term.loss},")
        self.log("recover/lr", optimizer.param_groups[-1]["lr"], batch_size=1)
        if self.cfg.parity is not None:
            return
        # Lightning divides by the micro-batches of a group and DDP by the processes; undo both.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(tokens, 1.0) / self._unit
        for parameter in trainable(self.student):
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def _require(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NotFiniteError(
                f"recover: {what} is {value} at step {self.global_step}; lower recover.lr={self.cfg.lr:g}, or set "
                "trainer.precision to bf16-mixed or 32-true"
            )

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip by the norm over all parameters, ``recover.max_grad_norm``."""
        sharded = getattr(self.trainer.model, "clip_grad_norm_", None)  # FSDP knows the norm over all shards
        if sharded is not None:
            norm = sharded(self.cfg.max_grad_norm)
        else:
            norm = nn.utils.clip_grad_norm_(list(trainable(self.student)), self.cfg.max_grad_norm)
        if self.trainer.precision != "16-mixed":  # whose scaler leaves such a step out
            self._require(float(norm), "the gradient's norm")

    # State

    def on_fit_start(self) -> None:
        """Bring a live teacher to the student's device."""
        if isinstance(self.teacher, Teacher):
            self.teacher.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable parameters only; the rest comes from the pruned checkpoint."""
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: v for name, v in weights.items() if name in self._shapes}
        checkpoint["recovery"] = {"tokens": self.tokens, "recent": [values.tolist() for values in self.recent]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a resume point belongs to this run and restore its counters."""
        loaded = checkpoint.get("state_dict")  # FSDP has taken it out by now
        if loaded is not None and {name: value.shape for name, value in loaded.items()} != self._shapes:
            raise UserError(
                "recover: the resume point last.ckpt was written for another model; delete it to start anew"
            )
        self.tokens = checkpoint["recovery"]["tokens"]
        self.recent.extend(torch.tensor(values) for values in checkpoint["recovery"]["recent"])

    def final_losses(self) -> dict[str, float]:
        """Mean of each loss over the last micro-batches of this process, by name."""
        if not self.recent:
            return {}
        mean = torch.stack([values.cpu() for values in self.recent]).mean(0).tolist()
        return {term.name: value for term, value in zip(self.terms, mean, strict=True)}
