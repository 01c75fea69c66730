"""``python -m efficientllava.report <folder> [metric]``: one table and one page from all runs below a folder.

With ``--watch``: how the jobs of a sweep stand, until the last one has ended; nothing is touched or written.

Writes ``results.csv``, ``results.md``, ``report.html`` and ``plots/`` into the folder and prints the table: a row per
configuration, mean and standard deviation over its seeds. The runs of an experiment of which the structural study
prints numbers get a second table and a plot with both.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..record import (
    STAGES,
    Results,
    metric_keys,
    scores,
)
from ..runtime.errors import UserError
from .tables import markdown
from .watch import watch

if TYPE_CHECKING:
    from .runs import Unfinished

METRIC = "digits_vqa/accuracy"


def rows(results: list[Results], metric: str) -> list[dict[str, object]]:
    """One row per run, with what tables and plots need.

    Args:
        results: Contents of several ``results.json``.
        metric: ``task/metric``.
    """
    _, task, name = metric_keys(metric)
    parts = [part for part in ("accuracy_image", "accuracy_text") if part != name]  # of digits_vqa
    table = []
    for result in results:
        told = (override for override in result["overrides"] if not override.startswith("paths."))
        row: dict[str, object] = {"overrides": " ".join(told), "seed": result["seed"]}
        row |= {f"ratio_{key}": result["ratio"][key] for key in ("requested", "achieved")}
        for stage in STAGES:
            measured = result["stages"].get(stage, {})
            row[f"{stage}_{name}"] = measured.get("metrics", {}).get(task, {}).get(name)
            row |= {f"{stage}_{part}": measured.get("metrics", {}).get(task, {}).get(part) for part in parts}
            row[f"{stage}_answer_loss"] = measured.get("metrics", {}).get(task, {}).get("answer_loss")
            row[f"{stage}_retained"] = measured.get("retained", {}).get(metric)
        row |= {f"samples_{key}": value for key, value in result["samples"].items()}
        row |= {f"seconds_{key}": round(value, 1) for key, value in result["seconds"].items()}
        table.append({**row, "commit": result["commit"]})
    return table


def main(arguments: list[str]) -> None:
    """Tabulate a folder of runs.

    Args:
        arguments: The folder and, optionally, ``task/metric`` and ``--watch``.

    Raises:
        UserError: There is no finished run below the folder.
    """
    watching = "--watch" in arguments
    arguments = [argument for argument in arguments if argument != "--watch"]
    if not 1 <= len(arguments) <= 2:
        raise UserError("usage: python -m efficientllava.report <folder of runs> [task/metric] [--watch]")
    folder = Path(arguments[0])
    if watching:
        watch(folder)
        return
    print(report(folder, arguments[1] if len(arguments) == 2 else None), end="")


def report(folder: Path, metric: str | None = None) -> str:
    """Write everything about a folder of runs.

    Args:
        folder: A sweep, or anything that holds runs.
        metric: ``task/metric``; None: the first score that the runs measured.

    Returns:
        The table in Markdown.

    Raises:
        UserError: There is no finished run below the folder, or none has the metric.
    """
    from . import study
    from .advisor import advise
    from .page import page, write_page
    from .plots import draw
    from .runs import (
        arms_of,
        by_model,
        load_runs,
        unfinished,
    )

    without = unfinished(folder)
    if without and not next(folder.rglob("results.json"), None):
        return _of_none(folder, without)
    runs = load_runs(folder)
    results = [run.results for run in runs]
    known = scores(results)
    if metric is not None and metric not in known:
        raise UserError(
            f"metric {metric}: no run below {folder} has this score; there are {', '.join(known) or 'none'}"
        )
    metric = metric or next(iter(known), METRIC)
    table = rows(results, metric)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=[*table[0], *(("state", "reason") if without else ())])
        writer.writeheader()
        writer.writerows(table)
        for run in without:
            writer.writerow({"overrides": " ".join(run.overrides), "state": run.state, "reason": run.reason})
    panels = study.panels_of(runs, metric)
    arms = arms_of(runs)
    text = "\n".join([markdown(arms, metric), *([study.markdown(panels)] if panels else []), *_without(without)])
    (folder / "results.md").write_text(text, encoding="utf-8")
    models = by_model(runs)
    plots = [*study.draw(panels), *(plot for model, own in models.items() for plot in draw(own, metric, model))]
    advice = {model: lines for model, own in models.items() if (lines := advise(own, metric))}
    write_page(folder / "report.html", page(folder, arms, metric, plots, advice), plots)
    return text


def _without(runs: Sequence[Unfinished]) -> list[str]:
    """A table of the runs without results, if there are any."""
    if not runs:
        return []
    lines = ["| run without results | typed | how it stands |", "|---|---|---|"]
    for run in runs:
        name, _, how = run.told().partition(": ")
        lines.append(f"| {name} | `{' '.join(run.overrides)}` | {_cell(how)} |")
    return ["\n".join(lines) + "\n"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _of_none(folder: Path, without: Sequence[Unfinished]) -> str:
    """Table and page of a sweep none of whose runs has results."""
    from .page import page, write_page

    [text] = _without(without)
    (folder / "results.md").write_text(text, encoding="utf-8")
    write_page(folder / "report.html", page(folder, [], METRIC, [], {}), [])
    return text


if __name__ == "__main__":
    from ..runtime.exit_codes import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
