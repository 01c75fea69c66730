"""The measurement at full depth, rehearsed: sizes of the tiny models, every step of the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from efficientllava.checkpoint.folder import load
from efficientllava.models.anatomy import layers_of
from experiments.scale import full, stopwatch, watch, write

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_config(option, layers=None, full_size=write.config_of):
    """A family's configuration with everything small but its vocabulary and the number of an image's tokens."""
    config = full_size(option, layers)
    for part, count in ((config.text_config, 4), (config.vision_config, 2)):
        part.update({**SMALL, "num_hidden_layers": count})
    config.text_config.num_key_value_heads = SMALL["num_attention_heads"]
    if option == "mini_internvl_4b":
        factors = [1.0] * (SMALL["hidden_size"] // SMALL["num_attention_heads"] // 2)
        config.text_config.rope_parameters |= {"short_factor": factors, "long_factor": factors}
    return config


@pytest.mark.parametrize("option", ["llava_1_5_7b", "mini_internvl_4b"])
def test_what_is_written_loads_as_the_published_family_does(option, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(write, "SHARD", 1 << 20)
    (tmp_path / "model").mkdir()
    write.WRITERS[option](tmp_path / "model", small_config(option))
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1
    loaded = load(tmp_path / "model", "bfloat16")
    rows, tokens = {"llava_1_5_7b": (32_064, 32_002), "mini_internvl_4b": (32_024, 32_021)}[option]
    assert loaded.model.lm_head.weight.shape == (rows, 64) and len(loaded.processor.tokenizer) == tokens
    assert len(layers_of(loaded.model)) == 4
    assert loaded.model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=0.05)


def test_the_names_are_those_of_the_hub():
    names = write.published(small_config("llava_1_5_7b"), write.LLAVA_NAMES)
    assert names["language_model.model.layers.3.mlp.down_proj.weight"].shape == (64, 96)
    assert {"language_model.lm_head.weight", "vision_tower.vision_model.post_layernorm.bias"} < names.keys()
    names = write.published(write.config_of("bunny_3b", 2), write.BUNNY_NAMES)
    assert names["model.embed_tokens.weight"].shape == (50_295, 2560)


def test_a_program_is_watched(tmp_path):
    told, block = tmp_path / "phase", 200 << 20
    code = (
        f"import time; from pathlib import Path; Path({str(told)!r}).write_text('busy'); time.sleep(0.4)\n"
        f"x = b'1' * {block}; time.sleep(0.8)"
    )
    found = watch.watch([sys.executable, "-c", code], {}, 1 << 30, told, tmp_path / "log")
    assert found.code == 0 and found.seconds > 1
    assert block < found.peaks["busy"] == found.peak < 1.2 * block
    if found.limited:
        found = watch.watch([sys.executable, "-c", code], {}, block // 2, told, tmp_path / "log")
        assert found.code == -9


def test_phases_are_apart_and_have_a_floor(tmp_path):
    timer = stopwatch.Stopwatch(tmp_path)
    one = torch.ones(600, 600)
    with timer, timer.phase("outer"):
        one @ one
        with timer.phase("inner"):
            lower = torch.linalg.cholesky(one.double() @ one.double() + 600 * torch.eye(600))
            torch.cholesky_inverse(lower)
    phases = timer.report()["phases"]
    cubed = 600**3
    assert phases["outer"]["floor"] == pytest.approx(2 * cubed / timer.rates.flops[torch.float32])
    assert phases["inner"]["floor"] == pytest.approx(3 * cubed / timer.rates.flops[torch.float64])
    assert all(phases[name]["seconds"] > 0 for name in ("outer", "inner", "other"))
    assert (tmp_path / "phase").read_text().strip() == "other"


def test_records_of_a_mixture_are_streamed(tmp_path):
    write.write_many(tmp_path / "records.json", 12_345)
    rows = json.loads((tmp_path / "records.json").read_text())
    assert len(rows) == 12_345 and rows[12_344]["id"] == "12344"
    assert {len(row["conversations"]) for row in rows} == {2, 4, 6, 8, 10, 12} and "image" not in rows[17]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_stages_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "config_of", small_config)
    place = full.Place(tmp_path, "llava_1_5_7b", 4, ratio=0.05, round_to=8)
    said, file = [], tmp_path / "rows.csv"
    assert full.run(place, file, 4.0, 0, said.append), said
    rows = full.read(file)
    assert {row["stage"] for row in rows} == {*full.stages(place)}
    parts = {(row["stage"], row["phase"]): row for row in rows}
    assert parts[full.FILES, ""]["same"] == "yes"
    for phase in ("load", "decoder layers", "Gram matrices", "OBS", "solve", "write", "reload gate"):
        assert float(parts["widthwise", phase]["cpu"]) > 0
    assert float(parts["recover, taught", "ask the teacher"]["seconds"]) > 0
    assert not place.home.exists()
    assert full.run(place, file, 4.0, 0, said.append) and full.read(file) == rows
    assert full.table(rows).count("\n") > len(full.stages(place)) + 4


def test_records_in_number_are_a_stage_of_their_own(tmp_path):
    [stage] = full.stages(full.Place(Path("/x"), full.MANY, None)).values()
    assert "model=tiny_llava" in stage and "recover.steps=1" in stage
