"""Heat maps over the runs of a sweep: recoveries against configurations, and what each layer keeps."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import heat, new_axes
from .runs import Arm

MOST_ROWS = 40
MOST_STRIPS = 20  # arms whose kept units are drawn
MOST_TEXT = 10  # layers up to which values are written into the cells
WIDEST = 40  # characters of a line beside a map


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
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, WIDEST) for label in rows.values()])
    return axes


def _row(arm: Arm) -> tuple[str, ...]:
    return arm.words("recover.name")


def kept(arms: Sequence[Arm], kind: str) -> tuple[Any, int] | None:
    """What every layer keeps, a row per plan; None where nothing was pruned.

    Args:
        arms: Arms of the sweep.
        kind: ``groups`` or ``channels``.

    Returns:
        Axes, and how many plans had no room.
    """
    plans: dict[str, list[float]] = {}
    for arm in arms:
        label = arm.label("data_frac", *(key for key in arm.settings if key.startswith("recover.")))
        row = plans.get(label) or shares(arm.runs[0].folder, kind)
        if row:
            plans[label] = row
    rows = list(plans.items())[:MOST_STRIPS]
    if not rows:
        return None
    depth = max(len(row) for _, row in rows)
    labels = [textwrap.fill(label, WIDEST) for label, _ in rows]
    lines = max(label.count("\n") for label in labels) + 1
    axes = new_axes(6.2, 1.3 + (0.16 + 0.13 * lines) * len(rows))
    cells = [row + [float("nan")] * (depth - len(row)) for _, row in rows]
    heat(axes, cells, "kept, %", (0, 100), text=depth <= MOST_TEXT)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xticks(range(0, depth, max(1, -(-depth // 16))))
    axes.set(xlabel="layer")
    return axes, len(plans) - len(rows)


def shares(folder: Path, kind: str) -> list[float] | None:
    """What every layer of a run keeps, in percent; 0 for a dropped layer.

    Args:
        folder: The run's folder, with ``plan.json``, and ``search.json`` where weights were masked.
        kind: ``groups``, or the weights of the attention that are not masked; ``channels``, or those of the MLP.

    Returns:
        None where nothing was pruned, or an earlier version wrote the plan: it does not say how many units there were.
    """
    file = folder / "plan.json"
    plan = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if "sparsity" in (plan.get("details") or {}):
        return _unmasked(folder / "search.json", "attention" if kind == "groups" else "mlp")
    if not plan.get("source_units"):
        return None
    kept, whole = {layer["index"]: len(layer[kind]) for layer in plan["layers"]}, int(kind == "channels")
    if kind == "groups":  # in query heads, of which every KV group has as many
        kept |= {v["index"]: len(v["heads"]) / plan["heads_per_group"] for v in plan["layers"] if v.get("heads")}
    return [100 * kept.get(index, 0) / units[whole] for index, units in enumerate(plan["source_units"])]


def _unmasked(file: Path, kind: str) -> list[float]:
    record = json.loads(file.read_text("utf-8"))
    genes = zip(record["genes"], record["best"], strict=True)
    return [100 * (1 - gene["amounts"][level]) for gene, level in genes if gene["kind"] == kind]
