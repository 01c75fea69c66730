"""The store: one entry per content, whole or not there, and what is damaged is computed again."""

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from efficientllava.runtime import store as module
from efficientllava.runtime.content import Memo
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.files import (
    SUMS,
    seal,
    whole_file,
    whole_folder,
)
from efficientllava.runtime.store import (
    RECORD,
    Store,
    growing,
)


class Stage:
    """Counts how often it is computed."""

    def __init__(self, text="result"):
        self.calls, self.text = 0, text

    def __call__(self, folder: Path, work: Path):
        self.calls += 1
        (folder / "file").write_text(self.text)
        return {"calls": self.calls}


def test_the_same_inputs_hit(tmp_path):
    compute, store = Stage(), Store(tmp_path)
    first = store.entry("prune", {"a": 1, "b": [1, 2]}, compute)
    second = Store(tmp_path).entry("prune", {"b": [1, 2], "a": 1}, compute)
    assert compute.calls == 1
    assert (first.reused, second.reused) == (False, True)
    assert first.folder == second.folder == tmp_path / "prune" / first.folder.name
    assert second.record == {"calls": 1}
    assert (second.folder / "file").read_text() == "result"


def test_changed_inputs_miss(tmp_path):
    compute, store = Stage(), Store(tmp_path)
    for kind, inputs in [("prune", {"a": 1}), ("prune", {"a": 2}), ("prune", {"a": 1, "b": None}), ("other", {"a": 1})]:
        assert not store.entry(kind, inputs, compute).reused
    assert compute.calls == 4


def test_reuse_false_computes_and_replaces(tmp_path):
    Store(tmp_path).entry("prune", {}, Stage("old"))
    entry = Store(tmp_path, reuse=False).entry("prune", {}, Stage("new"))
    assert not entry.reused
    again = Store(tmp_path).entry("prune", {}, Stage("unused"))
    assert again.reused
    assert (again.folder / "file").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_of_an_entry_follow_the_umask(tmp_path, umask):
    def compute(folder, _work):
        (folder / "sub").mkdir()
        for file in (folder / "a", folder / "sub" / "b"):
            file.write_text("as safetensors does")
            file.chmod(0o600)
        return {}

    before = os.umask(umask)
    try:
        folder = Store(tmp_path).entry("converted", umask, compute).folder
    finally:
        os.umask(before)
    assert {oct((folder / name).stat().st_mode & 0o777) for name in ("a", "sub/b", RECORD)} == {oct(0o666 & ~umask)}
    assert not (folder / ".umask").exists()


def left(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".jsonl"))


def test_a_failure_leaves_nothing(tmp_path):
    def fail(folder, work):
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).entry("prune", {}, fail)
    assert left(tmp_path) == []
    assert not Store(tmp_path).entry("prune", {}, Stage()).reused


def test_a_full_disk_leaves_nothing(tmp_path):
    def fail(folder, work):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        Store(tmp_path).entry("prune", {}, fail)
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made .*; set HERE"):
        Store(tmp_path / "file", fix="set HERE").entry("prune", {}, Stage())


# ---- kills ----------------------------------------------------------------------------------------------------------


def _killed(root, steps, at):
    """Compute an entry and die after a number of system calls that write."""
    count = 0

    def step(call):
        def counted(*args, **options):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, step(getattr(os, name)))
    Path.replace = lambda self, target: os.replace(self, target)
    Path.rename = lambda self, target: os.rename(self, target)
    Store(Path(root)).entry("prune", {}, Stage())
    steps.value = count


def test_a_kill_at_any_instant_leaves_nothing_or_a_whole_entry(tmp_path):
    context, steps = multiprocessing.get_context("fork"), multiprocessing.Value("i", 0)
    whole = context.Process(target=_killed, args=(tmp_path / "whole", steps, -1))
    whole.start()
    whole.join(60)
    assert steps.value > 5
    found = []
    for at in range(1, steps.value + 1):
        root = tmp_path / str(at)
        process = context.Process(target=_killed, args=(root, steps, at))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        compute = Stage("again")
        entry = Store(root).entry("prune", {}, compute)
        assert (entry.folder / "file").read_text() == ("result" if entry.reused else "again")
        assert compute.calls == (0 if entry.reused else 1)
        assert not [p for p in root.rglob("*") if p.suffix in (".partial", ".work", ".damaged")]
        found.append(entry.reused)
    assert found[0] is False and found[-1] is True


def test_what_a_kill_leaves_is_swept_up_and_the_work_folder_survives_it(tmp_path):
    store = Store(tmp_path)
    work = store.place("prune", {}).with_name(f"{store.place('prune', {}).name}.work")

    def die(folder, workdir):
        assert workdir == work
        with whole_file(workdir / "last.ckpt") as file:
            file.write_text("point")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.entry("prune", {}, die)
    stale = work.with_name(f".{store.place('prune', {}).name}.99999.partial")
    stale.mkdir()
    found = []
    assert not store.entry("prune", {}, lambda _, w: found.append((w / "last.ckpt").read_text()) or {}).reused
    assert found == ["point"]
    assert not stale.exists() and not work.exists()


def test_without_reuse_an_entry_starts_anew(tmp_path):
    def die(folder, workdir):
        (workdir / "state").write_text("old")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Store(tmp_path).entry("prune", {}, die)
    Store(tmp_path, reuse=False).entry("prune", {}, lambda _, work: {"seen": (work / "state").exists()})
    assert Store(tmp_path).entry("prune", {}, Stage()).record == {"seen": False}


def _compete(root, log):
    def compute(folder, work):
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return {"pid": os.getpid()}

    entry = Store(Path(root)).entry("prune", {"a": 1}, compute)
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


# ---- damage ---------------------------------------------------------------------------------------------------------


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_unseen(file):
    """Change a byte in place; size and mtime stay."""
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": flip,
    "flipped unseen": flip_unseen,
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["file", RECORD, SUMS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again_with_one_warning(tmp_path, caplog, name, damage):
    store = Store(tmp_path)
    entry = store.entry("prune", {}, Stage())
    DAMAGE[damage](entry.folder / name)
    for again in (store, Store(tmp_path)):
        caplog.clear()
        compute = Stage()
        found = again.entry("prune", {}, compute)
        assert (found.folder / "file").read_text() == "result"
        if again is store:
            assert compute.calls == 1 and not found.reused
            (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert "set aside and computed again" in told.getMessage() and str(entry.folder) in told.getMessage()
            assert (entry.folder.with_name(f".{entry.folder.name}.damaged")).is_dir()
        else:
            assert compute.calls == 0 and found.reused and not caplog.records


def test_an_empty_folder_in_the_place_of_an_entry_is_none(tmp_path, caplog):
    store = Store(tmp_path)
    store.place("prune", {}).mkdir(parents=True)
    assert not store.entry("prune", {}, Stage()).reused
    assert "set aside" in caplog.text


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "gone"])
@pytest.mark.parametrize("name", ["last.ckpt", "search.json"])
def test_a_damaged_resume_point_is_no_resume_point(tmp_path, caplog, name, damage):
    store = Store(tmp_path)

    def die(folder, work):
        for text in ("first point", "second point"):
            with whole_file(work / name) as file:
                file.write_text(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.entry("recover", {}, die)
    (work,) = (tmp_path / "recover").glob("*.work")
    DAMAGE[damage](work / name)
    entry = store.entry("recover", {}, lambda _, work: {"found": (work / name).exists()})
    assert entry.record == {"found": False}
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{name} is damaged; set aside and computed again" in told.getMessage()


def test_a_resume_point_whose_list_was_lost_is_not_trusted(tmp_path, caplog):
    store = Store(tmp_path)

    def die(folder, work):
        with whole_file(work / "last.ckpt") as file:
            file.write_text("point")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.entry("recover", {}, die)
    (sums,) = (tmp_path / "recover").glob(f"*.work/{SUMS}")
    sums.write_text("")
    assert store.entry("recover", {}, lambda _, work: {"found": (work / "last.ckpt").exists()}).record["found"] is False


def test_a_kill_between_the_list_and_the_file_costs_nothing(tmp_path, caplog):
    """The list names the next file before that has its name; the one before it counts still."""
    store = Store(tmp_path)

    def die(folder, work):
        with whole_file(work / "last.ckpt") as file:
            file.write_text("point")
        with (work / SUMS).open("a") as handle:
            handle.write("half a li")
        seal(work, {"last.ckpt": "0" * 64})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.entry("recover", {}, die)
    assert store.entry("recover", {}, lambda _, work: {"found": (work / "last.ckpt").exists()}).record["found"] is True
    assert not caplog.records


def test_damaged_files_of_a_growing_entry_are_set_aside_and_the_others_stay(tmp_path, caplog):
    folder, memo = tmp_path / "targets" / "key", Memo()
    with growing(folder, memo):
        for name in "abc":
            with whole_file(folder / f"{name}.safetensors") as file:
                file.write_text(name)
    flip(folder / "b.safetensors")
    (folder / "foreign.safetensors").write_text("nobody has noted it")
    for told in (1, 0):
        caplog.clear()
        with growing(folder, memo):
            assert sorted(p.name for p in folder.glob("[!.]*.safetensors")) == ["a.safetensors", "c.safetensors"]
        assert len(caplog.records) == told


def put_a_file(path):
    path.write_text("a file in the place of a folder")


def put_a_link(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_a_file, put_a_link, Path.mkdir])
@pytest.mark.parametrize("where", ["entry", "work", "record", "resume point"])
def test_what_is_no_file_or_no_folder_is_damaged_too(tmp_path, caplog, put, where):
    store = Store(tmp_path)
    entry = store.place("prune", {})
    work = entry.with_name(f"{entry.name}.work")
    if where == "record":
        store.entry("prune", {}, Stage())
        (entry / RECORD).unlink()
    elif where == "resume point":
        work.mkdir(parents=True)
    entry.parent.mkdir(exist_ok=True)
    put({"entry": entry, "work": work, "record": entry / RECORD, "resume point": work / "last.ckpt"}[where])
    compute, whole = Stage(), where == "work" and put is Path.mkdir  # where there was nothing to go on from
    assert (store.entry("prune", {}, compute).folder / "file").read_text() == "result"
    assert compute.calls == 1 and len(caplog.records) == (not whole)
    assert store.entry("prune", {}, compute).reused and compute.calls == 1


def test_what_was_set_aside_is_one_and_goes_when_the_entry_is_whole(tmp_path):
    store = Store(tmp_path)
    folder = store.entry("prune", {}, Stage()).folder
    for _ in range(3):
        flip(folder / "file")
        assert not store.entry("prune", {}, Stage()).reused
        assert len(list(folder.parent.glob(".*.damaged"))) == 1
    assert store.entry("prune", {}, Stage()).reused
    assert not list(folder.parent.glob(".*.damaged"))
    growing_folder, memo = tmp_path / "targets" / "key", Memo()
    with growing(growing_folder, memo), whole_file(growing_folder / "a.safetensors") as file:
        file.write_text("a")
    flip(growing_folder / "a.safetensors")
    for left in (1, 0):
        with growing(growing_folder, memo):
            assert len(list(growing_folder.glob(".*.damaged"))) == left


def test_a_file_takes_no_folder_s_place(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="mine: is a folder; give the name of a file"), whole_file(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_every_file_that_is_written_whole_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a") as file:
            file.touch(0o600)
            file.chmod(0o600)
        with whole_folder(tmp_path / "b") as folder:
            (folder / "c").touch()
            (folder / "c").chmod(0o644)
    finally:
        os.umask(before)
    modes = {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("a", "b/c")}
    assert modes == {oct(0o666 & ~umask)} and (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~umask
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c"]


# ---- what is shared with a run's folder -----------------------------------------------------------------------------


@pytest.fixture(params=[1, 64 << 20], ids=["large", "small"])
def limit(request, monkeypatch):
    """From how many bytes on files are shared."""
    monkeypatch.setattr(module, "LARGE", request.param)
    return request.param


def weights(store):
    def compute(folder, work):
        (folder / "pruned").mkdir()
        (folder / "pruned" / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "pruned" / "config.json").write_text("{}")
        return {}

    return store.entry("prune", {}, compute)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.usefixtures("limit")
def test_a_run_gets_the_content_and_what_was_there_goes(tmp_path):
    store = Store(tmp_path / "cache")
    entry, target = weights(store), tmp_path / "run" / "pruned"
    target.mkdir(parents=True)
    (target / "stale").write_text("")
    store.share(entry.folder / "pruned", target)
    assert content(target) == content(entry.folder / "pruned")
    store.share(entry.folder / "pruned" / "config.json", tmp_path / "run" / "plan.json")
    assert (tmp_path / "run" / "plan.json").read_text() == "{}"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["plan.json", "pruned"]
    assert weights(store).reused and weights(Store(tmp_path / "cache")).reused


def test_what_a_user_writes_into_a_small_file_of_a_run_reaches_nobody(tmp_path):
    store = Store(tmp_path / "cache")
    entry = weights(store)
    for run in ("one", "other"):
        (tmp_path / run).mkdir()
        store.share(entry.folder / "pruned", tmp_path / run / "pruned")
    before = content(entry.folder / "pruned")
    for file in (tmp_path / "one" / "pruned").iterdir():
        with file.open("r+b") as handle:
            handle.write(b"edited")
    assert content(tmp_path / "other" / "pruned") == content(entry.folder / "pruned") == before
    assert weights(store).reused


def test_what_a_user_writes_into_a_large_file_of_a_run_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "LARGE", 100)
    store = Store(tmp_path / "cache")
    entry = weights(store)
    (tmp_path / "run").mkdir()
    store.share(entry.folder / "pruned", tmp_path / "run" / "pruned")
    assert weights(store).reused
    file = tmp_path / "run" / "pruned" / "model.safetensors"
    config = tmp_path / "run" / "pruned" / "config.json"
    config.write_text("edited")
    assert not file.stat().st_mode & 0o222, "an ordinary user cannot write into what others share"
    file.chmod(0o644)
    flip_unseen(file)
    again = weights(Store(tmp_path / "cache"))
    assert (again.folder / "pruned" / "model.safetensors").read_bytes() == b"weights" * 100
    assert (again.folder / "pruned" / "config.json").read_text() == "{}"
    shares = file.stat().st_nlink == 1 and not caplog.records  # a file system that copies blocks when one side writes
    assert shares or (not again.reused and len(caplog.records) == 1)


def test_where_links_are_impossible_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path / "cache")
    store.share(weights(store).folder / "pruned", tmp_path / "pruned")
    assert content(tmp_path / "pruned")["model.safetensors"] == b"weights" * 100


def test_a_full_disk_while_sharing_leaves_the_old_folder(tmp_path, monkeypatch):
    store, target = Store(tmp_path / "cache"), tmp_path / "target"
    entry = weights(store)
    target.mkdir()
    (target / "file").write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        store.share(entry.folder / "pruned", target)
    assert (target / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "target"]


def test_what_is_no_folder_in_the_place_of_one_is_set_aside(tmp_path, caplog):
    place = Store(tmp_path).place("targets", {"of": 1})
    place.parent.mkdir()
    place.write_text("damage")
    assert Store(tmp_path).place("targets", {"of": 1}) == place and not place.exists()
    assert len(caplog.records) == 1 and "set aside" in caplog.text
