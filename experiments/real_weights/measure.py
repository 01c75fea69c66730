"""Answer loss of checkpoints on records that nothing was fitted to.

python -m experiments.real_weights.measure <records.json> <folder> [<folder> ...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from efficientllava.checkpoint import load
from efficientllava.data.collator import Collator
from efficientllava.data.table import read_conversations
from efficientllava.models.forward import answer_loss, supervised_positions

ROWS = 8


@torch.no_grad()
def nats(folder: str, records: Path) -> float:
    """Mean cross-entropy of the answers' tokens, in nats.

    Args:
        folder: A checkpoint.
        records: LLaVA-style JSON.
    """
    checkpoint = load(folder, "float32", "cpu")
    collate, found = Collator(checkpoint.processor, None), read_conversations(str(records), None, 0.0)
    loss = tokens = 0.0
    for start in range(0, len(found), ROWS):
        batch = collate([found[i] for i in range(start, min(start + ROWS, len(found)))])
        loss += float(answer_loss(checkpoint.model, batch, reduction="sum"))
        tokens += len(supervised_positions(batch["labels"])[1])
    return loss / tokens


def main(arguments: Sequence[str]) -> None:
    """Print one line per folder."""
    records, *folders = arguments
    for folder in folders:
        value = nats(folder, Path(records))
        print(
            f"{Path(records).stem} {folder}: {value:.4f} nats per token, perplexity {math.exp(value):.2f}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
