"""What the hub refuses comes as one line with the fix, before anything is downloaded or read for minutes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from huggingface_hub import errors

from efficientllava.checkpoint.export import save
from efficientllava.checkpoint.folder import load, stock_config
from efficientllava.checkpoint.hub import FILES, TELLING
from efficientllava.recovery.teacher import open_teacher
from efficientllava.runtime.content import Memo
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import ModelConfig, TeacherConfig

from ..models.originals import write_original
from ..runs import save_tiny

NAME = "org/name"


def http(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    return kind(f"{status} Client Error. (Request ID: x)\n\nAccess is restricted.", response=MagicMock(headers={}))


REFUSED = {
    "gated": (http(errors.GatedRepoError, 401), ["accept their terms", f"huggingface.co/{NAME}", "hf auth login"]),
    "unknown": (http(errors.RepositoryNotFoundError, 401), ["no such model", "check the name", "hf auth login"]),
    "revision": (http(errors.RevisionNotFoundError, 404), ["has no model.revision=v2", "branch, tag or commit"]),
    "server": (http(errors.HfHubHTTPError, 503), ["cannot be fetched", "503 Client Error"]),
    "no network": (
        errors.LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nmore"),
        ["no such folder", "cannot be reached (Got: ConnectError: Name", "HF_HUB_OFFLINE", "local folder"],
    ),
    "half": (errors.IncompleteSnapshotError("a part\nmore", snapshot_path="/cache"), ["only a part", "run again"]),
    "disk": (OSError(28, "No space left on device"), ["disk is full", "HF_HOME"]),
}


def refusal(path: str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(path, revision=revision)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_the_hub_refuses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, told = REFUSED[case]

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    text = refusal(NAME, "v2")
    assert text.startswith(f"model.path={NAME}: ")
    for part in told:
        assert part in text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub whose every model is ``tmp_path/remote``; returns what was asked of it."""
    asked: list[Any] = []

    def fetch(_name: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "remote")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return asked


@pytest.mark.parametrize("source", ["live", "cached"])
def test_the_teacher_is_of_the_revision_that_was_pruned(
    tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    save_tiny(tmp_path / "remote", layers=1)
    first = load(NAME, revision="v2")
    assert first.base == {"path": NAME, "digest": first.digest, "revision": "v2"}
    save(first.after(first.model, {"stage": "prune"}, [0]), tmp_path / "pruned")
    revisions: list[str | None] = []
    monkeypatch.setattr(
        "efficientllava.checkpoint.hub.download",
        lambda _name, revision, *_: revisions.append(revision) or tmp_path / "remote",
    )
    open_teacher(TeacherConfig(source=source), load(str(tmp_path / "pruned")).base, "cpu", tmp_path / "targets", Memo())
    assert set(revisions) == {"v2"}
    revisions.clear()
    other = TeacherConfig(path="org/teacher", revision="v3", source=source)
    open_teacher(other, first.base, "cpu", tmp_path / "targets", Memo())
    assert set(revisions) == {"v3"}


def test_a_model_from_the_hub(tmp_path: Path, hub: list[Any]) -> None:
    save_tiny(tmp_path / "remote", layers=1)
    assert load(NAME).path == NAME
    assert hub == [TELLING, FILES]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "llama"}, "a 'llama' model takes no images"),
        ({"model_type": "paligemma"}, "decoder 'gemma' is not supported; supported: "),
        ({"model_type": "bunny-llama"}, "a 'bunny-llama' in a layout of its own"),
        ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, "a 'llava' in a layout of its own"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_no_weights_are_fetched_in_vain(tmp_path: Path, hub: list[Any], config: dict[str, Any], told: str) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    text = refusal(NAME)
    assert told in text
    assert "models/anatomy.py" in text or "layouts.py" in text or "image-text-to-text" in text
    assert hub == [TELLING]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"adapter_config.json": {"base_model_name_or_path": "org/base"}}, "is an adapter (LoRA of org/base), not a w"),
        ({"adapter_config.json": {}, "config.json": {"model_type": "llava"}}, "holds an adapter, adapter_config.json"),
        ({"quantize_config.json": {}, "config.json": {"model_type": "llava"}}, "its weights are quantized; quantized"),
        ({"config.json": {"a": {"text_config": {"quantization_config": {"quant_method": "awq"}}}}}, "quantized (awq)"),
        ({}, "has no config.json; give a folder written by save_pretrained, or its hub id"),
    ],
    ids=["adapter", "adapter beside weights", "gptq", "nested awq", "nothing"],
)
@pytest.mark.parametrize("ask", [load, lambda name: stock_config(ModelConfig("m", name))], ids=["load", "dry run"])
def test_what_cannot_be_pruned_is_told_of_a_hub_id_too(
    tmp_path: Path, hub: list[Any], files: dict[str, Any], told: str, ask: Callable[[str], Any]
) -> None:
    (tmp_path / "remote").mkdir()
    for name, content in files.items():
        (tmp_path / "remote" / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        ask(NAME)
    assert str(caught.value).startswith(f"model.path={NAME}: ") and told in str(caught.value)
    assert hub == [TELLING]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A stock checkpoint of three shards."""
    whole = save_tiny(tmp_path / "whole", layers=2)
    model = load(str(whole), dtype="float16").model
    model.save_pretrained(tmp_path / "model", max_shard_size="400KB")
    for file in whole.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    for name in ("processor_config.json", "chat_template.jinja"):
        shutil.copy(whole / name, tmp_path / "model")
    assert load(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.mark.parametrize("kept", [0, 40, -100])
def test_half_downloaded_shards(sharded: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    last.write_bytes(last.read_bytes()[:kept])
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda *_, **__: 1 / 0)
    text = refusal(str(sharded))
    assert last.name in text
    assert "truncated" in text
    first.unlink()
    assert f"{first.name} is missing" in refusal(str(sharded))


def test_a_broken_processor_is_found_before_the_weights_are_read(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sharded / "tokenizer.json").unlink()
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda *_, **__: 1 / 0)
    assert "the processor cannot be loaded" in refusal(str(sharded))


def test_a_hub_model_in_an_original_layout(tmp_path: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    write_original(tmp_path / "remote", "internvl")
    checkpoint = load(NAME)
    assert checkpoint.base["path"] == NAME
    assert type(checkpoint.model).__name__ == "InternVLForConditionalGeneration"
