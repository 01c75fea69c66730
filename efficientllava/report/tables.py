"""The closing table of a run, and tables over runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ..record import (
    STAGES,
    Results,
    find,
    is_score,
    metric_keys,
)
from ..runtime.errors import UserError
from .runs import Arm, score_scale

ABSENT = "-"
LABELS = {
    "accuracy image": "image questions",
    "accuracy text": "text-only questions",
    "answer loss": "answer loss, nats per token",
    "anls": "ANLS",
    "f1": "F1",
    "avg": "AVG",
    "avg percent": "AVG-%",
}
DOUBTS = {  # counts that a score must not be read without, where they are not 0
    "n_undecided": "wrong until a judge reads them",
    "n_failed": "verdicts without a score",
    "n_unpaired": "images without two questions",
}
STUDY = ("avg", "avg_percent")  # of evaluate=vlmcompression
POINTS = ("perception", "cognition", *STUDY)  # metrics that are no shares
Row = tuple[str, str, list[str]]  # label, style, one cell per stage


def quantity(value: float) -> str:
    """A count in three significant digits with a unit prefix: 812345 is ``812 k``, 1.2e9 is ``1.20 G``."""
    units = ["", " k", " M", " G", " T", " P"]
    # Compared after rounding, so that 999.96 becomes 1.00 k and not 1000.
    while float(f"{value:.3g}") >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    whole = units[0] == "" and value == int(value)
    digits = 0 if value >= 99.95 or whole else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{units[0]}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.2f}"


def _row(
    label: str, stages: Sequence[Mapping[str, Any]], keys: Sequence[str], show: Callable[[Any], str], style: str = ""
) -> Iterator[Row]:
    """One row, or none when no stage has the number."""
    values = [find(stage, *keys) for stage in stages]
    if any(value is not None for value in values):
        yield label, style, [ABSENT if value is None else show(value) for value in values]


def _size_rows(results: Results, stages: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    yield from _row("parameters", stages, ["parameters"], quantity)
    yield from _row("language-model parameters", stages, ["language_parameters"], quantity)
    requested, whole = results["ratio"].get("requested"), find(results["stages"], "base", "language_parameters")
    if whole and len(stages) > 1:
        asked = [f"{percent(requested)} requested"] if requested is not None else []
        asked += [f"{key}={results['ratio'][key]}" for key in ("share", "drop_layers") if key in results["ratio"]]
        label = f"  removed ({asked[0]})" if asked else "  removed"
        later: list[Mapping[str, Any]] = [{}, *stages[1:]]
        yield from _row(label, later, ["language_parameters"], lambda size: percent(1 - size / whole))
    if any("report_loss" in stage for stage in stages):
        label = f"loss on {results['samples']['report']} unseen records"
        yield from _row(label, stages, ["report_loss"], lambda loss: f"{loss:.3f}")
    elif fitted := find(results, "losses", "fit"):
        known = [{"loss": fitted.get(stage)} for stage in STAGES[: len(stages)]]
        yield from _row("loss chosen on, optimistic", known, ["loss"], lambda loss: f"{loss:.3f}")
    yield from _row("checkpoint, MiB", stages, ["checkpoint_bytes"], _mebibytes)
    yield from _row("memory peak, MiB", stages, ["memory_bytes", "peak"], _mebibytes)


def _speed_rows(stages: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    plain = any(stage["setup"]["image_size"] == [] for stage in stages if stage.get("setup"))
    yield from _row(
        f"FLOPs per {'text-only question' if plain else 'image-question'}", stages, ["flops", "prefill"], quantity
    )
    yield from _row("  in the language model", stages, ["flops", "prefill_language"], quantity, "dim")
    for label, name in (("prefill latency, ms", "prefill"), ("per-token latency, ms", "decode")):
        yield from _row(label, stages, ["latency_ms", name], _milliseconds)
        yield from _row("  interquartile range", stages, ["latency_ms", f"{name}_iqr"], _milliseconds, "dim")
    yield from _throughput_rows(stages)


def _throughput_rows(stages: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for key in stages[0].get("tokens_per_second", {}):
        if not key.endswith("_iqr"):
            yield from _row(f"tokens/s, {key.replace('_', ' ')}", stages, ["tokens_per_second", key], quantity)


def _metric_label(metrics: Mapping[str, float], name: str) -> str:
    """Accuracies by type are indented below their group; the count stands behind the name."""
    head, _, kind = name.partition("/")
    label = kind.replace("_", " ").removeprefix("text ") if kind else head.replace("_", " ")
    label = LABELS.get(label, label)
    count = metrics.get(name.replace("accuracy", "n", 1)) if name.startswith("accuracy") else None
    indent = 4 if kind else 2 if "_" in head and head.startswith("accuracy") else 0
    return " " * indent + label + (f" ({count:.0f})" if count is not None else "")


def _task_rows(results: Results, stages: Sequence[Mapping[str, Any]], task: str) -> Iterator[Row]:
    metrics: dict[str, float] = next(found for stage in stages if (found := find(stage, "metrics", task)))
    # Of a benchmark with many groups only what papers print is shown.
    headline: list[str] | None = find(results.get("benchmarks", {}), task, "headline")
    scores = [name for name in metrics if not (name == "n" or name.startswith(("n_", "n/")))]
    for name in scores if headline is None or task == "digits_vqa" else headline:
        share = not name.endswith("loss") and (headline is not None or name.startswith("accuracy"))
        show = _show(name, share)
        style = "dim" if "/" in name else ""
        yield from _row(_metric_label(metrics, name), stages, ["metrics", task, name], show, style)
    for name, label in DOUBTS.items():
        if any(find(stage, "metrics", task, name) for stage in stages):
            yield from _row(f"  {label}", stages, ["metrics", task, name], quantity, "dim")
    if headline and not metrics.keys() & {*headline}:
        yield from _row("answers, not scored", stages, ["metrics", task, "n"], quantity)
    plain = ["accuracy"] if "accuracy" in metrics else [name for name in scores if name not in STUDY]
    for name in headline or plain:
        yield from _row(f"retained {name}", stages, ["retained", f"{task}/{name}"], percent, "bold")


def _show(metric: str, share: bool = True) -> Callable[[float], str]:
    """How a metric is written."""
    if metric in POINTS:
        return lambda value: f"{value:.1f}"
    return percent if share else lambda value: f"{value:.3f}"


def tabulate(results: Results, title: str | None = None) -> Table:
    """The closing table of a run: one column per stage; fits 80 columns, and a file as well as a terminal.

    Args:
        results: Output of `results.build` or `results.read`.
        title: Line above the table.

    Returns:
        A table for ``rich.print``.
    """
    names = [name for name in STAGES if name in results["stages"]]
    stages = [results["stages"][name] for name in names]
    tasks = list(dict.fromkeys(task for stage in stages for task in stage.get("metrics", {})))
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_style="bold", caption=_caption(results, stages), caption_style="dim"
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=9, style="bold" if name == "recovered" else "")
    sections = [(None, [*_size_rows(results, stages)]), (None, [*_speed_rows(stages)])]
    sections += [(task, [*_task_rows(results, stages, task)]) for task in tasks]
    for task, rows in sections:
        if task is not None and rows:
            table.add_row(f"[bold]{task}[/]")
        for label, style, cells in rows:
            table.add_row(label, *cells, style=style)
        if rows:
            table.add_section()
    return table


def tabulate_quantized(results: Results) -> Iterator[Table]:
    """Each stage beside its quantized copy, a column each: memory, speed and what papers print of every benchmark.

    Args:
        results: Output of `results.build` or `results.read`.

    Yields:
        One table; none where nothing was quantized.
    """
    names = sorted(results["stages"], key=lambda name: (STAGES.index(name.partition("_")[0]), name))
    if set(names) <= {*STAGES}:
        return
    stages = [results["stages"][name] for name in names]
    rows = [
        *_row("weights, MiB", stages, ["memory_bytes", "weights"], _mebibytes),
        *_row("peak, MiB", stages, ["memory_bytes", "peak"], _mebibytes),
        *_row("prefill, ms", stages, ["latency_ms", "prefill"], _milliseconds),
        *_row("token, ms", stages, ["latency_ms", "decode"], _milliseconds),
        *_throughput_rows(stages),
    ]
    for task, metrics in stages[0]["metrics"].items():
        first = [name for name in metrics if is_score(name)][:1]
        for name in find(results, "benchmarks", task, "headline") or first:
            rows += _row(f"{task} {name}", stages, ["metrics", task, name], _show(name))
    # Narrower gaps than elsewhere: six columns and their labels have to fit 80 characters.
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=_conditions(stages), caption_style="dim"
    )
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for label, style, cells in rows:
        table.add_row(label, *cells, style=style)
    yield table


def tabulate_deployed(results: Results) -> Iterator[Table]:
    """The files for llama.cpp, a row per type: size, agreement with transformers, and speed beside the dense model's.

    Args:
        results: Output of `results.build` or `results.read`.

    Yields:
        One table; none where nothing was exported.
    """
    made = results.get("deploy")
    if not made:
        return
    image = f"; image features: cosine {made['mmproj']['cosine']:.3f}" if "cosine" in made.get("mmproj", {}) else ""
    said = f"{made.get('runtime', 'not checked')}, architecture {made['architecture']}{image}"
    caption = f"{said}\ntokens per second of CPU, on one thread"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_style="dim")
    for head in (
        "llama.cpp",
        "MiB",
        "KL,\nnats",
        "same\ntop",
        "prefill",
        "decode",
        "dense\nMiB",
        "prefill",
        "decode",
    ):
        table.add_column(head, justify="right" if head != "llama.cpp" else "left", no_wrap=True)
    for kind, entry in made["files"].items():
        text, speed = find(entry, "agreement", "text"), entry.get("speed", {})
        cells = [f"{text['kl']:.2g}", percent(text["top1"])] if text else [ABSENT, ABSENT]
        pruned, dense = (
            [f"{speed[side][key]:.0f}" for key in ("prefill", "decode")] if side in speed else [ABSENT] * 2
            for side in ("exported", "dense")
        )
        before = _mebibytes(speed["dense"]["bytes"]) if "dense" in speed else ABSENT
        table.add_row(kind, _mebibytes(entry["bytes"]), *cells, *pruned, before, *dense)
    yield table


def _conditions(stages: Sequence[Mapping[str, Any]]) -> str | None:
    """What speed was measured on."""
    setup = next((found for stage in stages if (found := stage.get("setup"))), None)
    if setup is None:
        return None
    size = "x".join(str(side) for side in setup["image_size"]) or "none"
    return (
        f"speed: {setup['device']}, {setup['dtype']}, {setup['threads']} threads, batch {setup['batch_size']}, "
        f"image {size}, prompt {setup['prompt_tokens']} tokens, median of {setup['repeats']}"
    )


def _caption(results: Results, stages: Sequence[Mapping[str, Any]]) -> str | None:
    """The conditions of the speed measurement and what was not measured anew in this run."""
    conditions = _conditions(stages)
    lines = [conditions] if conditions else []
    if any("flops" in stage for stage in stages):
        lines.append("FLOPs: products of the prefill of that prompt, a multiply-add is two")
    protocols = {facts["protocol"] for facts in results.get("benchmarks", {}).values() if "protocol" in facts}
    lines += [f"benchmarks: prompts and parsing of {', '.join(sorted(protocols))}"] if protocols else []
    if results.get("reused"):
        lines.append(f"from the cache: {', '.join(results['reused'])}")
    return "\n".join(lines) or None


def mean_spread(
    values: Sequence[float], scale: float = 100, digits: int = 1, runs: int | None = None, varies: bool = True
) -> str:
    """Mean and, from two values on, the sample standard deviation.

    Args:
        values: One per run that has the number.
        scale: What they are multiplied by.
        digits: Behind the point.
        runs: How many there are; a number that not all of them have says how many do.
        varies: Whether the deviation is shown.
    """
    if not values:
        return ABSENT
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if varies and len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text if runs in (None, len(values)) else f"{text} (n = {len(values)})"


def markdown(arms: Sequence[Arm], metric: str = "digits_vqa/accuracy") -> str:
    """A table over runs: a row per configuration, mean ± sample standard deviation over its seeds.

    Args:
        arms: At least one.
        metric: ``task/metric`` to show for every stage, in percent where it is a share.

    Returns:
        Markdown. Rows are named by the settings in which the configurations differ.

    Raises:
        UserError: If there are no arms, or ``metric`` names no task.
    """
    if not arms or "/" not in metric:
        raise UserError(
            f"table of {len(arms)} arms by {metric!r}: give at least one run and a metric like task/accuracy"
        )
    (scale, unit), (_, task, _) = score_scale(arms, metric), metric_keys(metric)
    head = ["run", "seeds", "removed, %", *(f"{stage}{unit}" for stage in STAGES), "retained, %", "answer loss"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    for arm in arms:
        runs = len(arm.runs)
        cells = [f"`{arm.label()}`", str(runs), mean_spread(arm.values("ratio", "achieved"))]
        cells += [mean_spread(arm.values("stages", stage, *metric_keys(metric)), scale) for stage in STAGES]
        cells.append(mean_spread(arm.values("retained", metric, last=True), runs=runs))
        cells.append(mean_spread(arm.values("metrics", task, "answer_loss", last=True), scale=1, digits=3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
