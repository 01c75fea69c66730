"""The end of a run: files for llama.cpp, sizes and speeds, ``results.json``, a picture of samples, and the table.

It is done anew in every run, since it measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.export import usage
from ..checkpoint.folder import Checkpoint, load, resolve
from ..checkpoint.hub import origin_of
from ..data.records import open_image
from ..deploy import export
from ..evaluation.efficiency import checkpoint_bytes, measure, quantized
from ..evaluation.generation import set_aside
from ..models.pruned import is_per_layer
from ..pruning.plan import PruningPlan
from ..record import STAGES, build, write
from ..report import tabulate, tabulate_deployed, tabulate_quantized
from ..report.pictures import draw_samples
from ..runtime import RESULTS, digest, processes, say, whole_folder
from .evaluate import Scored
from .request import staying
from .run import Made, Run

STAGE_OF = {"pruned": "prune", "recovered": "recover"}  # what has made a checkpoint


def write_record(
    run: Run, chain: Sequence[Made], scored: Sequence[Scored], overrides: Sequence[str], keys: Mapping[str, Any]
) -> None:
    """Measure sizes and speeds, write ``results.json`` and ``samples.png``, and print the table.

    Args:
        run: What was opened.
        chain: What the stages have made.
        scored: What its evaluations have found.
        overrides: What the user typed.
        keys: Digests that a finished run is recognised by, and what `deploy` said.
    """
    settings, stages = run.settings, _efficiency(run, chain)
    for each in scored:
        told = {} if each.loss is None else {"report_loss": each.loss}
        stages[each.stage] |= {"metrics": each.metrics, **told}
    for kind, made in keys.get("deploy", {}).get("files", {}).items():
        for side, stage in (("dense", "base"), ("exported", chain[-1].stage)):
            if side in made.get("speed", {}):
                stages[stage].setdefault("gguf", {})[kind] = made["speed"][side]
    entries = {STAGE_OF[made.stage]: made.entry for made in chain if made.entry}
    answered = {f"evaluate/{each.stage}/{name}": entry for each in scored for name, entry in each.entries.items()}
    reports = {name: entry.record for name, entry in entries.items()}
    file = run.folder / "plan.json"
    plan = PruningPlan.read(file) if file.exists() else None
    done = {"requested": plan.requested, "achieved": plan.achieved, **(plan.details or {})} if plan else None
    drawn = len(run.recovery.records) if run.recovery else 0
    results = build(
        stages,
        ratio=done or {"requested": 0.0, "achieved": 0.0},
        samples={
            "calibration": len(run.calibration),
            "written": run.written,
            "report": len(run.reported),
            "recovery": drawn,
        },
        seconds={
            **{name: reports[name]["seconds"] if name in reports else 0.0 for name in STAGE_OF.values()},
            "evaluate": sum(each.seconds for each in scored),
        },
        seed=settings.seed,
        config_digest=digest(settings),
        **keys,
        overrides=list(overrides),
        reused=[name for name, entry in (entries | answered).items() if entry.reused],
        name=settings.name,
        model=run.base.path,
        benchmarks={task.name: {**task.facts(), "headline": task.headline} for task in run.tasks},
        generation={"decoding": "greedy", "set_aside": set_aside(run.base.model)},
        judges=_judged(scored),
        losses=_losses({each.stage: each.loss for each in scored}, reports),
        reports=reports,
    )
    write(results, run.folder / RESULTS)
    if shown := {each.stage: each.answers for each in scored if each.answers and each.stage in STAGES}:
        records = list(run.tasks[0].records())[: settings.evaluate.limit]
        if any(record.image is not None for record in records):
            draw_samples(records, shown, run.folder / "samples.png")
    tables = (tabulate(results), *tabulate_quantized(results), *tabulate_deployed(results))
    say("", *tables, "", f"everything lies in [bold]{run.folder}[/bold]")
    if staying(settings):
        per_layer = is_per_layer(chain[-1].checkpoint.model.config.get_text_config())
        say("", usage(str(run.folder / chain[-1].stage), per_layer))


def _judged(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """What judges did, by benchmark and stage."""
    tasks = dict.fromkeys(task for each in scored for task in each.judged)
    return {task: {each.stage: each.judged[task] for each in scored if task in each.judged} for task in tasks}


def _losses(reported: Mapping[str, float | None], reports: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Answer losses by role of the records: fitted to, compared on, and seen by no choice."""
    found = reports.get("prune", {}).get("report", {})
    names = {"fit": ("loss_dense", "loss_pruned"), "compare": ("loss_compared_dense", "loss_compared")}
    roles = {role: dict(zip(STAGES, map(found.get, keys), strict=False)) for role, keys in names.items()}
    known = {role: {s: v for s, v in by.items() if v is not None} for role, by in {**roles, "report": reported}.items()}
    return {role: losses for role, losses in known.items() if losses}


def _efficiency(run: Run, chain: Sequence[Made]) -> dict[str, dict[str, Any]]:
    """Sizes and speeds of all stages, measured together so that drift of the machine cancels.

    With offload one model at a time is on the device: two may not fit.
    """
    config, model = run.settings.evaluate, run.settings.model
    kind, stages = config.quantization, {made.stage: dict(made.sizes) for made in chain}
    if kind != "none":
        stages |= {f"{name}_{kind}": dict(size) for name, size in stages.items()}
    if config.efficiency:
        models = {made.stage: _whole(run, made.checkpoint) for made in chain}
        if kind != "none":
            models |= {f"{name}_{kind}": quantized(each, kind) for name, each in models.items()}
        if run.home == run.device:
            stages = measure(models, run.probe, config)
        else:
            stages = {}
            for name, each in models.items():
                stages |= measure({name: each.to(run.device)}, run.probe, config)
                each.to(run.home)
    for name in stages:
        if name in STAGES:
            folder = resolve(model.path, model.revision) if name == "base" else run.folder / name
            stages[name]["checkpoint_bytes"] = checkpoint_bytes(folder)
        elif "flops" in stages[name]:
            # The same products, into which the counter does not see, and weights without those that fill up groups.
            source = stages[name.removesuffix(f"_{kind}")]
            stages[name] |= {key: source[key] for key in ("flops", "parameters", "language_parameters")}
    return stages


def _whole(run: Run, checkpoint: Checkpoint) -> Any:
    """A checkpoint's model; one that a stage has consumed is loaded again."""
    if checkpoint.model.device.type != "meta":
        return checkpoint.model
    settings = run.settings
    # The first process alone is here: not `load_checkpoint`, in which it would wait for the others.
    more = {"revision": checkpoint.revision, "offload": settings.prune.offload}
    return load(checkpoint.path, settings.model.dtype, run.device, **more).model


FOLDER = "gguf"
QUESTIONS = 4  # with an image and without one, of the run's own records


def deploy(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """Export a run's last checkpoint into its folder, compare it in the installed runtime, and measure it there.

    Returns:
        See `efficientllava.deploy.export.deploy`; nothing on processes other than the first.
    """
    if processes.rank() > 0:
        return {}
    config, model = run.settings.deploy, run.settings.model
    # What the run began with, or, where it changes nothing, what that was made of, if it is here.
    beside = (model.path, model.revision) if export.compared(run.settings) else origin_of(Path(model.path).expanduser())
    if run.device != "cpu" or checkpoint.model.dtype != torch.float32:
        checkpoint = load(checkpoint.path, "float32", memo=run.store.memo)
    dense = partial(load, beside[0], "float32", "cpu", beside[1]) if beside else None
    say("deploy: files for llama.cpp" + ", checked and measured there" * config.check)
    with whole_folder(run.folder / FOLDER) as folder:
        made = export.deploy(checkpoint, folder, config, dense, _questions(run))
    for line in export.remarks(made):
        say(line)
    return made


def _questions(run: Run) -> list[Any]:
    """Questions of the run's own records, with and without an image."""
    records = [*run.calibration, *(record for task in run.tasks for record in task.records()[:100])]
    found: dict[bool, list[Any]] = {True: [], False: []}
    for record in records:
        turn = record.turns[0]
        seen = record.image is not None and turn.sees_image
        if len(record.images) < 2 and len(found[seen]) < QUESTIONS:
            found[seen].append((turn.question, open_image(record) if seen else None))
    return [*found[False], *found[True]]
