"""Finished runs below a folder, each with its configuration; and arms: runs that differ in their seed only."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..errors import UserError
from ..results import STAGES, Results, find, last_stage, metric_keys, read

# Keys that say where and how a run was done, not what.
PLACES = ("seed", "name", "paths", "hydra", "logger", "callbacks", "sweep", "threads", "reuse", "optimized_metric")
BUDGET = ("prune.ratio", "prune.share", "prune.drop_layers")  # how much is removed
AXES = (*BUDGET, "data_frac")  # what curves run along


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
        return shlex.join(["python", "run.py", *self.results["overrides"]])

    def written_config(self) -> str:
        """Its configuration as YAML, as Hydra has written it."""
        file = self.folder / ".hydra" / "config.yaml"
        return file.read_text("utf-8") if file.exists() else ""

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

    def words(self, *without: str) -> tuple[str, ...]:
        """Its settings in words, names first, without some keys."""
        shown = [key for key in self.settings if key not in without]
        return tuple(_in_words(key, self.settings[key]) for key in sorted(shown, key=lambda key: not _is_name(key)))

    def label(self, *without: str) -> str:
        """Its settings in one line, without some keys; where nothing is left, what its first run was."""
        config = self.runs[0].config
        names = [str(config[key]) for key in ("prune.name", "recover.name") if key not in without and key in config]
        return ", ".join(self.words(*without) or names) or "default"

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


def unfinished(folder: Path) -> Iterator[tuple[str, str]]:
    """Command and last message of every run below a folder that has left no results.

    Args:
        folder: A sweep.
    """
    for file in sorted(folder.rglob(".hydra/overrides.yaml")):
        run = file.parents[1]
        if not (run / "results.json").exists():
            logs = [
                log.read_text("utf-8", errors="replace").split("\n")
                for log in (run / "job.log", run / "run.log")
                if log.exists()
            ]
            lines = [line.strip() for log in logs for line in reversed(log) if line.strip()]
            told = next(
                (line for line in lines if line.startswith("error:")), "nothing was told; it may still be at work"
            )
            yield shlex.join(["python", "run.py", *_yaml(file)]), f"{run.name}: {told}"


def sweep_command(folder: Path) -> str | None:
    """What was typed to make a sweep; None for other folders."""
    file = folder / "multirun.yaml"
    if not file.exists():
        return None
    overrides = _yaml(file)["hydra"]["overrides"]
    launcher = [item for item in overrides["hydra"] if not item.startswith("hydra.mode=")]
    return shlex.join(["python", "run.py", "-m", *launcher, *overrides["task"]])


def _yaml(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / ".hydra" / "config.yaml"
    return dict(_flat(_yaml(file), "")) if file.exists() else {}


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
    shown = {key: run.config.get(key) for key in keys if key in own or key in AXES or _is_name(key)}
    if run.config.get("recover.name") == "none":
        shown.pop("data_frac", None)
    return shown


def _tells(key: str, typed: Collection[str], runs: Sequence[Run]) -> bool:
    """Whether a key tells arms apart; the name of an option stands for all that the option sets."""
    if key.split(".")[0] in PLACES or not (_is_name(key) or key in typed):
        return False
    return len({str(run.config.get(key)) for run in runs}) > 1


def in_units(values: Sequence[float], base: int, suffix: str = "") -> tuple[float, str]:
    """Divisor and name of the unit, millions or billions, in which the largest of some counts is best read.

    Args:
        values: Counts.
        base: 1000, or 1024 for bytes.
        suffix: Of the unit, such as ``iB``.
    """
    return (base**3, f"G{suffix}") if max(values, default=0) >= base**3 else (base**2, f"M{suffix}")


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_name(key: str) -> bool:
    return key.endswith(".name")


def score_scale(arms: Sequence[Arm], metric: str) -> tuple[float, str]:
    """Factor and unit that a score is shown with: shares in percent, points (such as those of MME) as they are.

    Args:
        arms: Arms of the sweep.
        metric: ``task/metric``.
    """
    values = [value for arm in arms for stage in STAGES for value in arm.values("stages", stage, *metric_keys(metric))]
    return (1, "") if any(value > 1 for value in values) else (100, ", %")


def _in_words(key: str, value: Any) -> str:
    if _is_name(key):
        return str(value)
    short = key.removeprefix("prune.").removeprefix("recover.")
    return f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}"
