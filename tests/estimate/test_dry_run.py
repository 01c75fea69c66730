"""A dry run says what the run will be."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from efficientllava import pipeline
from efficientllava.estimate.dry_run import _kept
from efficientllava.runtime.errors import UserError

from ..runs import (
    composed,
    run,
    save_tiny,
    small,
)

pytestmark = pytest.mark.usefixtures("without_fresh_processes")
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
HEADER = 20_000  # bytes of a weight file that are no weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def dry(tmp_path, overrides):
    overrides = [*overrides, "dry_run=true"]
    pipeline.run(composed(*overrides), str(tmp_path / "dry"), overrides)
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["dry_run.json"]
    return json.loads((tmp_path / "dry" / "dry_run.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        ["prune.ratio=0.3", "prune.selection=local", "recover=kd_hidden"],
        ["prune=widthwise_paper", "prune.share=0.4", "recover=none"],
        ["prune=flap", "prune.ratio=0.3", "prune.selection=floor", "recover=none"],
        ["prune=wanda_sp", "prune.ratio=0.3", "recover=none"],
        [
            "prune=layerwise",
            "prune.ratio=0.2",
            "recover=sft",
            "recover.train=lora",
            "recover.steps=null",
            "recover.epochs=2",
        ],
        ["prune=auto", "prune.ratio=0.3", "search.granularity=unstructured", "recover=none"],
    ],
    ids=["local", "share", "flap", "wanda_sp", "layerwise", "masks"],
)
def test_what_is_exact_is_what_the_run_reports(folder, tmp_path, options, capsys):
    overrides = small(folder, tmp_path / "out", *options, "evaluate=none", "evaluate.efficiency=false")
    if "prune=auto" in options:
        overrides += ["search.generations=1", "search.rounds=1", "search.projector=false"]
    told = dry(tmp_path, overrides)
    done = run(tmp_path / "run", overrides)
    assert told["ratio"]["achieved"] == done["ratio"]["achieved"]
    assert told["ratio"]["requested"] == done["ratio"]["requested"] or "prune=auto" in options
    nominal = 0.4 if "prune.share=0.4" in options else None
    assert told["ratio"].get("share") == done["ratio"].get("share") == nominal
    assert ("removed (share=0.4)" in capsys.readouterr().out) == (nominal is not None)
    assert list(told["stages"]) == list(done["stages"])
    for name, stage in told["stages"].items():
        assert stage["parameters"] == done["stages"][name]["parameters"]
        assert stage["language_parameters"] == done["stages"][name]["language_parameters"]
        assert 0 < done["stages"][name]["checkpoint_bytes"] - stage["checkpoint_bytes"] < HEADER
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    kept = [[len(layer["groups"]), len(layer["channels"])] for layer in plan["layers"]]
    assert [[groups, channels] for _, groups, channels in told["shape"]["pruned"]] == kept
    config = json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())
    assert told["shape"]["stock"] == ("pruned_" not in config["text_config"]["model_type"])
    if told["recovery"]:
        stats = done["reports"]["recover"]["stats"]
        assert told["recovery"]["trainable_parameters"] == stats["trainable_parameters"]
        assert told["recovery"]["steps"] == stats["steps"]
        assert told["recovery"]["samples"] == done["samples"]["recovery"]
        assert told["recovery"]["loss"] == stats["loss"]


@pytest.mark.parametrize("options", [["prune.selection=global"], ["prune.selection=shape"], ["prune=auto"]])
def test_what_the_data_decide_is_a_range(folder, tmp_path, options):
    told = dry(tmp_path, small(folder, tmp_path / "out", *options, "prune.ratio=0.4", "recover=none"))
    low, high = told["ratio"]["between"]
    assert low <= 0.4 <= high <= told["ratio"]["largest"] < 1
    assert not told["shape"]["exact"]
    assert told["shape"]["stock"] == ("prune.selection=shape" in options)


def test_a_searched_saving_of_time_is_open(folder, tmp_path):
    options = ["prune=auto", "search.budget.resource=latency", "search.budget.target=1.5", "recover=none"]
    told = dry(tmp_path, small(folder, tmp_path / "out", *options))
    assert told["ratio"]["between"] == [0.0, pytest.approx(told["ratio"]["largest"], abs=1e-5)]


@pytest.mark.parametrize(("granularity", "ratio", "most"), [("unstructured", 0.3, "95.0 %"), ("2:4", 0.5, "50.0 %")])
def test_weight_masks_remove_no_parameter_and_say_how_many_weights_become_zero(
    folder, tmp_path, capsys, granularity, ratio, most
):
    options = ["prune=auto", f"search.granularity={granularity}", "recover=none"]
    told = dry(tmp_path, small(folder, tmp_path / "out", *options, f"prune.ratio={ratio}"))
    assert (told["ratio"]["achieved"], told["ratio"]["requested"], told["ratio"]["sparsity"]) == (0, None, ratio)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{granularity} weight masks: {ratio:.1%}".replace("%", " %") in shown and f"at most {most} could" in shown
    assert "can be removed" not in shown


@pytest.mark.parametrize("options", [["prune.selection=local"], ["prune=layerwise"], ["prune=auto"]])
def test_a_ratio_out_of_reach_is_refused_with_the_largest(folder, tmp_path, options):
    overrides = small(folder, tmp_path / "out", *options, "prune.ratio=0.98", "recover=none")
    with pytest.raises(UserError, match=r"prune\.ratio=0\.98") as told:
        dry(tmp_path, overrides)
    assert told.value.exit_code == 2


def test_a_full_size_family_needs_no_weights_no_data_and_no_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    weights = "transformers.AutoModelForImageTextToText.from_pretrained"
    monkeypatch.setattr(weights, lambda *_, **__: pytest.fail("weights were read"))
    options = ["model=llava_1_5_7b", "prune=widthwise", "prune.selection=local", "prune.ratio=0.3", "trainer=gpu"]
    told = dry(tmp_path, [*options, f"paths.output_dir={tmp_path}"])
    assert told["stages"]["base"] == {
        "parameters": 7063427072,
        "language_parameters": 6738939904,
        "checkpoint_bytes": 2 * 7063427072,
    }
    assert told["shape"]["pruned"] == [[22, 22, 59 * 128]] * 32
    assert told["shape"]["stock"] is True
    removed = 32 * (10 * 4 * 128 * 4096 + (11008 - 59 * 128) * 3 * 4096)
    assert told["ratio"]["achieved"] == removed / 6738939904
    assert told["recovery"]["samples"] is None
    assert told["memory"]["device"] == "cuda"
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    shared = sum(p.numel() for p in tower.parameters())
    assert told["memory"]["stages"]["recover"]["parts"]["teacher"] == 2 * (7063427072 - shared)
    shown = capsys.readouterr().out
    for part in (
        "achieved ratio: 30.1 %",
        "32 of 32 layers; 22 heads and 7552 channels in each",
        "stock transformers: yes",
        "GPU memory",
    ):
        assert part in shown


@pytest.mark.parametrize("key", ["data.path", "data.image_root", "calibration.path", "model.path"])
def test_what_is_named_must_be_there(tmp_path, key):
    with pytest.raises(UserError, match=rf"^{key}={tmp_path}/gone: no such f") as told:
        dry(tmp_path, ["model=llava_1_5_7b", f"{key}={tmp_path}/gone", f"paths.output_dir={tmp_path}"])
    assert told.value.exit_code == 2


@pytest.fixture
def records(tmp_path):
    """Writes records, of which those named have an image, one that may be missing."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "there.png")

    def write(name, image=None, count=20):
        said = [{"from": "human", "value": "which colour ?"}, {"from": "gpt", "value": "red"}]
        rows = [{"id": f"r{i}", "conversations": said} | ({"image": image} if image else {}) for i in range(count)]
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    return write


def with_data(folder, tmp_path, path, *more):
    options = ["data=conversations", f"data.path={path}", f"data.image_root={tmp_path}/images"]
    options += [] if "prune=none" in more else ["calibration.samples=2"]
    return small(folder, tmp_path / "out", *options, "evaluate=none", *more)


def test_images_that_a_run_would_miss_are_missed(folder, tmp_path, records):
    good, bad = records("good.json", "there.png"), records("bad.json", "gone.png")
    dry(tmp_path, with_data(folder, tmp_path, good))
    own = (f"calibration.path={bad}", f"calibration.image_root={tmp_path}/images")
    for path, *more in ((bad, "prune=none"), (bad, "recover=none"), (good, *own)):
        with pytest.raises(UserError, match=r"r[0-9]+': image '.*gone\.png' does not exist") as told:
            dry(tmp_path, with_data(folder, tmp_path, path, *more))
        assert told.value.exit_code == 2 and "\n" not in str(told.value)
    torn = tmp_path / "torn.json"
    torn.write_text(good.read_text()[:-30])
    with pytest.raises(UserError, match=r"torn\.json' is not JSON"):
        dry(tmp_path, with_data(folder, tmp_path, torn))


def test_records_of_a_file_here_are_counted(folder, tmp_path, records):
    """Of 20 a tenth each is set aside for pruning and for the loss that is reported."""
    found = dry(tmp_path, with_data(folder, tmp_path, records("good.json", "there.png"), "data_frac=0.5"))
    assert found["recovery"]["samples"] == 8 and found["cost"]["hours"] > 0


def test_data_that_are_not_set_are_asked_for(folder, tmp_path):
    overrides = small(folder, tmp_path / "out", "data=conversations", "evaluate=none")
    with pytest.raises(UserError, match=r"^data\.path: not set"):
        dry(tmp_path, overrides)


def test_a_projector_is_not_trained_by_text_alone(folder, tmp_path, records):
    plain = records("text.json")
    dry(tmp_path, with_data(folder, tmp_path, plain, "recover=sft"))
    with pytest.raises(UserError, match=r"^recover\.train=projector: none of the records has an image") as told:
        dry(tmp_path, with_data(folder, tmp_path, plain, "recover=projector"))
    assert told.value.exit_code == 2


def test_a_batch_that_does_not_divide_is_refused(folder, tmp_path):
    overrides = small(folder, tmp_path / "out", "data.batch_size=3", "data.global_batch_size=8", "recover=sft")
    with pytest.raises(UserError, match=r"data\.global_batch_size=8"):
        dry(tmp_path, overrides)


def test_layers_of_one_size_are_told_together():
    shapes = [[32, 32, 110]] * 3 + [[20, 20, 110]] + [[20, 20, 60]] * 2 + [[32, 32, 110]]
    assert _kept(shapes) == ["heads 32 in 0-2, 6; 20 in 3-5", "channels 110 in 0-3, 6; 60 in 4-5"]
    assert _kept([[8, 4, 64]] * 2) == ["8 heads and 64 channels in each"]


def test_files_for_a_runtime_are_foreseen(folder, tmp_path, capsys):
    asked = ["prune.ratio=0.3", "recover=none", "deploy=gguf", "deploy.types=[f16,q8_0]"]
    found = dry(tmp_path, small(folder, tmp_path / "out", *asked))
    assert found["deploy"]["types"] == ["f16", "q8_0"] and found["deploy"]["bytes"] > 0
    assert any("prune.round_to=q8_0" in remark for remark in found["deploy"]["remarks"])
    assert "deploy: f16, q8_0" in capsys.readouterr().out
