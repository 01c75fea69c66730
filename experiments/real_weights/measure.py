"""Answer loss of checkpoints on records that nothing was fitted to.

python -m experiments.real_weights.measure <records.json> <folder> [<folder> ...]

Records of a folder named "kept" were never looked at while methods were made: each call on them is counted in a file
beside them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator
from efficientllava.data.table import read_conversations
from efficientllava.evaluation.answers import mean_loss
from efficientllava.models.forward import FeatureCache

ROWS = 8
KEPT, CALLS = "kept", "calls.txt"


def nats(folder: str, records: Path) -> float:
    """Mean cross-entropy of the answers' tokens, in nats.

    Args:
        folder: A checkpoint.
        records: LLaVA-style JSON.
    """
    if records.parent.name == KEPT:
        with (records.parent / CALLS).open("a", encoding="utf-8") as calls:
            calls.write(f"{records.name} {folder}\n")
    checkpoint, found = load(folder, "float32", "cpu"), read_conversations(str(records), None, 0.0)
    collate, features = Collator(checkpoint.processor, None), FeatureCache(checkpoint.model)
    return mean_loss(checkpoint.model, list(found), collate, ROWS, features)


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
