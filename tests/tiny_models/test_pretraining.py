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
from efficientllava.evaluation.generation import generate
from efficientllava.models.forward import answer_loss
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.store import Entry
from experiments.tiny_models.pretraining import (
    PROVENANCE,
    STATE,
    PretrainConfig,
    Pretraining,
    Scenes,
    forced_match,
    pretrain,
)
from experiments.tiny_models.tiny import BUILDERS, augmented, initialise, quadrants, scene_targets

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


def weights(entry: Entry) -> dict[str, torch.Tensor]:
    return load_file(entry.folder / "model.safetensors")


def kill(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kill a training after its second saved state; returns that state."""
    train = Pretraining.train

    def killed(training: Pretraining, batch: Any) -> None:
        if training.step == 5:
            raise KeyboardInterrupt
        train(training, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(QUICK, root)
    [work] = root.glob("tiny_internvl/*.work")
    return work / STATE


def test_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(QUICK, tmp_path / "whole")
    assert whole.record["test"]["all"]["n"] == 20
    state = kill(tmp_path / "killed", monkeypatch)
    assert state.is_file() and not list(tmp_path.glob(f"killed/*/*/{PROVENANCE}"))
    resumed = pretrain(QUICK, tmp_path / "killed")
    assert resumed.record == whole.record and not state.exists()
    assert weights(whole).keys() == weights(resumed).keys()
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize("damage", ["empty", "flipped", "a folder"])
def test_a_damaged_state_of_training_is_none(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = kill(tmp_path, monkeypatch)
    content = state.read_bytes()
    state.unlink()
    match damage:
        case "empty":
            state.write_bytes(b"")
        case "flipped":
            state.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case _:
            state.mkdir()
    assert pretrain(QUICK, tmp_path).record["test"]["all"]["n"] == 20
    assert [record.getMessage().partition(": ")[2] for record in caplog.records if record.levelname == "WARNING"] == [
        f"{STATE} is damaged; set aside and computed again"
    ]


@pytest.mark.parametrize("name", [PROVENANCE, "model.safetensors"])
def test_a_damaged_checkpoint_is_trained_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = pretrain(QUICK, tmp_path)
    whole = (entry.folder / "model.safetensors").read_bytes()
    (entry.folder / name).write_bytes((entry.folder / name).read_bytes()[:-10])
    again = pretrain(QUICK, tmp_path)
    assert again.record == entry.record and not again.reused
    assert (again.folder / "model.safetensors").read_bytes() == whole
    assert sum(f"{name} is damaged; set aside and computed again" in text for text in caplog.messages) == 1


def test_a_complete_folder_is_a_checkpoint_and_is_kept(tmp_path: Path) -> None:
    entry = pretrain(QUICK, tmp_path)
    provenance = json.loads((entry.folder / PROVENANCE).read_text())
    assert provenance["command"] == "python run.py experiment=train_tiny_internvl seed=0"
    assert provenance["recipe"]["steps"] == 4
    model = AutoModelForImageTextToText.from_pretrained(entry.folder)
    assert model.dtype == torch.float16
    assert not (entry.folder / STATE).exists()
    before = (entry.folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(QUICK, tmp_path) == entry._replace(reused=True)
    assert (entry.folder / "model.safetensors").stat().st_mtime_ns == before
    assert pretrain(replace(QUICK, seed=1), tmp_path).folder != entry.folder


def test_each_stage_trains_its_own_part(tmp_path: Path) -> None:
    model, _ = BUILDERS[QUICK.name]()
    initialise(model, 0)
    model.half().save_pretrained(tmp_path / "start")
    start = load_file(tmp_path / "start" / "model.safetensors")
    aligned, answered = (weights(pretrain(replace(QUICK, **{key: 0}), tmp_path)) for key in ("steps", "align_steps"))
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
