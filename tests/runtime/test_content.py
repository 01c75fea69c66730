"""Digests follow the content, whatever stamps say; a second look costs no reading.

And what counts as the source of a result: a module and all that it imports of the package.
"""

import os
import shutil

import pytest

from efficientllava.checkpoint.hub import folder_digest
from efficientllava.runtime import content
from efficientllava.runtime.content import Memo, settle
from efficientllava.settings.schema import EvaluateConfig, RunConfig
from efficientllava.stages.request import STAGES, settings_key


@pytest.fixture
def reads(monkeypatch):
    """Files that are read."""
    read: list[str] = []
    sha256 = content.sha256
    monkeypatch.setattr(content, "sha256", lambda file: read.append(file.name) or sha256(file))
    return read


def test_a_second_look_costs_a_stat_in_this_process_and_in_another(tmp_path, reads):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    settle(files)
    first = Memo(tmp_path / "memo.jsonl")
    known = first.digests(files)
    assert known[0] != known[1] and sorted(reads) == ["a", "b"]
    assert first.digests(files) == known == Memo(tmp_path / "memo.jsonl").digests(files)
    assert len(reads) == 2
    files[0].write_text("A")
    assert first.digests(files)[0] != known[0] and first.digests(files)[1] == known[1]
    assert "b" not in reads[2:]


def test_a_change_that_leaves_size_and_mtime_is_seen(tmp_path):
    file, memo = tmp_path / "a", Memo()
    for settled in (False, True):
        file.write_text("one")
        times = file.stat()
        if settled:
            settle([file])
        before = memo.digest(file)
        file.write_text("two")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert memo.digest(file) != before
        assert memo.digest(file) == Memo().digest(file)


def test_a_damaged_memo_or_none_costs_reading_alone(tmp_path, reads, caplog):
    file, kept = tmp_path / "a", tmp_path / "memo.jsonl"
    file.write_text("one")
    settle([file])
    known = Memo(kept).digest(file)
    kept.write_text(kept.read_text().replace(known[:8], known[:7] + ("0" if known[7] != "0" else "1")))
    assert Memo(kept).digest(file) == known and reads == ["a", "a"]
    assert len(caplog.records) == 1
    (tmp_path / "file").write_text("")
    assert Memo(tmp_path / "file" / "memo.jsonl").digest(file) == known


def test_a_flipped_byte_in_the_middle_of_large_weights_is_another_checkpoint(tmp_path):
    weights, size = tmp_path / "model.safetensors", (64 << 20) + (3 << 20)
    with weights.open("wb") as handle:
        handle.truncate(size)
    memo, seen = Memo(tmp_path / "memo"), set()
    for place in (None, size // 2 + 12345, size - 1, 7):
        if place is not None:
            with weights.open("r+b") as handle:
                handle.seek(place)
                handle.write(b"\1")
        seen.add(folder_digest(tmp_path, memo))
        assert folder_digest(tmp_path, Memo()) in seen
    assert len(seen) == 4


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files may be edited."""
    copy = tmp_path / "efficientllava"
    shutil.copytree(content.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(content, "PACKAGE", copy)
    content.source_digest.cache_clear()
    yield copy
    content.source_digest.cache_clear()


def edited(file):
    file.write_text(file.read_text("utf-8") + "\n# a word more\n", encoding="utf-8")
    content.source_digest.cache_clear()


@pytest.mark.parametrize("name", ["models/forward.py", "data/collator.py", "runtime/files.py", "pruning/refit.py"])
def test_an_edit_of_what_makes_numbers_gives_a_new_run(package, name):
    before = content.source_digest(*STAGES)
    edited(package / name)
    assert content.source_digest(*STAGES) != before


@pytest.mark.parametrize("name", ["report/plots.py", "launch/local.py", "runtime/console.py"])
def test_an_edit_of_what_shows_them_does_not(package, name):
    before = content.source_digest(*STAGES)
    edited(package / name)
    assert content.source_digest(*STAGES) == before


def test_an_edit_of_a_benchmark_s_own_file_gives_a_new_run_of_it(package):
    runs = [RunConfig(evaluate=EvaluateConfig([name])) for name in ("digits_vqa", "gqa")]
    before = [settings_key(run) for run in runs]
    edited(package / "evaluation" / "tasks" / "digits_vqa.py")
    assert [settings_key(run) == key for run, key in zip(runs, before, strict=True)] == [False, True]


def test_a_stage_does_not_depend_on_the_code_of_later_ones(package):
    before = content.source_digest("stages.prune")
    edited(package / "recovery" / "losses.py")
    assert content.source_digest("stages.prune") == before != content.source_digest("stages.recover")
    edited(package / "search" / "evolution.py")
    assert content.source_digest("stages.prune") != before


def test_late_relative_and_nested_imports_are_found(tmp_path, monkeypatch):
    package = tmp_path / "efficientllava"
    (package / "a").mkdir(parents=True)
    for name, text in {
        "a/__init__.py": "from .b import (\n    x,\n    y,\n)\n",
        "a/b.py": "def late():\n    from ..c import z\n    from .. import d\n",
        "c.py": "import os\nfrom json import loads\n",
        "d.py": "from efficientllava.e import w\n",
        "e.py": "",
        "unused.py": "",
    }.items():
        (package / name).write_text(text)
    monkeypatch.setattr(content, "PACKAGE", package)
    assert {*content.closure("a")} == {"a", "a.b", "c", "d", "e"}
