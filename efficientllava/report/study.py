"""An experiment's table and plot: a row per value of what it varies, ours beside what the paper prints."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from . import ABSENT
from .plots import Plot, label_ends, new_axes, style
from .runs import Run

PUBLISHED = Path(__file__).with_name("published.yaml")
FAMILIES = ("llava", "internvl", "bunny")
SHARES = ("prune.ratio", "data_frac")  # rows that are shown in percent
OFF = 0.01  # an achieved ratio this far from the requested one is shown
DODGE = 0.1  # of the distance between rows


class Value(NamedTuple):
    """A cell of the table."""

    mean: float  # in percent
    spread: float | None = None  # sample standard deviation over seeds; None for a single number
    removed: float | None = None  # share of parameters, where it is not that of the row
    suspect: str = ""  # why a published number is not to be trusted; empty: nothing is known against it

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
    def rows(self) -> list[Any]:
        """Values of what the experiment varies, as the paper orders them, else ascending."""
        ran = dict.fromkeys(row for column in self.ours.values() for row in column)
        if self.spec["rows"] != "arm":
            return sorted(ran)
        return [*(row for row in self.spec["at"] if row in ran), *(row for row in ran if row not in self.spec["at"])]

    @property
    def quantity(self) -> str:
        """What its numbers are, and what they are percent of."""
        if self.spec["value"] == "accuracy":
            return "accuracy, %"
        whole = f"score at {self.label(self.spec['of_row'])}" if "of_row" in self.spec else "unpruned model's score"
        return f"{self.spec['value']}, % of the {whole}"

    def label(self, row: Any) -> str:
        """A row in words."""
        return f"{100 * row:g} %" if self.spec["rows"] in SHARES else str(row)


def panels_of(runs: Sequence[Run], metric: str) -> list[Panel]:
    """Pivot the runs of an experiment of which the paper prints numbers.

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
                panels.append(Panel(name, model, spec, _ours(own, spec, metric), published(model, spec)))
    return panels


def _ours(runs: Sequence[Run], spec: Mapping[str, Any], metric: str) -> dict[str, dict[Any, Value]]:
    place = "final" if spec["value"] == "accuracy" else "final/retained"
    cells: dict[str, dict[Any, list[tuple[float, Run]]]] = {}
    for run in runs:
        row, _, column = str(run.config.get("name")).partition("@")
        if spec["rows"] != "arm":
            row, column = run.config[spec["rows"]], row
        for key, part in spec.get("metrics", {metric: ""}).items():
            titles = [spec.get("columns", {}).get(column, column), *([part] if part else [])]
            rows, kept = (cells.setdefault(", ".join(titles), {}), run.numbers.get(f"{place}/{key}"))
            if kept is not None:
                rows.setdefault(row, []).append((100 * (1 - kept if spec["value"] == "lost" else kept), run))
    values = {title: {row: _value(found) for row, found in rows.items()} for title, rows in cells.items()}
    return {title: _relative(column, spec.get("of_row")) for title, column in values.items()}


def _value(found: Sequence[tuple[float, Run]]) -> Value:
    shares, ratios = ([share for share, _ in found], [run.results["ratio"] for _, run in found])
    achieved, requested = (statistics.fmean(ratio["achieved"] for ratio in ratios), ratios[0]["requested"])
    removed = achieved if requested is not None and abs(achieved - requested) > OFF else None
    return Value(statistics.fmean(shares), statistics.stdev(shares) if len(shares) > 1 else None, removed)


def _relative(column: dict[Any, Value], row: Any) -> dict[Any, Value]:
    """A column in percent of one of its values, without which nothing can be said."""
    if row is None or row not in column:
        return column if row is None else {}
    scale = 100 / column[row].mean
    return {
        key: value._replace(mean=scale * value.mean, spread=None if value.spread is None else scale * value.spread)
        for key, value in column.items()
    }


def published(model: str, spec: Mapping[str, Any]) -> dict[str, dict[Any, Value]]:
    """What the paper prints for the family of a model, or for all that an experiment names: columns by title."""
    columns = {}
    for family in spec.get("families", [family for family in FAMILIES if family in model]):
        for title, entry in spec["published"].get(family, {}).items():
            values, suspect = (entry["values"], entry["suspect"]) if isinstance(entry, dict) else (entry, "")
            told = [value if isinstance(value, list) else [value, suspect] for value in values]
            pairs = zip(spec["at"], told, strict=True)
            columns[title] = {row: Value(value, suspect=why) for row, (value, why) in pairs if value is not None}
    return columns


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A table in Markdown; columns behind the first ones, which are left, hold numbers and are aligned on the right."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    first, *rest = ("| " + " | ".join(map(str, row)) + " |" for row in (head, *rows))
    return "\n".join([first, rule, *rest]) + "\n"


def markdown(panels: Sequence[Panel]) -> str:
    """The table of every panel."""
    return "\n".join(_text(panel) for panel in panels)


def _text(panel: Panel) -> str:
    columns = [*panel.ours.values(), *panel.published.values()]
    head = [panel.spec["rows"], *panel.ours, *(f"*{title}*" for title in panel.published)]
    rows = [[panel.label(row), *(column.get(row, ABSENT) for column in columns)] for row in panel.rows]
    reasons = dict.fromkeys(value.suspect for column in columns for value in column.values() if value.suspect)
    intro = f"**{panel.experiment}, {panel.model}**: {panel.quantity}, mean ± standard\n"
    intro += f"deviation over seeds; *published*: {panel.spec['source']}.\n\n"
    return intro + table(head, rows) + (f"\n† suspect: {'; '.join(reasons)}.\n" if reasons else "")


def draw(panels: Sequence[Panel]) -> Iterator[Plot]:
    """A plot per panel, beside the others of a report: ours filled, published hollow."""
    for panel in panels:
        rows, ends, columns = (panel.rows, [], [*panel.ours.items(), *panel.published.items()])
        turned = panel.spec["rows"] == "arm"
        axes = new_axes(6.4, 4.2, xlabel=panel.spec["rows"], ylabel=panel.quantity)
        slant = {"rotation": 35, "ha": "right"} if turned else {}
        axes.set_xticks(range(len(rows)), map(panel.label, rows), **slant)
        for index, (title, column) in enumerate(columns):
            points = [(x, column[row]) for x, row in enumerate(rows) if row in column]
            if points:
                ours, look = index < len(panel.ours), style(index)
                look |= {"lw": 1.6} if ours else {"lw": 1.1, "ls": ":", "mfc": "white"}
                look |= {"ls": "none"} if turned else {}  # arms have no order
                aside = DODGE * (index - (len(columns) - 1) / 2) * turned  # equal values are seen beside each other
                x, y = ([x + aside for x, _ in points], [value.mean for _, value in points])
                axes.errorbar(x, y, [value.spread or 0 for _, value in points], ms=4, capsize=2.5, **look)
                ends.append((x[-1], y[-1], title if ours else f"{title}, published", look["color"]))
        label_ends(axes, ends)
        caption = f"Mean over seeds, one standard deviation; hollow: published ({panel.spec['source']})."
        title = f"{panel.experiment}, {panel.model}: beside what is published"
        yield Plot(f"{panel.experiment}_{panel.model}", title, caption, axes.figure)
