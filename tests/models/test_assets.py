from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import efficientllava
from efficientllava.checkpoint.processors import load_processor
from efficientllava.data.collator import GenerationCollator
from efficientllava.data.embedded.digits import KINDS, Digits
from efficientllava.evaluation.generation import generate
from experiments.tiny_models.tiny import BUILDERS

ASSETS = Path(efficientllava.__file__).parent / "assets"
TARGETS = {"tiny_llava": 0.97, "tiny_bunny": 0.95, "tiny_internvl": 0.95}


@pytest.mark.parametrize("name", BUILDERS)
def test_shipped_weights_are_small_and_say_where_they_come_from(name: str) -> None:
    folder = ASSETS / name
    assert (folder / "model.safetensors").stat().st_size <= 6e6
    provenance = json.loads((folder / "provenance.json").read_text("utf-8"))
    assert {"command", "commit", "recipe", "minutes", "device", "versions", "test"} <= set(provenance)
    assert provenance["recipe"]["name"] == name
    scores = provenance["test"]
    assert set(scores) == {"all", *KINDS}
    assert scores["all"]["n"] == 2000
    assert scores["all"]["accuracy"] >= TARGETS[name]
    if name == "tiny_llava":
        assert min(score["accuracy"] for score in scores.values()) >= 0.92


@pytest.mark.parametrize("name", BUILDERS)
def test_shipped_weights_answer_as_they_claim(name: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    built, _ = BUILDERS[name]()
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, built)]
    assert shapes[0] == shapes[1]
    processor = load_processor(ASSETS / name)
    prompts = GenerationCollator(processor)(list(Digits("test", 300)))
    said = generate(model, processor.tokenizer, prompts, None, 8)
    found = sum(text == answer for text, answer in zip(said, prompts["answers"], strict=True)) / 300
    claimed = json.loads((ASSETS / name / "provenance.json").read_text("utf-8"))["test"]["all"]["accuracy"]
    # Three standard errors of 300 questions at 95 %.
    assert abs(found - claimed) < 0.04
