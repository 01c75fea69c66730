"""Plots over the runs of a sweep; each is left out where the sweep has nothing for it."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import AXES, Arm, Run

CYCLE = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#3a3a3a", "#00a6a6", "#b56576", "#8d99ae", "#7f5539")
MARKS = "osD^vPX*<>"
GRID = {"color": "#e3e7ec", "lw": 0.8}
MOST_INSIDE = 5  # entries of a legend inside the axes
MOST_STRIPS = 12  # arms whose kept units are drawn


@dataclass(frozen=True)
class Plot:
    """One figure.

    Args:
        name: File name without ending.
        title: What it shows.
        figure: The matplotlib figure.
    """

    name: str
    title: str
    figure: Any


def draw(arms: Sequence[Arm], metric: str) -> Iterator[Plot]:
    """All plots that a sweep has data for.

    Args:
        arms: Arms of the sweep.
        metric: ``task/metric``, such as ``digits_vqa/accuracy``.
    """
    makers: list[tuple[str, str, Callable[[Sequence[Arm], str], Any]]] = [
        ("retained", "Retained accuracy against what was removed", _retained),
        ("latency", "Accuracy against decode latency", _front(("latency_ms", "decode"), "per-token latency, ms")),
        ("bytes", "Accuracy against size", _front(("checkpoint_bytes",), "checkpoint, MiB", 2**20)),
        ("data_fraction", "Retained accuracy against the share of recovery data", _data_fraction),
        ("matrix", "Recovery matrix", _matrix),
        ("kept", "What was kept", _kept),
        ("training", "Recovery", _training),
    ]
    for name, title, make in makers:
        figure = make(arms, metric)
        if figure is not None:
            yield Plot(name, title, figure)


def _axes(width: float = 6.4, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(axes: Any, **labels: str) -> None:
    axes.set(**labels)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > MOST_INSIDE:
        columns = 2 if max(map(len, names)) < 48 else 1
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.17 * len(names) / columns)
        axes.figure.legend(handles, names, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    elif names:
        axes.legend(frameon=False, fontsize=8)


def _curves(arms: Sequence[Arm], metric: str, x: Sequence[str], without: Sequence[str]) -> dict[str, list[Any]]:
    """Points ``(x, mean, s.d.)`` in percent of the retained metric, by what is left of an arm's label."""
    curves: dict[str, list[Any]] = {}
    for arm in arms:
        place, kept = arm.mean(*x), arm.mean("retained", metric, last=True)
        if place and kept:
            curves.setdefault(arm.label(*without), []).append((100 * place[0], 100 * kept[0], 100 * kept[1]))
    return {label: sorted(points) for label, points in curves.items()}


def _plot_curves(curves: dict[str, list[Any]]) -> tuple[Any, Any]:
    figure, axes = _axes()
    for index, (label, points) in enumerate(curves.items()):
        x, y, spread = zip(*points, strict=True)
        style = {"color": CYCLE[index % len(CYCLE)], "marker": MARKS[index % len(MARKS)], "ms": 5, "capsize": 3}
        axes.errorbar(x, y, spread, label=label, lw=1.6, **style)
    return figure, axes


def _retained(arms: Sequence[Arm], metric: str) -> Any:
    curves = _curves(arms, metric, ("ratio", "achieved"), AXES)
    if not curves:
        return None
    figure, axes = _plot_curves(curves)
    _finish(axes, xlabel="language-model parameters removed, %", ylabel=f"retained {metric}, %")
    return figure


def _data_fraction(arms: Sequence[Arm], metric: str) -> Any:
    shares = {arm.settings.get("data_frac") for arm in arms} - {None}
    if len(shares) < 2:
        return None
    curves: dict[str, list[Any]] = {}
    for arm in arms:
        kept = arm.mean("retained", metric, last=True)
        if kept:
            point = (100 * arm.settings["data_frac"], 100 * kept[0], 100 * kept[1])
            curves.setdefault(arm.label("data_frac"), []).append(point)
    figure, axes = _plot_curves({label: sorted(points) for label, points in curves.items()})
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    _finish(axes, xlabel="share of the recovery data, %", ylabel=f"retained {metric}, %")
    return figure


def _front(path: Sequence[str], label: str, unit: float = 1) -> Callable[[Sequence[Arm], str], Any]:
    """A scatter of accuracy against a cost, with the Pareto front."""

    def make(arms: Sequence[Arm], metric: str) -> Any:
        score = ("metrics", *metric.split("/"))
        points = [
            (cost[0] / unit, 100 * value[0], arm.label())
            for arm in arms
            if (cost := arm.mean(*path, last=True)) and (value := arm.mean(*score, last=True))
        ]
        if not points:
            return None
        figure, axes = _axes()
        base_cost, base_value = arms[0].mean("stages", "base", *path), arms[0].mean("stages", "base", *score)
        if base_cost and base_value:
            axes.scatter(base_cost[0] / unit, 100 * base_value[0], marker="*", s=120, color="#3a3a3a", label="base")
        for index, (x, y, name) in enumerate(points):
            mark = MARKS[index // len(CYCLE) % len(MARKS)]
            axes.scatter(x, y, color=CYCLE[index % len(CYCLE)], marker=mark, s=40, label=name)
        front = pareto([point[:2] for point in points])
        axes.plot(*zip(*front, strict=True), color="#9aa5b1", lw=1.2, ls="--", zorder=0)
        _finish(axes, xlabel=label, ylabel=f"{metric}, %")
        return figure

    return make


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats: lower first value, higher second value; ascending.

    Args:
        points: ``(cost, value)`` each.
    """
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _matrix(arms: Sequence[Arm], metric: str) -> Any:
    rows = list(dict.fromkeys(arm.label("recover.name") for arm in arms))
    columns = list(dict.fromkeys(arm.settings.get("recover.name") for arm in arms))
    if len(columns) < 2 or len(rows) > 40:
        return None
    cells: list[list[float]] = [[float("nan")] * len(columns) for _ in rows]
    for arm in arms:
        kept = arm.mean("retained", metric, last=True)
        if kept:
            place = columns.index(arm.settings.get("recover.name"))
            cells[rows.index(arm.label("recover.name"))][place] = 100 * kept[0]
    figure, axes = _axes(2.5 + 1.0 * len(columns), 1.2 + 0.42 * len(rows))
    axes.grid(False)
    known = [value for row in cells for value in row if value == value]
    image = axes.imshow(cells, cmap="RdYlGn", aspect="auto", vmin=min(known), vmax=max(known))
    middle = statistics.fmean((min(known), max(known)))
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value == value:
                dark = abs(value - middle) > 0.4 * (max(known) - min(known))
                colour = "white" if dark and len(known) > 1 else "black"
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, ax=axes, label=f"retained {metric}, %", fraction=0.05)
    return figure


def _kept(arms: Sequence[Arm], _metric: str) -> Any:
    """Strips of kept KV groups and channels per layer, for the first run of each arm."""
    drawn: dict[str, list[list[float]]] = {}
    for arm in arms:
        shares = _shares(arm.runs[0])
        if shares is not None:
            drawn.setdefault(arm.label("recover.name", "data_frac"), shares)
    if not drawn:
        return None
    chosen = list(drawn.items())[:MOST_STRIPS]
    rows = [row for _, shares in chosen for row in shares]
    figure, axes = _axes(7.4, 1.0 + 0.5 * len(chosen))
    axes.grid(False)
    image = axes.imshow(rows, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axes.set_yticks([2 * index + 0.5 for index in range(len(chosen))], [label for label, _ in chosen], fontsize=8)
    for index in range(1, len(chosen)):
        axes.axhline(2 * index - 0.5, color="white", lw=3)
    axes.set(xlabel="layer (upper row: KV groups, lower row: MLP channels)")
    figure.colorbar(image, ax=axes, label="kept, %", fraction=0.05)
    return figure


def _shares(run: Run) -> list[list[float]] | None:
    """Kept groups and channels of every layer, in percent; 0 for a dropped layer.

    A plan does not say how many units there were: the highest kept index of any layer tells, but for a unit or two.
    """
    plan = run.plan()
    if plan is None:
        return None
    rows = []
    for kind in ("groups", "channels"):
        whole = 1 + max(max(layer[kind]) for layer in plan["layers"])
        row = [0.0] * plan["source_layers"]
        for layer in plan["layers"]:
            row[layer["index"]] = 100 * len(layer[kind]) / whole
        rows.append(row)
    return rows


def _training(arms: Sequence[Arm], _metric: str) -> Any:
    figure, axes = None, None
    for index, arm in enumerate(arms[: 2 * len(CYCLE)]):
        steps, losses = _log(arm.runs[0])
        if len(steps) < 2:
            continue
        if axes is None:
            figure, axes = _axes()
        line = "-" if index < len(CYCLE) else "--"
        axes.plot(steps, losses, line, color=CYCLE[index % len(CYCLE)], lw=1.4, label=arm.label())
    if axes is not None:
        axes.set_yscale("log")
        _finish(axes, xlabel="optimiser step", ylabel="recovery loss")
    return figure


def _log(run: Run) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's recovery, from its CSV log."""
    steps, losses = [], []
    for file in sorted(run.folder.glob("logs/**/metrics.csv")):
        with file.open(encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                if row.get("recover/loss"):
                    steps.append(int(row["step"]) + 1)
                    losses.append(float(row["recover/loss"]))
    return steps, losses
