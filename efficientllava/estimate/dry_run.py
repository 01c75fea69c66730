"""``dry_run=true``: say what a run would make and need, and stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ..data.records import Record, usable
from ..data.splits import (
    calibration_records,
    draw,
    load_split,
    record_count,
)
from ..deploy import export
from ..evaluation import tasks
from ..models.anatomy import sizes
from ..recovery.losses import describe as describe_loss
from ..recovery.student import require_trainable
from ..report import percent, quantity, tabulate
from ..runtime import BUILTIN, UserError, at_end, digest, is_remote, quiet_libraries, say, write_whole
from ..settings.schema import MASKED, PROSE, RunConfig
from ..stages.request import finished, made
from . import Forecast, forecast, shape_of, weight_bytes
from .cost import (
    ANSWER,
    REACHED,
    Device,
    Job,
    Work,
    device_of,
    disk_of,
    distinct,
    schedule,
    tokens_of,
    works,
)
from .memory import StageMemory, describe, stage_memory

_looked: set[str] = set()  # data that are there, by a digest of where
_planned: list[tuple[Forecast, Job, dict[str, StageMemory]]] = []  # jobs of a sweep in this process


def dry_run(settings: RunConfig, folder: Path) -> dict[str, Any]:
    """Print the forecast of a run and write it to ``dry_run.json``.

    Args:
        settings: The checked configuration.
        folder: The run's folder.

    Returns:
        What was written.

    Raises:
        UserError: What the run itself would refuse for its sizes, or data that are not there.
    """
    quiet_libraries()
    _require_data(settings)
    plan = forecast(settings)
    job = Job(tuple(works(plan)), settings.keep, finished=False)
    result = {**report(plan), "cost": cost([job], device_of(plan.device, plan.dtype))}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "dry_run.json", json.dumps(result, indent=1) + "\n")
    say(f"[bold]{settings.name}[/bold]  {settings.model.path}: a dry run, no weights are read")
    say("", tabulate(result), *_lines(plan, result), "", _memory_table(result), *result["memory"]["assumptions"])
    say("", *_cost_lines(result["cost"], tokens_of(plan)))
    return result


def plan_job(settings: RunConfig, folder: Path) -> None:
    """Take a job into the dry run of its sweep, which `tell_sweep` sums up in the end.

    Args:
        settings: The checked configuration.
        folder: Of the job, named by its number, in that of the sweep.

    Raises:
        UserError: What the run itself would refuse for its sizes, or data that are not there.
    """
    quiet_libraries()
    _require_data(settings)
    plan = forecast(settings)
    done = finished(settings, Path(settings.paths.output_dir) / "sweeps" / settings.sweep.name / folder.name, dry=True)
    if not _planned:
        at_end(lambda _complete: tell_sweep(folder.parent))
    _planned.append((plan, Job(tuple(works(plan)), settings.keep, done), stage_memory(plan)))


class _ImageFiles:
    """Stands for a collator that looks for the images of a record and opens none."""

    def check(self, record: Record) -> None:
        """Refuse a record without them."""
        gone = next((image for image in record.images if isinstance(image, Path) and not isfile(image)), None)
        if gone is not None:
            raise UserError(f"record {record.id!r}: image {str(gone)!r} does not exist; restore it or drop the record")


def _require_data(settings: RunConfig) -> None:
    """Look for the records and images that a run would read, as far as they are on this machine; nothing is fetched."""
    data, own, evaluate = settings.data, settings.calibration, settings.evaluate
    calibrates, trains = settings.prune.method != "none", settings.recover.name != "none"
    key = digest([asdict(each) for each in (data, own, settings.recover, evaluate)])
    key = digest([key, calibrates, trains, settings.data_frac, settings.seed])
    if key in _looked:
        return
    if calibrates and _is_here(*((own.path, own.image_root) if own.path else (data.path, data.image_root))):
        calibration_records(own, data, settings.seed, _ImageFiles())
    if trains and _is_here(data.path, data.image_root):
        records = draw(load_split(data, "train"), settings.data_frac, settings.seed)
        require_trainable(usable(records, _ImageFiles(), data), settings.recover.train)
    for name in evaluate.tasks:
        if evaluate.root is not None or (name == PROSE and evaluate.prose.path is not None):
            tasks.load(name, data, evaluate).records()
    _looked.add(key)


def _is_here(path: str | None, image_root: str | None) -> bool:
    """Whether records are on this machine; those of a list that comes with this package are where the images are."""
    return path is not None and not is_remote(path) and (image_root is not None or not path.startswith(BUILTIN))


def tell_sweep(folder: Path) -> None:
    """Print what the planned jobs of a sweep compute and leave, and write it to ``dry_run.json`` in its folder."""
    plan, jobs = _planned[0][0], [job for _, job, _ in _planned]
    stages = [stage for _, _, memory in _planned for stage in memory.items()]
    worst = {name: max((m for other, m in stages if other == name), key=lambda m: m.total) for name in dict(stages)}
    _planned.clear()
    result = {**cost(jobs, device_of(plan.device, plan.dtype)), "memory": _memory(plan, worst)}
    write_whole(folder / "dry_run.json", json.dumps(result, indent=1) + "\n")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "in jobs", "to compute", f"{result['unit']}-hours"):
        table.add_column(column, justify="right" if column else "left")
    for stage, entry in result["stages"].items():
        table.add_row(stage, str(entry["jobs"]), str(entry["distinct"]), _hours(entry["hours"]))
    table.add_row("together", str(result["jobs"]), "", _hours(result["hours"]), style="bold")
    jobs_told = f"{result['jobs']} jobs, {result['finished']} of them finished"
    say(f"[bold]{folder.name}[/bold]  {plan.settings.model.path}: {jobs_told}")
    say(table, *_cost_lines(result, tokens_of(plan)), "", _memory_table(result, " of the largest jobs"))
    say(*result["memory"]["assumptions"])


def cost(jobs: Sequence[Job], device: Device) -> dict[str, Any]:
    """What jobs compute and leave, as plain JSON values; stages that they share count once."""
    todo = distinct(jobs)
    count = Counter(work.stage for job in jobs for work in job.works)
    stages = {
        stage: {"jobs": count[stage], "distinct": len(found), "hours": _total(found, device)}
        for stage, found in todo.items()
    }
    whole = [work for found in todo.values() for work in found]
    elsewhere = device_of("cuda", torch.bfloat16)
    return {
        "jobs": len(jobs),
        "finished": sum(job.finished for job in jobs),
        "unit": device.unit,
        "device": device.name,
        "hours": _total(whole, device),
        "elsewhere": {"device": elsewhere.name, "hours": _total(whole, elsewhere)} if device.unit == "CPU" else None,
        "stages": stages,
        "keep": sorted({job.keep for job in jobs}),
        "disk": disk_of(jobs),
    }


def _total(works: Sequence[Work], device: Device) -> float | None:
    """Device hours; None where the size of some data is unknown."""
    flops = [work.flops for work in works]
    return None if None in flops else device.hours(sum(filter(None, flops)))


def _cost_lines(result: dict[str, Any], tokens: int) -> list[str]:
    disk, other = result["disk"], result["elsewhere"]
    each = f", {disk['each'] / 1e9:.3g} more per further job at work" if disk["each"] else ""
    return [
        f"about {_hours(result['hours'])} {result['unit']}-hours ({result['device']})"
        + (f", or {_hours(other['hours'])} GPU-hours ({other['device']})" if other else ""),
        f"assumed: {REACHED:.0%} of the peak, FLOPs of the weights alone, records of {tokens} tokens with one image, "
        f"answers of {ANSWER}; not counted: loading, saving, speed measurements",
        f"disk with keep={','.join(result['keep'])}: {disk['stays'] / 1e9:.3g} GB of checkpoints stay, at most "
        f"{disk['most'] / 1e9:.3g} GB on the way{each}",
    ]


def _hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def report(plan: Forecast) -> dict[str, Any]:
    """Everything that is known of a run before it starts, as plain JSON values; keys as in ``results.json``."""
    settings, outline = plan.settings, plan.plan
    stages = {"base": plan.base, **dict.fromkeys(made(settings), plan.pruned)}
    low, high = outline.achieved
    return {
        "ratio": {
            "requested": plan.requested,
            **settings.prune.nominal,
            "achieved": low if low == high else None,
            "between": [low, high],
            "largest": outline.largest,
            "sparsity": plan.sparsity,
        },
        "shape": {
            "exact": outline.exact,
            "base": shape_of(plan.base),
            "options": len(outline.options),
            "pruned": shape_of(plan.pruned),
            "stock": plan.stock,
        },
        "stages": {
            name: {**sizes(model), "checkpoint_bytes": weight_bytes(model, plan.storage)}
            for name, model in stages.items()
        },
        "recovery": _recovery(plan) if settings.recover.name != "none" else None,
        "deploy": _deployed(plan) if settings.deploy.name != "none" else None,
        "memory": _memory(plan, stage_memory(plan)),
    }


def _memory(plan: Forecast, stages: Mapping[str, StageMemory]) -> dict[str, Any]:
    return {
        "device": plan.device,
        "processes": plan.processes,
        "stages": {
            name: {"bytes": stage.total, "certain": stage.least, "parts": dict(stage.parts), "host": stage.host}
            for name, stage in stages.items()
        },
        "assumptions": describe(plan),
    }


def _deployed(plan: Forecast) -> dict[str, Any]:
    config = plan.settings.deploy
    return {
        "types": list(config.types),
        "bytes": export.needed_bytes(plan.pruned, config, dense=False),
        "remarks": export.foresee(plan.base, plan.plan.options, config),
    }


def _recovery(plan: Forecast) -> dict[str, Any]:
    config, samples = plan.settings.recover, record_count(plan.settings.data, plan.settings.data_frac)
    size, steps = schedule(plan, samples)
    return {
        "loss": describe_loss(config),
        "train": config.train,
        "trainable_parameters": plan.training[0],
        "samples": samples,
        "global_batch_size": size,
        "steps": steps,
    }


def _lines(plan: Forecast, result: dict[str, Any]) -> list[str]:
    """What the table has no column for."""
    settings, ratio, shape = plan.settings, result["ratio"], result["shape"]
    lines = []
    if settings.prune.method != "none":
        kept, low, high = shape["pruned"], *ratio["between"]
        achieved = percent(low) if low == high else f"between {percent(low)} and {percent(high)}, which the data decide"
        if plan.sparsity is None:
            lines.append(f"achieved ratio: {achieved}; at most {percent(ratio['largest'])} can be removed this way")
        else:
            granularity = settings.search.granularity
            lines.append(
                f"{granularity} weight masks: {percent(plan.sparsity)} of the weights of the decoder's linear layers "
                f"become zero, at most {percent(MASKED[granularity])} could; no parameter is removed"
            )
        first, *more = _kept(kept)
        if shape["options"] > 1:
            more.append(f"or another of {shape['options']} shapes, which the data decide")
        about = "" if shape["exact"] or shape["options"] > 1 else "about "
        lines += [
            f"kept: {len(kept)} of {len(shape['base'])} layers; {about}{first}",
            *(f"      {each}" for each in more),
        ]
        loads = {True: "yes", False: "no, it needs import efficientllava", None: "depends on the shape that is chosen"}
        lines.append(f"loads in stock transformers: {loads[shape['stock']]}")
    if recovery := result["recovery"]:
        epochs, steps, samples = settings.recover.epochs, recovery["steps"], recovery["samples"]
        amount = f"{steps:,} steps" if steps else f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}"
        known = "" if samples is None else f", {samples:,} records in all"
        lines.append(
            f"recovery: {recovery['loss']}, trains {recovery['train']} ({quantity(recovery['trainable_parameters'])} "
            f"parameters), {amount} in batches of {recovery['global_batch_size']} records{known}"
        )
    if deployed := result["deploy"]:
        side = " and the image side" if settings.deploy.mmproj else ""
        most = f"deploy: {', '.join(deployed['types'])}{side}, at most {deployed['bytes'] / 1e9:.2g} GB"
        lines += [most, *deployed["remarks"]]
    return lines


def _kept(shapes: list[list[int]]) -> list[str]:
    """Heads and channels: in one phrase where all layers agree, else by layer, such as ``20 in 3-30``."""
    parts = {"heads": [shape[0] for shape in shapes], "channels": [shape[2] for shape in shapes]}
    if all(len({*sizes}) == 1 for sizes in parts.values()):
        return [" and ".join(f"{sizes[0]} {name}" for name, sizes in parts.items()) + " in each"]
    told = []
    for name, counts in parts.items():
        where = {size: _ranges([i for i, each in enumerate(counts) if each == size]) for size in dict.fromkeys(counts)}
        told.append(f"{name} " + "; ".join(f"{size} in {layers}" for size, layers in where.items()))
    return told


def _ranges(numbers: list[int]) -> str:
    """Rising numbers with neighbours together, such as ``0-2, 31``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _memory_table(result: dict[str, Any], whose: str = "") -> Table:
    """One row per stage; ``whose`` ends the title."""
    memory = result["memory"]
    processes = f" of each of {memory['processes']} processes" if memory["processes"] > 1 else ""
    device = {"cuda": "GPU", "cpu": "host"}[memory["device"]]
    table = Table(box=box.SIMPLE_HEAD, title=f"{device} memory{processes}{whose}, GB", title_style="bold")
    table.add_column("", no_wrap=True)
    table.add_column("worst case", justify="right")
    table.add_column("certain", justify="right")
    table.add_column("of it")
    for name, stage in memory["stages"].items():
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in stage["parts"].items() if size)
        parts += f"; and {stage['host'] / 1e9:.2f} on the host" if stage["host"] and memory["device"] == "cuda" else ""
        table.add_row(name, f"{stage['bytes'] / 1e9:.2f}", f"{stage['certain'] / 1e9:.2f}", parts)
    return table
