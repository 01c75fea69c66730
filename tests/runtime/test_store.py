import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from efficientllava.cache import RECORD, StageCache, link, source_digest

from efficientllava import cache as module
from efficientllava.errors import UserError


class Stage:
    """Counts how often it is computed."""

    def __init__(self, text="result"):
        self.calls, self.text = 0, text

    def __call__(self, folder: Path, work: Path):
        self.calls += 1
        (folder / "file").write_text(self.text)
        return {"calls": self.calls}


def test_the_same_inputs_hit(tmp_path):
    compute, store = Stage(), StageCache(tmp_path)
    first = store.stage("prune", {"a": 1, "b": [1, 2]}, compute)
    second = StageCache(tmp_path).stage("prune", {"b": [1, 2], "a": 1}, compute)
    assert compute.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.folder == second.folder == tmp_path / "prune" / first.folder.name
    assert second.record == {"calls": 1}
    assert (second.folder / "file").read_text() == "result"


def test_changed_inputs_miss(tmp_path):
    compute, store = Stage(), StageCache(tmp_path)
    for stage, inputs in [
        ("prune", {"a": 1}),
        ("prune", {"a": 2}),
        ("prune", {"a": 1, "b": None}),
        ("other", {"a": 1}),
    ]:
        assert not store.stage(stage, inputs, compute).reused
    assert compute.calls == 4


def test_another_library_version_misses(tmp_path, monkeypatch):
    compute, store = Stage(), StageCache(tmp_path)
    store.stage("prune", {}, compute)
    monkeypatch.setattr(module, "library_versions", lambda: {"torch": "0"})
    assert not store.stage("prune", {}, compute).reused


def test_the_digest_of_our_source_follows_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "a.py").write_text("1")
    (tmp_path / "one.py").write_text("1")

    def now(*parts):
        source_digest.cache_clear()
        return source_digest(*parts)

    before, alone = now("pruning", "one.py"), now("one.py")
    (tmp_path / "pruning" / "a.py").write_text("2")
    assert now("pruning", "one.py") != before
    assert now("one.py") == alone
    source_digest.cache_clear()


def test_reuse_false_computes_and_replaces(tmp_path):
    StageCache(tmp_path).stage("prune", {}, Stage("old"))
    entry = StageCache(tmp_path, reuse=False).stage("prune", {}, Stage("new"))
    assert not entry.reused
    again = StageCache(tmp_path).stage("prune", {}, Stage("unused"))
    assert again.reused
    assert (again.folder / "file").read_text() == "new"


def left(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder, work):
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        StageCache(tmp_path).stage("prune", {}, fail)
    assert left(tmp_path) == []
    assert not StageCache(tmp_path).stage("prune", {}, Stage()).reused


def test_a_full_disk_leaves_nothing(tmp_path):
    def fail(folder, work):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        StageCache(tmp_path).stage("prune", {}, fail)
    assert left(tmp_path) == []


def test_what_a_kill_leaves_is_swept_up_and_the_work_folder_survives_it(tmp_path):
    store = StageCache(tmp_path)
    folder = store.stage("prune", {}, Stage()).folder
    (folder / RECORD).unlink()
    stale = folder.with_name(f".{folder.name}.99999.partial")
    stale.mkdir()
    work = folder.with_name(folder.name + ".work")
    work.mkdir()
    (work / "resume").write_text("point")
    found = []

    def compute(target, workdir):
        found.append((workdir / "resume").read_text())
        return {}

    assert not store.stage("prune", {}, compute).reused
    assert found == ["point"]
    assert not stale.exists()
    assert not work.exists()


def test_without_reuse_a_stage_starts_anew(tmp_path):
    store = StageCache(tmp_path)
    work = []

    def fail(folder, workdir):
        workdir.mkdir()
        work.append(workdir)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.stage("prune", {}, fail)
    assert work[0].is_dir()
    StageCache(tmp_path, reuse=False).stage("prune", {}, lambda folder, workdir: {"seen": workdir.exists()})
    assert StageCache(tmp_path).stage("prune", {}, Stage()).record == {"seen": False}


def _compete(root, log):
    def compute(folder, work):
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return {"pid": os.getpid()}

    entry = StageCache(Path(root)).stage("prune", {"a": 1}, compute)
    Path(f"{log}.{os.getpid()}").write_text(json.dumps([entry.record["pid"], entry.reused]))


def test_two_processes_compute_once(tmp_path):
    context = multiprocessing.get_context("fork")
    log = str(tmp_path / "log")
    jobs = [context.Process(target=_compete, args=(str(tmp_path / "cache"), log)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(Path(log).read_text().splitlines()) == 1
    found = [json.loads(p.read_text()) for p in tmp_path.glob("log.*")]
    assert found[0][0] == found[1][0]
    assert sorted(reused for _, reused in found) == [False, True]


def test_links_share_the_content_and_replace_what_is_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "run" / "pruned"
    source.mkdir()
    (source / "weights").write_bytes(b"abc")
    target.mkdir(parents=True)
    (target / "stale").write_text("")
    link(source, target)
    assert [p.name for p in target.iterdir()] == ["weights"]
    assert (target / "weights").stat().st_ino == (source / "weights").stat().st_ino
    link(source / "weights", tmp_path / "run" / "plan.json")
    assert (tmp_path / "run" / "plan.json").read_bytes() == b"abc"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["plan.json", "pruned"]


def test_where_links_are_impossible_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("abc")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "abc"


def test_a_full_disk_while_linking_leaves_the_old_folder(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        link(source, target)
    assert (target / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]
