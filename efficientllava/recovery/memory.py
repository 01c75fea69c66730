"""Teacher states that were computed once and are read again in later epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor


class RowMemory:
    """Hidden states of supervised positions by record, kept on the host.

    A frozen teacher without dropout says the same about a record in every epoch; with a small subset of the data and
    many steps, this saves nearly all of its passes.

    Args:
        limit_bytes: States beyond this size are not kept.
    """

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._kept: dict[bytes, Tensor] = {}

    def get(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the states of a batch.

        Args:
            batch: A collated batch; ``ids`` names the record of each row.

        Returns:
            ``(states, positions, hidden)``, rows one after the other; None unless all rows are known.
        """
        keys = _keys(batch)
        if not all(key in self._kept for key in keys):
            return None
        return torch.cat([self._kept[key] for key in keys], dim=1)

    def put(self, batch: Mapping[str, Any], counts: Sequence[int], states: Tensor) -> None:
        """Keep the states of a batch.

        Args:
            batch: A collated batch.
            counts: Positions of each row.
            states: ``(states, positions, hidden)``, rows one after the other.
        """
        for key, part in zip(_keys(batch), states.split(list(counts), dim=1), strict=True):
            size = part.numel() * part.element_size()
            if key not in self._kept and self._bytes + size <= self._limit:
                self._kept[key] = part.to("cpu", copy=True)
                self._bytes += size


def _keys(batch: Mapping[str, Any]) -> list[bytes]:
    # Record ids of public data sets repeat, so the tokens are part of the key.
    tokens, lengths = batch["input_ids"].cpu().numpy(), batch["attention_mask"].sum(1).tolist()
    rows = zip(batch["ids"], tokens, lengths, strict=True)
    return [blake2b(row[:length].tobytes(), key=blake2b(name.encode()).digest()).digest() for name, row, length in rows]
