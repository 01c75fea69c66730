from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from efficientllava.data.records import Record, Turn
from efficientllava.data.splits import split_folds
from efficientllava.models.offload import Offload
from efficientllava.pruning import two_stage
from efficientllava.pruning.module import PruningModule, with_roles
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.runtime.processes import sum_over
from efficientllava.settings.schema import PruneConfig
from experiments.speed.rows import quiet_trainer

from ..conftest import make_batch, make_batches, make_model

SAMPLE = 40  # positions: two batches of the three
SELECTIONS = ("global", "two_stage")
WRITTEN = [make_batch(seed=seed, images=False) for seed in range(10, 23)]  # three of them are held back
CONFIG = PruneConfig(method="widthwise", ratio=0.3, refit=True, selection="shape", importance="param_first")


def collate(records: list[Any]) -> dict[str, Any]:
    """Records of these tests are rows of one batch."""
    batch = make_batch(rows=12, images=False)
    rows = [int(record.id) for record in records]
    tensors = {key: value[rows] for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {**tensors, "ids": [record.id for record in records]}


RECORDS = [Record(str(i), None, (Turn(str(i), "a"),), False, "") for i in range(12)]


def module(prune: PruneConfig = CONFIG, **options: Any) -> PruningModule:
    return PruningModule(make_model("llama_gqa"), RECORDS, collate, prune, batch_size=5, **options)


def parts() -> tuple[list[Any], list[Any], list[Any]]:
    """Records to fit to, to make the refit's choices on while shapes are compared, and to compare shapes on."""
    fitted, held, compared = split_folds(RECORDS)
    assert len(fitted) > len(compared) == len(held) == 3
    return fitted, held, compared


def test_the_module_is_plan_and_apply():
    pruner = module()
    quiet_trainer(devices=1, inference_mode=False).predict(pruner, return_predictions=False)
    fitted, held, compared = parts()
    batches = [collate([record]) for record in (*fitted, *held, *compared)]  # gradients are taken record by record
    last = range(len(fitted) + len(held), len(RECORDS))
    calibration = Calibration(batches, compared=last, held=range(len(fitted), last.start), validated=last)
    model = make_model("llama_gqa")
    plan, report = make_plan(model, calibration, CONFIG)
    smaller, applied = apply_plan(model, plan, calibration, CONFIG)
    assert pruner.plan is not None and pruner.report is not None and pruner.pruned is not None
    assert pruner.plan.layers == plan.layers
    assert pruner.plan.calibration_ids == tuple(record.id for record in RECORDS)
    assert pruner.report.loss_dense == report.loss_dense
    assert pruner.report.loss_pruned == applied.loss_pruned
    for one, two in zip(pruner.pruned.parameters(), smaller.parameters(), strict=True):
        assert torch.equal(one, two)


def test_offload_keeps_the_model_out_of_lightnings_reach():
    pruner, whole = module(prune=replace(CONFIG, offload=True), offload=Offload("cpu")), module()
    assert not list(pruner.parameters()) and list(whole.parameters())
    assert pruner.transfer_batch_to_device({"x": 1}, torch.device("meta"), 0) == {"x": 1}
    for one in (pruner, whole):
        quiet_trainer(devices=1, inference_mode=False).predict(one, return_predictions=False)
    assert pruner.plan == whole.plan
    assert pruner.pruned is not None and whole.pruned is not None
    for one, two in zip(pruner.pruned.parameters(), whole.pruned.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("importance", "size"), [("obs", 5), ("param_first", 1)])
def test_batches_are_the_same_for_any_number_of_processes(world, importance, size):
    found = {}
    for rank in range(world):
        pruner = module(prune=replace(CONFIG, importance=importance))
        pruner.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # pyright: ignore[reportAttributeAccessIssue]
        for position, batch in enumerate(pruner.predict_dataloader()):
            if batch:  # a process without a share gets one empty batch
                found[rank + position * world] = batch["ids"]
    roles = [[record.id for record in part] for part in parts()]
    assert [found[i] for i in range(len(found))] == [
        ids[start : start + size] for ids in roles for start in range(0, len(ids), size)
    ]


def plans(mine: list[Any], written: list[Any]) -> tuple[Any, ...]:
    """Every kind of plan that looks at the batches as a whole, and what the first one makes of a model."""
    roles = with_roles(mine, [0] * len(mine), written, True, reduce=sum_over)
    model, plain = make_model("llama_gqa"), Calibration(mine, reduce=sum_over)
    plan, _ = make_plan(model, plain, CONFIG)
    others = [make_plan(model, roles, replace(CONFIG, importance="obs", selection=s))[0].layers for s in SELECTIONS]
    smaller, report = apply_plan(model, plan, plain, CONFIG)
    sample = two_stage._first(CalibrationStream(model, roles), "all").batches
    held = [roles.batches[place] for place in roles.validated]
    looked_at = [[name for batch in part for name in batch["ids"]] for part in (held, sample)]
    return [plan.layers, *others], smaller.state_dict(), report.loss_pruned, looked_at


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    two_stage.SAMPLE = SAMPLE
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(plans(make_batches(3)[rank::2], WRITTEN[rank::2]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_gloo_processes_make_the_plan_and_the_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(two_stage, "SAMPLE", SAMPLE)
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    layers, weights, loss, looked_at = plans(make_batches(3), WRITTEN)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first[0] == second[0] == layers
    assert first[2] == second[2] == pytest.approx(loss, rel=1e-6)
    for one, two, alone in zip(first[3], second[3], looked_at, strict=True):
        assert alone and sorted([*one, *two]) == sorted(alone)
    for name, value in weights.items():
        assert torch.equal(first[1][name], second[1][name])
        assert torch.allclose(first[1][name], value, atol=1e-6)
