"""Rows of a measurement in a CSV file that a killed one goes on with: what the file has is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file as they are written; none where there is no file."""
    return pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records") if file.exists() else []


def add(file: Path, rows: Sequence[Any], names: Sequence[str]) -> None:
    """Put rows, by name or in the order of the names, behind those of a file; what a row lacks is empty."""
    pd.DataFrame(rows, columns=[*names], dtype=object).to_csv(file, mode="a", header=not file.exists(), index=False)
