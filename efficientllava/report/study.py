"""An experiment's table and plot: a row per value of what it varies, ours beside what the paper prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ..record import find, last_stage, metric_keys
from .plots import Plot, label_ends, new_axes, style
from .runs import Run

PUBLISHED = Path(__file__).with_name("published.yaml")
FAMILIES = ("llava", "internvl", "bunny")
SHARES = ("prune.ratio", "data_frac")  # rows that are shown in percent
OFF = 0.01  # an achieved ratio this far from the requested one is shown
ABSENT = "-"
DODGE = 0.1  # of the distance between rows


class Value(NamedTuple):
    """A cell of the table.

    Attributes:
        mean: In percent.
        spread: Sample standard deviation over seeds; None for a single number.
        removed: Share of parameters removed, where it is not that of the row.
        suspect: Why a published number is not to be trusted; empty: nothing is known against it.
    """

    mean: float
    spread: float | None = None
    removed: float | None = None
    suspect: str = ""

    def __str__(self) -> str:
        text = f"{self.mean:.1f}" if self.spread is None else f"{self.mean:.1f} ± {self.spread:.1f}"
        return text + (f" at {100 * self.removed:.1f} %" if self.removed is not None else "") + "†" * bool(self.suspect)


Column = Mapping[Any, Value]  # by row


@dataclass(frozen=True)
class Panel:
    """What one model's runs say.

    Args:
        experiment: Name of the experiment.
        model: Its name.
        spec: The experiment's entry in ``published.yaml``.
        ours: Columns from runs.
        published: Columns from the paper.
    """

    experiment: str
    model: str
    spec: Mapping[str, Any]
    ours: Mapping[str, Column]
    published: Mapping[str, Column]

    @property
    def whole(self) -> str:
        """What the values are percent of."""
        return f"score at {self.label(self.spec['of_row'])}" if "of_row" in self.spec else "unpruned model's score"

    @property
    def rows(self) -> list[Any]:
        """Values of what the experiment varies, as the paper orders them, else ascending."""
        ran = dict.fromkeys(row for column in self.ours.values() for row in column)
        if self.spec["rows"] != "arm":
            return sorted(ran)
        return [*(row for row in self.spec["at"] if row in ran), *(row for row in ran if row not in self.spec["at"])]

    @property
    def quantity(self) -> str:
        """What its numbers are."""
        return self.spec["value"] + (", %" if self.spec["value"] == "accuracy" else f", % of the {self.whole}")

    def label(self, row: Any) -> str:
        """A row in words."""
        return f"{100 * row:g} %" if self.spec["rows"] in SHARES else str(row)


def panels_of(runs: Sequence[Run], metric: str) -> list[Panel]:
    """Pivot the runs of an experiment of which the paper prints numbers.

    Args:
        runs: Finished runs.
        metric: ``task/metric``.

    Returns:
        One panel per model, and per question that their experiment answers; none where the runs are of no such
        experiment or of several.
    """
    specs: Any = OmegaConf.to_container(OmegaConf.load(PUBLISHED))
    told = {override for run in runs for override in run.results["overrides"] if override.startswith("experiment=")}
    models = dict.fromkeys(str(run.config.get("model.name")) for run in runs)
    panels = []
    for name, spec in specs.items():
        if len(told) == 1 and told <= {f"experiment={name}", f"experiment={spec.get('of')}"}:
            for model in models:
                own = [run for run in runs if run.config.get("model.name") == model]
                panels.append(Panel(name, model, spec, _ours(own, spec, metric), _published(model, spec)))
    return panels


def _ours(runs: Sequence[Run], spec: Mapping[str, Any], metric: str) -> dict[str, dict[Any, Value]]:
    metrics = spec.get("metrics", {metric: ""})
    cells: dict[str, dict[Any, list[Run]]] = {}
    for run in runs:
        row, _, column = str(run.config.get("name")).partition("@")
        if spec["rows"] != "arm":
            row, column = run.config[spec["rows"]], row
        cells.setdefault(spec.get("columns", {}).get(column, column), {}).setdefault(row, []).append(run)
    columns = {}
    for column, rows in cells.items():
        for key, title in metrics.items():
            found = {row: value for row, members in rows.items() if (value := _value(members, spec, key))}
            columns[f"{column}, {title}" if title else column] = _relative(found, spec.get("of_row"))
    return columns


def _value(runs: Sequence[Run], spec: Mapping[str, Any], metric: str) -> Value | None:
    path = metric_keys(metric) if spec["value"] == "accuracy" else ("retained", metric)
    kept = [find(last_stage(run.results), *path) for run in runs]
    shares = [100 * (1 - share if spec["value"] == "lost" else share) for share in kept if share is not None]
    if not shares:
        return None
    achieved = statistics.fmean(run.results["ratio"]["achieved"] for run in runs)
    requested = runs[0].results["ratio"]["requested"]
    removed = achieved if requested is not None and abs(achieved - requested) > OFF else None
    return Value(statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else None, removed)


def _relative(column: dict[Any, Value], row: Any) -> dict[Any, Value]:
    """A column in percent of one of its values, without which nothing can be said."""
    if row is None:
        return column
    if row not in column:
        return {}
    scale = 100 / column[row].mean
    return {
        key: value._replace(mean=scale * value.mean, spread=None if value.spread is None else scale * value.spread)
        for key, value in column.items()
    }


def _published(model: str, spec: Mapping[str, Any]) -> dict[str, dict[Any, Value]]:
    families = spec.get("families", [family for family in FAMILIES if family in model])
    columns = {}
    for family in families:
        for title, entry in spec["published"].get(family, {}).items():
            values, suspect = (entry["values"], entry["suspect"]) if isinstance(entry, dict) else (entry, "")
            told = [value if isinstance(value, list) else [value, suspect] for value in values]
            pairs = zip(spec["at"], told, strict=True)
            columns[title] = {row: Value(value, suspect=why) for row, (value, why) in pairs if value is not None}
    return columns


def markdown(panels: Sequence[Panel]) -> str:
    """The table of every panel.

    Args:
        panels: Output of `panels_of`.
    """
    return "\n".join(line for panel in panels for line in _lines(panel))


def _lines(panel: Panel) -> Iterator[str]:
    spec = panel.spec
    reasons = list(
        dict.fromkeys(v.suspect for column in panel.published.values() for v in column.values() if v.suspect)
    )
    yield f"**{panel.experiment}, {panel.model}**: {panel.quantity}, mean ± standard"
    yield f"deviation over seeds; *published*: {spec['source']}."
    yield ""
    yield "| " + " | ".join([spec["rows"], *panel.ours, *(f"*{title}*" for title in panel.published)]) + " |"
    yield "|---|" + "---:|" * (len(panel.ours) + len(panel.published))
    for row in panel.rows:
        columns = [*panel.ours.values(), *panel.published.values()]
        cells = (str(column[row]) if row in column else ABSENT for column in columns)
        yield "| " + " | ".join([panel.label(row), *cells]) + " |"
    yield ""
    if reasons:
        yield f"† suspect: {'; '.join(reasons)}."
        yield ""


def draw(panels: Sequence[Panel]) -> Iterator[Plot]:
    """A plot per panel, beside the others of a report: ours filled, published hollow.

    Args:
        panels: Output of `panels_of`.
    """
    for panel in panels:
        rows, ends, columns = panel.rows, [], [*panel.ours.items(), *panel.published.items()]
        turned = panel.spec["rows"] == "arm"
        axes = new_axes(6.4, 4.2)
        axes.set_xticks(
            range(len(rows)), map(panel.label, rows), rotation=35 * turned, ha="right" if turned else "center"
        )
        axes.set(xlabel=panel.spec["rows"], ylabel=panel.quantity)
        for index, (title, column) in enumerate(columns):
            points = [(x, column[row]) for x, row in enumerate(rows) if row in column]
            if points:
                ours, look = index < len(panel.ours), style(index)
                line: dict[str, Any] = {"lw": 1.6} if ours else {"lw": 1.1, "ls": ":", "mfc": "white"}
                line |= {"ls": "none"} if turned else {}  # arms have no order
                aside = DODGE * (index - (len(columns) - 1) / 2) * turned  # equal values are seen beside each other
                x, y = [x + aside for x, _ in points], [value.mean for _, value in points]
                axes.errorbar(x, y, [value.spread or 0 for _, value in points], ms=4, capsize=2.5, **line, **look)
                ends.append((x[-1], y[-1], title if ours else f"{title}, published", look["color"]))
        label_ends(axes, ends)
        caption = f"Mean over seeds, one standard deviation; hollow: published ({panel.spec['source']})."
        yield Plot(
            f"{panel.experiment}_{panel.model}",
            f"{panel.experiment}, {panel.model}: beside what is published",
            caption,
            axes.figure,
        )
