"""Recovery losses: small callables that declare what they need; `objective` sums them.

Every loss returns a *sum over rows* (a row is a position that predicts a supervised token), so that the caller can
divide by the number of rows of the whole global batch, whatever its split over micro-batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SFTLoss:
    """Cross-entropy of the supervised tokens, in nats."""

    name: ClassVar[str] = "sft"
    needs_logits: ClassVar[bool] = True
    needs_teacher_logits: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __call__(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Sum the cross-entropy over rows.

        Args:
            logits: Student logits, ``(rows, vocab)``, fp32.
            targets: Token ids, ``(rows,)``; rows with -100 do not count.
            teacher_logits: Not used.

        Returns:
            Scalar sum.
        """
        return nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    def __str__(self) -> str:
        return "CE"


@dataclass(frozen=True)
class LogitKDLoss:
    """Kullback-Leibler divergence between the teacher's and the student's next-token distributions.

    T² · Σ_v p_v (log p_v - log q_v) per row at temperature T, p the teacher and q the student (``forward``), or the
    two exchanged (``reverse``). Source: arXiv 1503.02531, section 2 (the factor T²); arXiv 2604.24380 (both ways).

    Args:
        direction: ``forward`` or ``reverse``.
        temperature: T > 0.
    """

    direction: str = "forward"
    temperature: float = 2.0
    name: ClassVar[str] = "logit"
    needs_logits: ClassVar[bool] = True
    needs_teacher_logits: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __call__(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> Tensor:
        """Sum the divergence over rows.

        Args:
            logits: Student logits, ``(rows, vocab)``, fp32.
            targets: Not used.
            teacher_logits: Teacher logits, ``(rows, vocab)``, fp32.

        Returns:
            Scalar sum, in nats times T².
        """
        student = nn.functional.log_softmax(logits / self.temperature, dim=-1)
        teacher = nn.functional.log_softmax(teacher_logits / self.temperature, dim=-1)
        p, q = (teacher, student) if self.direction == "forward" else (student, teacher)
        return nn.functional.kl_div(q, p, reduction="sum", log_target=True) * self.temperature**2

    def __str__(self) -> str:
        return f"{'KL' if self.direction == 'forward' else 'RKL'}(T={self.temperature:g})"


@dataclass(frozen=True)
class HiddenStateKDLoss:
    """Distance between hidden states of student and teacher.

    ``l2``: mean over channels of (s - t)², divided by the mean over channels of t² (the teacher's power at that
    position; `normalise` False leaves it out, as arXiv 2604.24380 does). ``cosine``: 1 - cos(s, t). Which states are
    compared is described in `efficientllava.recovery.alignment`.

    Args:
        metric: ``l2`` or ``cosine``.
        layers: ``last``, ``all`` or original layer indices (negative ones count from the end).
        normalise: Divide the squared difference by the teacher's power.
    """

    metric: str = "l2"
    layers: str | tuple[int, ...] = "last"
    normalise: bool = True
    name: ClassVar[str] = "hidden"
    needs_logits: ClassVar[bool] = False
    needs_teacher_logits: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Sum the distance over rows.

        Args:
            student: ``(rows, hidden)``.
            teacher: ``(rows, hidden)``.

        Returns:
            Scalar sum, without unit when normalised.
        """
        student, teacher = student.float(), teacher.float()
        if self.metric == "cosine":
            return (1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).sum()
        distance = (student - teacher).square().mean(-1)
        if self.normalise:
            distance = distance / teacher.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return distance.sum()

    def __str__(self) -> str:
        return f"{'L2' if self.metric == 'l2' else 'cosine'}(hidden)"
