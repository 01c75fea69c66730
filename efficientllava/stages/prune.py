"""Pruning as a stage: a pruner or a policy search, run by Lightning, exported and shared through the store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.records import image_contents
from ..data.splits import load_split
from ..deploy import latency
from ..deploy.runtime import version
from ..models.anatomy import decoder_of
from ..models.offload import make_room
from ..pruning.module import PruningModule
from ..pruning.self_text import write_text
from ..report.pictures import draw_search
from ..runtime import Tick, digest, processes, progress
from ..search.module import SearchInputs, SearchModule
from ..settings.schema import RunConfig
from .run import Made, Run


def prune(run: Run, _before: Made) -> Made:
    """Prune the base checkpoint, by a criterion or by a search; its model is consumed."""
    settings, base = run.settings, run.base
    searches = settings.prune.method == "auto"

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        started = time.perf_counter()
        run.require_space(folder)
        with progress() as tick, _aside(run, work):
            module = _searcher(run, work, tick) if searches else _pruner(run, tick)
            run.trainer(quiet=True, inference_mode=False).predict(module, return_predictions=False)
        if searches:
            run.mark(module.table)
        plan, pruned, report = module.plan, module.pruned, module.report
        assert plan is not None and pruned is not None and report is not None
        if pruned is not base.model:  # as masks are; else its tower and embeddings, too, are the pruned model's now
            base.model = base.model.to("meta")
        run.export(folder / "pruned", base.after(pruned, plan.step, plan.kept_layers))
        if processes.rank() == 0:
            (folder / "plan.json").write_text(plan.to_json() + "\n", encoding="utf-8")
            if searches:
                (folder / "search.json").write_text(json.dumps(module.record) + "\n", encoding="utf-8")
                draw_search(module.record, folder / "search.png")
        return {"seconds": time.perf_counter() - started, "report": asdict(report)}

    content = {**_samples(run), **_runtime(settings)}
    entry = run.entry("prune", compute, model=base.digest, **content)
    base.model = base.model.to("meta")  # of the base only shapes are still looked at
    return run.made("pruned", entry)


@contextmanager
def _aside(run: Run, work: Path) -> Iterator[None]:
    """Have what is needed for moments, all but the decoder layers, in a file, where the host computes and holds it."""
    model: Any = run.base.model
    if run.offload or run.device != "cpu" or run.base.storage == model.lm_head.weight.dtype:
        yield  # it is elsewhere, or mapped from its own files
        return
    with make_room(model, torch.device("cpu"), work, list(decoder_of(model).layers)):
        processes.release_memory()
        yield


def _runtime(settings: RunConfig) -> dict[str, Any]:
    """What a search that counts in llama.cpp's time depends on."""
    elsewhere = settings.prune.method == "auto" and settings.search.budget.device == "gguf"
    return {"runtime": [version(), settings.deploy.types[0]]} if elsewhere else {}


def _samples(run: Run) -> dict[str, Any]:
    """The calibration records as inputs."""
    records = run.calibration
    return {
        "records": digest([record.id for record in records]),
        "files": run.files["prune"],
        "images": processes.on_first(lambda: image_contents(records, run.store.memo)),
        "written": [count, run.settings.seed] if (count := run.written) else None,
    }


def _writer(run: Run, tick: Tick) -> Callable[[Any, tuple[int, int]], list[Any]] | None:
    """What has the dense model write text for the statistics, if it is to."""
    config, count = run.settings.calibration, run.written
    how = (count, config.generate_length, run.settings.seed, config.batch_size, tick)
    return (lambda dense, part: write_text(dense, run.base.processor, *how, part)) if count else None


def _pruner(run: Run, tick: Tick) -> Any:
    settings, calibration = run.settings, run.settings.calibration
    return PruningModule(
        run.base.model,
        run.calibration,
        run.collate,
        settings.prune,
        calibration.batch_size,
        settings.seed,
        run.features,
        tick,
        run.offload,
        _writer(run, tick),
        calibration.generate_share,
    )


def _searcher(run: Run, work: Path, tick: Tick) -> Any:
    settings, model = run.settings, run.base.digest
    # Only the embedded data have held-out samples of their own; no training corpus is opened for a plot.
    holdout = load_split(settings.data, "minival") if settings.data.embedded else []
    inputs = SearchInputs(
        run.calibration,
        [holdout[index] for index in range(min(len(run.calibration), len(holdout)))],
        run.collate,
        settings.calibration.batch_size,
        {"model": model, "samples": digest(run.inputs("search", model=model, **_samples(run)))},
        run.store.root / "levels",
        work,
        _writer(run, tick),
        settings.calibration.generate_share,
        partial(latency.seconds, run.base.processor, settings.deploy.types[0], work) if _runtime(settings) else None,
        settings.reuse,
    )
    return SearchModule(run.base.model, inputs, settings.prune, settings.search, settings.seed, run.features, tick)
