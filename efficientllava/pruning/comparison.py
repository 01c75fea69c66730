"""Choices between candidates, made on records that none of them was fitted to.

The loss of a candidate on the records that it was refitted on is biased: the more freedom a candidate has to fit them,
the better it looks (the generalization gap of arXiv 2503.15369). Candidates are therefore compared by their divergence
from the dense model on other records, record by record, since most of the spread between records is common to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import final_norm_of
from ..models.forward import supervised_positions
from ..runtime.errors import UserError
from ..runtime.processes import gather
from .statistics import ANSWERS, CalibrationStream


@dataclass(frozen=True)
class Verdict:
    """A candidate on the records that are compared on.

    Args:
        kl: Divergence of each record's answers from the dense model's, in nats per supervised token.
        tokens: Supervised tokens of each record.
        loss: Cross-entropy of all supervised tokens, in nats per token.
    """

    kl: Tensor
    tokens: Tensor
    loss: float

    @property
    def mean(self) -> float:
        """Divergence per supervised token of all records."""
        return float((self.kl * self.tokens).sum() / self.tokens.sum())

    def excess(self, other: Verdict) -> tuple[float, float]:
        """How much more this candidate diverges than another, and the standard error of that over records."""
        shares = self.tokens / self.tokens.sum()
        steps = shares * (self.kl - other.kl)
        mean, count = float(steps.sum()), len(steps)
        spread = (steps - shares * mean).square().sum() * count / max(count - 1, 1)
        return mean, float(spread.sqrt())


class Comparison:
    """Measures candidates against the dense model on some batches of a stream.

    Args:
        stream: The calibration stream.
        batches: Indices of the batches whose records are compared on.
        dense: The dense model's hidden states behind its last layer, by batch.

    Raises:
        UserError: The dense model's own numbers are not finite.
    """

    def __init__(self, stream: CalibrationStream, batches: Sequence[int], dense: Sequence[Tensor]) -> None:
        self._stream, self._batches = stream, list(batches)
        self._dense = {b: self._rows(b, dense[b])[0] for b in self._batches}
        self.dense_loss = self(dense).loss

    def _rows(self, batch: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict supervised tokens, these tokens, and the record that each belongs to."""
        mask, targets = supervised_positions(self._stream.batches[batch]["labels"].to(self._stream.device))
        return self._stream.load(hidden)[mask], targets, mask.nonzero()[:, 0]

    @torch.no_grad()
    def __call__(self, hidden: Sequence[Tensor]) -> Verdict:
        """Judge a candidate from its hidden states behind the last layer, by batch; the same on all processes."""
        norm, head = final_norm_of(self._stream.model), self._stream.model.lm_head
        mine: list[tuple[float, float, float]] = []
        with self._stream.on_device(norm, head):  # pyright: ignore[reportArgumentType]
            for batch in self._batches:
                rows, targets, owners = self._rows(batch, hidden[batch])
                values = torch.zeros(len(hidden[batch]), 3, dtype=torch.float64, device=rows.device)
                parts = (part.split(ANSWERS) for part in (rows, self._dense.get(batch, rows), targets, owners))
                for some, dense, wanted, owner in zip(*parts, strict=True):
                    found, known = (head(norm(part)).float().log_softmax(-1) for part in (some, dense))  # pyright: ignore
                    kl = (known.exp() * (known - found)).sum(-1)
                    loss = nn.functional.nll_loss(found, wanted, reduction="none")
                    values.index_add_(0, owner, torch.stack([kl, loss, torch.ones_like(kl)], 1).double())
                mine += [tuple(row) for row in values.tolist() if row[2]]
        everywhere = [row for part in gather(mine) for row in part]
        kl, loss, tokens = torch.tensor(everywhere, dtype=torch.float64).view(-1, 3).unbind(1)
        if not bool(torch.isfinite(kl).all() and torch.isfinite(loss).all()):
            raise UserError("calibration: a candidate's loss on the records that are compared on is not finite")
        return Verdict(kl / tokens, tokens, float(loss.sum() / tokens.sum()))


def simplest(verdicts: Sequence[Verdict], simplicity: Sequence[float]) -> int:
    """The simplest candidate within one standard error of the best one.

    Args:
        verdicts: One per candidate, on the same records.
        simplicity: Distance from the simplest candidate imaginable, one per candidate.

    Returns:
        Index of the chosen candidate.
    """
    best = min(range(len(verdicts)), key=lambda i: verdicts[i].mean)
    excesses = [verdict.excess(verdicts[best]) for verdict in verdicts]
    near = [i for i, (mean, error) in enumerate(excesses) if mean <= error]
    return min({*near, best}, key=lambda i: (simplicity[i], verdicts[i].mean))
