"""How far a model's next-token distributions have moved from the base model's, at every token of the reference answers.

Of the base its `TOP` likeliest tokens are kept, with their probabilities p; of the other model it is asked how
likely these are, q. With P and Q, their sums, the divergence is that of `TOP` + 1 events, the last of which is "any
other token":

    KL = sum_i p_i log(p_i / q_i) + (1 - P) log((1 - P) / (1 - Q))

How the rest moves among themselves is neglected, so that it is never above the divergence over the whole vocabulary
(log-sum inequality). It is 0 for the base itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime import digest, whole_file

TOP = 32
FILE = "distributions.safetensors"
TINY = 1e-12  # of the rest of a distribution; it loses its digits where the likeliest have nearly all


class Divergence:
    """Keeps what the base says, or tells how far another model is from it.

    Args:
        base: Folder with the base's distributions, see `collect`; None: this is the base.
        work: Folder that keeps those of every batch; None: they are lost.
    """

    def __init__(self, base: Path | None, work: Path | None) -> None:
        self._base, self._work = base and safe_open(base / FILE, "pt"), work

    def of(self, names: Sequence[str], counts: Sequence[int]) -> Batch:
        """A batch, whose rows have names and numbers of tokens."""
        if self._base is None:
            return Batch(names, counts, None)
        keys = ("ids", "log_probs")
        known = [torch.cat([self._base.get_tensor(f"{name}/{key}") for name in names]) for key in keys]
        return Batch(names, counts, known)

    def done(self, batch: Batch) -> list[float] | None:
        """Sums over the tokens of each row, in nats; None of the base, whose distributions are kept."""
        if self._base is not None:
            return [float(row.sum()) for row in torch.cat([kl for (kl,) in batch.found]).split(batch.counts)]
        if self._work:
            ids, log_probs = (torch.cat(parts).split(batch.counts) for parts in zip(*batch.found, strict=True))
            rows = {f"{name}/ids": part.contiguous() for name, part in zip(batch.names, ids, strict=True)}
            rows |= {f"{name}/log_probs": part.contiguous() for name, part in zip(batch.names, log_probs, strict=True)}
            with whole_file(self._work / f"{digest(batch.names)}.{FILE}") as file:
                save_file(rows, file)


class Batch:
    """The tokens of a batch, of which some are seen at a time.

    Args:
        names: Of its rows.
        counts: Tokens of each.
        known: Of the base, for all tokens: the likeliest ids and their log-probabilities, ``(tokens, TOP)``.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int], known: Sequence[Tensor] | None) -> None:
        self.names, self.counts, self.known = list(names), list(counts), known
        self.found: list[tuple[Tensor, ...]] = []
        self._seen = 0

    def __call__(self, logits: Tensor) -> None:
        """See the next tokens, ``(some tokens, vocabulary)``."""
        start, self._seen = self._seen, self._seen + len(logits)
        log_probs = logits.log_softmax(-1)
        if self.known is None:
            top = log_probs.topk(min(TOP, logits.shape[1]))
            self.found.append((top.indices.int().cpu(), top.values.cpu()))
            return
        ids, base = (part[start : self._seen].to(logits.device) for part in self.known)
        self.found.append((divergence(base, log_probs.gather(1, ids.long())).cpu(),))


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """Of tokens, from log-probabilities of the base's likeliest, ``(tokens, TOP)``."""
    p, q = base.double(), other.double()
    rest, others = ((1 - part.exp().sum(1)).clamp(min=TINY) for part in (p, q))
    return (p.exp() * (p - q)).sum(1) + rest * (rest / others).log()


def collect(work: Path, folder: Path) -> None:
    """Bring the distributions that all processes have kept into one file."""
    rows = {name: rows for file in sorted(work.glob(f"*.{FILE}")) for name, rows in load_file(file).items()}
    if rows:
        save_file(rows, folder / FILE)
