"""Heat maps over the runs of a sweep: recoveries against configurations, and what each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import heat, new_axes
from .runs import Arm, Run

MOST_ROWS = 40
MOST_STRIPS = 20  # arms whose kept units are drawn
MOST_TEXT = 16  # layers up to which values are written into the cells


def matrix(arms: Sequence[Arm], metric: str) -> Any:
    """Axes with the retained score of every recovery; None with fewer than two recoveries."""
    known = [arm for arm in arms if arm.mean("retained", metric, last=True)]
    columns = list(dict.fromkeys(arm.settings.get("recover.name") for arm in known))
    taught = [arm for arm in known if arm.settings.get("recover.name") != "none"] or known
    rows = dict(list({_row(arm): arm.label("recover.name") for arm in taught}.items())[:MOST_ROWS])
    if len(columns) < 2:
        return None
    cells = [[float("nan")] * len(columns) for _ in rows]
    for arm in known:
        for index, row in enumerate(rows):
            # A run without recovery has no share of data: it stands in the row of every share.
            if row == _row(arm) or (arm.settings["recover.name"] == "none" and {*_row(arm)} <= {*row}):
                mean, _ = arm.mean("retained", metric, last=True) or (float("nan"), 0.0)
                cells[index][columns.index(arm.settings["recover.name"])] = 100 * mean
    values = [value for row in cells for value in row if value == value]
    axes = new_axes(2.6 + 0.85 * len(columns), 1.0 + 0.34 * len(rows))
    heat(axes, cells, "retained, %", (min(values), max(values)), text=True)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), list(rows.values()))
    return axes


def _row(arm: Arm) -> tuple[str, ...]:
    return arm.words("recover.name")


def kept(arms: Sequence[Arm], kind: str) -> Any:
    """Axes with the share of units that every layer keeps, a row per plan; None where nothing was pruned.

    Args:
        arms: Arms of the sweep.
        kind: ``groups`` or ``channels``.
    """
    plans: dict[str, list[float]] = {}
    for arm in arms:
        label = arm.label("data_frac", *(key for key in arm.settings if key.startswith("recover.")))
        row = plans.get(label) or _shares(arm.runs[0], kind)
        if row:
            plans[label] = row
    rows = list(plans.items())[:MOST_STRIPS]
    if not rows:
        return None
    depth = max(len(row) for _, row in rows)
    axes = new_axes(height=1.3 + 0.28 * len(rows))
    cells = [row + [float("nan")] * (depth - len(row)) for _, row in rows]
    heat(axes, cells, "kept, %", (0, 100), text=depth <= MOST_TEXT)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_xticks(range(0, depth, max(1, -(-depth // 16))))
    axes.set(xlabel="layer")
    return axes


def _shares(run: Run, kind: str) -> list[float] | None:
    plan = run.plan()
    return shares(plan, kind) if plan else None


def shares(plan: Mapping[str, Any], kind: str) -> list[float]:
    """Kept units of every layer, in percent; 0 for a dropped layer.

    A plan does not say how many units there were: the highest kept index of any layer tells, but for a unit or two.

    Args:
        plan: Content of ``plan.json``.
        kind: ``groups`` or ``channels``.
    """
    whole = 1 + max(max(layer[kind]) for layer in plan["layers"])
    row = [0.0] * plan["source_layers"]
    for layer in plan["layers"]:
        row[layer["index"]] = 100 * len(layer[kind]) / whole
    return row
