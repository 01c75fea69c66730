"""Table and plot of the rows: ``python -m experiments.edge.plot rows.csv plot.png``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

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
MARKERS = {"f16": "o", "q8_0": "s", "q4_1": "^", "q4_0": "v"}


def main(rows: Path, picture: Path) -> None:
    """Print the table, draw the plot."""
    found = pd.read_csv(rows)
    found["bytes"] /= 2**20
    found["digits"] *= 100
    table = found.loc[:, ["model", "type", *TOLD]].round(2)
    lines = [["model", "type", *TOLD.values()], ["---"] * len(table.columns), *table.to_numpy().tolist()]
    print(*(f"| {' | '.join(map(str, row))} |" for row in lines), sep="\n")
    figure = Figure((11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, quality in zip(axes, ("digits", "perplexity"), strict=True):
        for axis, price in zip(row, ("bytes", "own_decode"), strict=True):
            for number, (model, some) in enumerate(found.groupby("model", sort=False)):
                axis.plot(some[price], some[quality], "-", color=f"C{number}", linewidth=0.8, label=model)
                for kind, marker in MARKERS.items():
                    axis.plot(price, quality, marker, data=some[some.type == kind], color=f"C{number}")
            axis.grid(alpha=0.3)
            if quality == "perplexity":
                axis.set_yscale("log")
                axis.set_xlabel(TOLD[price].replace("MiB", "file, MiB"))
        row[0].set_ylabel(TOLD[quality])
    for kind, marker in MARKERS.items():
        axes[0, 0].plot([], [], marker, color="0.4", label=kind)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
