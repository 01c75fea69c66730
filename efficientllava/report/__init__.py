"""What one run measured: its numbers by name, what each of its layers keeps, and its closing tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..record import STAGES, Results, find, is_score, last_stage
from ..runtime import state

ABSENT = "-"
LABELS = {
    "accuracy image": "image questions",
    "accuracy text": "text-only questions",
    "answer loss": "answer loss, nats per token",
    "perplexity": "perplexity (less is better)",
    "kl": "KL to the base, nats per token",
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
POINTS = ("perception", "cognition", "perplexity", *STUDY)  # metrics that are no shares
WHOLE = ("digits_vqa", "prose")  # benchmarks of which everything is shown
NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "caption_style": "dim"}
KINDS = {"groups": "attention", "channels": "mlp"}  # of a layer's units, and of a search's genes
Stage = Mapping[str, Any]
_decimals = "{:.3f}".format
Row = tuple[str, str, Callable[[Any], str], str]  # label, name of a number in a stage, how it is shown, style


def numbers(results: Results) -> dict[str, float]:
    """Every number of a run by its name in tables, plots and W&B: ``base/digits_vqa/accuracy``, ``ratio/achieved``.

    Names of a stage start with its name; those of the last one stand below ``final/``, too.
    """
    nodes = {**results["stages"], "final": last_stage(results)}
    nodes |= {key: results.get(key, {}) for key in ("ratio", "seconds", "samples")}  # those of a dry run lack some
    return {name.replace("/metrics/", "/", 1): value for name, value in numbers_of(nodes).items()}


def numbers_of(node: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested mappings by their keys, joined by slashes."""
    return {name: value for name, value in flat(node, "/") if isinstance(value, int | float)}


def flat(node: Mapping[Any, Any], joint: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their joined keys."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, joint, f"{prefix}{key}{joint}")
        else:
            yield f"{prefix}{key}", value


def kept_shares(folder: Path, kind: str) -> list[float] | None:
    """What every layer of a run keeps, in percent; 0 for a dropped layer.

    Args:
        folder: The run's folder, with ``plan.json``, and ``search.json`` where weights were masked.
        kind: ``groups``, or the weights of the attention that are not masked; ``channels``, or those of the MLP.

    Returns:
        None where nothing was pruned, or an earlier version wrote the plan: it does not say how many units there were.
    """
    plan = state.read(folder, "plan.json")
    if "sparsity" in (plan.get("details") or {}):
        record, masked = (state.read(folder, "search.json"), KINDS[kind])
        genes = zip(record["genes"], record["best"], strict=True)
        return [100 * (1 - gene["amounts"][level]) for gene, level in genes if gene["kind"] == masked]
    if not plan.get("source_units"):
        return None
    kept, whole = ({layer["index"]: len(layer[kind]) for layer in plan["layers"]}, int(kind == "channels"))
    if kind == "groups":  # in query heads, of which every KV group has as many
        kept |= {v["index"]: len(v["heads"]) / plan["heads_per_group"] for v in plan["layers"] if v.get("heads")}
    return [100 * kept.get(index, 0) / units[whole] for index, units in enumerate(plan["source_units"])]


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


def _metric(name: str, share: bool = True) -> Callable[[float], str]:
    """How a metric is written."""
    return "{:.1f}".format if name.partition("/")[0] in POINTS else percent if share else _decimals


def _fill(table: Table, found: Mapping[str, float], names: Sequence[str], rows: Iterable[Row], head: str = "") -> None:
    """Write a section: a column per stage, without the rows of which no stage has the number."""
    for label, place, show, style in rows:
        values = [found.get(f"{name}/{place}") for name in names]
        if any(value is not None for value in values):
            if head:
                table.add_row(f"[bold]{head}[/]")
            head = ""
            table.add_row(label, *(ABSENT if value is None else show(value) for value in values), style=style)
    table.add_section()


def tabulate(results: Results) -> Table:
    """The closing table of a run: one column per stage; fits 80 columns, and a file as well as a terminal."""
    names = [name for name in STAGES if name in results["stages"]]
    stages, found = [results["stages"][name] for name in names], numbers(results)
    for name in names[1:]:
        whole, size = (found.get(f"{stage}/language_parameters") for stage in ("base", name))
        found |= {f"{name}/removed": 1 - size / whole} if whole and size is not None else {}
    found |= {f"{name}/fit": loss for name, loss in (find(results, "losses", "fit") or {}).items()}
    table = Table(box=box.SIMPLE_HEAD, caption_style="dim")
    table.caption = _caption(results, stages)
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=9, style="bold" if name == "recovered" else "")
    _fill(table, found, names, _size_rows(results, stages))
    _fill(table, found, names, _speed_rows(stages))
    for task in dict.fromkeys(task for stage in stages for task in stage.get("metrics", {})):
        _fill(table, found, names, _task_rows(results, stages, task), task)
    return table


def _size_rows(results: Results, stages: Sequence[Stage]) -> list[Row]:
    ratio = results["ratio"]
    asked = [f"{percent(ratio['requested'])} requested"] if ratio.get("requested") is not None else []
    asked += [f"{key}={ratio[key]}" for key in ("share", "drop_layers") if key in ratio]
    unseen: Row = (f"loss on {find(results, 'samples', 'report')} unseen records", "report_loss", _decimals, "")
    fitted: Row = ("loss chosen on, optimistic", "fit", _decimals, "")
    return [
        ("parameters", "parameters", quantity, ""),
        ("language-model parameters", "language_parameters", quantity, ""),
        (f"  removed ({asked[0]})" if asked else "  removed", "removed", percent, ""),
        unseen if any("report_loss" in stage for stage in stages) else fitted,
        ("checkpoint, MiB", "checkpoint_bytes", _mebibytes, ""),
        ("memory peak, MiB", "memory_bytes/peak", _mebibytes, ""),
    ]


def _speed_rows(stages: Sequence[Stage]) -> list[Row]:
    plain = any(stage["setup"]["image_size"] == [] for stage in stages if stage.get("setup"))
    asked = "text-only question" if plain else "image-question"
    return [
        (f"FLOPs per {asked}", "flops/prefill", quantity, ""),
        ("  in the language model", "flops/prefill_language", quantity, "dim"),
        ("prefill latency, ms", "latency_ms/prefill", _milliseconds, ""),
        ("  interquartile range", "latency_ms/prefill_iqr", _milliseconds, "dim"),
        ("per-token latency, ms", "latency_ms/decode", _milliseconds, ""),
        ("  interquartile range", "latency_ms/decode_iqr", _milliseconds, "dim"),
        *_throughput_rows(stages),
    ]


def _throughput_rows(stages: Sequence[Stage]) -> list[Row]:
    keys = [key for key in stages[0].get("tokens_per_second", {}) if not key.endswith("_iqr")] if stages else []
    return [(f"tokens/s, {key.replace('_', ' ')}", f"tokens_per_second/{key}", quantity, "") for key in keys]


def _metric_label(metrics: Mapping[str, float], name: str) -> str:
    """Accuracies by type are indented below their group; the count stands behind the name."""
    head, _, kind = name.partition("/")
    label = kind.replace("_", " ").removeprefix("text ") if kind else head.replace("_", " ")
    label = LABELS.get(label, label)
    count = metrics.get(name.replace("accuracy", "n", 1)) if name.startswith("accuracy") else None
    indent = 4 if kind else 2 if "_" in head and head.startswith("accuracy") else 0
    return " " * indent + label + (f" ({count:.0f})" if count is not None else "")


def _task_rows(results: Results, stages: Sequence[Stage], task: str) -> Iterator[Row]:
    metrics: dict[str, float] = next(found for stage in stages if (found := find(stage, "metrics", task)))
    # Of a benchmark with many groups only what papers print is shown.
    headline: list[str] | None = find(results, "benchmarks", task, "headline")
    shown = [name for name in metrics if is_score(name) or name.endswith("loss")]
    shown += [name for name in headline or () if name not in shown]
    for name in shown if headline is None or task in WHOLE else headline:
        share = is_score(name) and (headline is not None or name.startswith("accuracy"))
        yield (_metric_label(metrics, name), f"{task}/{name}", _metric(name, share), "dim" if "/" in name else "")
    for name, label in DOUBTS.items():
        if any(find(stage, "metrics", task, name) for stage in stages):
            yield f"  {label}", f"{task}/{name}", quantity, "dim"
    if headline and not metrics.keys() & {*headline}:
        yield "answers, not scored", f"{task}/n", quantity, ""
    plain = ["accuracy"] if "accuracy" in metrics else [name for name in shown if name not in STUDY]
    for name in headline or plain:
        yield f"retained {name}", f"retained/{task}/{name}", percent, "bold"


def tabulate_quantized(results: Results) -> Iterator[Table]:
    """Each stage beside its quantized copy, a column each: memory, speed and what papers print of every benchmark.

    Yields:
        One table; none where nothing was quantized.
    """
    names = sorted(results["stages"], key=lambda name: (STAGES.index(name.partition("_")[0]), name))
    if set(names) <= {*STAGES}:
        return
    stages = [results["stages"][name] for name in names]
    rows: list[Row] = [
        ("weights, MiB", "memory_bytes/weights", _mebibytes, ""),
        ("peak, MiB", "memory_bytes/peak", _mebibytes, ""),
        ("prefill, ms", "latency_ms/prefill", _milliseconds, ""),
        ("token, ms", "latency_ms/decode", _milliseconds, ""),
        *_throughput_rows(stages),
    ]
    for task, metrics in stages[0]["metrics"].items():
        first = [name for name in metrics if is_score(name)][:1]
        printed = find(results, "benchmarks", task, "headline") or first
        rows += [(f"{task} {name}", f"{task}/{name}", _metric(name), "") for name in printed]
    # Narrower gaps than elsewhere: six columns and their labels have to fit 80 characters.
    table = Table(caption=_conditions(stages), **NARROW)
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    _fill(table, numbers(results), names, rows)
    yield table


def tabulate_deployed(results: Results) -> Iterator[Table]:
    """The files for llama.cpp, a row per type: size, agreement with transformers, and speed beside the dense model's.

    Yields:
        One table; none where nothing was exported.
    """
    made = results.get("deploy")
    if not made:
        return
    image = f"; image features: cosine {made['mmproj']['cosine']:.3f}" if "cosine" in made.get("mmproj", {}) else ""
    said = f"{made.get('runtime', 'not checked')}, architecture {made['architecture']}{image}"
    table = Table(caption=f"{said}\ntokens per second of CPU, on one thread", **NARROW)
    table.add_column("llama.cpp", no_wrap=True)
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("MiB", "bytes", _mebibytes),
        ("KL,\nnats", "agreement/text/kl", "{:.2g}".format),
        ("same\ntop", "agreement/text/top1", percent),
        ("prefill", "speed/exported/prefill", "{:.0f}".format),
        ("decode", "speed/exported/decode", "{:.0f}".format),
        ("dense\nMiB", "speed/dense/bytes", _mebibytes),
        ("prefill", "speed/dense/prefill", "{:.0f}".format),
        ("decode", "speed/dense/decode", "{:.0f}".format),
    ]
    for head, _, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for kind, entry in made["files"].items():
        found = numbers_of(entry)
        table.add_row(kind, *(show(found[name]) if name in found else ABSENT for _, name, show in columns))
    yield table


def _conditions(stages: Sequence[Stage]) -> str | None:
    """What speed was measured on."""
    setup = next((found for stage in stages if (found := stage.get("setup"))), None)
    if setup is None:
        return None
    size = "x".join(str(side) for side in setup["image_size"]) or "none"
    return (
        f"speed: {setup['device']}, {setup['dtype']}, {setup['threads']} threads, batch {setup['batch_size']}, "
        f"image {size}, prompt {setup['prompt_tokens']} tokens, median of {setup['repeats']}"
    )


def _caption(results: Results, stages: Sequence[Stage]) -> str | None:
    """The conditions of the speed measurement and what was not measured anew in this run."""
    protocols = {facts["protocol"] for facts in results.get("benchmarks", {}).values() if "protocol" in facts}
    lines = {
        _conditions(stages): True,
        "FLOPs: products of the prefill of that prompt, a multiply-add is two": any("flops" in s for s in stages),
        f"benchmarks: prompts and parsing of {', '.join(sorted(protocols))}": protocols,
        f"from the cache: {', '.join(results.get('reused', ()))}": results.get("reused"),
    }
    return "\n".join(line for line, known in lines.items() if line and known) or None
