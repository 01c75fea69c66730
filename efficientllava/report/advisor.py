"""What the runs of a sweep say about the question a user has: which paradigm and recovery, for a given budget.

The decision flow is the study's (arXiv 2604.24380): first the parameters that may go, then the data that are there,
then the time. The answers are these runs' own numbers; what the study advises is said beside them where a run has it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..results import last_stage, metric_keys
from .runs import BUDGET, Arm, counted

POINTS = 0.025  # achieved ratios that are this near count as one budget
# Two-sided 95 % quantiles of Student's t by degrees of freedom; above these the normal one is near enough.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45}
NORMAL = 1.96
# The study's own flow: removed share up to which a paradigm and a recovery are advised.
STUDY = ((0.175, "layerwise", "projector"), (0.375, "layerwise", "kd_hidden"), (1.0, "widthwise", "kd_hidden"))


def advise(arms: Sequence[Arm], metric: str) -> list[str]:
    """One line of HTML per budget of parameters; nothing where no two arms can be compared.

    Args:
        arms: Arms of one sweep.
        metric: ``task/metric``.
    """
    known = sorted((arm for arm in arms if arm.mean("retained", metric, last=True)), key=_removed)
    groups: list[list[Arm]] = []
    for arm in known:
        if groups and _removed(arm) - _removed(groups[-1][0]) <= POINTS:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    # An arm that removes more meets the budget too: some paradigms remove in coarse steps.
    within = [[arm for arm in known if _removed(arm) >= _removed(group[0])] for group in groups]
    return [_budget(arms, metric) for arms in within if len(arms) > 1]


def _budget(group: Sequence[Arm], metric: str) -> str:
    """What to choose where at least so many parameters have to go, for every budget of data."""
    removed = _removed(group[0])
    short = [arm.label(*BUDGET) for arm in group]
    name = {id(arm): html.escape(arm.label(*BUDGET if len({*short}) == len(group) else ())) for arm in group}
    shares = sorted({_data(arm) for arm in group})
    lines = []
    for share in shares:
        within = [arm for arm in group if _data(arm) <= share]
        data = f"With up to {100 * share:g} % of the recovery data" if share else "Without training"
        lines.append(("" if len(shares) == 1 else f"{data}: ") + _winner(within, metric, name))
    _, paradigm, recovery = next(row for row in STUDY if removed <= row[0])
    for arm in group:
        names = [arm.runs[0].config.get(f"{key}.name") for key in ("prune", "recover")]
        near = _removed(arm) - removed <= POINTS
        if names == [paradigm, recovery] and _data(arm) == shares[-1] and near:
            lines.append(f"What the study advises here, {paradigm} with {recovery}, retains {_cell(arm, metric)}.")
            break
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<b>At least {100 * removed:.0f} % of the parameters removed</b><ul>{items}</ul>"


def _winner(group: Sequence[Arm], metric: str, name: Mapping[int, str]) -> str:
    """Who keeps most, who cannot be told apart from it, and who of these is quickest."""
    best, *others = sorted(group, key=lambda arm: -_retained(arm, metric))
    line = f"<b>{name[id(best)]}</b> retains {_cell(best, metric)}"
    if not others:
        return line + "."
    level = [arm for arm in others if _retained(best, metric) - _retained(arm, metric) <= _noise(best, arm, metric)]
    line += f", next {name[id(others[0])]} with {_cell(others[0], metric)}"
    if level:
        whom = "it" if level == others[:1] else counted(len(level), "other configuration")
        line += f"; the difference to {whom} is within the noise"
    line += "."
    quick = min([best, *level], key=_seconds)
    if _seconds(quick) < 0.8 * _seconds(best):
        line += f" {name[id(quick)]} is as good as far as these runs can tell, and takes {_seconds(quick):.0f} s to "
        line += f"prune and recover instead of {_seconds(best):.0f} s."
    return line


def _noise(one: Arm, other: Arm, metric: str) -> float:
    """Half width of the 95 % interval of the difference of two retained scores.

    From the spread over seeds; where an arm has one seed only, from the number of questions, as if the score were a
    share of independent questions.
    """
    counts = [len(arm.values("retained", metric, last=True)) for arm in (one, other)]
    if min(counts) > 1:
        spreads = [(arm.mean("retained", metric, last=True) or (0, 0))[1] for arm in (one, other)]
        error = math.hypot(*(spread / count**0.5 for spread, count in zip(spreads, counts, strict=True)))
        return STUDENT.get(sum(counts) - 2, NORMAL) * error
    _, task, _ = metric_keys(metric)
    questions = last_stage(one.runs[0].results)["metrics"].get(task, {}).get("n") or 1
    shares = [min(max(_retained(arm, metric), 0.0), 1.0) for arm in (one, other)]
    return NORMAL * math.sqrt(sum(share * (1 - share) for share in shares) / questions)


def _retained(arm: Arm, metric: str) -> float:
    found = arm.mean("retained", metric, last=True)
    return found[0] if found else float("-inf")


def _removed(arm: Arm) -> float:
    found = arm.mean("ratio", "achieved")
    return found[0] if found else 0.0


def _data(arm: Arm) -> float:
    """Share of the recovery data that an arm trains on."""
    config = arm.runs[0].config
    return 0.0 if config.get("recover.name") == "none" else config.get("data_frac", 1.0)


def _cell(arm: Arm, metric: str) -> str:
    values = arm.values("retained", metric, last=True)
    mean, spread = arm.mean("retained", metric, last=True) or (float("nan"), 0.0)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if len(values) > 1 else f"{100 * mean:.1f} % (one seed)"


def _seconds(arm: Arm) -> float:
    return sum((arm.mean("seconds", name) or (0.0, 0.0))[0] for name in ("prune", "recover"))
