"""Generalization gap of a policy, from norms that a level table holds: no forward pass.

EfficientLLaVA adds such a term to the loss on the samples (structural risk minimization, arXiv 2503.15369, abstract);
its formula is not public. The terms here are known bounds written for a pruned model, with ``N`` samples and the linear
layers ``j`` of the decoder: dense weights ``W_j``, ``n_j`` of them, mask ``M_j``, pruned and compensated weights
``What_j``. Constants of a bound that are equal for all policies stay, so that runs with different ``N`` compare.

A new term is one function with the signature of `Gap` and an entry in `GAPS`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runtime.errors import UserError
from .space import Policy

CONFIDENCE = 0.05  # delta of the PAC-Bayes bound: it holds with probability 1 - delta
TINY = 1e-30


@dataclass(frozen=True)
class LinearNorms:
    """Norms of one linear of a gene at one level; fused projections are one linear.

    Args:
        weights: Number of weights ``n``.
        dense: ``||W||^2`` of the dense weights.
        masked: ``||W * M||^2`` of the dense weights that the level keeps.
        change: ``||What - W||^2``, what the level changes, compensation included; removed weights count as zeros.
    """

    weights: int
    dense: float
    masked: float
    change: float

    @property
    def kept(self) -> float:
        """``||W * M|| / ||W||``, [0, 1]."""
        return math.sqrt(self.masked / max(self.dense, TINY))

    @property
    def distance(self) -> float:
        """``||What - W||^2 / ||W||^2``, >= 0."""
        return self.change / max(self.dense, TINY)


Gap = Callable[[Sequence[LinearNorms], Sequence[LinearNorms], int], float]
Norms = Callable[[int, int], Sequence[LinearNorms]]  # of a gene at a level


def no_gap(_norms: Sequence[LinearNorms], _uniform: Sequence[LinearNorms], _samples: int) -> float:
    """The ablation: empirical risk alone."""
    return 0.0


def frobenius(norms: Sequence[LinearNorms], _uniform: Sequence[LinearNorms], samples: int) -> float:
    """``N^(-1/2) sum_j a_j ||W_j * M_j|| / ||W_j||`` with ``a_j = n_j / sum_i n_i``.

    A sum in place of the product of layer norms in the Rademacher bound of arXiv 1712.06541; norms of the masked dense
    weights, since compensation hides how much went.

    Args:
        norms: Every linear layer under the policy.
        _uniform: Not used.
        samples: ``N``.
    """
    total = sum(linear.weights for linear in norms)
    return sum(linear.weights * linear.kept for linear in norms) / total / math.sqrt(samples)


def frobenius_product(norms: Sequence[LinearNorms], _uniform: Sequence[LinearNorms], samples: int) -> float:
    """``N^(-1/2) exp(1/J sum_j ln(||W_j * M_j|| / ||W_j||))``, the geometric mean over ``J`` layers.

    The product of layer norms in the Rademacher bound of arXiv 1712.06541, its ``J``-th root taken.

    Args:
        norms: Every linear layer under the policy.
        _uniform: Not used.
        samples: ``N``.
    """
    return math.exp(statistics.fmean(math.log(max(linear.kept, TINY)) for linear in norms)) / math.sqrt(samples)


def distance(norms: Sequence[LinearNorms], uniform: Sequence[LinearNorms], samples: int) -> float:
    """``sqrt((D^2 / (2 s^2) + ln(2 sqrt(N) / delta)) / (2 N))`` with ``D^2 = sum_j ||What_j - W_j||^2 / ||W_j||^2``.

    PAC-Bayes bound around the dense weights, which know nothing of the samples (McAllester's bound in Maurer's form,
    cs/0411099, with Gaussians of variance ``s^2``). ``s^2`` is ``J / 2`` times the median of ``||What_j - W_j||^2 /
    ||W_j||^2`` under the uniform policy, over the layers that it changes.

    Args:
        norms: Every linear layer under the policy.
        uniform: Every linear layer under the uniform policy of the same budget.
        samples: ``N``.
    """
    changed = [linear.distance for linear in uniform if linear.change > 0]
    variance = len(norms) / 2 * statistics.median(changed) if changed else 1.0
    divergence = sum(linear.distance for linear in norms) / (2 * variance)
    return math.sqrt((divergence + math.log(2 * math.sqrt(samples) / CONFIDENCE)) / (2 * samples))


GAPS: dict[str, Gap] = {"fro": frobenius, "fro_logprod": frobenius_product, "dist": distance, "none": no_gap}


def gap_of(kind: str, norms: Norms, uniform: Policy, samples: int) -> Callable[[Policy], float]:
    """Bind a term to a level table.

    Args:
        kind: A key of `GAPS`.
        norms: ``table.norms``.
        uniform: The uniform policy of the budget.
        samples: Number of samples that the empirical risk comes from, >= 1.

    Returns:
        The gap of a policy.

    Raises:
        UserError: The term is unknown.
    """
    if kind not in GAPS:
        raise UserError(f"search.gap={kind}: unknown; choose one of {', '.join(GAPS)}")

    def linears(policy: Policy) -> list[LinearNorms]:
        return [linear for gene, level in enumerate(policy) for linear in norms(gene, level)]

    reference = linears(uniform)
    return lambda policy: GAPS[kind](linears(policy), reference, samples)
