"""The curve of a training, from the CSV files that its processes have left."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

CURVE = "training.csv"  # of a finished recovery, in the cache and in the folders of its runs
Rows = list[dict[str, float]]


def read_curve(folder: Path) -> Rows:
    """Logged numbers by step; empty where nothing was logged.

    Args:
        folder: The run's folder.

    Returns:
        Ascending in ``step``. A training that went on after a kill has left a file per process, of which the later one
        replaces the steps that it has repeated.
    """
    whole = folder / CURVE
    merged: dict[int, dict[str, float]] = {}
    for file in [whole] if whole.exists() else sorted((folder / "logs").glob("**/metrics.csv"), key=_age):
        rows: dict[int, dict[str, float]] = {}
        with file.open(encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                numbers = {name: float(value) for name, value in row.items() if value}
                rows.setdefault(int(numbers["step"]), {}).update(numbers)
        merged = {step: row for step, row in merged.items() if step < min(rows, default=step + 1)} | rows
    return [merged[step] for step in sorted(merged)]


def _age(file: Path) -> int:
    return int(file.parent.name.removeprefix("part") or 0) if file.parent.name.startswith("part") else 0


def write_curve(rows: Sequence[dict[str, float]], file: Path) -> None:
    """Write logged numbers as one CSV file.

    Args:
        rows: Output of `read_curve`.
        file: The file; nothing is written where there are no rows.
    """
    if rows:
        with file.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
