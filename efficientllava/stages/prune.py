"""Pruning as a stage: a pruner or a policy search, run by Lightning, exported and shared through the cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime import processes
from ..runtime.console import Tick, progress
from ..runtime.content import digest
from .context import Context


def prune(context: Context) -> Any:
    """Prune the base checkpoint, by a criterion or by a search.

    Args:
        context: What the stages share; the model of its base is consumed.

    Returns:
        The pruned checkpoint, loaded from the run's folder.
    """
    settings = context.settings
    searches = settings.prune.method == "auto"

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        started = time.perf_counter()
        context.require_space(folder)
        with progress() as tick:
            module = _searcher(context, work, tick) if searches else _pruner(context, tick)
            context.trainer(quiet=True, inference_mode=False).predict(module, return_predictions=False)
        if searches:
            context.mark(module.table)
        plan, pruned, report = module.plan, module.pruned, module.report
        assert plan is not None and pruned is not None and report is not None
        context.export(folder / "pruned", pruned, context.base, plan.step, plan.kept_layers)
        if processes.rank() == 0:
            (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
            if searches:
                from ..report.pictures import draw_search

                (folder / "search.json").write_text(json.dumps(module.record) + "\n", encoding="utf-8")
                draw_search(module.record, folder / "search.png")
        return {"seconds": time.perf_counter() - started, "report": report.to_dict()}

    entry = context.stage("prune", compute, model=context.base.digest, **_samples(context))
    pruned = context.adopt("prune", "pruned", entry)
    # The pruned model takes the base's place; of the base only shapes are still looked at.
    context.features.follow(pruned.model)
    context.models.pop("base", None)
    context.base.model = context.base.model.to("meta")
    return pruned


def _samples(context: Context) -> dict[str, Any]:
    """The calibration records as inputs."""
    from ..data.stamps import image_contents

    records, first = context.calibration, processes.rank() == 0
    return {
        "records": digest([record.id for record in records]),
        "files": context.files["prune"],
        "images": processes.from_first(image_contents(records, context.store.memo) if first else None),
        "written": [count, context.settings.seed] if (count := _written(context)) else None,
    }


def _written(context: Context) -> int:
    """How many sequences the dense model writes."""
    from ..pruning.self_text import sequences

    settings = context.settings
    solves = settings.prune.solves
    return sequences(settings.calibration, context.calibration, context.base.processor) if solves else 0


def _writer(context: Context, tick: Tick) -> Callable[[Any], list[Any]] | None:
    """What has the dense model write text for the statistics, if it is to."""
    from ..pruning.self_text import write_text

    config, processor = context.settings.calibration, context.base.processor
    if not (count := _written(context)):
        return None
    how = (count, config.generate_length, context.settings.seed, config.batch_size, tick)
    return lambda dense: write_text(dense, processor, *how)


def _pruner(context: Context, tick: Tick) -> Any:
    from ..pruning.module import PruningModule

    settings, model = context.settings, context.models.pop("base")
    return PruningModule(
        model,
        context.calibration,
        context.collate,
        settings.prune,
        settings.calibration.batch_size,
        settings.seed,
        context.features,
        tick,
        context.device,
        _writer(context, tick),
        settings.calibration.generate_share,
    )


def _searcher(context: Context, work: Path, tick: Tick) -> Any:
    from ..data.splits import load_split
    from ..search.module import SearchInputs, SearchModule

    settings, model = context.settings, context.base.digest
    # Only the embedded data have held-out samples of their own; no training corpus is opened for a plot.
    holdout = load_split(settings.data, "minival") if settings.data.name == "digits_vqa" else []
    inputs = SearchInputs(
        context.calibration,
        [holdout[index] for index in range(min(len(context.calibration), len(holdout)))],
        context.collate,
        settings.calibration.batch_size,
        {"model": model, "samples": digest(context.inputs("search", model=model, **_samples(context)))},
        Path(settings.paths.cache_dir) / "levels",
        work,
        _writer(context, tick),
        settings.calibration.generate_share,
    )
    dense = context.models.pop("base")
    return SearchModule(dense, inputs, settings.prune, settings.search, settings.seed, context.features, tick)
