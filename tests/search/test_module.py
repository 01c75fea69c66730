from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from efficientllava.data.records import Record, Turn
from efficientllava.models.anatomy import layers_of, projector_of
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut
from efficientllava.report.pictures import draw_search
from efficientllava.runtime.errors import UserError
from efficientllava.search import change
from efficientllava.search.evaluator import Evaluator
from efficientllava.search.evolution import Search
from efficientllava.search.module import SearchInputs, SearchModule
from efficientllava.settings.schema import PruneConfig, SearchBudgetConfig, SearchConfig
from experiments.speed.rows import quiet_trainer

from ..conftest import make_batch, make_model

PRUNE = PruneConfig(method="auto", ratio=0.4, refit=True)
SMALL = {"rounds": 2, "generations": 2, "population": 6, "parents": 2, "mutants": 3, "crossovers": 2}
RECORDS = [Record(str(i), None, (Turn(str(i), "a"),), False, "") for i in range(8)]


def collate(records: list[Any]) -> dict[str, Any]:
    """Records of these tests are rows of one batch."""
    batch = make_batch(rows=16, images=False)
    rows = [int(record.id) for record in records]
    tensors = {key: value[rows] for key, value in batch.items() if isinstance(value, torch.Tensor)}
    return {**tensors, "ids": [record.id for record in records]}


def searcher(
    folder: Path,
    family: str = "llama_gqa",
    ratio: float = 0.4,
    prune: PruneConfig = PRUNE,
    records: Any = RECORDS,
    write: Any = None,
    **options: Any,
) -> SearchModule:
    holdout = [Record(str(8 + i), None, (Turn(str(8 + i), "a"),), False, "") for i in range(4)]
    inputs = SearchInputs(
        records, holdout, collate, 2, {"model": family, "samples": "eight"}, folder / "tables", folder / "work", write
    )
    config = SearchConfig(name="test", **{**SMALL, "stages": [0.5, 1.0], "projector_lr": 1e-2, **options})
    return SearchModule(make_model(family), inputs, replace(prune, ratio=ratio), config)


def run(module: SearchModule) -> SearchModule:
    quiet_trainer(devices=1, inference_mode=False).predict(module, return_predictions=False)
    return module


@pytest.mark.parametrize("family", ["llama_gqa", "phi", "phi3"])
def test_a_search_ends_in_a_plan_within_the_budget_and_a_smaller_model(tmp_path, family):
    done = run(searcher(tmp_path, family))
    assert done.plan is not None and done.pruned is not None and done.report is not None
    assert abs(done.plan.achieved - 0.4) <= 0.005 + 1e-9
    assert done.plan.calibration_ids == tuple(record.id for record in RECORDS)
    cut = [(layer.attention.units, layer.mlp.units) for layer in layers_of(done.pruned)]
    assert cut == [layer.shape for layer in done.plan.layers]
    assert done.report.loss_searched is not None and done.report.loss_pruned is not None
    best = tuple(done.record["best"])
    assert best in {tuple(entry["policy"]) for entry in done.record["policies"]}
    assert all(point["holdout_loss"] > 0 for point in done.record["holdout"])
    json.dumps(done.record)
    draw_search(done.record, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_the_same_seed_finds_the_same(tmp_path):
    one, two = run(searcher(tmp_path / "a")), run(searcher(tmp_path / "b"))
    assert one.plan == two.plan
    assert one.record == two.record


@pytest.mark.parametrize("projector", [True, False])
def test_the_risks_of_a_search_are_not_measured_again_for_its_plots(tmp_path, monkeypatch, projector):
    asked = []
    evaluate = Evaluator.evaluate
    monkeypatch.setattr(Evaluator, "evaluate", lambda *a, **k: asked.append(len(a[1])) or evaluate(*a, **k))
    known = run(searcher(tmp_path / "a", projector=projector)).record
    once = sum(asked)
    monkeypatch.setattr(Search, "risks", {})
    measured = run(searcher(tmp_path / "b", projector=projector)).record
    assert known == measured
    again = sum(asked) - 2 * once
    assert again > 0 and (projector or again == len(known["holdout"]))


@pytest.mark.parametrize("step", ["run_round", "end_round"])
def test_a_killed_search_ends_with_the_same_result(tmp_path, monkeypatch, step):
    whole = run(searcher(tmp_path / "whole"))
    calls, original = [], getattr(Search, step)

    def killed(self: Search, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, step, killed)
    with pytest.raises(KeyboardInterrupt):
        searcher_run(searcher(tmp_path / "killed"))
    assert calls
    monkeypatch.setattr(Search, step, original)
    resumed = run(searcher(tmp_path / "killed"))
    assert resumed.plan == whole.plan
    assert resumed.record["policies"] == whole.record["policies"]
    assert resumed.record["history"] == whole.record["history"]
    assert resumed.record["projector"] == whole.record["projector"] != []
    assert resumed.report is not None and whole.report is not None
    assert resumed.report.loss_pruned == whole.report.loss_pruned


def searcher_run(module: SearchModule) -> None:
    """Without a Trainer, which turns an interrupt into an exit."""
    for batch in module.predict_dataloader():
        module.predict_step(batch, 0)
    with torch.no_grad():
        module.on_predict_epoch_end()


def test_the_projector_moves_only_where_it_helps_on_unseen_batches(tmp_path):
    module = searcher(tmp_path)
    before = [p.clone() for p in projector_of(module.model).parameters()]
    done = run(module)
    assert done.pruned is not None
    moved = any(not torch.equal(a, b) for a, b in zip(before, projector_of(done.pruned).parameters(), strict=True))
    steps = done.record["projector"]
    assert len(steps) == SMALL["rounds"] - 1
    assert moved == any(step["kept"] for step in steps)
    assert all(step["kept"] == (step["after"] < step["before"]) for step in steps)
    still = run(searcher(tmp_path / "off", projector=False))
    assert "projector" not in still.record
    assert still.pruned is not None
    assert all(torch.equal(a, b) for a, b in zip(before, projector_of(still.pruned).parameters(), strict=True))


def test_the_projector_evolves_on_what_policies_are_judged_on(tmp_path):
    done = run(searcher(tmp_path, gap="held_out"))
    assert len(done.record["projector"]) == SMALL["rounds"] - 1


def test_levels_that_were_fitted_to_other_samples_are_another_table(tmp_path):
    tables = []
    for gap in ("held_out", "none", "fro"):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        tables.append(run(searcher(tmp_path, gap=gap)).table)
    assert tables[0] != tables[1] == tables[2]


def test_beside_images_policies_are_judged_without_written_text(tmp_path):
    pictures = [Image.new("L", (1, 1), i) for i in range(8)]
    shown = [replace(record, image=each) for record, each in zip(RECORDS, pictures, strict=True)]
    write = lambda *_: [make_batch(rows=2, seed=7, images=False)]  # noqa: E731
    known = {"images": shown, "text": RECORDS}
    found = {
        (name, bool(writer)): run(searcher(tmp_path / f"{name}{bool(writer)}", records=records, write=writer))
        for name, records in known.items()
        for writer in (None, write)
    }
    judged = {key: done.record["policies"] for key, done in found.items()}
    assert judged["images", True] == judged["images", False] and judged["text", True] != judged["text", False]
    one, other = (found["images", writes].pruned.state_dict() for writes in (True, False))
    assert any(name not in other or not torch.equal(value, other[name]) for name, value in one.items())


def test_a_uniform_search_of_layers_that_differ_is_refused(tmp_path):
    module = searcher(tmp_path, uniform=True, projector=False)
    layers = [LayerPlan(i, (0, 1), tuple(range(20 + i))) for i in range(4)]
    module.model = cut(module.model, PruningPlan("widthwise", tuple(layers), 4, 2, 0.3, 0.3))
    with pytest.raises(UserError, match=r"search\.uniform=true: the layers of this model differ"):
        run(module)


def test_a_uniform_search_ends_in_one_shape(tmp_path):
    done = run(searcher(tmp_path, uniform=True, projector=False))
    assert done.plan is not None and done.plan.uniform
    assert abs(done.plan.achieved - 0.4) <= 0.01


@pytest.mark.parametrize("granularity, ratio", [("unstructured", 0.4), ("2:4", 0.5)])
def test_masks_keep_all_parameters_and_report_zeros(tmp_path, granularity, ratio):
    dense = make_model("llama_gqa")
    done = run(searcher(tmp_path, ratio=ratio, granularity=granularity, projector=False))
    assert done.plan is not None and done.pruned is not None and done.plan.details is not None
    assert done.plan.achieved == 0.0 and done.plan.requested is None
    sparsity = done.plan.details["sparsity"]
    assert abs(sparsity - ratio) <= 0.005
    pairs = zip(layers_of(dense), layers_of(done.pruned), strict=True)
    linears = [
        (reader.linear, other.linear)
        for layer, pruned in pairs
        for component, twin in zip(layer.components, pruned.components, strict=True)
        for reader, other in zip(component.readers, twin.readers, strict=True)
    ]
    assert all(a.weight.shape == b.weight.shape for a, b in linears)
    assert sum(float((b.weight == 0).sum()) for _, b in linears) > 0
    assert done.report is not None and done.report.loss_pruned is not None


@pytest.mark.parametrize(("options", "zeros"), [({"uniform": True}, None), ({"granularity": "unstructured"}, 0.2)])
def test_a_target_takes_the_place_of_the_ratio(tmp_path, options, zeros):
    plan = run(searcher(tmp_path, ratio=0.8, budget=SearchBudgetConfig("params", 0.2), **options)).plan
    assert plan is not None and plan.requested == (None if zeros else 0.2)
    removed = plan.details["sparsity"] if plan.details else plan.achieved
    assert removed == pytest.approx(0.2, abs=0.01)


def test_a_control_draws_fresh_weights_in_the_shape_that_was_found(tmp_path):
    done, kept = run(searcher(tmp_path, prune=replace(PRUNE, reinitialise=True))), run(searcher(tmp_path))
    assert done.plan == kept.plan and done.pruned is not None and kept.pruned is not None
    fresh, refitted = (layers_of(each.pruned)[0].mlp.writer.weight for each in (done, kept))
    assert fresh.shape == refitted.shape and not torch.equal(fresh, refitted)


def test_a_budget_that_no_policy_meets_is_refused(tmp_path):
    module = searcher(tmp_path, budget=SearchBudgetConfig("params", 0.99))
    with pytest.raises(UserError, match="choose a share in this range"):
        run(module)


@pytest.mark.parametrize(("records", "measure"), [(RECORDS[:3], "loss_pruned"), (RECORDS, "kl")])
def test_the_finalist_that_loses_least_as_cut_is_the_one_that_is_cut(tmp_path, monkeypatch, records, measure):
    """On records that are compared on, where there are enough; what `simplest` prefers to it has tests of its own."""
    monkeypatch.setattr(change, "simplest", lambda each, _: min(range(len(each)), key=lambda i: each[i].mean))
    done = run(searcher(tmp_path, records=records, parents=4, finalists=3))
    tried = done.record["finalists"]
    assert tried[0]["policy"] == done.record["best"] and len(tried) in (3, 4)  # the plain one may be among the best
    assert len({entry["loss_pruned"] for entry in tried}) > 1
    assert all((entry["kl"] is None) == (measure != "kl") for entry in tried)
    best = min(tried, key=lambda entry: entry[measure])
    searched = {tuple(e["policy"]): e["loss"] for e in done.record["policies"] if e["share"] == 1.0}
    assert done.report is not None and done.report.loss_searched == searched[tuple(best["policy"])]
