"""Everything about a folder of runs: ``results.csv``, ``results.md``, ``report.html`` and ``plots/``.

The page says what the runs of a sweep answer to the question a user has: which paradigm and recovery, for a given
budget. The decision flow is the study's (arXiv 2604.24380): first the parameters that may go, then the data that are
there, then the time. The answers are these runs' own numbers; what the study advises is said beside them where a run
has it.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from pandas import DataFrame

from ..record import STAGES, lower_is_better, metric_keys, scores
from ..runtime import RESULTS, Standing, UserError, write_whole
from . import study
from .plots import Plot, draw
from .runs import (
    BUDGET,
    Arm,
    Run,
    arms_of,
    by_model,
    columns,
    command,
    counted,
    frame,
    load_runs,
    sweep_command,
    told,
    unfinished,
    written,
)

METRIC = "digits_vqa/accuracy"
PARTS = ("accuracy_image", "accuracy_text")  # of digits_vqa
TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 0.025  # achieved ratios that are this near count as one budget
# Two-sided 95 % quantiles of Student's t from one degree of freedom on; above 30 the normal one is near enough.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
STUDENT += (2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)
NORMAL = 1.96
# The study's own flow (arXiv 2604.24380): removed share up to which a method and a recovery are advised with
# training and, up to 30 %, without; and the share of data from which on more is worth little, below one half.
TRAINED = ((0.175, "layerwise", "projector"), (0.375, "layerwise", "kd_hidden"), (1.0, "widthwise", "kd_hidden"))
UNTRAINED = ((0.325, "widthwise", "none"),)
ENOUGH, HALF = 0.05, 0.5


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
    without = unfinished(folder)
    finished = not without or next(folder.rglob(RESULTS), None)
    runs = load_runs(folder) if finished else []
    known = scores(run.results for run in runs)
    if runs and metric is not None and metric not in known:
        raise UserError(
            f"metric {metric}: no run below {folder} has this score; there are {', '.join(known) or 'none'}"
        )
    metric = metric or next(iter(known), METRIC)
    arms, models, panels = (arms_of(runs), by_model(runs) if runs else {}, study.panels_of(runs, metric))
    texts = [markdown(arms, metric)] if runs else []
    texts += [study.markdown(panels)] if panels else []
    texts += [_markdown_of(without)] if without else []
    text = "\n".join(texts)
    (folder / "results.md").write_text(text, encoding="utf-8")
    if runs:
        _spreadsheet(runs, without, metric).to_csv(folder / "results.csv", index=False, lineterminator="\r\n")
    plots = [*study.draw(panels), *(plot for model, own in models.items() for plot in draw(own, metric, model))]
    advice = {model: advised for model, own in models.items() if (advised := advise(own, metric))}
    shown = [(plot, _svg(plot), plot.figure.get_figwidth()) for plot in plots]
    write_whole(folder / "report.html", _page(folder, arms, metric, without, advice=advice, plots=shown))
    (folder / "plots").mkdir(exist_ok=True)
    for plot in plots:
        plot.figure.savefig(folder / "plots" / f"{plot.name}.png")
    return text


def _spreadsheet(runs: Sequence[Run], without: Sequence[Standing], metric: str) -> DataFrame:
    """One row per run, with what tables and plots need, and one for each that has left no results."""
    _, task, name = metric_keys(metric)
    rows = []
    for run in runs:
        typed = (override for override in run.results["overrides"] if not override.startswith("paths."))
        row: dict[str, object] = {"overrides": " ".join(typed), "seed": run.results["seed"]}
        row |= {f"ratio_{key}": run.results["ratio"][key] for key in ("requested", "achieved")}
        for stage in STAGES:
            names = dict.fromkeys((name, *PARTS, "answer_loss"))
            row |= {f"{stage}_{key}": run.numbers.get(f"{stage}/{task}/{key}") for key in names}
            row[f"{stage}_retained"] = run.numbers.get(f"{stage}/retained/{metric}")
            row[f"{stage}_report_loss"] = run.numbers.get(f"{stage}/report_loss")
        row |= {f"samples_{key}": value for key, value in run.results["samples"].items()}
        row |= {f"seconds_{key}": round(value, 1) for key, value in run.results["seconds"].items()}
        rows.append({**row, "commit": run.results["commit"]})
    rows += [{"overrides": " ".join(run.overrides), "state": run.state, "reason": run.reason} for run in without]
    return DataFrame(rows, dtype=object)


def markdown(arms: Sequence[Arm], metric: str) -> str:
    """A table over runs: a row per configuration, mean ± sample standard deviation over its seeds.

    Args:
        arms: At least one; rows are named by the settings in which they differ.
        metric: ``task/metric`` to show for every stage, in percent where it is a share.
    """
    shown = [column for column in columns(arms, metric)[:7] if column.name != "ratio/sparsity"]
    rows = [[f"`{arm.label()}`", len(arm.runs), *(arm.cell(column) for column in shown)] for arm in arms]
    return study.table(["run", "seeds", *(column.head for column in shown)], rows)


def _markdown_of(without: Sequence[Standing]) -> str:
    """A table of the runs without results."""
    rows = []
    for run in without:
        name, _, how = told(run).replace("|", "\\|").replace("\n", " ").partition(": ")
        rows.append([name, f"`{' '.join(run.overrides)}`", how])
    return study.table(["run without results", "typed", "how it stands"], rows, 3)


def _page(folder: Path, arms: Sequence[Arm], metric: str, without: Sequence[Standing], **parts: Any) -> str:
    """The whole page; it requests nothing from anywhere."""
    runs = [run for arm in arms for run in arm.runs]
    commits = list(dict.fromkeys(run.results["commit"][:10] or "unknown" for run in runs))
    seeds = counted(len({run.results["seed"] for run in runs}), "seed")
    facts = [
        f"{counted(len(runs), 'run')} in {counted(len(arms), 'configuration')}, {seeds}",
        ", ".join(dict.fromkeys(str(run.results.get("model", "?")) for run in runs)),
        metric,
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
    ]
    table = _table(arms, metric)
    return jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        title=folder.resolve().name,
        facts=facts,
        command=sweep_command(folder),
        without=[(command(run.overrides), told(run)) for run in without],
        heads=list(table),
        rows=list(zip(*table.values(), strict=True)),
        arms=arms,
        line_of=command,
        written=written,
        **parts,
    )


def _svg(plot: Plot) -> str:
    """A plot as it stands on the page: the same runs give the same page."""
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": plot.name}):
        plot.figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return base64.b64encode(data.getvalue()).decode()


def _table(arms: Sequence[Arm], metric: str) -> dict[str, list[tuple[Any, Any]]]:
    """Text and value to sort by of every arm, by the heads of the columns; those without a number are left out."""
    table: dict[str, list[tuple[Any, Any]]] = {
        "configuration": [(arm.label(), arm.label()) for arm in arms],
        "seeds": [(len(arm.runs), len(arm.runs)) for arm in arms],
    }
    for column in columns(arms, metric):
        means = [arm.mean(column.name) for arm in arms]
        if any(mean and (mean[0] or not column.name.startswith("seconds/")) for mean in means):
            varies = any(round(column.scale * mean[1], column.digits) for mean in means if mean)
            values = [f"{mean[0] * column.scale:.9g}" if mean else "" for mean in means]
            table[column.head] = [(arm.cell(column, varies), value) for arm, value in zip(arms, values, strict=True)]
    return table


def advise(arms: Sequence[Arm], metric: str) -> dict[str, Sequence[str]]:
    """Lines of HTML for every budget of parameters; nothing where no two arms can be compared.

    Args:
        arms: Arms of one model. Masked weights are left out: they remove no parameters.
        metric: ``task/metric``.

    Returns:
        By what has to go at least: ``30 %``, or several budgets with the same advice, ``30 % or 35 %``.
    """
    names = {"removed": "ratio/achieved", "zeros": "ratio/sparsity", "retained": f"final/retained/{metric}"}
    names |= {"base": f"base/{metric}", "questions": f"final/{metric_keys(metric)[1]}/n"}
    names |= {"prune": "seconds/prune", "recover": "seconds/recover"}
    known = frame(arms, **names).fillna({"prune": 0, "recover": 0, "questions": 1})
    if lower_is_better(metric):  # no share of questions: one seed tells nothing of its noise
        known["questions"] = math.inf
    known = known.assign(seconds=known.prune + known.recover, name=[arm.label(*BUDGET) for arm in known.arm])
    known.label = known.label.map(html.escape)
    known = known[known.retained.notna() & known.zeros.isna()].sort_values("removed", kind="stable")
    budgets: dict[tuple[str, ...], list[float]] = {}
    least = -math.inf
    for removed in known.removed:
        if removed - least <= POINTS:
            continue
        least = removed
        # An arm that removes more meets the budget too: some paradigms remove in coarse steps.
        within = known[known.removed >= least]
        if len(within) > 1:
            budgets.setdefault(tuple(_budget(within)), []).append(100 * least)
    return {" or ".join(f"{share:.0f} %" for share in shares): lines for lines, shares in budgets.items()}


def _budget(within: Any) -> Iterator[str]:
    """What to choose where at least so many parameters have to go, for every budget of data."""
    shares = sorted({*within.data})
    for share in shares:
        # Of a configuration at several ratios, the one that keeps most: the question is which configuration.
        ranked = within[within.data <= share].sort_values("retained", ascending=False, kind="stable")
        best = ranked.drop_duplicates("name").sort_values(["retained", "seconds"], ascending=[False, True])
        data = f"With up to {100 * share:g} % of the recovery data" if share else "Without training"
        yield ("" if len(shares) == 1 else f"{data}: ") + _winner([*best.itertuples()])
    yield from _studied(within)


def _winner(group: Sequence[Any]) -> str:
    """Who keeps most, who cannot be told apart from it, and who of these is quickest."""
    best, *others = group
    line = f"<b>{best.label}</b> retains {_kept(best)}"
    if not others:
        return line + "."
    level = [arm for arm in others if best.retained - arm.retained <= _noise(best, arm)]
    line += f", next {others[0].label} with {_kept(others[0])}"
    if level:
        whom = "it" if level == others[:1] else counted(len(level), "other configuration")
        line += f"; the difference to {whom} is within the noise"
    line += "."
    quick = min([best, *level], key=lambda arm: arm.seconds)
    if quick.seconds < 0.8 * best.seconds:
        line += f" {quick.label} is as good as far as these runs can tell, and takes {quick.seconds:.0f} s to "
        line += f"prune and recover instead of {best.seconds:.0f} s."
    return line


def _studied(within: Any) -> Iterator[str]:
    """What the study's own choices keep here, where runs have them at this budget."""
    removed = within.removed.iloc[0]
    for flow, when in ((UNTRAINED, "without training"), (TRAINED, "with training")):
        _, method, recovery = next((row for row in flow if removed <= row[0]), (0.0, "", ""))
        found = [
            row
            for row in within[within.removed - removed <= POINTS].itertuples()
            if row.arm.runs[0].config.get("prune.method") == method
            and row.arm.runs[0].config.get("recover.name") == recovery
            and row.arm.runs[0].config.get("recover.weights.sft", 1.0) + (recovery == "none") > 0
        ]
        if found:
            wanted = ENOUGH if removed < HALF else 1.0
            row = min(found, key=lambda row: (abs(row.data - wanted), -row.retained))
            choice = method if recovery == "none" else f"{method} and {recovery}"
            yield f"The study's choice {when}, {choice}: {row.label} retains {_kept(row)}."


def _noise(one: Any, other: Any) -> float:
    """Half width of the 95 % interval of the difference of two retained scores.

    From the spread over seeds; where an arm has one seed only, from the number of questions, as if the score were a
    share of independent questions; of a score that is none, nothing is known then.
    """
    if min(one.retained_count, other.retained_count) > 1:
        error = math.hypot(*(row.retained_spread / row.retained_count**0.5 for row in (one, other)))
        freedom = one.retained_count + other.retained_count - 2
        return (STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL) * error
    # What is retained is such a share over that of the base, which all have in common; points count as shares of its.
    base = min(one.base, 1.0)
    shares = [min(max(row.retained * base, 0.0), 1.0) for row in (one, other)]
    return NORMAL * math.sqrt(sum(share * (1 - share) for share in shares) / one.questions) / base


def _kept(row: Any) -> str:
    spread = f" ± {100 * row.retained_spread:.1f} %" if row.retained_count > 1 else " % (one seed)"
    return f"{100 * row.retained:.1f}{spread}"
