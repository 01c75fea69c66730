"""``python -m experiments.speed``: measure everything on one CPU thread and print one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

from efficientllava.checkpoint.folder import load
from efficientllava.runtime.console import quiet_libraries
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.exit_codes import exit_code
from experiments.speed.evaluation import evaluation_row, generation_row
from experiments.speed.pruning import memory_rows
from experiments.speed.recovery import recovery_row, teacher_row, vision_row
from experiments.speed.rows import table
from experiments.speed.search import search_rows


def main(arguments: Sequence[str] = ()) -> None:
    """Measure everything and print one table.

    Args:
        arguments: None are known.

    Raises:
        UserError: There are some.
    """
    if arguments:
        raise UserError("usage: python -m experiments.speed (measures for some minutes on one CPU thread)")
    torch.set_num_threads(1)
    quiet_libraries()

    def fresh() -> Any:
        return load("builtin:tiny_llava")

    with redirect_stdout(StringIO()):
        rows = memory_rows()
        checkpoint = fresh()
        rows += [
            evaluation_row(checkpoint),
            generation_row(checkpoint),
            recovery_row(fresh),
            teacher_row(fresh),
            vision_row(checkpoint),
            *search_rows(),
        ]
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
