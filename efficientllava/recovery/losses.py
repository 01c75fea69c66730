"""What a recovery minimises: a weighted sum of losses, each of which says what it looks at.

A loss returns a *sum over rows* (a row is a position that predicts a supervised token), so that the caller can divide
by the number of rows of the whole global batch, whatever its split over micro-batches and processes.

A new loss is a class here, a line in `LOSSES`, and a weight in `WeightsConfig` that says what the loss looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.forward import supervised_positions
from ..models.outcomes import TopK, outcomes
from ..settings.schema import RecoverConfig

Head = Callable[[Tensor], Tensor]
# A range of rows to the teacher's logits of them, or to what is known of these.
TeacherLogits = Callable[[slice], "Tensor | TopK"]


class Loss:
    """What losses are: called, they return a scalar, the sum over rows; as text, they name themselves.

    A loss on logits is given those of the student, ``(rows, vocab)`` in fp32, the targets, ``(rows,)``, and those of
    the teacher (`TopK` where the teacher is cached, None where no loss needs one). A loss on hidden states is given
    those of student and teacher, ``(rows, hidden)``, once per pair of matched layers, and its sums are averaged.
    """

    def __call__(self, *given: Any) -> Tensor:
        """Sum over rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class SFTLoss(Loss):
    """Cross-entropy of the supervised tokens, in nats."""

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Any = None) -> Tensor:
        """Sum over rows; those with the target -100 do not count."""
        return nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")

    def __str__(self) -> str:
        return "CE"


@dataclass(frozen=True)
class LogitKDLoss(Loss):
    """Kullback-Leibler divergence between the teacher's and the student's next-token distributions.

    T² · Σ_v p_v (log p_v - log q_v) per row at temperature T, p the teacher and q the student (``forward``), or the
    two exchanged (``reverse``). Source: arXiv 1503.02531, section 2 (the factor T²); arXiv 2604.24380 (both ways).

    Of a cached teacher only its k most likely tokens are known; see `efficientllava.models.outcomes`.

    Args:
        direction: ``forward`` or ``reverse``.
        temperature: T > 0.
    """

    direction: str = "forward"
    temperature: float = 2.0

    def __call__(self, logits: Tensor, targets: Tensor, teacher: Tensor | TopK) -> Tensor:
        """Sum over rows, in nats times T²; the teacher may be what `top_k` makes of it at this temperature."""
        student = nn.functional.log_softmax(logits / self.temperature, dim=-1)
        if isinstance(teacher, TopK):
            student, reference = outcomes(student, teacher)
        else:
            reference = nn.functional.log_softmax(teacher / self.temperature, dim=-1)
        p, q = (reference, student) if self.direction == "forward" else (student, reference)
        return nn.functional.kl_div(q, p, reduction="sum", log_target=True) * self.temperature**2

    def __str__(self) -> str:
        return f"{'KL' if self.direction == 'forward' else 'RKL'}(T={self.temperature:g})"


@dataclass(frozen=True)
class HiddenStateKDLoss(Loss):
    """Distance between hidden states of student and teacher.

    ``l2``: mean over channels of (s - t)², divided by the mean over channels of t² (the teacher's power at that
    position; `normalise` False leaves it out, as arXiv 2604.24380 does). ``cosine``: 1 - cos(s, t). Which states are
    compared is described in `efficientllava.recovery.teacher`.

    Args:
        metric: ``l2`` or ``cosine``.
        normalise: Divide the squared difference by the teacher's power.
    """

    metric: str = "l2"
    normalise: bool = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Sum over rows, without unit when normalised."""
        student, teacher = student.float(), teacher.float()
        if self.metric == "cosine":
            return (1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).sum()
        distance = (student - teacher).square().mean(-1)
        if self.normalise:
            distance = distance / teacher.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
        return distance.sum()

    def __str__(self) -> str:
        return f"{'L2' if self.metric == 'l2' else 'cosine'}(hidden)"


# By the name of the weight.
LOSSES: dict[str, Callable[[RecoverConfig], Loss]] = {
    "sft": lambda cfg: SFTLoss(),
    "logit": lambda cfg: LogitKDLoss(cfg.kl, cfg.temperature),
    "hidden": lambda cfg: HiddenStateKDLoss(cfg.hidden_metric, normalise=cfg.parity is None),
}


class Term(NamedTuple):
    """A loss with its name, its weight in the sum, and what it looks at; see `efficientllava.settings.setting`."""

    name: str
    weight: float
    loss: Loss
    looks: tuple[str, ...]


def build_terms(cfg: RecoverConfig) -> tuple[Term, ...]:
    """The losses with a weight above 0, in the order of their weights."""
    weights = {each: getattr(cfg.weights, each.name) for each in fields(cfg.weights)}
    return tuple(
        Term(each.name, weight, LOSSES[each.name](cfg), each.metadata["looks"])
        for each, weight in weights.items()
        if weight > 0
    )


def describe(cfg: RecoverConfig) -> str:
    """Say in one line what a recovery minimises, such as ``0.5 x CE + 0.5 x L2(hidden)``; a parity is in brackets."""
    text = " + ".join(f"{weight:g} x {loss}" for _, weight, loss, _ in build_terms(cfg))
    return f"{text} [as {cfg.parity}]" if cfg.parity else text


def positions(labels: Tensor, parity: str | None) -> tuple[Tensor, Tensor]:
    """Choose the rows that count and their targets.

    Args:
        labels: ``(batch, seq)``, -100 where unsupervised.
        parity: None: positions that predict a supervised token; ``vlmcompression``: every position, padding included.

    Returns:
        ``mask`` ``(batch, seq)`` and ``targets`` ``(rows,)``, -100 for rows without one.
    """
    mask, targets = supervised_positions(labels)
    if parity is None:
        return mask, targets
    return torch.ones_like(mask), nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()


def divisors(terms: Sequence[Term], labels: Tensor, parity: str | None) -> Tensor:
    """What the sums of a micro-batch are divided by to be means.

    Args:
        terms: The weighted losses.
        labels: ``(batch, seq)``, -100 where unsupervised.
        parity: None: the number of supervised tokens for every loss. ``vlmcompression`` (arXiv 2604.24380, released
            code): supervised tokens for cross-entropy, the batch size for KL, all positions for hidden states.

    Returns:
        ``(terms,)``, fp32.
    """
    supervised = int(supervised_positions(labels)[0].sum())
    others = {} if parity is None else {"logit": len(labels), "hidden": labels.numel()}
    sizes = [others.get(term.name, supervised) for term in terms]
    return torch.tensor(sizes, dtype=torch.float32, device=labels.device)


def term_sums(
    terms: Sequence[Term],
    rows: Tensor,
    targets: Tensor,
    head: Head,
    teacher: TeacherLogits | None = None,
    pairs: Sequence[tuple[Tensor, Tensor]] = (),
    chunk: int = 1024,
) -> Tensor:
    """Sum every loss over rows.

    Args:
        terms: The weighted losses.
        rows: Student hidden states after the final norm, ``(rows, hidden)``.
        targets: Token ids, ``(rows,)``.
        head: The student's head.
        teacher: Gives the teacher's logits of a range of the rows.
        pairs: Hidden states of student and teacher, one pair per matched layer, ``(rows, hidden)``; their losses are
            averaged.
        chunk: Rows per call of the heads, >= 1.

    Returns:
        Unweighted sums, ``(terms,)``.
    """
    on_logits = [term for term in terms if "logits" in term.looks]
    taught = teacher if any("teacher" in term.looks for term in on_logits) else None
    losses = [term.loss for term in on_logits]
    sums = iter(logit_sums(losses, rows, targets, head, taught, chunk) if losses else ())

    def total(term: Term) -> Tensor:
        if "hidden" in term.looks:
            return torch.stack([term.loss(ours, theirs) for ours, theirs in pairs]).mean()
        return next(sums)

    return torch.stack([total(term) for term in terms])


def logit_sums(
    losses: Sequence[Loss],
    rows: Tensor,
    targets: Tensor,
    head: Head,
    teacher: TeacherLogits | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Sum the losses on logits over rows, with at most ``chunk`` rows of logits alive at a time.

    With more than one chunk, logits are computed again in the backward pass.

    Returns:
        One sum per loss, ``(losses,)``, fp32; connected to ``rows`` and the head even when there are no rows.
    """

    def sums(part: slice) -> Tensor:
        logits = head(rows[part]).float()
        with torch.no_grad():
            reference = teacher(part) if teacher else None
        return torch.stack([loss(logits, targets[part], reference) for loss in losses])

    if len(rows) <= chunk:
        return sums(slice(None))
    parts: list[Any] = [checkpoint(sums, slice(i, i + chunk), use_reentrant=False) for i in range(0, len(rows), chunk)]
    return torch.stack(parts).sum(0)
