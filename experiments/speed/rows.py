"""A line of the table, and how its two numbers are taken.

Absolute times depend on the machine; each line compares two ways of doing the same on the same machine, minutes apart
at most. Peak memory comes from torch's own allocator events (every allocation and release of tensor memory, temporaries
inside operators included), as the profiler records them: it depends neither on the machine nor on what the process
held before. Images and other memory outside torch's allocator are not counted.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: What is compared.
        measured: Numerator, with its unit in ``unit``.
        reference: Denominator.
        unit: ``MiB`` or ``s``.
        wish: Whether the ratio should be high or low, and its bound where the project states one.
    """

    what: str
    measured: float
    reference: float
    unit: str
    wish: str

    @property
    def ratio(self) -> float:
        """Measured over reference."""
        return self.measured / self.reference


def peak_memory(prepare: Callable[[], Any], function: Callable[[Any], Any]) -> int:
    """Highest amount of tensor memory that a call holds above what was held before it, in bytes.

    Args:
        prepare: Makes the argument. It runs under the profiler too, which knows the size of a released block only if it
            has seen it allocated.
        function: What to measure; on a CPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write lines between those of the table
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        argument = prepare()
        began = time.time_ns()
        function(argument)
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate((size for at, size in events if at >= began), initial=0))


def seconds(measured: Callable[[], Any], reference: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Shortest wall times of two functions, called in turn so that drift of the machine hits both; after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + repeats):
        for function, known in zip((measured, reference), times, strict=True):
            started = time.perf_counter()
            function()
            known.append(time.perf_counter() - started)
    return min(times[0][1:]), min(times[1][1:])


def quiet_trainer(**options: Any) -> Any:
    """A CPU Trainer that prints and writes nothing."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        **{"accelerator": "cpu", "use_distributed_sampler": False, **dict.fromkeys(silent, False), **options}
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'':<{width}}  {'ratio':>6}  {'measured':>12}  {'reference':>12}  wish"]
    for row in rows:
        values = "  ".join(f"{value:8.2f} {row.unit:<3}" for value in (row.measured, row.reference))
        lines.append(f"{row.what:<{width}}  {row.ratio:6.2f}  {values}  {row.wish}")
    return "\n".join(line.rstrip() for line in lines)
