"""Whole runs in this process, on a tiny random checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from efficientllava.pruning import self_text
from efficientllava.pruning.plan import PruningPlan
from efficientllava.record import REQUIRED
from efficientllava.runtime.errors import UserError

from .runs import run, save_tiny, small

pytestmark = pytest.mark.usefixtures("without_fresh_processes")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    """A run, its folder and its record."""
    place = tmp_path_factory.mktemp("first")
    typed = small(model, place / "out", "prune.ratio=0.3")
    return place, typed, run(place / "run", typed)


def numbers(record):
    """What a run with the same seed must repeat."""
    stages = record["stages"]
    return {
        "metrics": {name: stage["metrics"] for name, stage in stages.items()},
        "parameters": {name: stage["parameters"] for name, stage in stages.items()},
        "flops": {name: stage["flops"] for name, stage in stages.items()},
        "ratio": record["ratio"],
    }


def test_the_folder_of_a_run(first):
    place, typed, record = first
    folder = place / "run"
    names = {p.name for p in folder.iterdir() if p.name != ".lock"}
    assert names == {"plan.json", "predictions", "pruned", "recovered", "results.json", "samples.png"}
    assert {p.name for p in (folder / "predictions").iterdir()} == {"base", "pruned", "recovered"}
    for stage in ("pruned", "recovered"):
        files = {p.name for p in (folder / stage).iterdir()}
        assert files >= {"config.json", "model.safetensors", "README.md", "tokenizer.json", "processor_config.json"}
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert set(REQUIRED) <= set(record)
    assert set(record["stages"]) == {"base", "pruned", "recovered"}
    for name, stage in record["stages"].items():
        assert set(stage) >= {"parameters", "language_parameters", "checkpoint_bytes", "metrics", "latency_ms", "flops"}
        assert stage["metrics"]["digits_vqa"]["n"] == 12
        assert stage["latency_ms"]["prefill"] > 0
        assert stage["latency_ms"]["decode"] > 0
        assert ("retained" in stage) == (name != "base")
    assert record["samples"] == {"calibration": 4, "written": 0, "report": 4, "recovery": 8}
    assert set(record["seconds"]) == {"prune", "recover", "evaluate"}
    assert record["overrides"] == typed
    assert record["reused"] == []


def test_ratio_plan_and_parameters_agree(first):
    place, _, record = first
    base, pruned = record["stages"]["base"], record["stages"]["pruned"]
    removed = 1 - pruned["language_parameters"] / base["language_parameters"]
    assert record["ratio"]["requested"] == 0.3
    assert record["ratio"]["achieved"] == pytest.approx(removed, abs=1e-9)
    assert removed == pytest.approx(0.3, abs=0.01)
    plan = PruningPlan.read(place / "run" / "plan.json")
    assert plan.achieved == pytest.approx(removed, abs=1e-9)
    assert len(plan.calibration_ids) == 4
    assert base["parameters"] - pruned["parameters"] == base["language_parameters"] - pruned["language_parameters"]
    assert pruned["checkpoint_bytes"] < base["checkpoint_bytes"]


def test_recovery_changes_weights_and_pruning_ones_keep_their_type(first):
    place, _, _ = first
    pruned, recovered = (load_file(place / "run" / n / "model.safetensors") for n in ("pruned", "recovered"))
    assert pruned.keys() == recovered.keys()
    assert {t.dtype for t in [*pruned.values(), *recovered.values()]} == {torch.float16}
    changed = {name for name in pruned if not torch.equal(pruned[name], recovered[name])}
    assert any("language_model" in name and ".layers." in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_a_second_run_takes_everything_from_the_cache_and_gives_the_same_numbers(first, monkeypatch):
    place, typed, record = first

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("efficientllava.stages.recover.train", never)
    monkeypatch.setattr("efficientllava.stages.prune.PruningModule", never)
    again = run(place / "again", typed)
    assert numbers(again) == numbers(record)
    assert set(again["reused"]) == {"prune", "recover"} | {f"evaluate/{s}/digits_vqa" for s in record["stages"]}
    weights = [place / name / "recovered" / "model.safetensors" for name in ("run", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_same_seed_gives_the_same_run_without_the_cache(first):
    place, typed, record = first
    again = run(place / "anew", [*typed, "reuse=false"])
    assert again["reused"] == []
    assert numbers(again) == numbers(record)
    assert (place / "anew" / "plan.json").read_text() == (place / "run" / "plan.json").read_text()
    for stage in ("pruned", "recovered"):
        old, new = (load_file(place / name / stage / "model.safetensors") for name in ("run", "anew"))
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_record_says_how_much_was_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(self_text, "SMALL", 0)  # as of a real decoder
    options = ("recover=none", "evaluate=none", "evaluate.efficiency=false")
    record = run(tmp_path / "run", small(model, tmp_path / "out", *options))
    assert record["samples"]["written"] > 0


def test_the_record_says_how_answers_were_made(first):
    assert first[2]["generation"] == {"decoding": "greedy", "set_aside": {}}


def test_another_seed_is_another_run(first):
    place, typed, record = first
    again = run(place / "seed", [*typed, "seed=1"])
    assert again["reused"] == ["evaluate/base/digits_vqa"]
    assert again["seed"] == 1
    assert numbers(again)["metrics"]["recovered"] != numbers(record)["metrics"]["recovered"]


def test_another_recovery_reuses_the_pruned_model(first):
    place, typed, _ = first
    other = [o for o in typed if not o.startswith("recover.")] + ["recover=projector", "recover.steps=1"]
    again = run(place / "projector", [*other, "recover.epochs=null"])
    assert "prune" in again["reused"]
    assert "recover" not in again["reused"]
    pruned, recovered = (load_file(place / "projector" / n / "model.safetensors") for n in ("pruned", "recovered"))
    changed = {name for name in pruned if not torch.equal(pruned[name], recovered[name])}
    assert changed
    assert all("projector" in name for name in changed)


def test_a_pruned_model_is_pruned_again_and_learns_from_the_original(first, tmp_path):
    place, _, record = first
    typed = small(place / "run" / "recovered", tmp_path / "out", "prune=layerwise", "prune.drop_layers=1")
    typed = [o for o in typed if not o.startswith("prune.round_to")]
    again = run(tmp_path / "run", typed)
    card = json.loads((tmp_path / "run" / "recovered" / "efficientllava.json").read_text())
    original = json.loads((place / "run" / "pruned" / "efficientllava.json").read_text())["base"]
    assert card["base"] == original
    assert [step["stage"] for step in card["history"]] == ["prune", "recover", "prune", "recover"]
    kept = PruningPlan.read(tmp_path / "run" / "plan.json").kept_layers
    assert card["original_layers"] == list(kept)
    assert len(kept) == 2
    assert again["stages"]["base"]["language_parameters"] == record["stages"]["recovered"]["language_parameters"]


@pytest.mark.parametrize(
    ("options", "stages", "folders"),
    [
        (["recover=none"], ["base", "pruned"], {"pruned", "plan.json"}),
        (["prune=none"], ["base", "recovered"], {"recovered"}),
        (["prune=none", "recover=none"], ["base"], set()),
    ],
)
def test_stages_can_be_left_out(first, model, options, stages, folders):
    place, _, _ = first
    name = "_".join(options)
    record = run(
        place / name, small(model, place / "out", *options, *(["prune.ratio=0.3"] if len(folders) == 2 else []))
    )
    assert list(record["stages"]) == stages
    assert {p.name for p in (place / name).iterdir() if p.name != ".lock"} == {
        "results.json",
        "samples.png",
        "predictions",
    } | folders
    if "prune=none" in options:
        assert record["ratio"] == {"requested": 0.0, "achieved": 0.0}


def test_without_benchmarks_sizes_are_still_reported(first, model):
    place, _, _ = first
    options = ["evaluate=none", "evaluate.efficiency=false", "recover=none", "prune.ratio=0.3"]
    typed = [
        o
        for o in small(model, place / "out", *options)
        if not o.startswith(("evaluate.repeats", "evaluate.new", "evaluate.speed"))
    ]
    record = run(place / "bare", typed)
    assert record["stages"]["pruned"]["metrics"] == {}
    assert record["stages"]["pruned"]["parameters"] < record["stages"]["base"]["parameters"]
    assert not (place / "bare" / "samples.png").exists()


def test_a_part_of_the_data_is_a_seeded_draw(first):
    place, typed, _ = first
    record = run(place / "part", [*typed, "data_frac=0.5"])
    assert record["samples"]["recovery"] == 4
    assert "prune" in record["reused"]
    assert "recover" not in record["reused"]


def test_a_sweeper_gets_the_number_it_asks_for(first):
    from efficientllava import pipeline

    from .runs import composed

    place, typed, record = first
    asked = [*typed, "optimized_metric=stages.recovered.metrics.digits_vqa.answer_loss"]
    value = pipeline.run(composed(*asked), str(place / "asked"), asked)
    assert value == record["stages"]["recovered"]["metrics"]["digits_vqa"]["answer_loss"]
    wrong = [*typed, "optimized_metric=stages.nothing"]
    with pytest.raises(UserError, match=r"optimized_metric: 'stages\.nothing' is not in") as error:
        pipeline.run(composed(*wrong), str(place / "wrong"), wrong)
    assert error.value.exit_code == 1


def test_the_export_is_refused_when_the_reloaded_model_differs(model, tmp_path, monkeypatch):
    from efficientllava import pipeline

    from .runs import composed

    def differ(*_):
        raise RuntimeError("logits differ by 1")

    monkeypatch.setattr("efficientllava.stages.run.reload_gate", differ)
    typed = small(model, tmp_path / "out", "recover=none")
    with pytest.raises(RuntimeError, match="logits differ"):
        pipeline.run(composed(*typed), str(tmp_path / "run"), typed)
    assert not (tmp_path / "run" / "pruned").exists()
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_changed_weights_are_another_model(first, model, tmp_path):
    place, typed, _ = first
    other = shutil.copytree(model, tmp_path / "other")
    shutil.rmtree(other)
    save_tiny(other, seed=1)
    record = run(place / "other", [o if not o.startswith("model.path=") else f"model.path={other}" for o in typed])
    assert record["reused"] == []


def test_equal_weights_that_were_other_layers_are_recovered_anew(first, model):
    place, _, _ = first
    options = ["prune=layerwise", "prune.drop_layers=1", "recover=none"]
    run(place / "dropped", [o for o in small(model, place / "out", *options) if o != "prune.round_to=1"])
    dropped = place / "dropped" / "pruned"
    typed = small(dropped, place / "out", "prune=none", "evaluate=none", "evaluate.efficiency=false")
    typed = [
        o for o in typed if not o.startswith(("evaluate.repeats", "evaluate.new_tokens", "evaluate.speed", "data.test"))
    ]
    assert run(place / "layers0", typed)["reused"] == []
    assert run(place / "layers1", typed)["reused"] == ["recover"]
    provenance = json.loads((dropped / "efficientllava.json").read_text())
    other = next(layers for layers in ([0, 1], [0, 2]) if layers != provenance["original_layers"])
    (dropped / "efficientllava.json").write_text(json.dumps({**provenance, "original_layers": other}))
    assert run(place / "layers2", typed)["reused"] == []


def test_the_closing_lines_load_what_the_run_has_made(first, model, capsys):
    place, _, _ = first
    options = ["prune.ratio=0.3", "prune.protect=[0]", "recover=none", "evaluate=none", "evaluate.efficiency=false"]
    unmeasured = ("evaluate.repeats", "evaluate.new_tokens", "evaluate.speed", "data.test")
    typed = [o for o in small(model, place / "out", *options) if not o.startswith(unmeasured)]
    run(place / "protected", typed)
    assert "import efficientllava" in capsys.readouterr().out
    options = ["prune=none", "recover=projector", "evaluate=none", "evaluate.efficiency=false"]
    typed = small(place / "protected" / "pruned", place / "out", *options)
    run(place / "again_recovered", [o for o in typed if not o.startswith(unmeasured)])
    said = capsys.readouterr().out
    assert "import efficientllava" in said
    assert f"from_pretrained('{place}/again_recovered/recovered')" in said.replace("\n", "")


def test_a_run_that_prunes_from_files_makes_what_one_in_memory_makes(model, tmp_path):
    options = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "reuse=false")
    records = []
    for name, more in (("memory", ()), ("disk", ("prune.offload=disk",))):
        records.append(run(tmp_path / name, small(model, tmp_path / "out", *options, *more)))
    memory, disk = (load_file(tmp_path / name / "pruned" / "model.safetensors") for name in ("memory", "disk"))
    assert memory.keys() == disk.keys()
    for name, tensor in memory.items():
        assert tensor.dtype == disk[name].dtype
        assert torch.equal(tensor, disk[name]), name
    plans = [(tmp_path / name / "plan.json").read_text() for name in ("memory", "disk")]
    assert plans[0] == plans[1]
    assert records[0]["losses"] == records[1]["losses"]
    assert len(records[0]["losses"]["report"]) == 2
