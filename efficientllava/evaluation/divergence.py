"""How far a model's next-token distributions have moved from the base model's, at every token of the reference answers.

Of the base its `TOP` likeliest tokens are kept; see `efficientllava.models.outcomes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.outcomes import TopK, outcomes, top_k
from ..runtime import digest, whole_file

TOP = 32
FILE = "distributions.safetensors"


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
        keys = TopK._fields
        known = [torch.cat([self._base.get_tensor(f"{name}/{key}") for name in names]) for key in keys]
        return Batch(names, counts, TopK(*known))

    def done(self, batch: Batch) -> list[float] | None:
        """Sums over the tokens of each row, in nats; None of the base, whose distributions are kept."""
        if self._base is not None:
            return [float(row.sum()) for row in torch.cat([kl for (kl,) in batch.found]).split(batch.counts)]
        if self._work:
            kept = {
                key: torch.cat(part) for key, part in zip(TopK._fields, zip(*batch.found, strict=True), strict=True)
            }
            rows = {
                f"{name}/{key}": part.contiguous()
                for key, every in kept.items()
                for name, part in zip(batch.names, every.split(batch.counts), strict=True)
            }
            with whole_file(self._work / f"{digest(batch.names)}.{FILE}") as file:
                save_file(rows, file)


class Batch:
    """The tokens of a batch, of which some are seen at a time.

    Args:
        names: Of its rows.
        counts: Tokens of each.
        known: Of the base, for all tokens.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int], known: TopK | None) -> None:
        self.names, self.counts, self.known = list(names), list(counts), known
        self.found: list[tuple[Tensor, ...]] = []
        self._seen = 0

    def __call__(self, logits: Tensor) -> None:
        """See the next tokens, ``(some tokens, vocabulary)``."""
        start, self._seen = self._seen, self._seen + len(logits)
        if self.known is None:
            log_probs, tokens, tail = top_k(logits, TOP)
            self.found.append((log_probs.cpu(), tokens.int().cpu(), tail.cpu()))
            return
        log_probs, tokens, tail = (part[start : self._seen].to(logits.device) for part in self.known)
        q, p = (part.double() for part in outcomes(logits.log_softmax(-1), TopK(log_probs, tokens.long(), tail)))
        self.found.append(((p.exp() * (p - q)).sum(1).cpu(),))


def collect(work: Path, folder: Path) -> None:
    """Bring the distributions that all processes have kept into one file."""
    rows = {name: rows for file in sorted(work.glob(f"*.{FILE}")) for name, rows in load_file(file).items()}
    if rows:
        save_file(rows, folder / FILE)
