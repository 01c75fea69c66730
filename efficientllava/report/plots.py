"""Plots over the runs of a sweep; each is left out where the sweep has nothing for it.

What the plots of a report share: figures, colours, and labels that stand beside their curves.

Heat maps over the runs of a sweep: recoveries against configurations, and what each layer keeps.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..record import metric_keys, read_curve
from ..settings.schema import GGUF_TYPES
from .runs import (
    AXES,
    Arm,
    data_share,
    in_units,
    score_scale,
)

MOST_ROWS = 40  # of a dot plot
CYCLE = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3a3a3a", "#00918f", "#c2185b", "#5d7183", "#7f5539")
MARKS = "osD^vPX*<>"
FAINT = "#b4bec9"
LINE = 11.0  # points that a line of a label takes
WRAP = 26  # characters of a line of a label

Point = tuple[float, float, float]  # x, mean, standard deviation


def new_axes(width: float = 5.6, height: float = 3.9) -> Any:
    """Axes of a figure of their own, in inches, with a faint grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(color="#e3e7ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    return axes


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the series with this index."""
    return {"color": CYCLE[index % len(CYCLE)], "marker": MARKS[index // len(CYCLE) % len(MARKS)]}


def halo() -> list[Any]:
    """Path effects that keep a text readable above lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def draw_curves(axes: Any, curves: Mapping[str, Sequence[Point]], styles: Sequence[str]) -> None:
    """Curves with error bars, labelled at their right ends; beyond ten, the lower ones are faint and share a label.

    Args:
        axes: Where to.
        curves: Points in ascending x, by label.
        styles: Labels in the order of their colours, over all panels of a plot.
    """
    ranked = sorted(curves, key=lambda label: -sum(y for _, y, _ in curves[label]) / len(curves[label]))
    shown, ends = ranked[: len(CYCLE)], []
    for label in reversed(ranked):
        x, y, spread = zip(*curves[label], strict=True)
        look = style(styles.index(label)) if label in shown else {"color": FAINT, "marker": "."}
        axes.errorbar(
            x, y, spread if any(spread) else None, lw=1.6 if label in shown else 0.8, ms=4, capsize=2.5, **look
        )
        if label in shown:
            ends.append((x[-1], y[-1], label, look["color"]))
    if len(ranked) > len(shown):
        x, y, _ = curves[ranked[-1]][-1]
        ends.append((x, y, f"{len(ranked) - len(shown)} others", "#7b8794"))
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
    labels = sorted(
        (to_axes.transform((x, y))[1], x, y, textwrap.fill(text, WRAP), colour) for x, y, text, colour in ends
    )
    sizes = [LINE * (1 + text.count("\n")) / height for _, _, _, text, _ in labels]
    for place, (_, x, y, text, colour) in zip(spread([label[0] for label in labels], sizes), labels, strict=True):
        line = {
            "arrowstyle": "-",
            "color": colour,
            "lw": 0.6,
            "alpha": 0.5,
            "shrinkA": 0,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        }
        at = {"xytext": (1.04, place), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), fontsize=8, linespacing=1.0, color=colour, arrowprops=line, **at)


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


def heat(axes: Any, cells: Sequence[Sequence[float]], label: str, limits: tuple[float, float], text: bool) -> None:
    """A heat map whose values can be read; NaN cells stay empty.

    Args:
        axes: Where to.
        cells: Rows.
        label: Of the colour bar.
        limits: Values of the lightest and the darkest colour.
        text: Whether values are written into their cells.
    """
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    image = axes.imshow(cells, cmap="YlGnBu", aspect="auto", vmin=limits[0], vmax=limits[1])
    broken = any(round(value, 1) % 1 for row in cells for value in row if value == value)
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if text and value == value:
                dark = value - limits[0] > 0.55 * (limits[1] - limits[0])
                digits = int(broken and value < 99.95)
                colour = "white" if dark else "#1f2933"
                axes.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)
    for index in range(1, len(cells)):
        axes.axhline(index - 0.5, color="white", lw=2)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


MOST_STRIPS = 20  # arms whose kept units are drawn
MOST_TEXT = 10  # layers up to which values are written into the cells
WIDEST = 40  # characters of a line beside a map


def matrix(arms: Sequence[Arm], metric: str) -> Any:
    """Axes with the retained score of every recovery; None with fewer than two recoveries."""
    known = [arm for arm in arms if arm.mean("retained", metric, last=True)]
    columns = list(dict.fromkeys(arm.settings.get("recover.name") for arm in known))
    taught = [arm for arm in known if arm.settings.get("recover.name") != "none"] or known
    rows = dict(list({_row(arm): arm.label("recover.name") for arm in taught}.items())[:MOST_ROWS])
    if len(columns) < 2:
        return None
    cells = [[float("nan")] * len(columns) for _ in rows]
    for arm in known:
        for index, row in enumerate(rows):
            # A run without recovery has no share of data: it stands in the row of every share.
            if row == _row(arm) or (arm.settings["recover.name"] == "none" and {*_row(arm)} <= {*row}):
                mean, _ = arm.mean("retained", metric, last=True) or (float("nan"), 0.0)
                cells[index][columns.index(arm.settings["recover.name"])] = 100 * mean
    values = [value for row in cells for value in row if value == value]
    axes = new_axes(2.6 + 0.85 * len(columns), 1.0 + 0.34 * len(rows))
    heat(axes, cells, "retained, %", (min(values), max(values)), text=True)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, WIDEST) for label in rows.values()])
    return axes


def _row(arm: Arm) -> tuple[str, ...]:
    return arm.words("recover.name")


def kept(arms: Sequence[Arm], kind: str) -> tuple[Any, int] | None:
    """What every layer keeps, a row per plan; None where nothing was pruned.

    Args:
        arms: Arms of the sweep.
        kind: ``groups`` or ``channels``.

    Returns:
        Axes, and how many plans had no room.
    """
    plans: dict[str, list[float]] = {}
    for arm in arms:
        label = arm.label("data_frac", *(key for key in arm.settings if key.startswith("recover.")))
        row = plans.get(label) or shares(arm.runs[0].folder, kind)
        if row:
            plans[label] = row
    rows = list(plans.items())[:MOST_STRIPS]
    if not rows:
        return None
    depth = max(len(row) for _, row in rows)
    labels = [textwrap.fill(label, WIDEST) for label, _ in rows]
    lines = max(label.count("\n") for label in labels) + 1
    axes = new_axes(6.2, 1.3 + (0.16 + 0.13 * lines) * len(rows))
    cells = [row + [float("nan")] * (depth - len(row)) for _, row in rows]
    heat(axes, cells, "kept, %", (0, 100), text=depth <= MOST_TEXT)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xticks(range(0, depth, max(1, -(-depth // 16))))
    axes.set(xlabel="layer")
    return axes, len(plans) - len(rows)


def shares(folder: Path, kind: str) -> list[float] | None:
    """What every layer of a run keeps, in percent; 0 for a dropped layer.

    Args:
        folder: The run's folder, with ``plan.json``, and ``search.json`` where weights were masked.
        kind: ``groups``, or the weights of the attention that are not masked; ``channels``, or those of the MLP.

    Returns:
        None where nothing was pruned, or an earlier version wrote the plan: it does not say how many units there were.
    """
    file = folder / "plan.json"
    plan = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if "sparsity" in (plan.get("details") or {}):
        return _unmasked(folder / "search.json", "attention" if kind == "groups" else "mlp")
    if not plan.get("source_units"):
        return None
    kept, whole = {layer["index"]: len(layer[kind]) for layer in plan["layers"]}, int(kind == "channels")
    if kind == "groups":  # in query heads, of which every KV group has as many
        kept |= {v["index"]: len(v["heads"]) / plan["heads_per_group"] for v in plan["layers"] if v.get("heads")}
    return [100 * kept.get(index, 0) / units[whole] for index, units in enumerate(plan["source_units"])]


def _unmasked(file: Path, kind: str) -> list[float]:
    record = json.loads(file.read_text("utf-8"))
    genes = zip(record["genes"], record["best"], strict=True)
    return [100 * (1 - gene["amounts"][level]) for gene, level in genes if gene["kind"] == kind]


MOST_TOGETHER = 5  # series in one panel; more get a panel for each paradigm
ALIKE = 0.005  # costs that differ by no more are one
REMOVED, ZEROS = ("ratio", "achieved"), ("ratio", "sparsity")  # of structured plans and of masks
Curves = dict[str, list[Point]]


@dataclass(frozen=True)
class Plot:
    """One figure.

    Args:
        name: File name without ending.
        title: What it shows.
        caption: How to read it.
        figure: The matplotlib figure.
    """

    name: str
    title: str
    caption: str
    figure: Any


def draw(arms: Sequence[Arm], metric: str, model: str = "") -> Iterator[Plot]:
    """All plots that a sweep has data for.

    Args:
        arms: Arms of one model.
        metric: ``task/metric``, such as ``digits_vqa/accuracy``.
        model: Its name, where the sweep has several.
    """
    for plot in _draw(arms, metric):
        name, title = f"{plot.name}_{model.replace('/', '_')}", f"{model}: {plot.title}"
        yield replace(plot, name=name, title=title) if model else plot


def _draw(arms: Sequence[Arm], metric: str) -> Iterator[Plot]:
    masked = [arm for arm in arms if arm.values(*ZEROS)]
    whole = [arm for arm in arms if arm not in masked]
    yield from _retained(whole, metric, REMOVED, "retained", "language-model parameters removed, %")
    yield from _retained(masked, metric, ZEROS, "retained_masks", "weights of the decoder's linears that are zero, %")
    yield from _front(arms, metric, ("latency_ms", "decode"), "latency", "decode latency", (1, "ms per token"))
    unit, name = in_units(
        [size for arm in arms for size in arm.values("stages", "base", "checkpoint_bytes")], 1024, "iB"
    )
    yield from _front(arms, metric, ("checkpoint_bytes",), "bytes", "size", (unit, f"checkpoint, {name}"))
    for kind in GGUF_TYPES:
        place, named = ("gguf", kind), f"in llama.cpp, {kind}"
        size = unit, f"file of the decoder, {kind}, {name}"
        yield from _front(arms, metric, (*place, "bytes"), f"gguf_{kind}_bytes", f"size {named}", size)
        speed = 1.0, f"{kind}, ms of CPU per token"
        yield from _front(arms, metric, (*place, "decode_ms"), f"gguf_{kind}_decode", f"decoding {named}", speed)
    yield from _data_fraction(arms, metric)
    caption = f"Retained {metric}, %, mean over seeds; a row per configuration, a column per recovery."
    if axes := matrix(arms, metric):
        yield Plot("matrix", "Recovery matrix", caption, axes.figure)
    for kind, title, what in (
        ("groups", "Kept heads per layer", "KV groups"),
        ("channels", "Kept MLP channels per layer", "channels"),
    ):
        if found := kept(arms, kind):
            axes, more = found
            caption = f"Share of {what} that each layer keeps, %, first run of each configuration; 0: the layer is "
            caption += "dropped." + " Where weights are masked: the share that is not zero." * bool(masked)
            caption += f" {more} more configurations have no room." * bool(more)
            yield Plot(f"kept_{kind}", title, caption, axes.figure)
    yield from _training(arms)


def _left(arm: Arm, metric: str) -> tuple[float, float]:
    """What an arm retains, in percent: mean and deviation."""
    mean, deviation = arm.mean("retained", metric, last=True) or (0.0, 0.0)
    return 100 * mean, 100 * deviation


def _limits(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Ends of a scale on which all means and their bars have room."""
    low, high = min(mean - spread for mean, spread in values), max(mean + spread for mean, spread in values)
    margin = 0.05 * (high - low) + 0.2
    return low - margin, high + margin


def _by_paradigm(arms: Sequence[Arm], series: Callable[[Arm], str]) -> dict[str, list[Arm]]:
    """All arms together, or by paradigm where they would be too many series."""
    names = dict.fromkeys(str(arm.settings.get("prune.name")) for arm in arms)
    if len(names) == 1 or len({series(arm) for arm in arms}) <= MOST_TOGETHER:
        return {"": list(arms)}
    return {name: [arm for arm in arms if str(arm.settings.get("prune.name")) == name] for name in names}


def _retained(arms: Sequence[Arm], metric: str, ratio: Sequence[str], file: str, label: str) -> Iterator[Plot]:
    known = [arm for arm in arms if arm.mean("retained", metric, last=True) and arm.mean(*ratio)]
    if not known:
        return
    title, caption = "Retained accuracy against what was removed", "Mean over seeds; bars: one standard deviation."
    most = max(map(data_share, known))
    full = [arm for arm in known if data_share(arm) in (0.0, most)]
    if len({arm.label(*AXES) for arm in full}) == len(full):
        axes, more = _dots(known, metric)
        caption += f" {more} more configurations have no room." * bool(more)
        yield Plot(file, "Retained accuracy", caption, axes.figure)
        return
    caption += f" Recoveries with {100 * most:g} % of the data." * (len(full) < len(known))
    panels = _by_paradigm(full, lambda arm: arm.label(*AXES))
    hidden = AXES if len(panels) == 1 else (*AXES, "prune.name")
    styles = list(dict.fromkeys(arm.label(*hidden) for arm in full))
    limits = _limits([_left(arm, metric) for arm in full])
    for name, group in panels.items():
        curves: Curves = {}
        for arm in group:
            removed, _ = arm.mean(*ratio) or (0, 0)
            curves.setdefault(arm.label(*hidden), []).append((100 * removed, *_left(arm, metric)))
        axes = new_axes()
        axes.set(ylim=limits, ylabel=f"retained {metric}, %", xlabel=label)
        draw_curves(axes, {label: sorted(points) for label, points in curves.items()}, styles)
        yield Plot(f"{file}_{name}".rstrip("_"), f"{title}: {name}".removesuffix(": "), caption, axes.figure)


def _dots(arms: Sequence[Arm], metric: str) -> tuple[Any, int]:
    """One row per arm, the best on top: for sweeps in which nothing is removed at more than one ratio."""
    rows = sorted((_left(arm, metric), arm.label()) for arm in arms)
    shown = rows[-MOST_ROWS:]
    labels = [textwrap.fill(label, WIDEST) for _, label in shown]
    axes = new_axes(height=1.1 + sum(0.12 + 0.13 * (1 + label.count("\n")) for label in labels))
    for index, ((mean, deviation), _) in enumerate(shown):
        axes.errorbar(mean, index, xerr=deviation or None, fmt="o", ms=5, capsize=3, color=CYCLE[0])
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlabel=f"retained {metric}, %", ylim=(-0.6, len(shown) - 0.4))
    return axes, len(rows) - len(shown)


def _data_fraction(arms: Sequence[Arm], metric: str) -> Iterator[Plot]:
    known = [arm for arm in arms if "data_frac" in arm.settings and arm.mean("retained", metric, last=True)]
    for name, group in _by_paradigm(known, lambda arm: arm.label("data_frac")).items():
        hidden = ("data_frac", "prune.name") if name else ("data_frac",)
        curves: Curves = {}
        for arm in group:
            curves.setdefault(arm.label(*hidden), []).append((100 * arm.settings["data_frac"], *_left(arm, metric)))
        curves = {label: sorted(points) for label, points in curves.items() if len(points) > 1}
        if not curves:
            continue
        axes = new_axes()
        axes.set(xscale="log", xlabel="share of the recovery data, %", ylabel=f"retained {metric}, %")
        shares = sorted({x for points in curves.values() for x, _, _ in points})
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.minorticks_off()
        axes.autoscale_view()
        axes.set_ylim(_limits([(y, spread) for points in curves.values() for _, y, spread in points]))
        draw_curves(axes, curves, list(curves))
        title, caption = "Retained accuracy against recovery data", "Mean over seeds; bars: one standard deviation."
        yield Plot(f"data_fraction_{name}".rstrip("_"), f"{title}: {name}".removesuffix(": "), caption, axes.figure)


def _front(
    arms: Sequence[Arm], metric: str, path: Sequence[str], name: str, title: str, scale: tuple[float, str]
) -> Iterator[Plot]:
    """A scatter of the score against a cost, with the Pareto front."""
    where, (unit, label) = metric_keys(metric), scale
    factor, sign = score_scale(arms, metric)
    points = [
        (cost[0] / unit, factor * value[0], arm)
        for arm in arms
        if (cost := arm.mean(*path, last=True)) and (value := arm.mean(*where, last=True))
    ]
    costs = [cost for cost, _, _ in points]
    if not points or (len(points) > 1 and max(costs) - min(costs) <= ALIKE * max(costs)):
        return
    axes = new_axes()
    base = [arms[0].mean("stages", "base", *keys) for keys in (path, where)]
    if base[0] and base[1]:
        place = base[0][0] / unit, factor * base[1][0]
        axes.plot(*place, marker="*", ms=11, color="#3a3a3a", ls="none")
        axes.annotate(
            "base", place, xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8, path_effects=halo()
        )
    series = list(dict.fromkeys(arm.label(*AXES) for _, _, arm in points))
    for x, y, arm in points:
        axes.plot(x, y, ls="none", ms=5, **style(series.index(arm.label(*AXES))))
    front = pareto([point[:2] for point in points])
    axes.plot(*zip(*front, strict=True), color=FAINT, lw=1.2, ls="--", zorder=0, drawstyle="steps-post")
    axes.set(xlabel=label, ylabel=f"{metric}{sign}")
    axes.margins(0.08)
    best = {(x, y): arm for x, y, arm in points}
    named = front if len(front) <= len(CYCLE) else front[:: -(-len(front) // len(CYCLE))]
    label_ends(axes, [(*p, best[p].label(), style(series.index(best[p].label(*AXES)))["color"]) for p in named])
    caption = "The last stage of each configuration; named are those that no other beats in both (the Pareto front)."
    yield Plot(name, f"Accuracy against {title}", caption, axes.figure)


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


def _training(arms: Sequence[Arm]) -> Iterator[Plot]:
    """A panel per recovery, since their losses are not of one kind."""
    from matplotlib.ticker import LogLocator

    logs: dict[str, Curves] = {}
    for arm in arms:
        curve = [row for row in read_curve(arm.runs[0].folder) if math.isfinite(row.get("recover/loss", math.nan))]
        if len(curve) > 1:
            losses = smoothed([row["recover/loss"] for row in curve])
            recovery = str(arm.runs[0].config.get("recover.name", "recovery"))
            points = [(row["step"] + 1, loss, 0.0) for row, loss in zip(curve, losses, strict=True)]
            logs.setdefault(recovery, {})[arm.label("recover.name") if arm.settings else recovery] = points
    for recovery, curves in logs.items():
        axes = new_axes()
        axes.set(xlabel="optimiser step", ylabel="recovery loss")
        losses = [loss for curve in curves.values() for _, loss, _ in curve]
        if 0 < 10 * min(losses) < max(losses):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        ranked = sorted(curves, key=lambda label: curves[label][-1][1])
        for index, label in enumerate(ranked):
            x, y, _ = zip(*curves[label], strict=True)
            shown = index < len(CYCLE)
            axes.plot(x, y, lw=1.3 if shown else 0.7, color=CYCLE[index] if shown else FAINT)
        if len(curves) > 1:
            ends = [(*curves[label][-1][:2], label, CYCLE[i]) for i, label in enumerate(ranked[: len(CYCLE)])]
            label_ends(axes, ends)
        caption = "First run of each configuration, exponential mean over about ten logged steps."
        yield Plot(f"training_{recovery}", f"Training: {recovery}", caption, axes.figure)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the bias of its start: the first value is itself.

    Args:
        values: Any.
        weight: Of the past, in [0, 1).
    """
    means, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        means.append(total / norm)
    return means
