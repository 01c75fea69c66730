"""Speed of exported files in the installed runtime, dense and pruned in turn, in tokens per second of CPU."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .runtime import Runtime, serve

PROMPT, ANSWER = 128, 32  # tokens, as far as the context has room for them
LOADS = 3
WORDS = 24  # tokens that any vocabulary has, from the fourth on


def speeds(files: Mapping[str, Path], context: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure files side by side, on one thread.

    Args:
        files: By name, such as ``dense`` and ``exported``.
        context: Tokens that all of them have room for, >= 8.
        repeats: Rounds over all files; medians are reported.

    Returns:
        By name: ``bytes`` on disk, ``load_seconds`` (file in memory already), and tokens per second of CPU of a prompt
        (``prefill``) and of the tokens behind it (``decode``; ``decode_ms``: milliseconds of CPU for one).
    """
    prompt = min(PROMPT, context // 2)
    answer = min(ANSWER, context - prompt - 1)
    ids = [3 + position % WORDS for position in range(prompt)]
    loads = {name: statistics.median(_loads(file, context)) for name, file in files.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serve(file, context=context)) for name, file in files.items()}
        for number in range(1 + repeats):
            for name in [*servers][:: 1 if number % 2 else -1]:
                measured = _round(servers[name], ids, answer)
                if number:  # the first one warms up
                    times[name].append(measured)
    return {
        name: {
            "bytes": file.stat().st_size,
            "load_seconds": loads[name],
            "prefill": prompt / statistics.median(first for first, _ in times[name]),
            "decode": answer / statistics.median(later for _, later in times[name]),
            "decode_ms": 1e3 / answer * statistics.median(later for _, later in times[name]),
        }
        for name, file in files.items()
    }


def _loads(file: Path, context: int) -> list[float]:
    found = []
    for _ in range(LOADS):
        with serve(file, context=context) as runtime:
            found.append(runtime.seconds)
    return found


def _round(runtime: Runtime, ids: list[int], answer: int) -> tuple[float, float]:
    """Seconds of CPU up to the first token, and for those behind it."""
    first, whole = (_seconds(runtime, ids, count) for count in (1, 1 + answer))
    return first, max(whole - first, 1e-6)


def _seconds(runtime: Runtime, ids: list[int], count: int) -> float:
    started = runtime.cpu()
    told: Any = runtime.complete(ids, tokens=count, ignore_eos=True)
    if told["tokens_predicted"] != count:
        raise RuntimeError(f"the runtime wrote {told['tokens_predicted']} tokens, asked for were {count}")
    return runtime.cpu() - started
