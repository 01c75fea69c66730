"""The table and the plot of ``rows.csv``: ``python -m experiments.peers.plot <rows.csv> <picture.png>``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from efficientllava.data.embedded.prose import TEXTS
from efficientllava.report.study import table
from experiments.peers.__main__ import DENSE

OURS = ("widthwise", "global", "auto", "no_refit")
HEAD = ("ratio", "arm", "draws", "digits, %", *TEXTS, "KL, nats", "compare, nats", "CPU seconds", "peak, GB")


def rises(rows: Path) -> Any:
    """Means over draws, with the rise of the loss on each text over the dense model's, in nats per token."""
    found: Any = pd.read_csv(rows)
    dense = found[found.arm == DENSE].iloc[0]
    found = found[found.arm != DENSE].copy()
    for name in TEXTS:
        found[name] = np.log(found[name] / dense[name])
    means = found.groupby(["ratio", "arm"], sort=False).mean(numeric_only=True).reset_index()
    means["draws"] = found.groupby(["ratio", "arm"], sort=False).size().to_numpy()
    return means.sort_values(["ratio", "kl"])


def draw(means: Any, picture: Path) -> None:
    """Near text against far text, a point per arm; one panel per ratio."""
    ratios = sorted({*means.ratio})
    figure = Figure((6.5 * len(ratios), 5.5), layout="constrained")
    near, far = [*TEXTS][:2], [*TEXTS][2]
    for axes, ratio in zip(figure.subplots(1, len(ratios), squeeze=False)[0], ratios, strict=True):
        for row in means[means.ratio == ratio].to_dict("records"):
            x, y = np.mean([row[name] for name in near]), row[far]
            own = row["arm"].partition("@")[0] in OURS
            axes.plot(x, y, "o" if own else "s", color="C0" if own else "C1")
            axes.annotate(row["arm"], (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set(
            title=f"{100 * ratio:.0f} % removed, no recovery",
            xlabel=f"rise of the loss on {' and '.join(near)}, nats per token",
            ylabel=f"rise on {far}, nats per token",
        )
        axes.margins(0.15)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Print the table, draw the plot."""
    rows, picture = map(Path, sys.argv[1:])
    means = rises(rows)
    told = means.assign(digits=100 * means.digits, arm="`" + means.arm + "`")
    names = ["ratio", "arm", "draws", "digits", *TEXTS, "kl", "compare", "cpu_seconds", "peak_gb"]
    shown = told[names].round({"digits": 1, "cpu_seconds": 0}).round(2).astype({"cpu_seconds": int})
    print(table(HEAD, shown.to_numpy(), 2), end="")
    draw(means, picture)


if __name__ == "__main__":
    main()
