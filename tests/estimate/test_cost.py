"""What a sweep would compute and leave: closed forms, shared stages, and the dry run of a whole sweep."""

from __future__ import annotations

import json
import runpy
import sys
import time
from dataclasses import replace

import pytest
import torch

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator
from efficientllava.data.splits import calibration_records, split_folds
from efficientllava.estimate import forecast
from efficientllava.estimate.cost import (
    ANSWER,
    PEAKS,
    REACHED,
    SINGLE,
    TEXT,
    Job,
    Work,
    device_of,
    disk_of,
    distinct,
    works,
)
from efficientllava.estimate.dry_run import plan_job, tell_sweep
from efficientllava.estimate.memory import stage_memory
from efficientllava.evaluation.tasks.published import BENCHMARKS
from efficientllava.pruning.memory import micro_batch
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.solution import TRIED
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.compose import typed

from ..runs import (
    ROOT,
    composed,
    run,
    save_tiny,
    small,
)


def planned(*overrides):
    plan = forecast(typed(composed(*overrides, "dry_run=true")))
    return {work.stage: work for work in works(plan)}


def test_operations_of_a_full_size_run_in_closed_form():
    common = ("model=llava_1_5_7b", "trainer=gpu", "prune=layerwise", "prune.drop_layers=8", "evaluate=pope")
    found = planned(*common, "recover=projector", "data_frac=0.1", "evaluate.limit=100")
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    head = 32064 * 4096 + 4096
    base, pruned, tokens = 2 * (32 * layer + head), 2 * (24 * layer + head), 576 + TEXT
    vision = 2 * (7063427072 - 6738939904) * 24 * 24
    assert found["evaluate base"].flops == 100 * (vision + (tokens + ANSWER) * base)
    assert found["evaluate pruned"].flops == 100 * (vision + (tokens + ANSWER) * pruned)
    # The dense loss, the influences, and the loss of what is left.
    assert found["prune"].flops == 64 * (vision + tokens * (2 * base + pruned))
    steps = -(-66530 // 4) // 32 + 1
    assert found["recover"].flops == steps * 128 * (vision + tokens * 3 * pruned)
    assert found["prune"].bytes == found["recover"].bytes == 2 * (7063427072 - 8 * layer)
    taught = planned(*common, "recover=kd_hidden", "data_frac=0.1", "recover.train=projector")
    assert taught["recover"].flops == steps * 128 * (vision + tokens * (3 * pruned + base))
    cached = planned(*common, "recover=kd_hidden", "recover.teacher.source=cached", "recover.train=projector")
    assert cached["teacher targets"].flops == 665_298 * (vision + tokens * base)
    assert cached["evaluate base"].flops == 9000 * (vision + (tokens + ANSWER) * base)


def test_passes_of_a_widthwise_pruning_in_closed_form():
    common = (
        "model=llava_1_5_7b",
        "trainer=gpu",
        "evaluate=none",
        "recover=none",
        "prune=widthwise",
        "prune.ratio=0.3",
    )
    common = (*common, "prune.selection=local", "prune.importance=magnitude")
    head = 32064 * 4096 + 4096
    base = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + head)
    heads, channels = 22 * 128, 59 * 128
    pruned = 2 * (32 * (4 * 4096 * heads + 3 * 4096 * channels + 2 * 4096) + head)
    vision, tokens = 2 * (7063427072 - 6738939904) * 24 * 24, 64 * (576 + TEXT)
    plain = planned(*common, "prune.refit=false")["prune"].flops
    assert plain == 64 * vision + tokens * (base + pruned)
    common = (*common, "calibration.generate=0")
    layer = planned(*common, "prune.refit_target=layer", "prune.damping=0.1")["prune"].flops
    solved = sum(2 * tokens * w * (w + 4096) + 3 * w**3 + 2 * w * w * 4096 for w in (heads, channels))
    assert layer == plain + tokens * base + 32 * solved
    tried = sum(w**3 / 3 + 2 * 4 * w * w * 4096 for w in (heads, channels))
    crosses = sum(2 * tokens * w * 4096 + 2 * w * w * 4096 for w in (heads, channels))
    both = planned(*common, "prune.damping=0.1")["prune"].flops
    assert both == pytest.approx(layer + tokens * base + 32 * (crosses + tried), rel=1e-12)
    every = planned(*common)["prune"].flops
    assert every == pytest.approx(both + 32 * (TRIED - 1) * tried, rel=1e-12)


def test_each_attention_that_2ssp_takes_costs_a_pass_of_the_sample_per_layer():
    common = ("model=llava_1_5_7b", "trainer=gpu", "evaluate=none", "recover=none", "prune.ratio=0.3")
    other, found = (
        planned(*common, *more)["prune"].flops for more in (("prune=flap", "prune.bias=false"), ("prune=2ssp",))
    )
    attention, mlp = 4 * 4096**2, 3 * 4096 * 11008
    total = 32 * (attention + mlp + 2 * 4096) + 4096 + 2 * 32064 * 4096
    off = round(32 * (0.3 * total / 32 / (attention + mlp)) ** (mlp / attention / 1.5))
    trials = off * 32 * 2048 * 2 * (total - 32064 * 4096)
    assert found - other == pytest.approx(trials, rel=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "options",
    [
        ("prune=widthwise", "prune.selection=local"),
        ("prune=widthwise", "calibration.samples=16", "calibration.generate=0"),
        ("prune=widthwise_paper", "calibration.samples=32"),
        ("prune=layerwise",),
    ],
)
def test_a_pruning_takes_what_was_foreseen_within_a_factor_of_two_or_in_a_quarter(options):
    settings = typed(composed("model=tiny_llava", "trainer=cpu", "recover=none", *options))
    (foreseen,) = (work.flops for work in works(forecast(settings)) if work.stage == "prune")
    checkpoint = load(settings.model.path, settings.model.dtype, "cpu")
    collate = Collator(checkpoint.processor, settings.data.max_length)
    records = calibration_records(settings.calibration, settings.data, 0, collate)
    rows = micro_batch(settings.prune, settings.calibration.batch_size)
    parts = [[part[i : i + rows] for i in range(0, len(part), rows)] for part in split_folds(records)]
    folds = [fold for fold, part in enumerate(parts) for _ in part]
    held, last = ([i for i, fold in enumerate(folds) if fold == kind] for kind in (1, 2))
    batches = [collate(chunk) for part in parts for chunk in part]
    calibration = Calibration(batches, compared=last, held=held, validated=last)
    started = time.process_time()
    plan, _ = make_plan(checkpoint.model, calibration, settings.prune)
    apply_plan(checkpoint.model, plan, calibration, settings.prune)
    took = time.process_time() - started
    # What a run reaches of a plain product's speed depends on the processor: 0.35 to 0.45 of the time on an AMD EPYC.
    assert 0.25 < took / 3600 / device_of("cpu", torch.float32).hours(foreseen) < 2


def test_data_of_unknown_size_are_unknown(monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "pope", replace(BENCHMARKS["pope"], questions=None))
    assert planned("model=llava_1_5_7b", "trainer=gpu", "recover=none", "evaluate=pope")["evaluate base"].flops is None

    common = ("model=llava_1_5_7b", "trainer=gpu", "data=conversations", "recover=sft")
    assert planned(*common)["recover"].flops is None
    known = planned(*common, "recover.epochs=null", "recover.steps=10")["recover"].flops
    assert known is not None and known > 0


def test_jobs_share_what_does_not_depend_on_what_differs():
    one = planned("recover=sft", "seed=0")
    other = planned("recover=projector", "seed=0")
    third = planned("recover=sft", "seed=1")
    common = {stage for stage in one if one[stage].key == other[stage].key}
    assert common == {"evaluate base", "prune", "evaluate pruned"}
    assert {stage for stage in one if one[stage].key == third[stage].key} == {"evaluate base"}
    jobs = [Job(tuple(each.values()), "all", done) for each, done in ((one, True), (other, False), (third, False))]
    todo = {stage: len(found) for stage, found in distinct(jobs).items()}
    assert todo == {"evaluate base": 0, "prune": 1, "evaluate pruned": 1, "recover": 2, "evaluate recovered": 2}


@pytest.mark.parametrize(
    ("keep", "stays", "most", "each"), [("all", 26, 26, 0), ("recovered", 16, 26, 0), ("none", 0, 18, 8)]
)
def test_disk(keep, stays, most, each):
    pruned = Work("prune", "p", 0.0, 10)
    jobs = [Job((pruned, Work("recover", f"r{i}", 0.0, 8)), keep, finished=False) for i in range(2)]
    assert disk_of(jobs) == {"stays": stays, "most": most, "each": each}


def test_devices(monkeypatch):
    assert device_of("cuda", torch.bfloat16).rate == REACHED * PEAKS["A100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert device_of("cuda", torch.float32).rate == REACHED * PEAKS["H100 PCIe"] * SINGLE
    here = device_of("cpu", torch.float32)
    assert here.unit == "CPU" and 1e8 < here.rate < 1e12


@pytest.mark.usefixtures("without_fresh_processes")
def test_the_dry_run_of_a_sweep_is_one_table_and_knows_what_is_finished(tmp_path, monkeypatch, capsys):
    model, out = save_tiny(tmp_path / "model"), tmp_path / "out"
    common = ["recover=sft", "recover.steps=1", "evaluate=none", "evaluate.efficiency=false", "sweep.name=mine"]
    typed_ = small(model, out, *common)
    run(out / "sweeps" / "mine" / "0", [*typed_, "seed=0"])
    before = sorted((out / "sweeps").rglob("*"))
    for launcher in ("basic", "gpu_pool"):
        arguments = ["-m", *typed_, "seed=0,1,2", "dry_run=true", "keep=recovered", f"hydra/launcher={launcher}"]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # whoever runs the program here changes it
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown.count("3 jobs, 1 of them finished") == 1 and "no weights are read" not in shown
        told = json.loads((out / "dry_runs" / "mine" / "dry_run.json").read_text())
        assert {stage: (e["jobs"], e["distinct"]) for stage, e in told["stages"].items()} == {
            "prune": (3, 2),
            "recover": (3, 2),
        }
        size = (out / "sweeps" / "mine" / "0" / "recovered" / "model.safetensors").stat().st_size
        assert told["disk"]["stays"] == pytest.approx(3 * size, rel=0.02)
        assert told["hours"] == pytest.approx(sum(e["hours"] for e in told["stages"].values()))
    assert sorted((out / "sweeps").rglob("*")) == before


def test_the_memory_of_a_sweep_is_that_of_its_largest_jobs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("efficientllava.runtime.console._sweeps", [])  # what is planned is told when they end
    model = save_tiny(tmp_path / "model")
    most = []
    for batch in (4, 8, 2):
        chosen = small(model, tmp_path / "out", "recover=sft", f"data.batch_size={batch}", "dry_run=true")
        settings = typed(composed(*chosen))
        most.append(stage_memory(forecast(settings))["recover"].total)
        plan_job(settings, tmp_path / str(batch))
    tell_sweep(tmp_path)
    told = json.loads((tmp_path / "dry_run.json").read_text())["memory"]["stages"]
    assert told["recover"]["bytes"] == max(most) > min(most)
    assert [*told] == ["evaluate", "prune", "recover", "measure speed"]
    assert "host memory of the largest jobs, GB" in capsys.readouterr().out
