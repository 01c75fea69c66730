"""Runs of the whole program inside the test process: a tiny random checkpoint, few samples, few steps."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from efficientllava.settings.schema import MASKED
from efficientllava.stages.request import register

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(ROOT / "run.py")]
SMALL = (
    "prune.round_to=1",
    "calibration.samples=4",
    "data.images=8",
    "data.test_questions=12",
    "data.batch_size=4",
    "recover.epochs=null",
    "recover.steps=2",
    "evaluate.repeats=1",
    "evaluate.new_tokens=2",
    "evaluate.speed_batches=[1]",
    "logger=none",
    "callbacks=none",
    "trainer=cpu",
)


def save_tiny(folder: Path, name: str = "tiny_llava", layers: int = 3, seed: int = 0) -> Path:
    """A random checkpoint in half precision, of fewer layers than the shipped one."""
    from experiments.tiny_models import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "LAYERS", layers)
        model, processor = tiny.BUILDERS[name]()
    tiny.initialise(model, seed)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def small(model: Path | str, output: Path, *overrides: str) -> list[str]:
    """Overrides of a small run; ``overrides`` come last and win, and what they leave without effect is left out."""
    known = {override.partition("=")[0] for override in overrides}
    idle = {
        "recover=none": ("recover.", "data.batch_size", "data.images"),
        "prune=none": ("prune.", "calibration."),
        **dict.fromkeys(("prune=layerwise", *(f"search.granularity={g}" for g in MASKED)), ("prune.round_to",)),
        "evaluate.efficiency=false": ("evaluate.",),
    }
    left_out = tuple(prefix for override in overrides for prefix in idle.get(override, ()))
    left_out += ("data.images", "data.test_questions") if "data" in known else ()
    left_out += ("prune.round_to",) if "prune.share" in known else ()
    base = [o for o in SMALL if o.partition("=")[0] not in known and not o.startswith(left_out)]
    chosen = [f"{group}=digits_vqa" for group in ("data", "evaluate") if group not in known]
    sets = ["model=checkpoint", f"model.path={model}", "model.name=tiny", "model.train=full", *chosen]
    return [*sets, f"paths.output_dir={output}", *base, *overrides]


def environment() -> dict[str, str]:
    """What a run of its own is started with, also by a test that is one of several processes."""
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**alone, "PYTHONPATH": str(ROOT)}


def write_at_once(write: Callable[[Path, str], None], path: Path) -> None:
    """Let three processes write into one file at the same time, each by its name: x, y and z."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(path, name)) for name in "xyz"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]


def composed(*overrides: str) -> DictConfig:
    """The configuration as `run.py` sees it, without Hydra's own node."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the pipeline in this process and return ``results.json``."""
    from efficientllava import pipeline

    torch.set_num_threads(1)
    pipeline.run(composed(*overrides), str(folder), overrides)
    return json.loads((folder / "results.json").read_text("utf-8"))
