"""``python -m efficientllava.bench``: measure everything on one CPU thread and print one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

from ..checkpoint import load
from ..console import quiet_libraries
from ..errors import UserError
from ..outcome import exit_code
from .evaluation import evaluation_row, generation_row
from .pruning import memory_rows
from .recovery import recovery_row, teacher_row, vision_row
from .rows import table
from .search import search_rows


def main(arguments: Sequence[str] = ()) -> None:
    """Measure everything and print one table.

    Args:
        arguments: None are known.

    Raises:
        UserError: There are some.
    """
    if arguments:
        raise UserError("usage: python -m efficientllava.bench (measures for some minutes on one CPU thread)")
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
