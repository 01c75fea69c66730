"""The folder for llama.cpp: what the installed runtime computes with it, and what is said of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from efficientllava.checkpoint.folder import load
from efficientllava.deploy import check, decoders, export, inputs, runtime
from efficientllava.runtime.errors import ConfigError, UserError
from efficientllava.settings.schema import DeployConfig

from .conftest import needs_runtime, pruned

PER_LAYER = ((0, 8, 136), (1, 1, 33), (3, 5, 64), (4, 2, 96))
F32 = DeployConfig(name="gguf", types=["f32"], measure=False)


def cosine(name: str, folder: Path) -> float:
    checkpoint = load(f"builtin:{name}")
    keys, tensors = inputs.image_side(checkpoint.model, checkpoint.processor)
    decoders.write(folder / "mmproj.gguf", "clip", keys, tensors, "f32")
    found = check.image_agreement(checkpoint.model, checkpoint.processor, folder / "mmproj.gguf", folder)
    return found["cosine_min"]


@needs_runtime
@pytest.mark.parametrize("name", ["tiny_bunny", "tiny_internvl"])
def test_image_features_are_the_models(tmp_path: Path, name: str) -> None:
    assert cosine(name, tmp_path) > 0.99999


@needs_runtime
@pytest.mark.xfail(
    strict=True, reason="ggml-org/llama.cpp issue 25814: the class token stands last, its position first"
)
def test_image_features_of_clip(tmp_path: Path) -> None:
    assert cosine("tiny_llava", tmp_path) > 0.99999


@needs_runtime
def test_other_positions_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = inputs.image_side

    def in_order(model: Any, processor: Any) -> Any:
        keys, tensors = described(model, processor)
        rows = model.model.vision_tower.embeddings.position_embeddings[0]
        return keys, ((name, (lambda: rows) if "position" in name else made) for name, made in tensors)

    monkeypatch.setattr(inputs, "image_side", in_order)
    assert cosine("tiny_internvl", tmp_path) < check.SAME


@needs_runtime
def test_a_pruned_checkpoint_in_the_runtime(tmp_path: Path) -> None:
    dense = load("builtin:tiny_internvl")
    smaller = dataclasses.replace(dense, model=pruned(load("builtin:tiny_internvl").model, *PER_LAYER))
    smaller.provenance = {**dense.provenance, "base": dense.base, "history": [{"stage": "prune"}]}
    config = DeployConfig(name="gguf", types=["f32", "q8_0"], repeats=1)
    made = export.deploy(smaller, tmp_path, config, lambda: dense)
    assert made["architecture"] == "deci"
    tight = made["files"]["f32"]["agreement"]
    for group in ("text", "image", "resized"):
        assert tight[group]["logprob_error"] < 0.01
        assert tight[group]["greedy_equal"] and tight[group]["top1"] == 1
    assert tight["image"]["lengths_equal"] and tight["image"]["chat_equal"]
    assert made["mmproj"]["cosine_min"] > 0.99999
    assert 0 < tight["text"]["kl"] < made["files"]["q8_0"]["agreement"]["text"]["kl"]
    for entry in made["files"].values():
        speed = entry["speed"]
        assert speed["exported"]["bytes"] == entry["bytes"] == (tmp_path / entry["file"]).stat().st_size
        assert speed["dense"]["bytes"] > speed["exported"]["bytes"]
        assert min(speed[side][key] for side in speed for key in ("load_seconds", "prefill", "decode")) > 0
    assert {name for name in made["files"]["q8_0"]["fallback"] if "blk.1" in name} == {"blk.1.ffn_down.weight"} | {
        f"blk.1.{name}.weight" for name in ("attn_output",)
    }
    assert [line for line in export.remarks(made) if line.startswith("q8_0")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Modelfile",
        "README.md",
        "mmproj-tiny_internvl-pruned-F16.gguf",
        "tiny_internvl-pruned-F32.gguf",
        "tiny_internvl-pruned-Q8_0.gguf",
    ]
    told = (tmp_path / "README.md").read_text()
    assert "llama-server -m tiny_internvl-pruned-F32.gguf --mmproj mmproj-tiny_internvl-pruned-F16.gguf" in told
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./tiny_internvl-pruned-F32.gguf\nFROM ./mmproj")


@needs_runtime
def test_a_wrong_decoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = decoders.write

    def spoilt(path: Path, architecture: str, metadata: Any, tensors: Any, kind: str) -> list[str]:
        other = [(name, (lambda made=made: 1.3 * made()) if "blk.2.attn_v" in name else made) for name, made in tensors]
        return written(path, architecture, metadata, other, kind)

    monkeypatch.setattr(decoders, "write", spoilt)
    with pytest.raises(UserError, match="the exported decoder is not the model"):
        export.deploy(load("builtin:tiny_internvl"), tmp_path, F32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["README.md", "Modelfile"])
def test_pages_of_other_people_s_are_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# Mine\n\nFROM ./my-model\n")
    with pytest.raises(UserError, match=rf"{name}: is not of an export and would be lost"):
        export.deploy(load("builtin:tiny_internvl"), tmp_path, DeployConfig(types=["f32"], check=False, measure=False))
    assert [path.name for path in tmp_path.iterdir()] == [name] and "Mine" in (tmp_path / name).read_text()


@needs_runtime
def test_what_the_runtime_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"bad\.gguf: xllamacpp .* does not take it: ") as raised:
        runtime.speeds({"exported": tmp_path / "bad.gguf"}, 64, 1)
    assert "\n" not in str(raised.value)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="llama-quantize"):
        export.describe(None, DeployConfig(types=["q4_k_m"]))
    with pytest.raises(ConfigError, match="distinct, of f32"):
        export.describe(None, DeployConfig(types=[]))


def test_without_the_packages_one_line_says_how_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf and xllamacpp not installed; pip install .*\[gguf\]"):
        export.describe(None, DeployConfig())
    with pytest.raises(ConfigError, match="deploy=gguf: gguf not installed"):
        export.describe(None, DeployConfig(check=False, measure=False))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoders, "write", full)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # the packages are not asked for
    with pytest.raises(UserError, match="the disk is full; free some space"):
        export.write(load("builtin:tiny_internvl"), tmp_path, F32)


def test_towers_that_are_not_exported() -> None:
    checkpoint = load("builtin:tiny_llava")
    config = checkpoint.model.config
    processor = SimpleNamespace(image_processor=checkpoint.processor.image_processor)
    config.vision_config.hidden_act = "relu"
    with pytest.raises(UserError, match="activations 'relu'"):
        inputs.image_side(checkpoint.model, processor)
    config.vision_config.hidden_act, config.vision_feature_layer = "quick_gelu", [-2, -1]
    with pytest.raises(UserError, match=r"vision_feature_layer=\[-2, -1\]"):
        inputs.image_side(checkpoint.model, processor)


def test_the_last_but_one_block_of_a_tower() -> None:
    checkpoint = load("builtin:tiny_llava")
    checkpoint.model.config.vision_feature_layer = -2
    keys, _ = inputs.image_side(checkpoint.model, checkpoint.processor)
    assert keys["clip.vision.feature_layer"] == [2]  # of three


def test_probe_image_is_always_the_same() -> None:
    assert torch.equal(*(torch.frombuffer(bytearray(check.noise(4, 4).tobytes()), dtype=torch.uint8) for _ in range(2)))
