from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from efficientllava.data.collator import Collator, GenerationCollator
from efficientllava.data.embedded.digits import KINDS, Digits
from efficientllava.data.embedded.scenes import FULL, strokes
from efficientllava.evaluation.answers import generate
from efficientllava.models.forward import answer_loss
from efficientllava.runtime.content import Memo
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.files import whole_file
from efficientllava.runtime.store import growing
from experiments.tiny_models.pretraining import (
    PROVENANCE,
    STATE,
    Pretraining,
    initialise,
    pretrain,
)
from experiments.tiny_models.pretraining_data import (
    PretrainConfig,
    Scenes,
    augmented,
    quadrants,
    scene_targets,
)
from experiments.tiny_models.scoring import forced_match
from experiments.tiny_models.tiny import BUILDERS

QUICK = PretrainConfig(
    "tiny_internvl",
    align_steps=3,
    align_images=4,
    steps=4,
    images=2,
    questions=5,
    easy_steps=2,
    warmup=2,
    save_every=2,
    check_every=100,
    test_questions=20,
)


def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = pretrain(QUICK, tmp_path / "whole")
    assert scores["all"]["n"] == 20

    train = Pretraining.train

    def killed(training: Pretraining, batch: Any) -> None:
        if training.step == 5:
            raise KeyboardInterrupt
        train(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(QUICK, tmp_path / "killed")
    assert (tmp_path / "killed.work" / STATE).exists()
    assert not (tmp_path / "killed").exists()
    assert pretrain(QUICK, tmp_path / "killed") == scores
    assert not (tmp_path / "killed.work").exists()
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("damage", ["empty", "flipped", "a folder"])
def test_a_damaged_state_of_training_is_none(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    (work := tmp_path / "model.work").mkdir()
    with growing(work, Memo()), whole_file(work / STATE) as file:
        file.write_bytes(b"a state of training")
    match damage:
        case "empty":
            (work / STATE).write_bytes(b"")
        case "flipped":
            (work / STATE).write_bytes(b"a state of trainimg")
        case _:
            (work / STATE).unlink()
            (work / STATE).mkdir()
    assert pretrain(QUICK, tmp_path / "model")["all"]["n"] == 20
    assert [record.getMessage().partition(": ")[2] for record in caplog.records if record.levelname == "WARNING"] == [
        f"{STATE} is damaged; set aside and computed again"
    ]


@pytest.mark.parametrize("name", [PROVENANCE, "model.safetensors"])
def test_a_damaged_checkpoint_is_trained_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "model"
    scores = pretrain(QUICK, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    assert pretrain(QUICK, folder) == scores and (folder / "model.safetensors").read_bytes() == whole
    assert sum("is damaged; set aside, the model is trained again" in text for text in caplog.messages) == 1


def test_complete_folder_is_a_checkpoint_and_is_kept(tmp_path: Path) -> None:
    tmp_path /= "model"
    scores = pretrain(QUICK, tmp_path)
    provenance = json.loads((tmp_path / PROVENANCE).read_text())
    assert provenance["command"] == "python run.py experiment=train_tiny_internvl seed=0"
    assert provenance["recipe"]["steps"] == 4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.float16
    assert not (tmp_path / STATE).exists()
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert pretrain(QUICK, tmp_path)["all"] == scores["all"]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another recipe"):
        pretrain(replace(QUICK, seed=1), tmp_path)


def test_each_stage_trains_its_own_part(tmp_path: Path) -> None:
    def weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
        pretrain(config, tmp_path / f"{config.align_steps}-{config.steps}")
        return load_file(tmp_path / f"{config.align_steps}-{config.steps}" / "model.safetensors")

    model, _ = BUILDERS[QUICK.name]()
    initialise(model, 0)
    model.half().save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "model.safetensors")
    aligned, answered = weights(replace(QUICK, steps=0)), weights(replace(QUICK, align_steps=0))
    changed = [{key.split(".")[0] for key in start if not torch.equal(start[key], w[key])} for w in (aligned, answered)]
    assert changed == [{"vision_tower", "multi_modal_projector"}, {"language_model", "multi_modal_projector"}]


@pytest.mark.parametrize("name", BUILDERS)
def test_initial_activations_keep_their_scale(name: str) -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model, _ = BUILDERS[name]()
        initialise(model, seed)
        models.append(model)
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    with torch.no_grad():
        decoder = models[0].get_decoder()
        hidden = decoder(input_ids=torch.randint(10, 50, (4, 20)), output_hidden_states=True).hidden_states
    assert 0.5 * hidden[0].std() < hidden[-2].std() < 4 * hidden[0].std()


def test_augmented_strokes_stay_legible() -> None:
    images = strokes("train").images
    moved = augmented(images, (0, 1))
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= FULL
    assert np.array_equal(moved, augmented(images, (0, 1)))
    assert not np.array_equal(moved, augmented(images, (0, 2)))
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images[:200], moved[:200], strict=True)]
    assert 0.6 < float(np.median(similar)) < 0.99


def test_targets_name_what_each_quadrant_shows() -> None:
    assert quadrants(4).tolist() == [0, 1, 2, 3]
    assert quadrants(16).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    data = Digits("train", 20)
    targets = scene_targets([data.scene(index) for index in range(20)])
    for index in range(20):
        shown = {glyph.place: glyph.digit for glyph in data.scene(index)}
        assert targets["digits"][index].tolist() == [shown.get(place, 10) for place in range(4)]
        assert (targets["colours"][index] == -100).tolist() == [place not in shown for place in range(4)]


def test_steps_follow_the_curriculum() -> None:
    steps = Scenes(QUICK, BUILDERS["tiny_llava"]()[1], 0)
    assert len(steps) == 7
    assert steps[0]["pixel_values"].shape == (4, 3, 32, 32)
    assert "labels" in steps[3]
    assert len(steps[3]["ids"]) == 2
    assert steps[5]["segment_ids"].max() == 4
    hard = Scenes(replace(QUICK, extra=("count",) * 4, extra_from=2), steps.collate.prompts.processor, 0)
    counts = [str(item["labels"].tolist()) for item in (steps[4], hard[4], steps[5], hard[5])]
    assert counts[0] == counts[1]
    assert counts[2] != counts[3]
    later = Scenes(QUICK, steps.collate.prompts.processor, 3)
    assert torch.equal(later[0]["input_ids"], steps[3]["input_ids"])


def test_forced_match_equals_generation() -> None:
    model, processor = BUILDERS["tiny_internvl"]()
    initialise(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    records = list(Digits("test", 150))
    batch = Collator(processor)([record for record in records if record.turns[0].answer in ("yes", "no")])
    for _ in range(8):
        optimizer.zero_grad()
        answer_loss(model, batch).backward()
        optimizer.step()
    scores = forced_match(model.eval(), processor, records)
    asked = GenerationCollator(processor)(records)
    said = generate(model, processor.tokenizer, asked, None, 8)
    right = [text == answer for text, answer in zip(said, asked["answers"], strict=True)]
    assert 0.05 < sum(right) / 150 < 0.5
    for kind in ("all", *KINDS):
        hits = [hit for hit, name in zip(right, asked["kinds"], strict=True) if kind in ("all", name)]
        assert scores[kind] == {"accuracy": sum(hits) / len(hits), "n": len(hits)}


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tiny_gpt' is not one of tiny_llava"):
        pretrain(PretrainConfig("tiny_gpt"), tmp_path)
