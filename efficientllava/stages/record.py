"""The record of a run: sizes and speeds, ``results.json``, a picture of samples, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..record import STAGES
from ..runtime.console import say
from ..runtime.content import digest
from ..runtime.keeping import staying
from .context import Context
from .evaluate import Evaluation


def write_record(context: Context, evaluation: Evaluation, overrides: Sequence[str], keys: Mapping[str, Any]) -> None:
    """Measure sizes and speeds, write ``results.json`` and ``samples.png``, and print the table.

    Args:
        context: What the stages shared.
        evaluation: Metrics and answers of all stages.
        overrides: What the user typed.
        keys: Digests that a finished run is recognised by, and what `efficientllava.stages.deploy.deploy` said.
    """
    from ..checkpoint.card import usage
    from ..evaluation.answers import set_aside
    from ..models.pruned import is_per_layer
    from ..pruning.plan import PruningPlan
    from ..record import build, write
    from ..report.pictures import draw_samples
    from ..report.tables import tabulate, tabulate_deployed, tabulate_quantized

    stages = _efficiency(context)
    for stage, metrics in evaluation.metrics.items():
        stages[stage]["metrics"] = metrics
    last = next(stage for stage in reversed(STAGES) if stage in stages)
    for kind, made in keys.get("deploy", {}).get("files", {}).items():
        for side, stage in (("dense", "base"), ("exported", last)):
            if side in made.get("speed", {}):
                stages[stage].setdefault("gguf", {})[kind] = made["speed"][side]
    for stage, loss in evaluation.losses.items():
        stages[stage]["report_loss"] = loss
    reports = {name: entry.record for name, entry in context.entries.items() if name in ("prune", "recover")}
    file = context.folder / "plan.json"
    plan = PruningPlan.read(file) if file.exists() else None
    results = build(
        stages,
        ratio={
            "requested": plan.requested if plan else 0.0,
            "achieved": plan.achieved if plan else 0.0,
            **((plan and plan.details) or {}),
        },
        samples=context.samples,
        seconds=context.seconds,
        seed=context.settings.seed,
        config_digest=digest(context.settings),
        **keys,
        overrides=list(overrides),
        reused=[name for name, entry in context.entries.items() if entry.reused],
        name=context.settings.name,
        model=context.base.path,
        benchmarks={task.name: {**task.facts, "headline": task.headline} for task in context.tasks},
        generation={"decoding": "greedy", "set_aside": set_aside(context.base.model)},
        judges=evaluation.judged,
        losses=_losses(evaluation.losses, reports),
        reports=reports,
    )
    write(results, context.folder / "results.json")
    if evaluation.answers:
        records = list(context.tasks[0].records())[: context.settings.evaluate.limit]
        shown = {stage: answers for stage, answers in evaluation.answers.items() if stage in STAGES}
        draw_samples(records, shown, context.folder / "samples.png")
    say(
        "",
        tabulate(results),
        *tabulate_quantized(results),
        *tabulate_deployed(results),
        "",
        f"everything lies in [bold]{context.folder}[/bold]",
    )
    for last in staying(context.settings)[-1:]:
        per_layer = is_per_layer(context.models[last].config.get_text_config())
        say("", usage(str(context.folder / last), per_layer))


def _losses(reported: Mapping[str, float], reports: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Answer losses by role of the records: fitted to, compared on, and seen by no choice."""
    found = reports.get("prune", {}).get("report", {})
    roles = {"fit": ("loss_dense", "loss_pruned"), "compare": ("loss_compared_dense", "loss_compared")}
    sides = {role: dict(zip(STAGES, map(found.get, names), strict=False)) for role, names in roles.items()}
    known = {role: {s: v for s, v in losses.items() if v is not None} for role, losses in sides.items()}
    return {role: losses for role, losses in {**known, "report": dict(reported)}.items() if losses}


def _efficiency(context: Context) -> dict[str, dict[str, Any]]:
    """Sizes and speeds of all stages, measured together so that drift of the machine cancels.

    With offload one model at a time is on the device: two may not fit.
    """
    from ..checkpoint.folder import resolve
    from ..evaluation.efficiency import checkpoint_bytes, measure, quantized

    model, stages, kind = context.settings.model, context.sizes, context.settings.evaluate.quantization
    if kind != "none":
        stages = {**stages, **{f"{name}_{kind}": dict(size) for name, size in stages.items()}}
    if context.settings.evaluate.efficiency:
        # The pruner consumes the model that it works on.
        base = context.models.get("base") or context.load(model.path, model.dtype, model.revision).model
        models = {"base": base, **context.models}
        if kind != "none":
            models |= {f"{name}_{kind}": quantized(each, kind) for name, each in models.items()}
        if context.home == context.device:
            stages = measure(models, context.probe(), context.settings.evaluate)
        else:
            stages = {}
            for name, each in models.items():
                stages |= measure({name: each.to(context.device)}, context.probe(), context.settings.evaluate)
                each.to(context.home)
    folders = {"base": resolve(model.path, model.revision)}
    for name in stages:
        if name in STAGES:
            stages[name]["checkpoint_bytes"] = checkpoint_bytes(folders.get(name, context.folder / name))
        elif "flops" in stages[name]:
            # The same products, into which the counter does not see, and weights without those that fill up groups.
            source = stages[name.removesuffix(f"_{kind}")]
            stages[name] |= {key: source[key] for key in ("flops", "parameters", "language_parameters")}
    return stages
