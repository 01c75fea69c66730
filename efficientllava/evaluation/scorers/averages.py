"""One number for nine benchmarks, as in the study of structural pruning (arXiv 2604.24380, tables 2 and 5)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...runtime.errors import UserError
from . import mean

# Column: task, metric, factor to a scale of 0 to 100. The study does not say which POPE metric it prints; its 86.99 for
# LLaVA-1.5-7B, whose published F1 is 85.9, fits lmms-eval's accuracy.
COLUMNS = {
    "MMMU": ("mmmu", "accuracy", 100),
    "SQA": ("scienceqa_img", "accuracy", 100),
    "MathV": ("mathvista", "accuracy", 100),
    "AI2D": ("ai2d", "accuracy", 100),
    "MME-C": ("mme", "cognition", 1 / 8),
    "MME-P": ("mme", "perception", 1 / 20),
    "POPE": ("pope", "accuracy", 100),
    "DocVQA": ("docvqa", "anls", 100),
    "GQA": ("gqa", "accuracy", 100),
}


def average(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """The study's AVG, 0 to 100: the unweighted mean of its nine columns, with MME-C / 8 and MME-P / 20.

    Args:
        metrics: ``{task: {metric: value}}`` as in ``results.json``: shares in [0, 1], MME in points.

    Raises:
        UserError: If a column is missing.
    """
    missing = [name for name, (task, metric, _) in COLUMNS.items() if metric not in metrics.get(task, {})]
    if missing:
        raise UserError(f"AVG: there is no result for {', '.join(missing)}; it is the mean of {', '.join(COLUMNS)}")
    return mean(factor * metrics[task][metric] for task, metric, factor in COLUMNS.values())


def average_percent(metrics: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]) -> float:
    """The study's AVG-%: AVG as a percentage of the unpruned model's (a ratio of means, no mean of ratios).

    Raises:
        UserError: If a column is missing, or the unpruned model's AVG is 0.
    """
    whole = average(base)
    if whole == 0:
        raise UserError("AVG-%: the unpruned model has an AVG of 0, of which nothing is a percentage")
    return 100 * average(metrics) / whole


def study(
    metrics: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """AVG and AVG-% as ``{"vlmcompression": {"avg", "avg_percent", "n"}}``; nothing unless all its tasks were run.

    Raises:
        UserError: As for `average_percent`.
    """
    if not {task for task, _, _ in COLUMNS.values()} <= metrics.keys():
        return {}
    percent = average_percent(metrics, base)
    return {"vlmcompression": {"avg": average(metrics), "avg_percent": percent, "n": len(COLUMNS)}}


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all runs of a judge have, and the deviation of their ``score`` or ``accuracy``.

    The deviation, of the population of runs, is ``score_std`` or ``accuracy_std``.
    """
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    main = "score" if "score" in shared else "accuracy"
    spread = statistics.pstdev(run[main] for run in runs)
    return {name: mean(run[name] for run in runs) for name in shared} | {f"{main}_std": spread}
