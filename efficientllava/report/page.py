"""One self-contained page from the runs of a sweep: plots, a sortable table, an advisor, and every command."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import whole_file
from ..results import STAGES
from .plots import Plot
from .runs import Arm, Run

STYLE = """
:root { --ink: #1f2933; --soft: #61707f; --line: #e3e7ec; --paper: #fff; --wash: #f6f8fa; --accent: #1b6ca8 }
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--wash) }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 12px }
.soft { color: var(--soft) } .card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 18px; margin: 0 0 16px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 16px }
.plots .card { margin: 0 } .plots img { width: 100%; height: auto } .plots h3 { margin: 0 0 8px; font-size: 14px }
.advice li { margin: 4px 0 } .advice b { color: var(--accent) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { cursor: pointer; color: var(--soft); font-weight: 600; user-select: none } th:hover { color: var(--ink) }
th:first-child, td:first-child { text-align: left } tbody tr:hover { background: var(--wash) }
th[data-order="1"]::after { content: " \\25B2" } th[data-order="-1"]::after { content: " \\25BC" }
details { border-bottom: 1px solid var(--line); padding: 6px 0 } summary { cursor: pointer }
code, pre { font: 13px/1.45 ui-monospace, monospace } pre { overflow-x: auto; background: var(--wash); padding: 10px;
  border-radius: 6px; margin: 8px 0 }
@media (max-width: 560px) { .plots { grid-template-columns: 1fr } main { padding: 20px 12px } }
"""
SORT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const order = head.dataset.order === "-1" ? 1 : -1, body = head.closest("table").tBodies[0];
  document.querySelectorAll("th").forEach(other => delete other.dataset.order);
  head.dataset.order = order;
  const key = row => { const value = row.cells[column].dataset.value; return value === "" ? -Infinity : isNaN(value)
    ? value : Number(value); };
  [...body.rows].sort((a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * order)
    .forEach(row => body.append(row));
}));
"""


def page(title: str, arms: Sequence[Arm], metric: str, plots: Sequence[Plot], advice: Sequence[str]) -> str:
    """The whole page; it requests nothing from anywhere.

    Args:
        title: Headline.
        arms: Arms of the sweep.
        metric: ``task/metric``.
        plots: Output of `efficientllava.report.plots.draw`.
        advice: Lines of HTML, see `efficientllava.report.advisor`.
    """
    runs = [run for arm in arms for run in arm.runs]
    models = ", ".join(dict.fromkeys(str(run.results.get("model", "?")) for run in runs))
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{len(runs)} runs in {len(arms)} configurations of {html.escape(models)}; mean ± standard '
        f"deviation over seeds; metric {html.escape(metric)}</p>",
    ]
    if advice:
        items = "".join(f"<li>{line}</li>" for line in advice)
        body.append(f'<h2>What won here</h2><div class="card advice"><ul>{items}</ul></div>')
    cards = "".join(f'<div class="card"><h3>{html.escape(p.title)}</h3>{_image(p)}</div>' for p in plots)
    body += [f'<h2>Plots</h2><div class="plots">{cards}</div>'] if plots else []
    body.append(f'<h2>Table</h2><div class="card scroll">{_table(arms, metric)}</div>')
    body.append(f'<h2>Runs</h2><div class="card">{"".join(_details(run) for run in runs)}</div>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main><script>{SORT}</script></body></html>\n"
    )


def _image(plot: Plot) -> str:
    data = io.BytesIO()
    plot.figure.savefig(data, format="svg")
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{html.escape(plot.title)}" src="data:image/svg+xml;base64,{text}">'


def _columns(metric: str) -> list[tuple[str, tuple[str, ...], bool, float, int]]:
    """Head, place in ``results.json``, whether in its last stage, factor and digits of every column."""
    score = ("metrics", *metric.split("/"))
    task = metric.partition("/")[0]
    return [
        ("removed, %", ("ratio", "achieved"), False, 100, 1),
        *((f"{stage}, %", ("stages", stage, *score), False, 100, 1) for stage in STAGES),
        ("retained, %", ("retained", metric), True, 100, 1),
        ("answer loss", ("metrics", task, "answer_loss"), True, 1, 3),
        ("parameters, M", ("parameters",), True, 1e-6, 3),
        ("MiB", ("checkpoint_bytes",), True, 2**-20, 2),
        ("ms per token", ("latency_ms", "decode"), True, 1, 2),
        ("prune, s", ("seconds", "prune"), False, 1, 0),
        ("recover, s", ("seconds", "recover"), False, 1, 0),
    ]


def _table(arms: Sequence[Arm], metric: str) -> str:
    columns = [column for column in _columns(metric) if any(arm.values(*column[1], last=column[2]) for arm in arms)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("configuration", "seeds", *(c[0] for c in columns)))
    rows = []
    for arm in arms:
        label = html.escape(arm.label())
        cells = [f'<td data-value="{label}">{label}</td><td data-value="{len(arm.runs)}">{len(arm.runs)}</td>']
        for _, path, last, factor, digits in columns:
            found = arm.mean(*path, last=last)
            if found is None:
                cells.append('<td data-value="">-</td>')
                continue
            mean, spread = (factor * value for value in found)
            text = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(arm.runs) > 1 else "")
            cells.append(f'<td data-value="{mean:.9g}">{text}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _details(run: Run) -> str:
    config = json.dumps(_nested(run.config), indent=2, default=str)
    return (
        f"<details><summary><code>{html.escape(run.command)}</code></summary>"
        f'<p class="soft">seed {run.results["seed"]}, commit {html.escape(run.results["commit"] or "unknown")}, '
        f"{html.escape(run.folder.name)}</p><pre>{html.escape(config)}</pre></details>"
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return nested


def write_page(path: Path, text: str, plots: Sequence[Plot]) -> None:
    """Write the page, and the plots as PNG into ``plots/`` beside it.

    Args:
        path: The page's file.
        text: Output of `page`.
        plots: The plots.
    """
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")
    folder = path.with_name("plots")
    folder.mkdir(exist_ok=True)
    for plot in plots:
        plot.figure.savefig(folder / f"{plot.name}.png")
