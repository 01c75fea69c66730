"""Table and plot of the rows: ``python -m experiments.edge.plot rows.csv plot.png``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from efficientllava.report.study import table

TOLD = {
    "bytes": "MiB",
    "own_prefill": "prefill, tokens/s",
    "own_decode": "decode, tokens/s",
    "digits": "digits_vqa, %",
    "perplexity": "perplexity",
    "kl": "KL, nats",
    "share_prefill": "prefill, x ideal",
    "share_decode": "decode, x ideal",
}
RECOVERED = "_recovered"
MARKERS = {"f16": "o", "q8_0": "s", "q4_1": "^", "q4_0": "v"}


def main(rows: Path, picture: Path) -> None:
    """Print the table, draw the plot."""
    found = pd.read_csv(rows)
    found["bytes"] /= 2**20
    found["digits"] *= 100
    numbers = found[["model", "type", *TOLD]].round(2)
    print(table(["model", "type", *TOLD.values()], numbers.to_numpy(), 2), end="")
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(m.removesuffix(RECOVERED) for m in found.model))}
    for row, quality in zip(axes, ("digits", "perplexity"), strict=True):
        for axis, price in zip(row, ("bytes", "own_decode"), strict=True):
            for model, some in found.groupby("model", sort=False):
                colour = colours[str(model).removesuffix(RECOVERED)]
                shown = "none" if str(model).endswith(RECOVERED) else colour
                line = some[some.type != "q4_1"]  # its grid is the decoder's own; see the page
                axis.plot(line[price], line[quality], "--" if shown == "none" else "-", color=colour, linewidth=0.8)
                for kind, marker in MARKERS.items():
                    one = some[some.type == kind]
                    axis.plot(one[price], one[quality], marker, color=colour, markerfacecolor=shown)
            axis.grid(alpha=0.3)
            if quality == "perplexity":
                axis.set_yscale("log")
                axis.set_xlabel(TOLD[price].replace("MiB", "file, MiB"))
        row[0].set_ylabel(TOLD[quality])
    named = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    named.append(Line2D([], [], color="0.4", linestyle="--", marker="o", markerfacecolor="none", label="recovered"))
    named += [Line2D([], [], color="0.4", linestyle="", marker=m, label=kind) for kind, m in MARKERS.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
