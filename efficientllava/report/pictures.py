"""The pictures of one run: what its models say to the same test images, and its policy search."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from ..data.records import Record, open_image
from ..runtime import whole_file
from . import KINDS

Answer = tuple[str, float | None]
SHOWN = 8
HALF = 0.5
COLUMNS = 2
RIGHT, WRONG = "#1a7f37", "#cf222e"
INK, FAINT = "#1f2328", "#6e7781"
CARD = {"facecolor": "#f6f8fa", "edgecolor": "#d0d7de", "boxstyle": "round,pad=0,rounding_size=0.08", "clip_on": False}
CARD_WIDTH, CARD_HEIGHT, GAP = 6.2, 1.95, 0.14  # inches
NEAREST_BELOW = 128  # pixels; smaller images are enlarged without smoothing
BEST, MEAN, DENSE = "#1b6ca8", "#9aa5b1", "#444444"
RISKS = {"loss": "answer loss, nats per token", "kl": "KL to the dense model, nats", "error": "wrong answers"}


def choose(records: Sequence[Record]) -> list[int]:
    """Pick questions with an image to show: the first of each type in turn, whatever was answered.

    Args:
        records: Questions: records of one turn.

    Returns:
        Ascending indices into ``records``; fewer than `SHOWN` if there are not enough.
    """
    by_kind: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record.image is not None:
            by_kind.setdefault(record.turns[0].kind, []).append(index)
    in_turn = [index for turn in zip_longest(*by_kind.values()) for index in turn if index is not None]
    return sorted(in_turn[:SHOWN])


def draw_samples(records: Sequence[Record], answers: Mapping[str, Sequence[Answer]], path: Path) -> None:
    """Draw test images with the question, the reference and every model's answer: green if right, red if wrong.

    Args:
        records: Questions: records of one turn, of which `choose` picks.
        answers: Per stage (``base``, ``pruned``, ``recovered``) one answer per record, with its score in [0, 1] (right
            above one half), or None where there is none.
        path: PNG to write.

    Raises:
        UserError: If the file cannot be written.
    """
    chosen = choose(records)
    columns = min(COLUMNS, max(1, len(chosen)))
    rows = max(1, -(-len(chosen) // columns))
    width, height = columns * (CARD_WIDTH + GAP) + GAP, rows * (CARD_HEIGHT + GAP) + GAP
    gaps = {"wspace": GAP / CARD_WIDTH, "hspace": GAP / CARD_HEIGHT}
    edges = {"left": GAP / width, "right": 1 - GAP / width, "bottom": GAP / height, "top": 1 - GAP / height}
    figure = Figure(figsize=(width, height), facecolor="#ffffff")
    cards = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=gaps | edges).flat)
    for axes in cards:
        axes.axis("off")
    for axes, index in zip(cards, chosen, strict=False):
        _card(axes, records[index], {stage: given[index] for stage, given in answers.items()})
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _card(axes: Any, record: Record, answers: Mapping[str, Answer]) -> None:
    """One question: the image, the question, the reference, and a line per model; in inches from the upper left."""
    axes.set(xlim=(0, CARD_WIDTH), ylim=(CARD_HEIGHT, 0))
    axes.add_artist(FancyBboxPatch((0, 0), CARD_WIDTH, CARD_HEIGHT, linewidth=0.8, zorder=0, **CARD))
    image, side = open_image(record), CARD_HEIGHT - 0.3
    if image is not None:
        edges = (0.15 / CARD_WIDTH, 0.15 / CARD_HEIGHT, side / CARD_WIDTH, side / CARD_HEIGHT)
        place = axes.inset_axes(edges)
        place.imshow(image, interpolation="nearest" if max(image.size) < NEAREST_BELOW else "antialiased")
        place.axis("off")
    turn = record.turns[0]
    left, step = CARD_HEIGHT + 0.12, 0.27
    write = partial(axes.text, parse_math=False)  # people and models put $ where they like
    for number, line in enumerate(textwrap.wrap(turn.question, 40, max_lines=2, placeholder=" …")):
        write(left, 0.36 + 0.23 * number, line, size=12, color=INK, weight="bold")
    rows = [("reference", turn.answer, INK, "")]
    for stage, (answer, score) in answers.items():
        colour, mark = (INK, "") if score is None else (RIGHT, "✓") if score > HALF else (WRONG, "✗")
        rows.append((stage, answer, colour, mark))
    for number, (label, answer, colour, mark) in enumerate(reversed(rows)):
        y = CARD_HEIGHT - 0.24 - step * number
        text = textwrap.shorten(answer, 28, placeholder=" …") if answer.strip() else "(nothing)"
        write(left, y, label, size=10, color=FAINT)
        write(left + 0.92, y, mark, size=11, color=colour, weight="bold")
        write(left + 1.14, y, text, size=11, color=colour, weight="bold" if mark else "normal")


def draw_search(record: Mapping[str, Any], path: Path) -> None:
    """Draw objective per generation, ratio per layer, and risk against gap.

    Args:
        record: Content of ``search.json``, see `efficientllava.search.module`.
        path: PNG to write.
    """
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    history, strip, scatter = figure.subplots(1, 3, width_ratios=(1.1, 1.2, 1.1))
    _history(history, record["history"])
    _strip(strip, record)
    _scatter(scatter, record)
    figure.savefig(path)


def _history(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    means = {step: entry["mean"] for step, entry in enumerate(entries) if entry["mean"] is not None}
    axes.plot([entry["best"] for entry in entries], color=BEST, label="best so far")
    axes.plot([*means], [*means.values()], color=MEAN, label="mean of a generation")
    # The first generation is far worse than all later ones: what it would need of the scale hides their progress.
    first, last = entries[0]["best"], entries[-1]["best"]
    top = max(2 * first - last, statistics.median(means.values()))
    if top > last:
        axes.set_ylim(last - 0.05 * (top - last), top + 0.15 * (top - last))
    for step in range(1, len(entries)):
        if entries[step]["theta"] != entries[step - 1]["theta"]:
            axes.axvline(step, color=DENSE, lw=0.8, ls=":")
    axes.set(title="search", xlabel="generation (dotted: projector evolved)")
    axes.set_ylabel("objective, s.d. from the first mean")
    axes.legend(frameon=False, loc="upper right")


def _strip(axes: Any, record: Mapping[str, Any]) -> None:
    genes, kinds = ([*zip(record["genes"], record["best"], strict=True)], KINDS.values())
    removed = [[100 * gene["amounts"][level] for gene, level in genes if gene["kind"] == kind] for kind in kinds]
    image = axes.imshow(removed, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axes.set_box_aspect(0.4)
    depth = len(removed[0])
    for row, shares in enumerate(removed if depth <= 12 else ()):
        for column, share in enumerate(shares):
            colour = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, depth, max(1, depth // 8)))
    axes.set(title="chosen policy", xlabel="layer")
    axes.figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.08, label="removed, %")


def _scatter(axes: Any, record: Mapping[str, Any]) -> None:
    risk, points = record["settings"]["risk"], record.get("holdout") or []
    if points:
        losses = [point["holdout_loss"] for point in points]
        positive = min(losses) > 0
        at = ([point["gap"] for point in points], [point["risk"][risk] for point in points])
        shown = axes.scatter(*at, c=losses, cmap="viridis_r", norm=LogNorm() if positive else None)
        bar = axes.figure.colorbar(shown, ax=axes, label="loss on held-out samples, nats per token")
        if positive:
            bar.locator, bar.formatter = (LogLocator(subs=(1, 2, 5)), FormatStrFormatter("%g"))
            bar.minorticks_off()
    else:
        whole = [entry for entry in record["policies"] if entry["share"] == 1.0]
        axes.scatter([entry["gap"] for entry in whole], [entry[risk] for entry in whole], color=MEAN, s=12)
    axes.axhline(record["dense"][risk], color=DENSE, lw=0.8, ls="--", label="dense")
    axes.set(title="empirical risk and gap", xlabel=f"generalization gap, {record['gap']}", ylabel=RISKS[risk])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.legend(frameon=False)
