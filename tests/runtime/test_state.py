"""How jobs of a sweep stand, from the files in their folders."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from efficientllava.report.__main__ import summary, watch
from efficientllava.report.runs import unfinished
from efficientllava.runtime import state
from efficientllava.runtime.errors import UserError


def test_a_sweep_is_read_from_its_folders(tmp_path):
    state.write(tmp_path, state.SWEEP, jobs=[[f"seed={n}"] for n in range(5)])
    state.begin(tmp_path / "0", ["seed=0"])
    state.end(tmp_path / "0", None)
    state.begin(tmp_path / "1", ["seed=1"])
    state.end(tmp_path / "1", "out of memory")
    state.begin(tmp_path / "2", ["seed=2"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state.begin(tmp_path / "3", ["seed=3"])
    state.write(tmp_path / "3", pid=gone.pid)
    jobs = state.standings(tmp_path)
    assert [job.state for job in jobs] == ["done", "failed", "running", "failed", "waiting"]
    assert [job.overrides for job in jobs] == [(f"seed={n}",) for n in range(5)]
    assert jobs[1].reason == "out of memory" and "left no word" in jobs[3].reason
    assert summary(jobs).startswith("1 done, 2 failed, 1 running, 1 waiting")


def test_a_failed_job_that_the_sweep_has_no_more_is_not_told(tmp_path):
    for number in range(3):
        state.begin(tmp_path / str(number), [f"seed={number}"])
        state.end(tmp_path / str(number), None if number < 2 else "out of memory")
        (tmp_path / str(number) / ".hydra").mkdir()
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(f"- seed={number}\n")
    (tmp_path / "0" / "results.json").write_text("{}")
    for planned, told in ((3, ["1", "2"]), (2, ["1"])):
        state.write(tmp_path, state.SWEEP, jobs=[[f"seed={n}"] for n in range(planned)])
        assert [job.name for job in state.standings(tmp_path)] == ["0", "1", "2"][:planned]
        assert [job.folder.name for job in unfinished(tmp_path)] == told


def test_time_left_counts_what_waits_over_what_runs(tmp_path):
    known = {"overrides": (), "reason": "", "folder": tmp_path}
    jobs = [state.Standing("0", "done", seconds=100.0, **known), state.Standing("1", "running", seconds=40.0, **known)]
    jobs += [state.Standing(str(n), "waiting", seconds=None, **known) for n in (2, 3)]
    assert state.seconds_left(jobs) == pytest.approx(260)
    assert state.seconds_left(jobs[1:]) is None


def test_watching_ends_with_the_last_job_and_says_why_one_failed(tmp_path, capsys):
    with pytest.raises(UserError, match="no jobs of a sweep"):
        watch(tmp_path)
    state.begin(tmp_path / "0", ["seed=0"])
    state.end(tmp_path / "0", "x=1: no")
    before = sorted(os.listdir(tmp_path / "0"))
    watch(tmp_path, poll=0.01)
    told = capsys.readouterr().out
    assert "job 0 failed: x=1: no  seed=0" in told and "0 done, 1 failed, 0 running, 0 waiting" in told
    assert sorted(os.listdir(tmp_path / "0")) == before


def test_a_damaged_note_is_no_note(tmp_path):
    (tmp_path / state.JOB).write_text("{")
    assert state.read(tmp_path) == {}
