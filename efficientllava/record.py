"""`results.json`: what a run measured. Build, write, read, look up, and show as a table; and a training's curve.

Other tools rely on the keys that `build` writes; more may stand beside them.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .runtime import RESULTS, UserError, first_line, write_whole

STAGES = ("base", "pruned", "recovered")
PACKAGES = ("torch", "transformers", "lightning", "peft", "efficientllava")
LOWER = ("perplexity",)  # scores of which less is better
REQUIRED = ("ratio", "stages", "samples", "seconds", "seed", "versions", "commit", "config_digest", "overrides")

Results = dict[str, Any]
Metrics = Mapping[str, Mapping[str, float]]


def is_score(metric: str) -> bool:
    """Whether a metric is a score that can be retained: no count (``n``, ``n_text``, ``n/count``), loss or KL."""
    return not (metric.partition("/")[0] in ("n", "kl") or metric.startswith("n_") or metric.endswith("loss"))


def lower_is_better(metric: str) -> bool:
    """Whether less of a score is better, such as of ``perplexity/sqlite`` or ``prose/perplexity``."""
    return any(part in LOWER for part in metric.split("/"))


def metric_keys(metric: str) -> tuple[str, str, str]:
    """Where ``task/metric`` stands in a stage; tasks of lmms-eval have a slash in their names, metrics may have any.

    Args:
        metric: E.g. ``digits_vqa/accuracy/text_copying`` or ``lmms_eval/mme/mme_perception``.
    """
    *group, task, name = metric.split("/", 2 if metric.startswith("lmms_eval/") else 1)
    return "metrics", "/".join((*group, task)), name


def retained(metrics: Metrics, base: Metrics) -> dict[str, float]:
    """Fraction of the base model's score that a stage keeps.

    Args:
        metrics: ``{task: {metric: value}}`` of the stage.
        base: The same of the unpruned model.

    Returns:
        ``{"task/metric": stage / base}`` for every score of both, ``base / stage`` where less is better; a score of
        which the base has 0 has no fraction and is left out, as are counts and losses (see `is_score`).
    """
    return {
        f"{task}/{name}": base[task][name] / value if lower_is_better(name) else value / base[task][name]
        for task, values in metrics.items()
        for name, value in values.items()
        if is_score(name) and base.get(task, {}).get(name)
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a number."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def commit() -> str:
    """The git commit of the checkout this package runs from, with ``+dirty`` for uncommitted changes; else empty."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or a checkout that it refuses to read: the commit is unknown, the numbers stand


def build(
    stages: Mapping[str, Mapping[str, Any]],
    *,
    ratio: Mapping[str, float | None],
    samples: Mapping[str, int],
    seconds: Mapping[str, float],
    seed: int,
    config_digest: str,
    overrides: Sequence[str] = (),
    reused: Iterable[str] = (),
    **more: Any,
) -> Results:
    """Assemble the content of ``results.json``; the retained fractions, versions and commit are added here.

    Args:
        stages: For ``base``, ``pruned``, ``recovered`` (those that ran): the entries of `evaluation.efficiency.measure`
            and ``checkpoint_bytes``, and ``metrics`` as ``{task: {metric: value}}``.
        ratio: ``requested`` and ``achieved`` share of language-model parameters removed.
        samples: Number of samples, by what they were for.
        seconds: Wall time of ``prune``, ``recover``, ``evaluate``.
        seed: Seed of the run.
        config_digest: Digest of the resolved configuration.
        overrides: What the user typed.
        reused: Names of the results that come from the cache, e.g. ``prune`` or ``evaluate/base``.
        **more: Further top-level entries.

    Returns:
        The dictionary to hand to `write`.
    """
    base = stages.get("base", {}).get("metrics", {})
    entries: dict[str, Any] = {}
    for name, stage in stages.items():
        entries[name] = {"metrics": {}, **stage}
        if name != "base":
            entries[name]["retained"] = retained(entries[name]["metrics"], base)
    return {
        "ratio": dict(ratio),
        "stages": entries,
        "samples": dict(samples),
        "seconds": dict(seconds),
        "reused": sorted(reused),
        "seed": seed,
        "versions": versions(),
        "commit": commit(),
        "config_digest": config_digest,
        "overrides": list(overrides),
        **more,
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null, so that any reader can parse the file."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``results.json`` so that a reader finds the whole file or none.

    Args:
        results: Output of `build`.
        path: File to write; its folder exists.

    Raises:
        UserError: If the file cannot be written (full disk, no permission); nothing is left behind.
    """
    write_whole(Path(path), json.dumps(_finite(results), indent=2, allow_nan=False) + "\n")


def read(path: str | os.PathLike[str]) -> Results:
    """Read a ``results.json``.

    Args:
        path: The file, or the run folder that holds it.

    Returns:
        Its content.

    Raises:
        UserError: If there is no such file, it is no JSON, or it lacks keys that every run writes.
    """
    path = Path(path)
    path = path / RESULTS if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a run's folder or its results.json"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); give the results.json of a finished run") from error
    missing = [key for key in REQUIRED if key not in content] if isinstance(content, dict) else list(REQUIRED)
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; give the results.json of a finished run")
    return content


def find(node: Any, *keys: str) -> Any:
    """Follow keys into nested mappings; None where one is missing."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def last_stage(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run ends with: recovered if it recovered, else pruned, else base."""
    return next(results["stages"][stage] for stage in reversed(STAGES) if stage in results["stages"])


def scores(results: Iterable[Results], printed_only: bool = False) -> list[str]:
    """Every ``task/metric`` that a run has a score for, what papers print first.

    Args:
        results: Contents of several ``results.json``.
        printed_only: Leave out what papers do not print.
    """
    found: dict[str, bool] = {}
    for result in results:
        for stage in result["stages"].values():
            for task, metrics in stage["metrics"].items():
                printed = find(result, "benchmarks", task, "headline") or ["accuracy"]
                found |= {f"{task}/{name}": name in printed for name in metrics if is_score(name)}
    known = [metric for metric in found if found[metric] or not printed_only]
    return sorted(known, key=lambda metric: not found[metric])


def lookup(results: Mapping[str, Any], key: str) -> float:
    """A number by its dotted key, for sweepers.

    Args:
        results: Output of `build` or `read`.
        key: E.g. ``stages.recovered.metrics.digits_vqa.accuracy``.

    Returns:
        The number.

    Raises:
        UserError: If there is no number under this key; the message lists what stands where the path ends.
    """
    node: Any = results
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            choices = ", ".join(node) if isinstance(node, Mapping) else "nothing"
            place = ".".join(walked) or RESULTS
            raise UserError(f"optimized_metric: {key!r} is not in results.json; {place} has {choices}")
        node = node[part]
        walked.append(part)
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise UserError(f"optimized_metric: {key!r} is not a number in results.json but {type(node).__name__}")
    return node


CURVE = "training.csv"  # of a finished recovery, in the cache and in the folders of its runs
Rows = list[dict[str, float]]


def read_curve(folder: Path) -> Rows:
    """Logged numbers of a run's training by step, finished or at work; empty where nothing was logged."""
    return _rows([folder / CURVE]) if (folder / CURVE).exists() else read_logs(folder)


def read_logs(folder: Path) -> Rows:
    """What the training at work, or the last one, has logged in a run's folder, ascending in ``step``.

    One that went on after a kill has left a file per process, of which the later one replaces the steps that it has
    repeated.
    """
    return _rows(sorted((folder / "logs").glob("**/metrics.csv"), key=_age))


def _rows(files: Sequence[Path]) -> Rows:
    merged: dict[int, dict[str, float]] = {}
    for file in files:
        rows: dict[int, dict[str, float]] = {}
        try:
            whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")  # a kill may have cut the last line
            for row in csv.DictReader(whole.splitlines()):
                numbers = {name: float(value) for name, value in row.items() if value}
                rows.setdefault(int(numbers["step"]), {}).update(numbers)
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(f"{file}: is damaged ({first_line(error)}); train again, or remove it") from error
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
