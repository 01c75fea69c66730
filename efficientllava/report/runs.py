"""Finished runs below a folder, each with its configuration; and arms: runs that differ in their seed only."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..record import (
    STAGES,
    Results,
    find,
    last_stage,
    metric_keys,
    read,
)
from ..runtime import state
from ..runtime.errors import UserError
from ..settings.compose import SWEEP_NAME, key_of

# Keys that say where and how a run was done, not what.
PLACES = ("seed", "name", "paths", "hydra", "logger", "callbacks", "sweep", "threads", "reuse", "keep")
PLACES += ("optimized_metric", "dry_run")
BUDGET = ("prune.ratio", "prune.share", "prune.drop_layers")  # how much is removed
AXES = (*BUDGET, "data_frac")  # what curves run along
NAMES = ("model.name", "prune.name", "recover.name")


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
        """A finite number of each run that has it.

        Args:
            *path: Keys into ``results.json``, or into its last stage.
            last: Which of the two.
        """
        found = (find(last_stage(run.results) if last else run.results, *path) for run in self.runs)
        return [value for value in found if isinstance(value, int | float) and math.isfinite(value)]

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
        failed = [run.told() for run in unfinished(folder)]
        why = f" ({counted(len(failed), 'run')} without results, the first: {failed[0]})" if failed else ""
        raise UserError(f"{folder}: no results.json below this folder{why}; give a folder of finished runs")
    return [Run(file.parent, read(file), _config(file.parent)) for file in files]


@dataclass(frozen=True)
class Unfinished:
    """A run that has left no results.

    Args:
        folder: Its folder.
        overrides: What was typed for it.
        state: ``failed``, ``running`` or ``waiting``.
        reason: Why, in its last words or in those of whoever has ended it.
    """

    folder: Path
    overrides: tuple[str, ...]
    state: str
    reason: str

    @property
    def command(self) -> str:
        """The line that makes this run."""
        return shlex.join(["python", "run.py", *self.overrides])

    def told(self) -> str:
        """Its number, how it stands and where its words are, in one line."""
        log = next((log for log in (self.folder / "job.log", self.folder / "run.log") if log.exists()), None)
        return f"{self.folder.name}: {self.state}: {self.reason or 'nothing was told'}{f' ({log})' if log else ''}"


def unfinished(folder: Path) -> list[Unfinished]:
    """Every run below a folder that has begun or was submitted and has left no results.

    Args:
        folder: A sweep.
    """
    known = {entry.folder: entry for entry in state.standings(folder) if (entry.folder / state.JOB).exists()}
    begun = {file.parents[1] for file in folder.rglob(".hydra/overrides.yaml")}
    found = []
    for run in sorted({*known, *begun}, key=lambda run: [(len(part), part) for part in run.parts]):
        entry = known.get(run)
        if (run / "results.json").exists() and not (entry and entry.state == state.FAILED):
            continue
        typed = _yaml(run / ".hydra" / "overrides.yaml") if run in begun else entry.overrides if entry else ()
        how, why = (entry.state, entry.reason) if entry else _last_words(run)
        found.append(Unfinished(run, tuple(typed), how, why))
    return found


def _last_words(run: Path) -> tuple[str, str]:
    """How a run stands that nobody has kept a note of, from its logs."""
    logs = [log.read_text("utf-8", errors="replace") for log in (run / "job.log", run / "run.log") if log.exists()]
    lines = [line.strip() for log in logs for line in reversed(log.split("\n"))]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error:")), None)
    return (state.FAILED, told) if told else (state.RUNNING, "nothing was told; it may still be at work")


def sweep_command(folder: Path) -> str | None:
    """What was typed to make a sweep; None for other folders."""
    file = folder / "multirun.yaml"
    if not file.exists():
        return None
    overrides = _yaml(file)["hydra"]["overrides"]
    told = overrides["hydra"]
    told = told[:-2] if told and SWEEP_NAME in told[-1] else told  # what the sweep itself adds for its jobs
    launcher = [item for item in told if not item.startswith("hydra.mode=")]
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
    """Group runs that differ in their seed only, in the order of first appearance; a seed counts once.

    Args:
        runs: Runs of one sweep.
    """
    typed = {key for run in runs for key in _typed(run)}
    keys = _telling(runs, typed)
    groups: dict[tuple[str, ...], dict[Any, Run]] = {}
    for run in runs:
        groups.setdefault(tuple(str(run.config.get(key)) for key in keys), {})[run.results["seed"]] = run
    found = [tuple(group.values()) for group in groups.values()]
    return [Arm(_settings(group[0], keys, typed), group) for group in found]


def by_model(runs: Sequence[Run]) -> dict[str, list[Arm]]:
    """Arms of every model, since what is right for one says nothing of another; of all where each has one arm.

    Args:
        runs: Runs of one sweep.

    Returns:
        By the model's name; by the empty string where there is nothing to divide.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run.results.get("model")), []).append(run)
    arms = [arms_of(group) for group in groups.values()]
    if len(arms) == 1 or all(len(own) == 1 for own in arms):
        return {"": arms_of(runs)}
    names = [str(own[0].runs[0].config.get("model.name")) for own in arms]
    return dict(zip(names if len({*names}) == len(names) else groups, arms, strict=True))


def _telling(runs: Sequence[Run], typed: Collection[str]) -> list[str]:
    """Keys that tell arms apart: names and axes, and of what was typed and the rest what these do not decide."""
    every = dict.fromkeys(key for run in runs for key in run.config if key.split(".")[0] not in PLACES)
    varying = [key for key in every if len({str(run.config.get(key)) for run in runs}) > 1]
    chosen = [key for key in varying if key in NAMES or key in AXES]
    chosen += [key for key in varying if key in typed and not _decided(key, chosen, runs)]
    for key in varying:
        # What not all runs know is of another version of this package, and the same in all of them.
        if all(key in run.config for run in runs) and not _decided(key, chosen, runs):
            chosen.append(key)
    return [key for key in varying if key in chosen]


def _decided(key: str, others: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether runs that agree in the other keys agree in this one."""
    values: dict[tuple[str, ...], str] = {}
    return all(
        values.setdefault(tuple(str(run.config.get(other)) for other in others), str(run.config.get(key)))
        == str(run.config.get(key))
        for run in runs
    )


def _typed(run: Run) -> set[str]:
    return {key_of(override) for override in run.results["overrides"]}


def _settings(run: Run, keys: Sequence[str], typed: Collection[str]) -> dict[str, Any]:
    """What a run was told of the keys; what others were told and it was not has no meaning for it."""
    own = _typed(run)
    shown = {key: run.config.get(key) for key in keys if key in own or key in AXES or key not in typed or _is_name(key)}
    if run.config.get("recover.name") == "none":
        shown.pop("data_frac", None)
    return {key: value for key, value in shown.items() if value is not None}


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


def data_share(arm: Arm) -> float:
    """Share of the recovery data that an arm trains on."""
    config = arm.runs[0].config
    return 0.0 if config.get("recover.name") == "none" else config.get("data_frac", 1.0)


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
