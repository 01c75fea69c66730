"""The file of verdicts: several writers, kills, garbage."""

import json

import pytest

from efficientllava.evaluation.judges import Verdicts
from efficientllava.runtime.errors import UserError

from ...runs import write_at_once


def test_verdicts_outlive_the_process(tmp_path):
    path = tmp_path / "new" / "mmvet.jsonl"
    Verdicts(path).add("a", {"verdict": "1.0", "id": "ü"})
    found = Verdicts(path).get("a")
    assert found is not None and found["verdict"] == "1.0" and found["id"] == "ü"
    assert Verdicts(path).get("b") is None


def test_the_first_verdict_counts_whoever_asked(tmp_path):
    one, other = Verdicts(tmp_path / "v.jsonl"), Verdicts(tmp_path / "v.jsonl")
    one.add("a", {"verdict": "first"})
    assert other.add("a", {"verdict": "second"})["verdict"] == "first"
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 1


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "v.jsonl"
    Verdicts(path).add("a", {"verdict": "1"})
    with path.open("a") as handle:
        handle.write('not json\n[1]\n{"verdict": "no key"}\n{"key": "b", "verd')
    cache = Verdicts(path)
    cache.add("c", {"verdict": "3"})
    again = Verdicts(path)
    assert [bool(again.get(key)) for key in "abc"] == [True, False, True]
    assert cache.add("b", {"verdict": "2"})["verdict"] == "2"


def _write(path, name):
    cache = Verdicts(path)
    for number in range(60):
        cache.add(str(number), {"verdict": name * 2000})


def test_processes_write_at_the_same_time(tmp_path):
    path = tmp_path / "v.jsonl"
    write_at_once(_write, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(int(row["key"]) for row in rows) == list(range(60))
    assert all(len(row["verdict"]) == 2000 for row in rows)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "v.jsonl").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Verdicts(tmp_path / "file" / "v.jsonl").add("a", {"verdict": "1"})
