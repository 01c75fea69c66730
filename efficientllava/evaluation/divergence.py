"""How far a model's next-token distributions have moved from the base model's, at every token of the reference answers.

Of the base its `TOP` likeliest tokens are kept; see `efficientllava.models.outcomes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models.outcomes import TopK, outcomes, top_k
from ..runtime import digest, whole_file

TOP = 32
FILE = "distributions.safetensors"


class Divergence:
    """Sees the tokens of a batch, some at a time: keeps what the base says, or tells how far a model is from it.

    Args:
        base: The base's distributions, the opened file of `collect`; None: this is the base.
        names: Of the batch's rows.
    """

    def __init__(self, base: Any, names: Sequence[str]) -> None:
        self._names, self._seen = list(names), 0
        self._found: list[tuple[Tensor, ...]] = []
        kept = ([base.get_tensor(f"{name}/{key}") for name in names] for key in TopK._fields)
        self._known = TopK(*map(torch.cat, kept)) if base else None

    def __call__(self, logits: Tensor) -> None:
        """See the next tokens, ``(some tokens, vocabulary)``."""
        start, self._seen = self._seen, self._seen + len(logits)
        if self._known is None:
            log_probs, tokens, tail = top_k(logits, TOP)
            self._found.append((log_probs.cpu(), tokens.int().cpu(), tail.cpu()))
            return
        log_probs, tokens, tail = (part[start : self._seen].to(logits.device) for part in self._known)
        q, p = (part.double() for part in outcomes(logits.log_softmax(-1), TopK(log_probs, tokens.long(), tail)))
        self._found.append(((p.exp() * (p - q)).sum(1).cpu(),))

    def done(self, counts: Sequence[int], work: Path | None) -> list[float] | None:
        """Sums over the tokens of each row, in nats; None of the base.

        Args:
            counts: Tokens of each row.
            work: Folder that keeps the distributions of the base, for `collect`; None: they are lost.
        """
        parts = [torch.cat(some).split(list(counts)) for some in zip(*self._found, strict=True)]
        if self._known is not None:
            return [float(row.sum()) for row in parts[0]]
        if work:
            rows = {
                f"{name}/{key}": row.contiguous()
                for key, part in zip(TopK._fields, parts, strict=True)
                for name, row in zip(self._names, part, strict=True)
            }
            with whole_file(work / f"{digest(self._names)}.{FILE}") as file:
                save_file(rows, file)


def collect(work: Path, folder: Path) -> None:
    """Bring the distributions that all processes have kept into one file."""
    rows = {name: rows for file in sorted(work.glob(f"*.{FILE}")) for name, rows in load_file(file).items()}
    if rows:
        save_file(rows, folder / FILE)
