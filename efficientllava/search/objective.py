"""What a search minimises: the risk on the samples plus a bound on how far it may be from the truth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Risk:
    """Empirical risk of one policy.

    Args:
        loss: Cross-entropy of the answers, nats per supervised token.
        kl: ``KL(dense || pruned)`` per supervised token, nats.
        error: Share of answers with at least one wrong token, teacher-forced, [0, 1].
    """

    loss: float
    kl: float
    error: float
