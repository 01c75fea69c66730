"""Sweeps that go wrong: two in one folder, a dead worker, a job that hangs, a full disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from .runs import RUN, environment, save_tiny, small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
BARE = ("evaluate.efficiency=false", "prune.selection=local", "sweep.name=mine", "hydra/launcher=gpu_pool")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def start(place, *typed):
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*RUN, *typed], env=environment(), cwd=place, **piped)


def end(process):
    """Exit code and error lines."""
    _, told = process.communicate()
    assert "Traceback" not in told, told
    return process.returncode, [line for line in told.splitlines() if line.startswith("error: ")]


def results(folder):
    return [json.loads((folder / str(job) / "results.json").read_text()) for job in (0, 1)]


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.suffix in (".partial", ".work", ".part")]


def test_two_sweeps_in_one_folder_share_jobs_and_stages_that_start_at_once(model, tmp_path):
    taught = ("recover=kd_hidden", "recover.teacher.source=cached", "recover.lr=1e-3,2e-3")
    line = ["-m", *small(model, tmp_path / "out", *BARE, *taught), "hydra.launcher.slots=2"]
    sweeps = [start(tmp_path, *line) for _ in range(2)]
    assert [end(sweep) for sweep in sweeps] == [(0, []), (0, [])]
    folder = tmp_path / "out" / "sweeps" / "mine"
    records = results(folder)
    for stage in ("evaluate/base/digits_vqa", "prune", "evaluate/pruned/digits_vqa"):
        assert sum(stage in record["reused"] for record in records) == 1, stage
    asked = [record["reports"]["recover"]["stats"]["targets"] for record in records]
    assert sorted(targets["computed"] for targets in asked) == [0, asked[0]["records"]]
    assert not any("recover" in record["reused"] for record in records), "each job was done by one of the sweeps"
    logs = "".join((folder / str(job) / "job.log").read_text() for job in (0, 1))
    assert logs.count("nothing to do") == 2 and "\0" not in logs
    assert (folder / "report.html").is_file() and not leftovers(tmp_path / "out")


def test_a_dead_worker_stops_only_its_job_and_the_same_command_fills_the_gap(model, tmp_path):
    line = ["-m", *small(model, tmp_path / "out", *BARE, "recover=none", "evaluate=none", "keep=none")]
    line += ["prune.ratio=0.2,0.3", "hydra.launcher.slots=2"]
    sweep = start(tmp_path, *line)
    worker = None
    while worker is None and sweep.poll() is None:
        jobs = psutil.Process(sweep.pid).children()
        worker = next((job for job in jobs if "hydra.job.num=1" in job.cmdline()), None)
        time.sleep(0.05)
    assert worker is not None
    worker.kill()
    code, told = end(sweep)
    assert code == 1 and len(told) == 2
    assert told[0].startswith("error: job 1: ended by signal SIGKILL, out of memory, if nobody has ended it: ")
    folder = tmp_path / "out" / "sweeps" / "mine"
    done = (folder / "0" / "results.json").stat().st_mtime_ns
    assert any((tmp_path / "out" / "cache" / "prune").glob("*/pruned")), "a gap is left that may need it"
    assert end(start(tmp_path, *line)) == (0, [])
    assert [record["ratio"]["achieved"] for record in results(folder)] == pytest.approx([0.2, 0.3], abs=0.02)
    assert (folder / "0" / "results.json").stat().st_mtime_ns == done
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_job_that_hangs_is_ended(model, tmp_path):
    os.mkfifo(tmp_path / "endless.json")  # opening it waits for somebody who writes
    line = ["-m", *small(model, tmp_path / "out", *BARE, "recover=none", "evaluate=none"), "seed=0"]
    line += [f"calibration.path={tmp_path}/endless.json", "hydra.launcher.timeout_min=0.5"]
    started = time.monotonic()
    code, told = end(start(tmp_path, *line))
    assert code == 1 and time.monotonic() - started > 30
    assert "without result (hydra.launcher.timeout_min)" in told[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


FULL = """
import runpy, sys
import efficientllava.checkpoint.export as export
write = export.write

def full(*given, **named):
    write(*given, **named)
    raise OSError(28, "No space left on device")

export.write = full
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_nothing_half_is_taken_for_whole(model, tmp_path, small_disk):
    out = small_disk / "out"
    command = [*small(model, out, "recover=none", "evaluate=none", *BARE[:2]), f"hydra.run.dir={out}/run"]
    filler = small_disk / "filler"
    disk = os.statvfs(small_disk)
    filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 300_000))
    told = end(start(tmp_path, *command))
    assert told[0] == 1 and len(told[1]) == 1
    assert re.match(r"error: prune: needs about 0\.000\d+ GB in .*cache/prune, 0\.000\d+ GB are free; ", told[1][0])
    filler.unlink()
    full = subprocess.run([sys.executable, "-c", FULL, RUN[1], *command], capture_output=True, text=True, check=False)
    lines = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert full.returncode == 1 and len(lines) == 1 and "Traceback" not in full.stderr
    assert "the disk is full; free some space" in lines[0]
    for name in ("results.json", "stage.json", "*.safetensors"):
        assert not [file for file in out.rglob(name) if "evaluate" not in file.parts]  # the dense model's loss is whole
    assert end(start(tmp_path, *command)) == (0, [])
    assert json.loads((out / "run" / "results.json").read_text())["reused"] == []
    assert not leftovers(out)
