"""Plots over the runs of a sweep; each is left out where the sweep has nothing for it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..curves import read_curve
from ..results import metric_keys
from ..schema import GGUF_TYPES
from .drawing import CYCLE, FAINT, Point, draw_curves, halo, label_ends, new_axes, style
from .maps import WIDEST, kept, matrix
from .runs import AXES, Arm, data_share, in_units, score_scale

MOST_ROWS = 40  # of a dot plot
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
