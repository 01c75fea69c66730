"""Next-token distributions of which only the likeliest tokens are kept.

A divergence then runs over these tokens K and one more outcome, "any other token", with p_rest = 1 - Σ_{v in K} p_v and
q_rest = 1 - Σ_{v in K} q_v. Merging outcomes never raises a divergence (log sum inequality): it is a lower bound of the
full one, equal to it when K is the whole vocabulary, and 0 for equal distributions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The k most likely tokens of a model, and all others as one.

    Attributes:
        log_probs: Log-probabilities of the k tokens, ``(rows, k)``.
        tokens: Their ids, ``(rows, k)``.
        tail: Log-probability of all other tokens together, ``(rows,)``; means nothing when there are none.
    """

    log_probs: Tensor
    tokens: Tensor
    tail: Tensor


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """What is kept of logits, ``(rows, vocab)`` in fp32.

    Args:
        logits: The logits.
        k: Tokens to keep, >= 1; from the size of the vocabulary on, nothing is lost.
        temperature: T > 0, by which they are divided.
    """
    log_probs = (logits / temperature).log_softmax(-1)
    values, tokens = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    return TopK(values, tokens, log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1))


def outcomes(log_probs: Tensor, known: TopK) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k tokens and of the rest: of a model whose are all there, and of the known one."""
    found = log_probs.gather(-1, known.tokens)
    if found.shape == log_probs.shape:
        return found, known.log_probs
    rest = log_probs.scatter(-1, known.tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([found, rest], -1), torch.cat([known.log_probs, known.tail.unsqueeze(-1)], -1)
