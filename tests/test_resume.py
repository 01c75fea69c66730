"""Kills at bad moments: the same command then ends as if nothing had happened, and nothing half-written is found."""

import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from efficientllava.recovery.module import RecoveryModule

from .runs import (
    RUN,
    run,
    save_tiny,
    small,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("without_fresh_processes")]
STEPS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def command(model, output, *more):
    options = ["recover.save_every=2", f"recover.steps={STEPS}", "evaluate=none", "evaluate.efficiency=false", *more]
    return small(model, output, *options)


def kill_when(appears, typed, place):
    """Start a run in a process of its own and kill it as soon as a file or folder is there."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*RUN, *typed, f"hydra.run.dir={place}/run"], cwd=place, **quiet)
    try:
        while process.poll() is None and not appears():
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run had ended before it could be killed"


def weights(folder):
    return load_file(folder / "recovered" / "model.safetensors")


def test_a_killed_recovery_ends_with_the_weights_of_an_uninterrupted_one(model, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", command(model, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    typed = command(model, out)
    kill_when(lambda: list(out.glob("cache/recover/*.work/last.ckpt")), typed, tmp_path)
    assert not (tmp_path / "run" / "recovered").exists()
    assert not list(out.glob("cache/recover/*/stage.json"))
    assert (tmp_path / "run" / "pruned" / "model.safetensors").is_file()
    resumed = []
    load = RecoveryModule.on_load_checkpoint
    monkeypatch.setattr(RecoveryModule, "on_load_checkpoint", lambda self, c: resumed.append(c) or load(self, c))
    record = run(tmp_path / "run", typed)
    assert len(resumed) == 1
    assert 0 < resumed[0]["global_step"] < STEPS
    assert "prune" in record["reused"]
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    stats = [r["reports"]["recover"]["stats"] for r in (whole, record)]
    assert stats[0]["steps"] == stats[1]["steps"] == STEPS
    assert stats[0]["tokens"] == stats[1]["tokens"]
    assert stats[0]["final_losses"] == stats[1]["final_losses"]
    assert not [p for p in out.rglob("*") if p.suffix in (".partial", ".work")]


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-5000] + b"X" + b[-4999:]])
def test_a_damaged_resume_point_is_set_aside_and_training_starts_over(model, tmp_path, monkeypatch, caplog, damage):
    whole = run(tmp_path / "whole", command(model, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    typed = command(model, out)
    kill_when(lambda: list(out.glob("cache/recover/*.work/last.ckpt")), typed, tmp_path)
    (point,) = out.glob("cache/recover/*.work/last.ckpt")
    point.write_bytes(damage(point.read_bytes()))
    monkeypatch.setattr(RecoveryModule, "on_load_checkpoint", lambda *_: pytest.fail("it goes on from damage"))
    record = run(tmp_path / "run", typed)
    assert "prune" in record["reused"] and record["stages"].keys() == whole["stages"].keys()
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(left[name], right[name]) for name in left)
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and r.name.startswith("efficientllava")]
    assert len(told) == 1 and "last.ckpt is damaged; set aside and computed again" in told[0]


def cached(out):
    """The finished stages and when they were finished."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (out / "cache").glob("*/[!.]*/stage.json")}


def exporting(stage, name):
    return lambda out, _: any(out.glob(f"cache/{stage}/.*.partial/{name}/*"))


def answering(done):
    """While answers are collected, after ``done`` losses and benchmarks of models."""
    whole = "cache/evaluate/[!.]*/stage.json"
    return lambda out, _: any(out.glob("cache/evaluate/.*.partial")) and len(list(out.glob(whole))) == done


MOMENTS = {
    "the dense model answers": answering(1),
    "calibration": lambda out, _: any(out.glob("cache/prune/.*.partial")),
    "export of the pruned model": exporting("prune", "pruned"),
    "the pruned model answers": answering(3),
    "recovery": lambda out, _: any(out.glob("cache/recover/*.work/last.ckpt")),
    "export of the recovered model": exporting("recover", "recovered"),
    "the recovered model answers": answering(5),
    "the report": lambda _, place: (place / "run" / "recovered").exists(),
}


@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_in_every_stage_ends_like_an_undisturbed_one(model, tmp_path):
    more = (
        "recover=sft",
        "recover.steps=20",
        "recover.save_every=2",
        "data.test_questions=400",
        "evaluate.batch_size=4",
    )
    more += ("evaluate.efficiency=false",)
    whole = run(tmp_path / "whole", small(model, tmp_path / "undisturbed", *more))
    out = tmp_path / "out"
    typed, finished = small(model, out, *more), {}
    for moment in MOMENTS.values():
        kill_when(lambda: moment(out, tmp_path), typed, tmp_path)  # noqa: B023 - called at once
        assert not (tmp_path / "run" / "results.json").exists()
        assert finished.items() <= cached(out).items(), "what was whole has been computed again"
        finished = cached(out)
    record = run(tmp_path / "run", typed)
    assert finished.items() <= cached(out).items() and len(cached(out)) == 8
    assert {"prune", "recover", "evaluate/base/digits_vqa", "evaluate/pruned/digits_vqa"} <= {*record["reused"]}
    for stage in ("base", "pruned", "recovered"):
        assert record["stages"][stage]["metrics"] == whole["stages"][stage]["metrics"]
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert (tmp_path / "run" / "plan.json").read_text() == (tmp_path / "whole" / "plan.json").read_text()
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".partial", ".work", ".part")]
