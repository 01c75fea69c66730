"""One self-contained page from the runs of a sweep: plots, a sortable table, an advisor, and every command."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..record import STAGES, metric_keys, scores
from ..runtime.files import whole_file
from ..settings.schema import GGUF_TYPES
from .plots import Plot
from .runs import (
    Arm,
    Run,
    counted,
    in_units,
    score_scale,
    sweep_command,
    unfinished,
)
from .tables import mean_spread

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #61707f; --line: #e3e7ec; --paper: #fff; --wash: #f6f8fa;
  --accent: #1b6ca8 }
* { box-sizing: border-box }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--wash) }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere } h2 { font-size: 19px; margin: 40px 0 12px }
p { margin: 4px 0 } .soft { color: var(--soft) } .small { font-size: 13px }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; min-width: 0 }
.plots { columns: 2 480px; column-gap: 16px; margin-bottom: -16px }
.plots .card { overflow-x: auto; break-inside: avoid; margin-bottom: 16px }
.plots img { display: block; width: 100%; margin: 8px auto 0 }
h3 { margin: 12px 0 4px; font-size: 15px } h3:first-child { margin: 0 }
ul { margin: 0; padding-left: 20px } li { margin: 5px 0 }
.scroll { overflow: auto; max-height: 80vh; padding: 0 } table { border-collapse: collapse; width: 100% }
th, td { padding: 6px 9px; font-size: 13.5px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums }
thead th { white-space: normal; vertical-align: bottom; position: sticky; top: 0; z-index: 2;
  background: var(--paper); cursor: pointer; color: var(--soft);
  font-weight: 600; user-select: none }
th:hover, th[aria-sort] { color: var(--ink) } tbody tr:hover td { background: var(--wash) }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
td:first-child { white-space: normal; min-width: 240px } thead th:first-child { z-index: 3 }
th[aria-sort=ascending]::after { content: " \\25B2" } th[aria-sort=descending]::after { content: " \\25BC" }
details { border-bottom: 1px solid var(--line); padding: 6px 0 } details:last-child { border: 0 }
summary { cursor: pointer } code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { background: var(--wash); padding: 10px 12px; border-radius: 6px; margin: 8px 0; overflow-x: auto }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 600px) { main { padding: 20px 12px } .card { padding: 12px } .scroll { padding: 0 }
  td:first-child { min-width: 120px } }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #9aa8b5; --line: #333d47; --paper: #1c2329; --wash: #13181c; --accent: #6db5ea }
  .plots img { filter: invert(.88) hue-rotate(180deg) } }
@media print { :root { --wash: #fff } main { max-width: none; padding: 0 } h2, tr { break-after: avoid }
  .scroll { max-height: none; overflow: visible } table { font-size: 8px } th, td { padding: 2px 4px }
  th, td:first-child { position: static !important } .plots { columns: 2 } }
"""
SORT = """
document.querySelectorAll("thead th").forEach((head, column) => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], down = head.ariaSort === "descending" ? 1 : -1;
  head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down < 0 ? "descending" : "ascending");
  const compare = (one, other) => one === other ? 0 : one === "" ? 1 : other === "" ? -1
    : down * (isNaN(one) || isNaN(other) ? one.localeCompare(other, undefined, { numeric: true }) : one - other);
  [...body.rows].sort((a, b) => compare(a.cells[column].dataset.value, b.cells[column].dataset.value))
    .forEach(row => body.append(row));
}));
"""
ADVICE = (
    "Retained scores; mean ± standard deviation over seeds. “Within the noise” means that the 95 % interval of the "
    "difference includes zero: from the spread over seeds (Student's t), or from the number of questions where there "
    "is one seed. All seeds answer the same questions, and few seeds leave wide intervals."
)
TABLE = (
    "Mean ± sample standard deviation over seeds; a column without ± is the same for all seeds, to the digits shown. "
    "A click on a head sorts."
)


def page(
    folder: Path, arms: Sequence[Arm], metric: str, plots: Sequence[Plot], advice: Mapping[str, Sequence[str]]
) -> str:
    """The whole page; it requests nothing from anywhere.

    Args:
        folder: The folder of the runs; its name is the headline.
        arms: Arms of the sweep.
        metric: ``task/metric``.
        plots: Output of `efficientllava.report.plots.draw`.
        advice: By model, lines of HTML, see `efficientllava.report.advisor`.
    """
    title = html.escape(folder.resolve().name)
    failed = unfinished(folder)
    body = [*_head(folder, title, arms, metric)]
    if failed:
        items = "".join(
            f"<li><code>{html.escape(run.command)}</code><br>{html.escape(run.told())}</li>" for run in failed
        )
        body.append(f'<h2>{counted(len(failed), "run")} without results</h2><div class="card"><ul>{items}</ul></div>')
    if advice:
        body.append('<h2>What won here</h2><div class="card">')
        for model, lines in advice.items():
            body.append(f"<h3>{html.escape(model)}</h3>" if model else "")
            body.append(f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>")
        body.append(f'<p class="soft small">{ADVICE}</p></div>')
    if plots:
        body.append(f'<h2>Plots</h2><div class="plots">{"".join(map(_card, plots))}</div>')
    if arms:
        table = _table(arms, metric)
        body.append(f'<h2>Table</h2><p class="soft small">{TABLE}</p><div class="card scroll">{table}</div>')
        runs = "".join(_details(arm, run) for arm in arms for run in arm.runs)
        body.append(f'<h2>Runs</h2><div class="card">{runs}</div>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main><script>{SORT}</script></body></html>\n"
    )


def _head(folder: Path, title: str, arms: Sequence[Arm], metric: str) -> Iterator[str]:
    runs = [run for arm in arms for run in arm.runs]
    models = ", ".join(dict.fromkeys(str(run.results.get("model", "?")) for run in runs))
    commits = list(dict.fromkeys(run.results["commit"][:10] or "unknown" for run in runs))
    seeds = counted(len({run.results["seed"] for run in runs}), "seed")
    yield f"<h1>{title}</h1>"
    facts = (
        f"{counted(len(runs), 'run')} in {counted(len(arms), 'configuration')}, {seeds}",
        models,
        metric,
        f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
    )
    yield f'<p class="soft">{" · ".join(map(html.escape, facts))}</p>'
    if command := sweep_command(folder):
        yield f'<pre class="command">{html.escape(command)}</pre>'


def _card(plot: Plot) -> str:
    """A plot as it stands on the page; too small a screen scrolls it."""
    import matplotlib

    data = io.BytesIO()
    # The same runs give the same page.
    with matplotlib.rc_context({"svg.hashsalt": plot.name}):
        plot.figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text, width = base64.b64encode(data.getvalue()).decode(), plot.figure.get_figwidth()
    size = f"min-width: {58 * width:.0f}px; max-width: {135 * width:.0f}px"
    image = f'<img alt="{html.escape(plot.title)}" style="{size}" src="data:image/svg+xml;base64,{text}">'
    return (
        f'<div class="card"><h3>{html.escape(plot.title)}</h3><p class="soft small">{html.escape(plot.caption)}</p>'
        f"{image}</div>"
    )


def _columns(arms: Sequence[Arm], metric: str) -> list[tuple[str, tuple[str, ...], bool, float, int]]:
    """Head, place in ``results.json``, whether in its last stage, factor and digits of every column with a number."""
    score, (factor, sign) = metric_keys(metric), score_scale(arms, metric)
    count, giga = in_units([size for arm in arms for size in arm.values("stages", "base", "parameters")], 1000)
    size, unit = in_units(
        [size for arm in arms for size in arm.values("stages", "base", "checkpoint_bytes")], 1024, "iB"
    )
    others = [other for other in scores((run.results for arm in arms for run in arm.runs), True) if other != metric]
    columns = [
        ("removed, %", ("ratio", "achieved"), False, 100, 1),
        ("zeros, %", ("ratio", "sparsity"), False, 100, 1),
        *((f"{stage}{sign}", ("stages", stage, *score), False, factor, 1) for stage in STAGES),
        ("retained, %", ("retained", metric), True, 100, 1),
        ("answer loss", (*score[:2], "answer_loss"), True, 1, 3),
        *((f"{other.replace('/', ' ')}, retained %", ("retained", other), True, 100, 1) for other in others),
        (f"parameters, {giga}", ("parameters",), True, 1 / count, 3),
        (f"checkpoint, {unit}", ("checkpoint_bytes",), True, 1 / size, 2),
        ("ms per token", ("latency_ms", "decode"), True, 1, 2),
        *((f"{kind} file, {unit}", ("gguf", kind, "bytes"), True, 1 / size, 2) for kind in GGUF_TYPES),
        *((f"{kind}, ms of CPU per token", ("gguf", kind, "decode_ms"), True, 1, 2) for kind in GGUF_TYPES),
        ("prune, s", ("seconds", "prune"), False, 1, 0),
        ("recover, s", ("seconds", "recover"), False, 1, 0),
    ]
    found = [[value for arm in arms for value in arm.values(*column[1], last=column[2])] for column in columns]
    told = zip(columns, found, strict=True)
    return [column for column, values in told if (any(values) if column[1][0] == "seconds" else values)]


def _table(arms: Sequence[Arm], metric: str) -> str:
    columns = _columns(arms, metric)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("configuration", "seeds", *(c[0] for c in columns)))
    cells = [[_sortable(html.escape(arm.label())), _sortable(str(len(arm.runs)))] for arm in arms]
    for _, path, last, factor, digits in columns:
        found = [arm.values(*path, last=last) for arm in arms]
        varies = any(len(values) > 1 and round(factor * statistics.stdev(values), digits) for values in found)
        for arm, values, row in zip(arms, found, cells, strict=True):
            mean = f"{statistics.fmean(values) * factor:.9g}" if values else ""
            row.append(_sortable(mean_spread(values, factor, digits, len(arm.runs), varies), mean))
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _sortable(text: str, value: str | None = None) -> str:
    return f'<td data-value="{text if value is None else value}">{text}</td>'


def _details(arm: Arm, run: Run) -> str:
    facts = f"commit {run.results['commit'] or 'unknown'}, folder {run.folder.name}"
    return (
        f"<details><summary>{html.escape(arm.label())}, seed {run.results['seed']}</summary>"
        f'<pre class="command">{html.escape(run.command)}</pre><p class="soft small">{html.escape(facts)}</p>'
        f"<pre>{html.escape(run.written_config())}</pre></details>"
    )


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
