"""The pictures of a policy search, from its record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEST, MEAN, DENSE = "#1b6ca8", "#9aa5b1", "#444444"


def draw_search(record: Mapping[str, Any], path: Path) -> None:
    """Draw objective per generation, ratio per layer, and risk against gap.

    Args:
        record: Content of ``search.json``, see `efficientllava.search.module`.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    history, strip, scatter = figure.subplots(1, 3, width_ratios=(1.1, 1.2, 1.1))
    _history(history, record)
    _strip(figure, strip, record)
    _scatter(figure, scatter, record)
    figure.savefig(path)


def _history(axes: Any, record: Mapping[str, Any]) -> None:
    entries = record["history"]
    steps = range(len(entries))
    axes.plot(steps, [entry["best"] for entry in entries], color=BEST, label="best so far")
    means = [(step, entry["mean"]) for step, entry in zip(steps, entries, strict=True) if entry["mean"] is not None]
    axes.plot(*zip(*means, strict=True), color=MEAN, label="mean of a generation")
    # The first generation is far worse than all later ones: what it would need of the scale hides their progress.
    first, last = entries[0]["best"], entries[-1]["best"]
    top = max(2 * first - last, statistics.median(mean for _, mean in means))
    if top > last:
        axes.set_ylim(last - 0.05 * (top - last), top + 0.15 * (top - last))
    for step in steps[1:]:
        if entries[step]["theta"] != entries[step - 1]["theta"]:
            axes.axvline(step, color=DENSE, lw=0.8, ls=":")
    axes.set(
        title="search", xlabel="generation (dotted: projector evolved)", ylabel="objective, s.d. from the first mean"
    )
    axes.legend(frameon=False, loc="upper right")


def _strip(figure: Any, axes: Any, record: Mapping[str, Any]) -> None:
    genes, best = record["genes"], record["best"]
    kinds = ("attention", "mlp")
    removed = [
        [gene["amounts"][level] for gene, level in zip(genes, best, strict=True) if gene["kind"] == kind]
        for kind in kinds
    ]
    image = axes.imshow([[100 * share for share in row] for row in removed], cmap="YlGnBu", vmin=0, vmax=100)
    axes.set_aspect("auto")
    axes.set_box_aspect(0.4)
    depth = len(removed[0])
    if depth <= 12:
        for row, shares in enumerate(removed):
            for column, share in enumerate(shares):
                colour = "white" if share > 0.55 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, depth, max(1, depth // 8)))
    axes.set(title="chosen policy", xlabel="layer")
    figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.08, label="removed, %")


def _scatter(figure: Any, axes: Any, record: Mapping[str, Any]) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

    risk = record["settings"]["risk"]
    names = {"loss": "answer loss, nats per token", "kl": "KL to the dense model, nats", "error": "wrong answers"}
    points = record.get("holdout") or []
    if points:
        values = [point["holdout_loss"] for point in points]
        shown = axes.scatter(
            [point["gap"] for point in points],
            [point["risk"][risk] for point in points],
            c=values,
            cmap="viridis_r",
            norm=LogNorm() if min(values) > 0 else None,
        )
        bar = figure.colorbar(shown, ax=axes, label="loss on held-out samples, nats per token")
        if min(values) > 0:
            bar.locator, bar.formatter = LogLocator(subs=(1, 2, 5)), FormatStrFormatter("%g")
            bar.minorticks_off()
    else:
        whole = [entry for entry in record["policies"] if entry["share"] == 1.0]
        axes.scatter([entry["gap"] for entry in whole], [entry[risk] for entry in whole], color=MEAN, s=12)
    axes.axhline(record["dense"][risk], color=DENSE, lw=0.8, ls="--", label="dense")
    axes.set(title="empirical risk and gap", xlabel=f"generalization gap, {record['gap']}", ylabel=names[risk])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(frameon=False)
