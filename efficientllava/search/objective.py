"""What a search minimises: the risk on the samples plus a bound on how far it may be from the truth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RISKS = ("loss", "kl", "error")


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


@dataclass(frozen=True)
class Objective:
    """``J = z(R) + lambda z(gap)``, both standardised on the first population (structural risk minimization).

    Args:
        risk: Which field of `Risk` is ``R``.
        weight: ``lambda``, >= 0.
        risk_mean: Mean of ``R`` in the first population.
        risk_std: Its standard deviation, > 0.
        gap_mean: Mean of the gap in the first population.
        gap_std: Its standard deviation, > 0.
    """

    risk: str
    weight: float
    risk_mean: float
    risk_std: float
    gap_mean: float
    gap_std: float

    @classmethod
    def fitted(cls, risk: str, weight: float, risks: Sequence[Risk], gaps: Sequence[float]) -> Objective:
        """Standardise on a population; a constant term gets a deviation of 1, overflows do not count."""
        return cls(risk, weight, *_moments([getattr(r, risk) for r in risks]), *_moments(gaps))

    def value(self, risk: Risk, gap: float) -> float:
        """``J`` of a policy; infinite where the risk overflowed."""
        empirical = (getattr(risk, self.risk) - self.risk_mean) / self.risk_std
        total = empirical + self.weight * (gap - self.gap_mean) / self.gap_std
        return total if math.isfinite(total) else math.inf


def _moments(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return statistics.fmean(finite), statistics.pstdev(finite) or 1.0
