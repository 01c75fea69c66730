"""What the plots of a report share: figures, colours, and labels that stand beside their curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

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
