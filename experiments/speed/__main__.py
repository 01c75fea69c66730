"""Ratios of time and memory of this project against simpler ways of the same: ``python -m experiments.speed``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import torch

from efficientllava.checkpoint.folder import load
from efficientllava.runtime.console import quiet_libraries
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.exit_codes import exit_code
from experiments.speed.loops import evaluation_row, generation_row, recovery_row, teacher_row, vision_row
from experiments.speed.pruning import memory_rows
from experiments.speed.rows import table
from experiments.speed.search import search_rows


def main() -> None:
    """Measure everything on one CPU thread and print one table.

    Raises:
        UserError: There are arguments; none are known.
    """
    if sys.argv[1:]:
        raise UserError("usage: python -m experiments.speed (measures for some minutes on one CPU thread)")
    torch.set_num_threads(1)
    quiet_libraries()
    fresh = partial(load, "builtin:tiny_llava")
    with redirect_stdout(StringIO()):
        rows, checkpoint = memory_rows(), fresh()
        rows += [evaluation_row(checkpoint), generation_row(checkpoint), recovery_row(fresh), teacher_row(fresh)]
        rows += [vision_row(checkpoint), *search_rows()]
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
