"""Finished runs below a folder, each with its configuration; and arms: runs that differ in their seed only."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..errors import UserError
from ..results import Results, find, last_stage, read

# Keys that say where and how a run was done, not what.
PLACES = ("seed", "name", "paths", "hydra", "logger", "callbacks", "sweep", "threads", "reuse", "optimized_metric")
AXES = ("prune.ratio", "prune.share", "prune.drop_layers", "data_frac")  # what curves run along


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: Its folder.
        results: Content of ``results.json``.
        config: Its configuration by dotted key.
    """

    folder: Path
    results: Results
    config: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The line that makes this run."""
        return " ".join(["python run.py", *self.results["overrides"]])

    def plan(self) -> Mapping[str, Any] | None:
        """What was kept; None where nothing was pruned."""
        file = self.folder / "plan.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    Args:
        settings: What tells the arm from the others of a sweep, by dotted key.
        runs: At least one.
    """

    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    def label(self, *without: str) -> str:
        """Its settings in words, without some keys."""
        shown = {key: value for key, value in self.settings.items() if key not in without}
        return ", ".join(_in_words(key, value) for key, value in shown.items()) or "default"

    def values(self, *path: str, last: bool = False) -> list[float]:
        """A number of each run that has it.

        Args:
            *path: Keys into ``results.json``, or into its last stage.
            last: Which of the two.
        """
        found = (find(last_stage(run.results) if last else run.results, *path) for run in self.runs)
        return [value for value in found if isinstance(value, int | float)]

    def mean(self, *path: str, last: bool = False) -> tuple[float, float] | None:
        """Mean and sample standard deviation (0 for one run) of a number; None where no run has it."""
        values = self.values(*path, last=last)
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def load_runs(folder: Path) -> list[Run]:
    """All finished runs below a folder, in the order of their numbers.

    Args:
        folder: A sweep, or anything that holds runs.

    Raises:
        UserError: There is none.
    """
    files = sorted(folder.rglob("results.json"), key=lambda file: [(len(part), part) for part in file.parts])
    if not files:
        raise UserError(f"{folder}: no results.json below this folder; give a folder of finished runs")
    return [Run(file.parent, read(file), _config(file.parent)) for file in files]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / ".hydra" / "config.yaml"
    if not file.exists():
        return {}
    return dict(_flat(OmegaConf.to_container(OmegaConf.load(file)), ""))


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Group runs that differ in their seed only, in the order of first appearance.

    Args:
        runs: Runs of one sweep.
    """
    typed = {override.partition("=")[0].lstrip("+") for run in runs for override in run.results["overrides"]}
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if _tells(key, typed, runs)]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(str(run.config.get(key)) for key in keys), []).append(run)
    return [Arm(_settings(group[0], keys), tuple(group)) for group in groups.values()]


def _settings(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """What a run was told of the keys; what others were told and it was not has no meaning for it."""
    own = {override.partition("=")[0].lstrip("+") for override in run.results["overrides"]}
    return {key: run.config.get(key) for key in keys if key in own or key in AXES or key.endswith(".name")}


def _tells(key: str, typed: Collection[str], runs: Sequence[Run]) -> bool:
    """Whether a key tells arms apart; the name of an option stands for all that the option sets."""
    if key.split(".")[0] in PLACES or not (key.endswith(".name") or key in typed):
        return False
    return len({str(run.config.get(key)) for run in runs}) > 1


def _in_words(key: str, value: Any) -> str:
    if key.endswith(".name"):
        return str(value)
    short = key.removeprefix("prune.").removeprefix("recover.")
    return f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}"
