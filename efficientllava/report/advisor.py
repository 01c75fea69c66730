"""What the runs of a sweep say about the question a user has: which paradigm and recovery, for a given budget.

The decision flow is the study's (arXiv 2604.24380): the parameters that may stay, the data and the time that are there.
The answers are these runs' own numbers, nothing else.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from .runs import Arm

POINTS = 0.025  # achieved ratios that are this near count as one budget


def advise(arms: Sequence[Arm], metric: str) -> list[str]:
    """One line of HTML per budget of parameters, and per share of recovery data where it varies.

    Args:
        arms: Arms of one sweep.
        metric: ``task/metric``.
    """
    known = [arm for arm in arms if arm.mean("retained", metric, last=True)]
    return [*_by_parameters(known, metric), *_by_data(known, metric)] if len(known) > 1 else []


def _retained(arm: Arm, metric: str) -> float:
    found = arm.mean("retained", metric, last=True)
    return found[0] if found else float("-inf")


def _removed(arm: Arm) -> float:
    found = arm.mean("ratio", "achieved")
    return found[0] if found else 0.0


def _by_parameters(arms: Sequence[Arm], metric: str) -> Iterator[str]:
    groups: list[list[Arm]] = []
    for arm in sorted(arms, key=_removed):
        if groups and _removed(arm) - _removed(groups[-1][0]) <= POINTS:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    for group in groups:
        if len(group) > 1:
            removed = 100 * sum(map(_removed, group)) / len(group)
            yield f"{removed:.0f} % of the parameters may go: {_winner(group, metric)}"


def _by_data(arms: Sequence[Arm], metric: str) -> Iterator[str]:
    shares = sorted({arm.settings["data_frac"] for arm in arms if "data_frac" in arm.settings})
    for share in shares if len(shares) > 1 else []:
        group = [arm for arm in arms if arm.settings["data_frac"] == share]
        if len(group) > 1:
            yield f"{100 * share:g} % of the recovery data is there: {_winner(group, metric)}"


def _winner(group: Sequence[Arm], metric: str) -> str:
    ranked = sorted(group, key=lambda arm: -_retained(arm, metric))
    best, second = ranked[0], ranked[1]
    line = f"<b>{html.escape(best.label())}</b> retains {_cell(best, metric)}"
    line += f", next {html.escape(second.label())} with {_cell(second, metric)}"
    quick = min(group, key=_seconds)
    if quick is not best and _seconds(quick) < _seconds(best):
        line += f"; quickest: {html.escape(quick.label())} in {_seconds(quick):.0f} instead of {_seconds(best):.0f} s"
        line += f", {_cell(quick, metric)}"
    return line


def _cell(arm: Arm, metric: str) -> str:
    mean, spread = arm.mean("retained", metric, last=True) or (float("nan"), 0.0)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if len(arm.runs) > 1 else f"{100 * mean:.1f} %"


def _seconds(arm: Arm) -> float:
    return sum((arm.mean("seconds", name) or (0.0, 0.0))[0] for name in ("prune", "recover"))
