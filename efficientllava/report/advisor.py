"""What the runs of a sweep say about the question a user has: which paradigm and recovery, for a given budget.

The decision flow is the study's (arXiv 2604.24380): first the parameters that may go, then the data that are there,
then the time. The answers are these runs' own numbers; what the study advises is said beside them where a run has it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from ..record import last_stage, metric_keys
from .runs import (
    BUDGET,
    Arm,
    counted,
    data_share,
)

POINTS = 0.025  # achieved ratios that are this near count as one budget
# Two-sided 95 % quantiles of Student's t by degrees of freedom; above these the normal one is near enough.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45}
NORMAL = 1.96
# The study's own flow (arXiv 2604.24380): removed share up to which a method and a recovery are advised with
# training and, up to 30 %, without; and the share of data from which on more is worth little, below one half.
TRAINED = ((0.175, "layerwise", "projector"), (0.375, "layerwise", "kd_hidden"), (1.0, "widthwise", "kd_hidden"))
UNTRAINED = ((0.325, "widthwise", "none"),)
ENOUGH, HALF = 0.05, 0.5


def advise(arms: Sequence[Arm], metric: str) -> list[str]:
    """One line of HTML per budget of parameters; nothing where no two arms can be compared.

    Args:
        arms: Arms of one model. Masked weights are left out: they remove no parameters.
        metric: ``task/metric``.
    """
    scored = [arm for arm in arms if arm.mean("retained", metric, last=True) and not arm.values("ratio", "sparsity")]
    known = sorted(scored, key=_removed)
    groups: list[list[Arm]] = []
    for arm in known:
        if groups and _removed(arm) - _removed(groups[-1][0]) <= POINTS:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    budgets: dict[tuple[str, ...], list[float]] = {}
    for group in groups:
        # An arm that removes more meets the budget too: some paradigms remove in coarse steps.
        within = [arm for arm in known if _removed(arm) >= _removed(group[0])]
        if len(within) > 1:
            budgets.setdefault(tuple(_budget(within, metric)), []).append(100 * _removed(group[0]))
    return [_told(lines, removed) for lines, removed in budgets.items()]


def _told(lines: Sequence[str], removed: Sequence[float]) -> str:
    items = "".join(f"<li>{line}</li>" for line in lines)
    shares = " or ".join(f"{share:.0f} %" for share in removed)
    return f"<b>At least {shares} of the parameters removed</b><ul>{items}</ul>"


def _budget(within: Sequence[Arm], metric: str) -> Iterator[str]:
    """What to choose where at least so many parameters have to go, for every budget of data."""
    shares = sorted({data_share(arm) for arm in within})
    for share in shares:
        # Of a configuration at several ratios, the one that keeps most: the question is which configuration.
        best: dict[str, Arm] = {}
        for arm in within:
            name = arm.label(*BUDGET)
            if data_share(arm) <= share and (
                name not in best or _retained(arm, metric) > _retained(best[name], metric)
            ):
                best[name] = arm
        data = f"With up to {100 * share:g} % of the recovery data" if share else "Without training"
        yield ("" if len(shares) == 1 else f"{data}: ") + _winner(list(best.values()), metric)
    yield from _studied(within, metric)


def _winner(group: Sequence[Arm], metric: str) -> str:
    """Who keeps most, who cannot be told apart from it, and who of these is quickest."""
    best, *others = sorted(group, key=lambda arm: (-_retained(arm, metric), _seconds(arm)))
    line = f"<b>{_name(best)}</b> retains {_cell(best, metric)}"
    if not others:
        return line + "."
    level = [arm for arm in others if _retained(best, metric) - _retained(arm, metric) <= _noise(best, arm, metric)]
    line += f", next {_name(others[0])} with {_cell(others[0], metric)}"
    if level:
        whom = "it" if level == others[:1] else counted(len(level), "other configuration")
        line += f"; the difference to {whom} is within the noise"
    line += "."
    quick = min([best, *level], key=_seconds)
    if _seconds(quick) < 0.8 * _seconds(best):
        line += f" {_name(quick)} is as good as far as these runs can tell, and takes {_seconds(quick):.0f} s to "
        line += f"prune and recover instead of {_seconds(best):.0f} s."
    return line


def _studied(within: Sequence[Arm], metric: str) -> Iterator[str]:
    """What the study's own choices keep here, where runs have them at this budget."""
    removed = _removed(within[0])
    for flow, when in ((UNTRAINED, "without training"), (TRAINED, "with training")):
        _, method, recovery = next((row for row in flow if removed <= row[0]), (0.0, "", ""))
        found = [
            arm
            for arm in within
            if _removed(arm) - removed <= POINTS
            and arm.runs[0].config.get("prune.method") == method
            and arm.runs[0].config.get("recover.name") == recovery
            and arm.runs[0].config.get("recover.weights.sft", 1.0) + (recovery == "none") > 0
        ]
        if found:
            wanted = ENOUGH if removed < HALF else 1.0
            arm = min(found, key=lambda arm: (abs(data_share(arm) - wanted), -_retained(arm, metric)))
            choice = method if recovery == "none" else f"{method} and {recovery}"
            yield f"The study's choice {when}, {choice}: {_name(arm)} retains {_cell(arm, metric)}."


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


def _name(arm: Arm) -> str:
    return html.escape(arm.label())


def _cell(arm: Arm, metric: str) -> str:
    values = arm.values("retained", metric, last=True)
    mean, spread = arm.mean("retained", metric, last=True) or (float("nan"), 0.0)
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %" if len(values) > 1 else f"{100 * mean:.1f} % (one seed)"


def _seconds(arm: Arm) -> float:
    return sum((arm.mean("seconds", name) or (0.0, 0.0))[0] for name in ("prune", "recover"))
