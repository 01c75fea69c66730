"""Finished runs below a folder, each with its configuration; and arms: runs that differ in their seed only."""

from __future__ import annotations

import logging
import math
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pandas import DataFrame
from yaml import YAMLError

from ..record import STAGES, Results, find, metric_keys, read, scores
from ..runtime import COMMAND, RESULTS, Standing, UserError, first_line, state
from ..settings.compose import HOW, SWEEP_NAME, key_of
from ..settings.schema import GGUF_TYPES
from . import ABSENT, flat, numbers

log = logging.getLogger(__name__)
DAMAGED = (UserError, YAMLError, OmegaConfBaseException, UnicodeDecodeError)  # of a file that was cut off
PLACES = (*HOW, "seed", "name", "dry_run")  # keys in which runs of one arm may differ
BUDGET = ("prune.ratio", "prune.share", "prune.drop_layers")  # how much is removed
AXES = (*BUDGET, "data_frac")  # what curves run along
NAMES = ("model.name", "prune.name", "recover.name")


def command(overrides: Sequence[str]) -> str:
    """The line that makes a run."""
    return shlex.join([*COMMAND, *overrides])


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

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Its numbers by name, see `efficientllava.report.numbers`."""
        return numbers(self.results)


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

    def values(self, name: str) -> list[float]:
        """A finite number of each run that has it."""
        return [value for run in self.runs if math.isfinite(value := run.numbers.get(name, math.nan))]

    def mean(self, name: str) -> tuple[float, float] | None:
        """Mean and sample standard deviation (0 for one run) of a number; None where no run has it."""
        values = self.values(name)
        return (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None

    def cell(self, column: Column, varies: bool = True) -> str:
        """Mean and, where it varies, deviation of a column; a number that not all runs have says how many do."""
        count, mean = len(self.values(column.name)), self.mean(column.name)
        if not mean:
            return ABSENT
        text = " ± ".join(f"{column.scale * number:.{column.digits}f}" for number in mean[: 1 + (varies and count > 1)])
        return text if count == len(self.runs) else f"{text} (n = {count})"

    @property
    def data_share(self) -> float:
        """Share of the recovery data that it trains on."""
        config = self.runs[0].config
        return 0.0 if config.get("recover.name") == "none" else config.get("data_frac", 1.0)


class Column(NamedTuple):
    """How a number of all arms is shown, in tables and along axes."""

    head: str  # its words, with the unit
    name: str  # see `efficientllava.report.numbers`
    scale: float = 100
    digits: int = 1  # behind the point


def columns(arms: Sequence[Arm], metric: str) -> list[Column]:
    """What tables and plots show of the arms of a sweep; metrics are named ``task/metric``."""
    scale, sign = score_scale(arms, metric)
    count, giga = _unit(arms, "base/parameters", 1000, "")
    size, gibi = _unit(arms, "base/checkpoint_bytes", 1024, "iB")
    unseen = [Column(f"{stage}, loss on unseen records", f"{stage}/report_loss", 1, 3) for stage in STAGES]
    scored = [
        *(Column(f"{stage}{sign}", f"{stage}/{metric}", scale) for stage in STAGES),
        Column("retained, %", f"final/retained/{metric}"),
        Column("answer loss", f"final/{metric_keys(metric)[1]}/answer_loss", 1, 3),
    ]
    asked = any(arm.values(f"{stage}/{metric}") for arm in arms for stage in STAGES)
    others = [other for other in scores((run.results for arm in arms for run in arm.runs), True) if other != metric]
    return [
        Column("removed, %", "ratio/achieved"),
        Column("zeros, %", "ratio/sparsity"),
        *(scored if asked else []),
        *unseen,
        *(Column(f"{other.replace('/', ' ')}, retained %", f"final/retained/{other}") for other in others),
        Column(f"parameters, {giga}", "final/parameters", 1 / count, 3),
        Column(f"checkpoint, {gibi}", "final/checkpoint_bytes", 1 / size, 2),
        Column("ms per token", "final/latency_ms/decode", 1, 2),
        *(Column(f"{kind} file, {gibi}", f"final/gguf/{kind}/bytes", 1 / size, 2) for kind in GGUF_TYPES),
        *(Column(f"{kind}, ms of CPU per token", f"final/gguf/{kind}/decode_ms", 1, 2) for kind in GGUF_TYPES),
        Column("prune, s", "seconds/prune", 1, 0),
        Column("recover, s", "seconds/recover", 1, 0),
    ]


def score_scale(arms: Sequence[Arm], metric: str) -> tuple[float, str]:
    """Factor and unit that a score is shown with: shares in percent, points (such as those of MME) as they are."""
    values = [value for arm in arms for stage in STAGES for value in arm.values(f"{stage}/{metric}")]
    return (1, "") if any(value > 1 for value in values) else (100, ", %")


def _unit(arms: Sequence[Arm], name: str, base: int, suffix: str) -> tuple[float, str]:
    """Divisor and name of the unit, millions or billions, in which the largest of some counts is best read."""
    most = max((value for arm in arms for value in arm.values(name)), default=0)
    return (base**3, f"G{suffix}") if most >= base**3 else (base**2, f"M{suffix}")


def frame(arms: Sequence[Arm], **names: str) -> Any:
    """What plots and advice compare, as a data frame with a row per arm.

    Args:
        arms: At least one.
        **names: Numbers by their column, see `efficientllava.report.numbers`.

    Returns:
        ``arm``, its ``label``, its ``series`` (without what curves run along), ``paradigm`` and ``data`` share; and of
        every number the mean, with its standard deviation in ``<column>_spread``, NaN where no run has it, and how
        many have it in ``<column>_count``.
    """
    rows = []
    for arm in arms:
        row = {"arm": arm, "label": arm.label(), "series": arm.label(*AXES), "data": arm.data_share}
        row["paradigm"] = str(arm.settings.get("prune.name"))
        for column, name in names.items():
            row[column], row[f"{column}_spread"] = arm.mean(name) or (math.nan, math.nan)
            row[f"{column}_count"] = len(arm.values(name))
        rows.append(row)
    return DataFrame(rows)


def load_runs(folder: Path) -> list[Run]:
    """All finished runs below a folder, in the order of their numbers.

    Raises:
        UserError: There is none.
    """
    files = sorted(folder.rglob(RESULTS), key=_in_order)
    if not files:
        failed = [told(run) for run in unfinished(folder)]
        why = f" ({counted(len(failed), 'run')} without results, the first: {failed[0]})" if failed else ""
        raise UserError(f"{folder}: no results.json below this folder{why}; give a folder of finished runs")
    if not (runs := [run for run in map(_opened, files) if run]):
        raise UserError(f"{folder}: what the runs below this folder have left is damaged; do them again")
    return runs


def _opened(file: Path) -> Run | None:
    """A finished run; None where a kill or a full disk has left half of its files, which is told."""
    try:
        return Run(file.parent, read(file), dict(flat(_read(file.parent), ".")))
    except DAMAGED as error:
        log.warning("%s: is damaged and left out (%s); do it again", file.parent, first_line(error))
        return None


def _in_order(path: Path) -> list[tuple[int, str]]:
    return [(len(part), part) for part in path.parts]


def written(folder: Path, name: str = ".hydra/config.yaml") -> str:
    """What Hydra has written into a run's folder; empty where it has not."""
    return (folder / name).read_text("utf-8") if (folder / name).exists() else ""


def _read(folder: Path, name: str = ".hydra/config.yaml") -> Any:
    return OmegaConf.to_container(OmegaConf.create(written(folder, name)))


def unfinished(folder: Path) -> list[Standing]:
    """Every run below a folder that has begun or was submitted and has left no results, with all that was typed."""
    known = {entry.folder: entry for entry in state.standings(folder) if (entry.folder / state.JOB).exists()}
    begun = {file.parents[1] for file in folder.rglob(".hydra/overrides.yaml")}
    found = []
    for run in sorted({*known, *begun} - state.dropped(folder), key=_in_order):
        entry = known.get(run) or _unnoted(run)
        if entry.state == state.FAILED or not (run / RESULTS).exists():
            typed = entry.overrides
            if run in begun:
                with suppress(*DAMAGED):
                    typed = _read(run, ".hydra/overrides.yaml")
            found.append(entry._replace(overrides=tuple(typed)))
    return found


def _unnoted(run: Path) -> Standing:
    """How a run stands that nobody has kept a note of, from its logs."""
    logs = [log.read_text("utf-8", errors="replace") for log in _logs(run)]
    lines = [line.strip() for log in logs for line in reversed(log.split("\n"))]
    error = next((line.removeprefix("error: ") for line in lines if line.startswith("error:")), None)
    how = (state.FAILED, error) if error else (state.RUNNING, "nothing was told; it may still be at work")
    return Standing(run.name, how[0], (), how[1], None, run)


def _logs(run: Path) -> list[Path]:
    return [log for log in (run / "job.log", run / "run.log") if log.exists()]


def told(run: Standing) -> str:
    """The number of a run without results, how it stands and where its words are, in one line."""
    log = "".join(f" ({log})" for log in _logs(run.folder)[:1])
    return f"{run.folder.name}: {run.state}: {run.reason or 'nothing was told'}{log}"


def sweep_command(folder: Path) -> str | None:
    """What was typed to make a sweep; None for other folders."""
    overrides = find(_read(folder, "multirun.yaml"), "hydra", "overrides")
    if not overrides:
        return None
    typed = overrides["hydra"]
    typed = typed[:-2] if typed and SWEEP_NAME in typed[-1] else typed  # what the sweep itself adds for its jobs
    launcher = [item for item in typed if not item.startswith("hydra.mode=")]
    return command(["-m", *launcher, *overrides["task"]])


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Group runs of one sweep that differ in their seed only, in the order of first appearance; a seed counts once."""
    typed = {key for run in runs for key in _typed(run)}
    keys = _telling(runs, typed)
    groups: dict[tuple[str, ...], dict[Any, Run]] = {}
    for run in runs:
        idle = ["data_frac"] if run.config.get("recover.name") == "none" else []  # nothing is trained on a share
        groups.setdefault(_values(run, [key for key in keys if key not in idle]), {})[run.results["seed"]] = run
    found = [tuple(group.values()) for group in groups.values()]
    return [Arm(_settings(group[0], keys, typed), group) for group in found]


def by_model(runs: Sequence[Run]) -> dict[str, list[Arm]]:
    """Arms of every model, since what is right for one says nothing of another; of all where each has one arm.

    Returns:
        Arms by the model's name, by its path where names are shared; by the empty name where there is one model only.
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
    varying = [key for key in every if _kinds(runs, [key]) > 1]
    chosen = [key for key in varying if key in NAMES or key in AXES]
    names = _kinds(runs, chosen)
    chosen += [key for key in varying if key in typed and _kinds(runs, [*chosen, key]) > names]
    for key in varying:
        # What not all runs know is of another version of this package, and the same in all of them.
        if all(key in run.config for run in runs) and _kinds(runs, [*chosen, key]) > _kinds(runs, chosen):
            chosen.append(key)
    return [key for key in varying if key in chosen]


def _values(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(run.config.get(key)) for key in keys)


def _kinds(runs: Sequence[Run], keys: Sequence[str]) -> int:
    """How many kinds of runs these keys tell apart."""
    return len({_values(run, keys) for run in runs})


def _typed(run: Run) -> set[str]:
    return {key_of(override) for override in run.results["overrides"]}


def _settings(run: Run, keys: Sequence[str], typed: Collection[str]) -> dict[str, Any]:
    """What a run was told of the keys; what others were told and it was not has no meaning for it."""
    own = _typed(run)
    shown = {key: run.config.get(key) for key in keys if key in own or key in AXES or key not in typed or _is_name(key)}
    if run.config.get("recover.name") == "none":
        shown.pop("data_frac", None)
    return {key: value for key, value in shown.items() if value is not None}


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_name(key: str) -> bool:
    return key.endswith(".name")


def _in_words(key: str, value: Any) -> str:
    if _is_name(key):
        return str(value)
    short = key.removeprefix("prune.").removeprefix("recover.")
    return f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}"
