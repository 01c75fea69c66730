"""The script for an accelerator, rehearsed on the CPU with tiny sizes."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import GenerationCollator
from efficientllava.data.embedded.digits import Digits
from efficientllava.models.anatomy import language_parameters
from efficientllava.models.forward import decoder_inputs, going_on
from experiments.scale import gpu
from experiments.scale.decode import decoding
from experiments.scale.gpu import NEEDS_CUDA, PARTS, REHEARSED, Bench, Row

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses what a machine without CUDA says")
WHAT = {
    "prune": (
        *("2 layers, 30 % of the width: scoring", "8 layers, 30 % of the width: refit and cut", "export"),
        *("8 layers, 30 % of the depth: scoring", "8 layers, 30 % of the depth: cut"),
    ),
    "speed": (
        *("decode, batch 1: dense", "decode, batch 1: 45 % of the width", "decode, batch 2: 45 % of the depth"),
        *("prefill, batch 2: 45 % of the width", "prefill, batch 2: 45 % of the depth"),
    ),
    "train": (
        *("SFT: training", "KD, live teacher: training", "KD, teacher asked once: asked"),
        "KD, cached teacher: training",
    ),
    "search": ("level table of 2 layers", "candidates"),
}


def rows_of(folder):
    with (folder / "rows.csv").open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.csv").write_text("part,what,measured,unit,beside,goal,note\n")
    return tmp_path


@ON_CPU
@pytest.mark.parametrize("name", WHAT)
def test_a_part_writes_its_rows(name, folder):
    PARTS[name][0](Bench(name, folder, REHEARSED))
    rows = {row.what: row for row in rows_of(folder)}
    assert {*WHAT[name]} <= {*rows}
    for what, row in rows.items():
        assert row.part == name
        if what.endswith(": memory"):
            assert (row.measured, row.note) == ("", NEEDS_CUDA)
        else:
            assert float(row.measured) > 0
        assert NEEDS_CUDA in row.note or not what.startswith("decode")


@ON_CPU
def test_the_goal_is_nine_tenths_of_what_is_left(folder, monkeypatch):
    monkeypatch.setattr(gpu, "decode_ms", lambda *_: 1.0)
    monkeypatch.setattr(gpu, "prefill_ms", lambda *_: {"dense": 2.0, "small": 1.0})
    part = Bench("speed", folder, REHEARSED)
    gpu.speed(part)
    row = next(row for row in rows_of(folder) if row.what == "prefill, batch 2: 45 % of the width")
    ideal = language_parameters(part.model()) / language_parameters(part.pruned("width", 45))
    assert (float(row.measured), float(row.beside)) == (2.0, pytest.approx(ideal)) and 1.75 < ideal < 1.9
    assert row.goal == f">= {0.9 * ideal:.2f}, >= 1.6"


@torch.no_grad()
def test_compiled_decoding_chooses_the_same_tokens_with_one_program_for_all_layers():
    checkpoint = load("builtin:tiny_llava")
    model, records = checkpoint.model, Digits("calibration", 3)
    batch = GenerationCollator(checkpoint.processor)([records[0]])
    prompt = {key: batch[key][:2] for key in ("input_ids", "pixel_values")}
    output = model(**decoder_inputs(model, prompt), use_cache=True)
    expected = [output.logits[:, -1:].argmax(-1)]
    for _ in range(3):
        output = model(input_ids=expected[-1], **going_on(output), use_cache=True)
        expected.append(output.logits[:, -1:].argmax(-1))
    before = counters["stats"]["unique_graphs"]
    with decoding(model, prompt, 3) as (step, token):
        found = [token.clone()]
        for _ in range(3):
            step()
            found.append(token.clone())
    assert torch.equal(torch.cat(found, 1), torch.cat(expected, 1)) and len(torch.cat(found, 1).unique()) > 2
    assert counters["stats"]["unique_graphs"] == before + 1
    assert [layer.self_attn.layer_idx for layer in model.get_decoder().layers] == [*range(8)]


def test_a_part_is_killed_at_its_limit_and_a_fault_is_told(folder):
    (folder / "scratch").mkdir()
    Row("search", "candidates", None, "1/s", note=NEEDS_CUDA).write(folder)
    for code in ("import time; time.sleep(60)", "raise SystemExit('no card')", "pass"):
        gpu.run_part("search", folder, 1 if "sleep" in code else 60, [sys.executable, "-c", code])
    _, killed, failed, ended = rows_of(folder)
    assert [row.note for row in (killed, failed, ended)] == ["killed at its limit", "failed: no card", "ended"]
    assert 1 <= float(killed.measured) < 30 and not (folder / "scratch").exists()
    table = gpu.table(folder, ["--rehearse"])
    assert "`python -m experiments.scale.gpu --rehearse` on " in table
    assert f"| search | candidates |  |  |  | {NEEDS_CUDA} |" in table


@pytest.mark.slow
@pytest.mark.timeout(1800)
@ON_CPU
def test_the_rehearsal_runs_all_parts(tmp_path):
    gpu.main([str(tmp_path), "--rehearse"])
    rows = rows_of(tmp_path)
    assert [row.part for row in rows if row.what == "the whole part" and row.note == "ended"] == [*PARTS]
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(rows) + 1
    assert any(row.what == "SFT, FSDP with one device: training" and float(row.measured) > 0 for row in rows)


def test_all_parts_take_eight_minutes_at_most():
    assert sum(limit for _, limit in PARTS.values()) <= 480
