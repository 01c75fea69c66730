"""Recovery losses: small callables that declare what they need; `objective` sums them.

Every loss returns a *sum over rows* (a row is a position that predicts a supervised token), so that the caller can
divide by the number of rows of the whole global batch, whatever its split over micro-batches and processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class TopK(NamedTuple):
    """The k most likely tokens of a teacher, and all others as one.

    Attributes:
        log_probs: Log-probabilities of the k tokens at the temperature of the loss, ``(rows, k)``, fp32.
        tokens: Their ids, ``(rows, k)``.
        tail: Log-probability of all other tokens together, ``(rows,)``; means nothing when there are none.
    """

    log_probs: Tensor
    tokens: Tensor
    tail: Tensor


def top_k(logits: Tensor, k: int, temperature: float) -> TopK:
    """Reduce a teacher's logits to what `LogitKDLoss` needs of them.

    Args:
        logits: ``(rows, vocab)``, fp32.
        k: Tokens to keep, >= 1; from the size of the vocabulary on, nothing is lost.
        temperature: T > 0 of the loss.
    """
    log_probs = nn.functional.log_softmax(logits / temperature, dim=-1)
    values, tokens = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(values, tokens, log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1))


@dataclass(frozen=True)
class SFTLoss:
    """Cross-entropy of the supervised tokens, in nats."""

    name: ClassVar[str] = "sft"
    needs_logits: ClassVar[bool] = True
    needs_teacher_logits: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __call__(self, logits: Tensor, targets: Tensor, teacher: object = None) -> Tensor:
        """Sum the cross-entropy over rows.

        Args:
            logits: Student logits, ``(rows, vocab)``, fp32.
            targets: Token ids, ``(rows,)``; rows with -100 do not count.
            teacher: Not used.

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

    Of a cached teacher only its k most likely tokens K are known. Then v runs over K and one more outcome "any other
    token", with p_rest = 1 - Σ_{v in K} p_v and q_rest = 1 - Σ_{v in K} q_v. Merging outcomes never raises a divergence
    (log sum inequality), so this is a lower bound of the full one, equal to it when K is the whole vocabulary.

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

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Tensor | TopK) -> Tensor:
        """Sum the divergence over rows.

        Args:
            logits: Student logits, ``(rows, vocab)``, fp32.
            targets: Not used.
            teacher: Teacher logits, ``(rows, vocab)``, fp32, or what `top_k` makes of them at this temperature.

        Returns:
            Scalar sum, in nats times T².
        """
        student = nn.functional.log_softmax(logits / self.temperature, dim=-1)
        if isinstance(teacher, TopK):
            student, reference = _outcomes(student, teacher)
        else:
            reference = nn.functional.log_softmax(teacher / self.temperature, dim=-1)
        p, q = (reference, student) if self.direction == "forward" else (student, reference)
        return nn.functional.kl_div(q, p, reduction="sum", log_target=True) * self.temperature**2

    def __str__(self) -> str:
        return f"{'KL' if self.direction == 'forward' else 'RKL'}(T={self.temperature:g})"


def _outcomes(log_probs: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the teacher's k tokens and of the rest, of student and teacher."""
    student = log_probs.gather(-1, teacher.tokens)
    if student.shape == log_probs.shape:
        return student, teacher.log_probs
    rest = log_probs.scatter(-1, teacher.tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([student, rest], -1), torch.cat([teacher.log_probs, teacher.tail.unsqueeze(-1)], -1)


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
