"""`prune=auto` from the configuration to the folder: one's own samples, kills, several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from .runs import (
    RUN,
    environment,
    run,
    save_tiny,
    small,
)

QUICK = (
    *("prune=auto", "prune.ratio=0.3", "recover=none", "evaluate=none", "evaluate.efficiency=false"),
    *(
        "search=paper",
        "search.rounds=1",
        "search.generations=3",
        "search.population=6",
        "search.parents=3",
        "search.mutants=4",
        "search.crossovers=1",
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def command(model, output, *more):
    return small(model, output, *QUICK, *more)


@pytest.mark.usefixtures("without_fresh_processes")
def test_ones_own_samples_are_all_that_a_search_without_recovery_opens(model, tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        said = [{"from": "human", "value": "<image>\nwhich digit is red ?"}, {"from": "gpt", "value": str(index)}]
        records.append({"id": f"mine{index}", "image": f"{index}.png", "conversations": said})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    # Whoever opened other records would be told that data.path is not set.
    typed = command(model, tmp_path / "out", "data=conversations", f"calibration.path={tmp_path}/mine.json")
    record = run(tmp_path / "run", [*typed, f"calibration.image_root={tmp_path}/images"])
    assert record["ratio"]["achieved"] == pytest.approx(0.3, abs=0.005)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert sorted(plan["calibration_ids"]) == [f"mine{index}" for index in range(4)]
    searched = json.loads((tmp_path / "run" / "search.json").read_text())
    assert {"loss", "kl", "error", "gap", "objective"} <= set(searched["policies"][0])
    assert (tmp_path / "run" / "search.png").stat().st_size > 10_000
    report = record["reports"]["prune"]["report"]
    assert report["loss_searched"] > 0 and report["loss_pruned"] > 0


def weights(folder):
    return load_file(folder / "pruned" / "model.safetensors")


def started(typed, place, name):
    return subprocess.Popen(
        [*RUN, *typed, f"hydra.run.dir={place / name}"],
        env=environment(),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_ends_as_an_undisturbed_one(model, tmp_path):
    long = "search.generations=40"
    whole = started(command(model, tmp_path / "one", long), tmp_path, "whole")
    assert whole.wait() == 0, whole.stderr and whole.stderr.read()
    typed = command(model, tmp_path / "two", long)
    process = started(typed, tmp_path, "again")
    while process.poll() is None and not list((tmp_path / "two").glob("cache/prune/*.work/search.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "again" / "pruned").exists()
    again = started(typed, tmp_path, "again")
    assert again.wait() == 0, again.stderr and again.stderr.read()
    for name in ("plan.json", "search.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "again" / name).read_text()
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert all(one[key].equal(two[key]) for key in one.keys() | two.keys())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_search_as_one(model, tmp_path):
    found = []
    for name, trainer in (("one", []), ("two", ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"])):
        process = started(command(model, tmp_path / name, *trainer), tmp_path, f"run_{name}")
        assert process.wait() == 0, process.stderr and process.stderr.read()
        record = json.loads((tmp_path / f"run_{name}" / "search.json").read_text())
        found.append((record, weights(tmp_path / f"run_{name}")))
    (one, mine), (two, theirs) = found
    assert one["best"] == two["best"]
    assert [e["policy"] for e in one["policies"]] == [e["policy"] for e in two["policies"]]
    assert [e["loss"] for e in one["policies"]] == pytest.approx([e["loss"] for e in two["policies"]], rel=1e-5)
    assert max(float((mine[key].float() - theirs[key].float()).abs().max()) for key in mine) < 2e-2
