"""What a recovery minimises: the weighted sum of losses, the positions it counts, and what the sums are divided by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import require_valid
from ..models.forward import supervised_positions
from .losses import HiddenStateKDLoss, LogitKDLoss, SFTLoss, TopK

Head = Callable[[Tensor], Tensor]
# A range of rows to the teacher's logits of them, or to what is known of these.
TeacherLogits = Callable[[slice], Tensor | TopK]


class Term(NamedTuple):
    """A loss and its weight in the sum."""

    weight: float
    loss: SFTLoss | LogitKDLoss | HiddenStateKDLoss


def build_terms(cfg: Any) -> tuple[Term, ...]:
    """Build the weighted losses of a configuration; weights of 0 are left out.

    Args:
        cfg: A `efficientllava.schema.RecoverConfig`.

    Returns:
        The terms in the order sft, logit, hidden.

    Raises:
        UserError: What `efficientllava.config` does not allow.
    """
    require_valid(cfg, "recover.")
    layers = cfg.hidden_layers if isinstance(cfg.hidden_layers, str) else tuple(int(i) for i in cfg.hidden_layers)
    terms = (
        Term(cfg.weights.sft, SFTLoss()),
        Term(cfg.weights.logit, LogitKDLoss(cfg.kl, cfg.temperature)),
        Term(cfg.weights.hidden, HiddenStateKDLoss(cfg.hidden_metric, layers, normalise=cfg.parity is None)),
    )
    return tuple(term for term in terms if term.weight > 0)


def describe(cfg: Any) -> str:
    """Say in one line what a recovery minimises, such as ``0.5 x CE + 0.5 x L2(hidden)``.

    Args:
        cfg: A `efficientllava.schema.RecoverConfig`.

    Returns:
        The sum of weighted losses; a parity mode is named in brackets.

    Raises:
        UserError: As `build_terms`.
    """
    text = " + ".join(f"{weight:g} x {loss}" for weight, loss in build_terms(cfg))
    return f"{text} [as {cfg.parity}]" if cfg.parity else text


def logit_sums(
    losses: Sequence[SFTLoss | LogitKDLoss],
    rows: Tensor,
    targets: Tensor,
    head: Head,
    teacher: TeacherLogits | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Sum the losses on logits over rows, with at most ``chunk`` rows of logits alive at a time.

    With more than one chunk, logits are computed again in the backward pass.

    Args:
        losses: The losses that need logits.
        rows: Student hidden states after the final norm, ``(rows, hidden)``.
        targets: Token ids, ``(rows,)``.
        head: The student's head.
        teacher: Gives the teacher's logits of a range of the rows.
        chunk: Rows per call of the heads, >= 1.

    Returns:
        One sum per loss, ``(losses,)``, fp32; connected to ``rows`` and the head even when there are no rows.
    """

    def sums(part: slice) -> Tensor:
        logits = head(rows[part]).float()
        with torch.no_grad():
            reference = None if teacher is None else teacher(part)
        return torch.stack([loss(logits, targets[part], reference) for loss in losses])  # pyright: ignore[reportArgumentType]

    if len(rows) <= chunk:
        return sums(slice(None))
    parts = [checkpoint(sums, slice(i, i + chunk), use_reentrant=False) for i in range(0, len(rows), chunk)]
    return torch.stack(parts).sum(0)  # pyright: ignore[reportArgumentType, reportCallIssue]


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
    sizes = {"sft": supervised, "logit": supervised, "hidden": supervised}
    if parity is not None:
        sizes |= {"logit": len(labels), "hidden": labels.numel()}
    return torch.tensor([sizes[loss.name] for _, loss in terms], dtype=torch.float32, device=labels.device)


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
        terms: The weighted losses, in the order of `build_terms`.
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
    on_logits = [loss for _, loss in terms if not isinstance(loss, HiddenStateKDLoss)]
    taught = teacher if any(loss.needs_teacher_logits for loss in on_logits) else None
    parts = [logit_sums(on_logits, rows, targets, head, taught, chunk)] if on_logits else []
    for _, loss in terms:
        if isinstance(loss, HiddenStateKDLoss):
            parts.append(torch.stack([loss(ours, theirs) for ours, theirs in pairs]).mean(0, keepdim=True))
    return torch.cat(parts)
