"""The pictures of a policy search, from its record.

``samples.png``: what the base, the pruned and the recovered model say to the same test images.
"""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.records import Record, open_image
from ..runtime.files import whole_file

Answer = tuple[str, float | None]
SHOWN = 8
HALF = 0.5
COLUMNS = 2
RIGHT, WRONG = "#1a7f37", "#cf222e"
INK, FAINT, PAPER, CARD = "#1f2328", "#6e7781", "#ffffff", "#f6f8fa"
CARD_WIDTH, CARD_HEIGHT, GAP = 6.2, 1.95, 0.14  # inches
NEAREST_BELOW = 128  # pixels; smaller images are enlarged without smoothing


def choose(records: Sequence[Record], count: int = SHOWN) -> list[int]:
    """Pick questions with an image to show: the first of each type in turn, whatever was answered.

    Args:
        records: Questions: records of one turn.
        count: How many.

    Returns:
        Indices into ``records``, ascending; fewer than ``count`` if there are not enough.
    """
    by_kind: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        if record.image is not None:
            by_kind.setdefault(record.turns[0].kind, []).append(index)
    chosen: list[int] = []
    for position in range(max(map(len, by_kind.values()), default=0)):
        chosen += [indices[position] for indices in by_kind.values() if position < len(indices)]
        if len(chosen) >= count:
            break
    return sorted(chosen[:count])


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …") if text.strip() else "(nothing)"


def _image(figure: Any, record: Record, left: float, bottom: float) -> None:
    image = open_image(record)
    if image is None:
        return
    width, height = figure.get_size_inches()
    side = CARD_HEIGHT - 0.3
    axes = figure.add_axes((
        (left + 0.15) / width, (bottom + 0.15) / height, side / width, side / height
    ))  # fmt: skip
    axes.imshow(image, interpolation="nearest" if max(image.size) < NEAREST_BELOW else "antialiased")
    axes.axis("off")


def _card(figure: Any, record: Record, answers: Mapping[str, Answer], left: float, bottom: float) -> None:
    """One question: the image, the question, the reference, and a line per model."""
    from matplotlib.patches import FancyBboxPatch

    width, height = figure.get_size_inches()

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text((left + x) / width, (bottom + CARD_HEIGHT - y) / height, text, va="baseline", **style)

    figure.add_artist(
        FancyBboxPatch(
            (left, bottom),
            CARD_WIDTH,
            CARD_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            transform=figure.dpi_scale_trans,
            facecolor=CARD,
            edgecolor="#d0d7de",
            linewidth=0.8,
            zorder=0,
        )
    )
    _image(figure, record, left, bottom)
    (turn,) = record.turns
    text_left = CARD_HEIGHT + 0.12
    lines = textwrap.wrap(turn.question, 40, max_lines=2, placeholder=" …")
    for number, line in enumerate(lines):
        write(text_left, 0.36 + 0.23 * number, line, size=12, color=INK, weight="bold")
    rows = [("reference", turn.answer, INK, "")]
    for stage, (answer, score) in answers.items():
        colour, mark = (INK, "") if score is None else (RIGHT, "✓") if score > HALF else (WRONG, "✗")
        rows.append((stage, answer, colour, mark))
    step = 0.27
    top = CARD_HEIGHT - 0.24 - step * (len(rows) - 1)
    for number, (label, answer, colour, mark) in enumerate(rows):
        y = top + step * number
        write(text_left, y, label, size=10, color=FAINT)
        write(text_left + 0.92, y, mark, size=11, color=colour, weight="bold")
        write(text_left + 1.14, y, _short(answer, 28), size=11, color=colour, weight="bold" if mark else "normal")


def draw_samples(
    records: Sequence[Record],
    answers: Mapping[str, Sequence[Answer]],
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
) -> None:
    """Draw test images with the question, the reference and every model's answer: green if right, red if wrong.

    Args:
        records: Questions: records of one turn.
        answers: Per stage (``base``, ``pruned``, ``recovered``) one answer per record, with its score in [0, 1] (right
            above one half), or None where there is none.
        path: PNG to write.
        indices: Which records to show; default: `choose`.

    Raises:
        UserError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    indices = choose(records) if indices is None else indices
    columns = min(COLUMNS, max(1, len(indices)))
    rows = max(1, -(-len(indices) // columns))
    width = columns * CARD_WIDTH + (columns + 1) * GAP
    height = rows * CARD_HEIGHT + (rows + 1) * GAP
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    for place, index in enumerate(indices):
        row, column = divmod(place, columns)
        left = GAP + column * (CARD_WIDTH + GAP)
        bottom = height - (row + 1) * (CARD_HEIGHT + GAP)
        _card(figure, records[index], {stage: texts[index] for stage, texts in answers.items()}, left, bottom)
    with whole_file(Path(path)) as file:
        figure.savefig(file, dpi=120, format="png")


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
