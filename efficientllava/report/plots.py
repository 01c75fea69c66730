"""Plots over the runs of a sweep; each is left out where the sweep has nothing for it.

First what all share: figures, colours, labels that stand beside their curves, heat maps.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from pandas import DataFrame, concat

from ..record import lower_is_better, read_curve
from ..runtime import UserError
from ..settings.schema import GGUF_TYPES
from . import kept_shares
from .runs import AXES, Arm, Column, columns, frame, score_scale

log = logging.getLogger(__name__)
MOST_ROWS = 40  # of a dot plot
MOST_STRIPS = 20  # arms whose kept units are drawn
MOST_TEXT = 10  # layers up to which values are written into the cells
MOST_TOGETHER = 5  # series in one panel; more get a panel for each paradigm
ALIKE = 0.005  # costs that differ by no more are one
CYCLE = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3a3a3a", "#00918f", "#c2185b", "#5d7183", "#7f5539")
MARKS = "osD^vPX*<>"
INK, FAINT = "#3a3a3a", "#b4bec9"
LINE = 11.0  # points that a line of a label takes
WRAP = 26  # characters of a line of a label
WIDEST = 40  # characters of a line beside a map
BARS = "Mean over seeds; bars: one standard deviation."
# File and title of the plots of a score against what it costs, by the cost.
FRONTS = {"latency_ms/decode": ("latency", "decode latency"), "checkpoint_bytes": ("bytes", "size")}
for _kind in GGUF_TYPES:
    FRONTS[f"gguf/{_kind}/bytes"] = (f"gguf_{_kind}_bytes", f"size in llama.cpp, {_kind}")
    FRONTS[f"gguf/{_kind}/decode_ms"] = (f"gguf_{_kind}_decode", f"decoding in llama.cpp, {_kind}")


class Plot(NamedTuple):
    """One figure of matplotlib."""

    name: str  # of its file, without ending
    title: str  # what it shows
    caption: str  # how to read it
    figure: Any


def new_axes(width: float = 5.6, height: float = 3.9, **texts: Any) -> Any:
    """Axes of a figure of their own, in inches, with a faint grid, and their labels and scales."""
    axes = Figure(figsize=(width, height), dpi=150, layout="constrained").subplots()
    axes.grid(color="#e3e7ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.set(**texts)
    axes.minorticks_off()
    return axes


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the series with this index."""
    return {"color": CYCLE[index % len(CYCLE)], "marker": MARKS[index // len(CYCLE) % len(MARKS)]}


def draw_curves(
    axes: Any, curves: Any, ranked: Sequence[str], styles: Sequence[str], width: float = 1.6, **look: Any
) -> None:
    """Curves with error bars, labelled at their right ends; beyond ten, the last ones are faint and share a label.

    Args:
        axes: With final limits and scales in y.
        curves: Data frame of points: ``x``, ``y``, ``spread`` and the label of their ``curve``.
        ranked: Labels, the best first.
        styles: Labels in the order of their colours, over all panels of a plot.
        width: Of a line, in points.
        **look: What else all lines have in common.
    """
    shown, ends = ranked[: len(CYCLE)], []
    for label in reversed(ranked):
        points = curves[curves.curve == label].sort_values(["x", "y"])
        last, bars = points.iloc[-1], points.spread if any(points.spread) else None
        line = {"lw": width, **style(styles.index(label))}
        if label not in shown:
            line = {"lw": width / 2, "color": FAINT, "marker": "."}
        axes.errorbar(points.x, points.y, bars, **{"ms": 4, "capsize": 2.5, **line, **look})
        if label in shown:
            ends.append((last.x, last.y, label, line["color"]))
        elif label == ranked[-1]:
            ends.append((last.x, last.y, f"{len(ranked) - len(shown)} others", "#7b8794"))
    if len(ranked) > 1:
        label_ends(axes, ends)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write labels right of the axes, pushed apart, each joined to its point.

    Args:
        axes: With its final limits and scales in y.
        ends: x, y, text and colour of each.
    """
    axes.figure.draw_without_rendering()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    to_axes = axes.transData + axes.transAxes.inverted()
    labels = sorted((to_axes.transform(end[:2])[1], *end[:2], textwrap.fill(end[2], WRAP), end[3]) for end in ends)
    sizes = [LINE * (1 + text.count("\n")) / height for _, _, _, text, _ in labels]
    line = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    look = {"fontsize": 8, "linespacing": 1.0, "va": "center", "annotation_clip": False, "textcoords": "axes fraction"}
    for place, (_, x, y, text, colour) in zip(spread([label[0] for label in labels], sizes), labels, strict=True):
        arrow = {**line, "color": colour}
        axes.annotate(text, (x, y), xytext=(1.04, place), color=colour, arrowprops=arrow, **look)


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres near the wanted ones, so that neighbours do not overlap.

    Args:
        wanted: In ascending order, within [0, 1].
        sizes: Room that each needs.

    Returns:
        Ascending centres; below 0 only where the sizes exceed 1 together.
    """
    places, floor = [], 0.0
    for centre, size in zip(wanted, sizes, strict=True):
        places.append(max(centre, floor + size / 2))
        floor = places[-1] + size / 2
    ceiling = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling - sizes[index] / 2)
        ceiling = places[index] - sizes[index] / 2
    return places


def heat(cells: DataFrame, width: float, label: str, limits: tuple[float, float], text: bool = True) -> Any:
    """A heat map whose values can be read; NaN cells stay empty.

    Args:
        cells: Its rows, by their labels.
        width: Of the figure, in inches.
        label: Of the colour bar.
        limits: Values of the lightest and the darkest colour.
        text: Whether values are written into their cells.
    """
    labels = [textwrap.fill(row, WIDEST) for row in cells.index]
    lines = max(label.count("\n") for label in labels) + 1
    axes = new_axes(width, 1.3 + (0.16 + 0.13 * lines) * len(labels))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(labels)), labels)
    image = axes.imshow(cells, cmap="YlGnBu", aspect="auto", vmin=limits[0], vmax=limits[1])
    values = {place: value for place, value in np.ndenumerate(cells.to_numpy()) if value == value}
    broken = any(round(value, 1) % 1 for value in values.values())
    for (y, x), value in values.items() if text else ():
        colour = "white" if value - limits[0] > 0.55 * (limits[1] - limits[0]) else "#1f2933"
        digits = int(broken and value < 99.95)
        axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)
    axes.hlines([y - 0.5 for y in range(1, len(labels))], *axes.get_xlim(), color="white", lw=2)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return axes


def draw(arms: Sequence[Arm], metric: str, model: str = "") -> Iterator[Plot]:
    """All plots that a sweep has data for, of one model, which is named where there are several."""
    for plot in _draw(arms, metric):
        name, title = f"{plot.name}_{model.replace('/', '_')}", f"{model}: {plot.title}"
        yield plot._replace(name=name, title=title) if model else plot


def _draw(arms: Sequence[Arm], metric: str) -> Iterator[Plot]:
    known = frame(arms, removed="ratio/achieved", zeros="ratio/sparsity", retained=f"final/retained/{metric}")
    known[["removed", "zeros", "retained", "retained_spread"]] *= 100
    kept, ylabel = known.dropna(subset="retained"), f"retained {metric}, %"
    removed = "language-model parameters removed, %"
    yield from _retained(kept[kept.zeros.isna()], "removed", "retained", xlabel=removed, ylabel=ylabel)
    zeros = "weights of the decoder's linears that are zero, %"
    yield from _retained(kept.dropna(subset="zeros"), "zeros", "retained_masks", xlabel=zeros, ylabel=ylabel)
    costs = {column.name: column for column in columns(arms, metric)}
    for name, (file, title) in FRONTS.items():
        yield from _front(arms, metric, costs[f"final/{name}"], file, title)
    yield from _data_fraction(kept, ylabel)
    yield from _matrix(kept, metric)
    for kind, unit, what in (("groups", "heads", "KV groups"), ("channels", "MLP channels", "channels")):
        caption = f"Share of {what} that each layer keeps, %, first run of each configuration; 0: the layer is dropped."
        caption += " Where weights are masked: the share that is not zero." * any(known.zeros.notna())
        yield from _kept(arms, kind, f"Kept {unit} per layer", caption)
    yield from _training(arms)


def _limits(known: Any) -> tuple[float, float]:
    """Ends of a scale on which all means and their bars have room."""
    low, high = (min(known.retained - known.retained_spread), max(known.retained + known.retained_spread))
    margin = 0.05 * (high - low) + 0.2
    return low - margin, high + margin


def _curves(known: Any, x: Any, *along: str) -> Any:
    """Points of curves along some keys, in one panel, or one for each paradigm where they would be too many."""

    def labels(*keys: str) -> list[str]:
        return [arm.label(*keys) for arm in known.arm]

    together = known.paradigm.nunique() == 1 or len({*labels(*along)}) <= MOST_TOGETHER
    names = labels(*along) if together else labels(*along, "prune.name")
    points = known.assign(x=x, y=known.retained, spread=known.retained_spread, curve=names)
    return points.assign(panel="" if together else points.paradigm)


def _in_panels(points: Any, file: str, title: str, caption: str, limits: Any = None, **texts: Any) -> Iterator[Plot]:
    """A plot for each panel, on one scale where there are common limits."""
    for panel, own in points.groupby("panel", sort=False):
        axes = new_axes(ylim=limits or _limits(own), **texts)
        ranked = own.groupby("curve", sort=False).y.mean().sort_values(ascending=False, kind="stable")
        draw_curves(axes, own, [*ranked.index], [*points.curve.unique()])
        yield Plot(f"{file}_{panel}".rstrip("_"), f"{title}: {panel}".removesuffix(": "), caption, axes.figure)


def _retained(known: Any, ratio: str, file: str, **texts: str) -> Iterator[Plot]:
    known = known.dropna(subset=ratio)
    most = known.data.max()
    full = known[known.data.isin((0.0, most))]
    if full.series.is_unique:
        yield from _dots(known, file, texts["ylabel"])
        return
    caption = BARS + f" Recoveries with {100 * most:g} % of the data." * (len(full) < len(known))
    points, title = (_curves(full, full[ratio], *AXES), "Retained accuracy against what was removed")
    yield from _in_panels(points, file, title, caption, _limits(full), **texts)


def _dots(known: Any, file: str, label: str) -> Iterator[Plot]:
    """One row per arm, the best on top: for sweeps in which nothing is removed at more than one ratio."""
    shown = known.sort_values(["retained", "retained_spread", "label"]).tail(MOST_ROWS)
    if shown.empty:
        return
    labels = [textwrap.fill(label, WIDEST) for label in shown.label]
    height = 1.1 + sum(0.12 + 0.13 * (1 + label.count("\n")) for label in labels)
    axes = new_axes(height=height, xlabel=label, ylim=(-0.6, len(shown) - 0.4))
    for index, row in enumerate(shown.itertuples()):
        bar = row.retained_spread or None
        axes.errorbar(row.retained, index, xerr=bar, fmt="o", ms=5, capsize=3, color=CYCLE[0])
    axes.set_yticks(range(len(shown)), labels)
    yield Plot(file, "Retained accuracy", BARS + _no_room(len(known) - len(shown)), axes.figure)


def _no_room(more: int) -> str:
    return f" {more} more configurations have no room." * bool(more)


def _data_fraction(known: Any, label: str) -> Iterator[Plot]:
    known = known.loc[["data_frac" in arm.settings for arm in known.arm]]
    points = _curves(known, 100 * known.data, "data_frac")
    points = points[points.groupby(["panel", "curve"]).x.transform("size") > 1]
    ticks = {share: f"{share:g}" for share in sorted({*points.x})}
    texts = {"xscale": "log", "xticks": [*ticks], "xticklabels": ticks.values(), "ylabel": label}
    title, xlabel = ("Retained accuracy against recovery data", "share of the recovery data, %")
    yield from _in_panels(points, "data_fraction", title, BARS, xlabel=xlabel, **texts)


def _front(arms: Sequence[Arm], metric: str, cost: Column, file: str, title: str) -> Iterator[Plot]:
    """A scatter of the score against a cost, with the Pareto front."""
    scale, sign = score_scale(arms, metric)
    points = frame(arms, x=cost.name, y=f"final/{metric}").dropna(subset=["x", "y"])
    points[["x", "y"]] *= [cost.scale, scale]
    if points.empty or (len(points) > 1 and max(points.x) - min(points.x) <= ALIKE * max(points.x)):
        return
    axes = new_axes(xlabel=cost.head, ylabel=f"{metric}{sign}")
    base = (arms[0].mean(cost.name.replace("final/", "base/")), arms[0].mean(f"base/{metric}"))
    if base[0] and base[1]:
        place, look = ((cost.scale * base[0][0], scale * base[1][0]), {"ha": "center", "fontsize": 8})
        axes.plot(*place, marker="*", ms=11, color=INK, ls="none")
        halo = [withStroke(linewidth=3, foreground="white")]
        axes.annotate("base", place, xytext=(0, -13), textcoords="offset points", path_effects=halo, **look)
    styles = {series: style(index) for index, series in enumerate(points.series.unique())}
    for point in points.itertuples():
        axes.plot(point.x, point.y, ls="none", ms=5, **styles[point.series])
    front = points.loc[pareto(points.assign(y=-points.y) if lower_is_better(metric) else points).index]
    axes.plot(front.x, front.y, color=FAINT, lw=1.2, ls="--", zorder=0, drawstyle="steps-post")
    axes.margins(0.08)
    named = front.iloc[:: -(-len(front) // len(CYCLE))]
    label_ends(axes, [(p.x, p.y, p.label, styles[p.series]["color"]) for p in named.itertuples()])
    caption = "The last stage of each configuration; named are those that no other beats in both (the Pareto front)."
    yield Plot(file, f"Accuracy against {title}", caption, axes.figure)


def pareto(points: Any) -> Any:
    """The rows of a data frame that no other one beats: lower ``x``, higher ``y``; ascending."""
    ranked = points.sort_values(["x", "y"], ascending=[True, False])
    return ranked[ranked.y > ranked.y.cummax().shift(fill_value=-math.inf)]


def _matrix(known: Any, metric: str) -> Iterator[Plot]:
    """The retained score of every recovery, with at least two recoveries."""
    known = known.assign(recovery=[arm.settings.get("recover.name") for arm in known.arm])
    rows = {arm.label("recover.name"): {*arm.words("recover.name")} for arm in known.arm[known.recovery != "none"]}
    cells = DataFrame(index=[*rows][:MOST_ROWS], columns=known.recovery.unique(), dtype=float)
    if len(cells.columns) < 2:
        return
    for arm, recovery, retained in zip(known.arm, known.recovery, known.retained, strict=True):
        own, words = arm.label("recover.name"), {*arm.words("recover.name")}
        for row in cells.index:
            # A run without recovery has no share of data: it stands in the row of every share.
            if row == own or (recovery == "none" and words <= rows[row]):
                cells.loc[row, recovery] = retained
    axes = heat(cells, 2.6 + 0.85 * len(cells.columns), "retained, %", (cells.min().min(), cells.max().max()))
    axes.set_xticks(range(len(cells.columns)), cells.columns)
    caption = f"Retained {metric}, %, mean over seeds; a row per configuration, a column per recovery."
    yield Plot("matrix", "Recovery matrix", caption, axes.figure)


def _kept(arms: Sequence[Arm], kind: str, title: str, caption: str) -> Iterator[Plot]:
    """What every layer keeps, a row per plan; ``kind`` is ``groups`` or ``channels``."""
    plans: dict[str, list[float]] = {}
    for arm in arms:
        label = arm.label("data_frac", *(key for key in arm.settings if key.startswith("recover.")))
        if row := plans.get(label) or kept_shares(arm.runs[0].folder, kind):
            plans[label] = row
    if not plans:
        return
    cells = DataFrame.from_dict(plans, orient="index").head(MOST_STRIPS)
    depth = len(cells.columns)
    axes = heat(cells, 6.2, "kept, %", (0, 100), text=depth <= MOST_TEXT)
    axes.set(xlabel="layer", xticks=range(0, depth, max(1, -(-depth // 16))))
    yield Plot(f"kept_{kind}", title, caption + _no_room(len(plans) - len(cells)), axes.figure)


def _training(arms: Sequence[Arm]) -> Iterator[Plot]:
    """A panel per recovery, since their losses are not of one kind."""
    logs = [DataFrame(columns=["recovery"])]
    for arm in arms:
        try:
            rows = read_curve(arm.runs[0].folder)
        except UserError as error:
            log.warning("%s; its curve is left out", error)
            continue
        curve = DataFrame(rows, columns=["step", "recover/loss"]).set_axis(["x", "y"], axis=1)
        curve = curve[curve.y.abs() < math.inf]
        if len(curve) > 1:
            recovery = str(arm.runs[0].config.get("recover.name", "recovery"))
            label = arm.label("recover.name") if arm.settings else recovery
            points = {"x": curve.x + 1, "y": smoothed(curve.y), "spread": 0, "curve": label, "recovery": recovery}
            logs.append(DataFrame(points))
    for recovery, points in concat(logs).groupby("recovery", sort=False):
        axes = new_axes(xlabel="optimiser step", ylabel="recovery loss")
        if 0 < 10 * points.y.min() < points.y.max():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        ranked = [*points.groupby("curve", sort=False).y.last().sort_values(kind="stable").index]
        draw_curves(axes, points, ranked, ranked, 1.3, marker="")
        caption = "First run of each configuration, exponential mean over about ten logged steps."
        yield Plot(f"training_{recovery}", f"Training: {recovery}", caption, axes.figure)


def smoothed(values: Any) -> Any:
    """Exponential mean of a series without the bias of its start: the first value is itself."""
    return values.ewm(alpha=0.1).mean()
