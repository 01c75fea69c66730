"""A run whose cache or folder was damaged or written into: the same command ends well, with the same numbers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..runs import run, save_tiny, small

pytestmark = pytest.mark.usefixtures("without_fresh_processes")
TYPED = ("recover=kd_hidden", "recover.teacher.source=cached", "evaluate.efficiency=false", "prune.selection=local")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a cache and a finished run."""
    place = tmp_path_factory.mktemp("made")
    save_tiny(place / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllava.stages.run.reload_gate", lambda *_: None)
        go(place, "first")
    return place


def go(place: Path, name: str, *more: str) -> dict[str, Any]:
    model = place.parent / "model" if not (place / "model").is_dir() else place / "model"
    return run(place / name, small(model, place / "out", *TYPED, *more))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "made")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("efficient")]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"{}")])
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("evaluate", "predictions.jsonl"),
        ("prune", "pruned/model.safetensors"),
        ("recover", "recovered/model.safetensors"),
        ("recover", "stage.json"),
    ],
)
def test_a_damaged_stage_is_computed_again(place, caplog, stage, name, damage):
    first = json.loads((place / "first" / "results.json").read_text())
    damage(next((place / "out" / "cache" / stage).glob(f"*/{name}")))
    again = go(place, "again")
    assert again["stages"] == first["stages"] and len(again["reused"]) == 4
    (told,) = warnings(caplog)
    assert f"cache/{stage}/" in told and f"{name} is damaged; set aside and computed again" in told
    caplog.clear()
    assert len(go(place, "third")["reused"]) == 5 and not warnings(caplog)


def test_what_is_saved_into_a_run_s_folder_changes_no_other_run(place, caplog):
    go(place, "other")
    before = {name: (place / "other" / name / "model.safetensors").read_bytes() for name in ("pruned", "recovered")}
    for name in before:
        for file in (place / "first" / name).iterdir():
            flip(file)
    for name, content in before.items():
        assert (place / "other" / name / "model.safetensors").read_bytes() == content
    third = go(place, "third")
    assert len(third["reused"]) == 5 and not warnings(caplog)
    assert (place / "third" / "recovered" / "model.safetensors").read_bytes() == before["recovered"]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_run_whose_results_are_damaged_is_done_again(place, caplog, content):
    first = json.loads((place / "first" / "results.json").read_text())
    (place / "first" / "results.json").write_text(content)
    assert go(place, "first")["stages"] == first["stages"]
    assert len(warnings(caplog)) == 1 and "results.json: is damaged" in caplog.text
