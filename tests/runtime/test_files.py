"""Files that several processes write: kills, garbage, damage."""

import json

import pytest

from efficientllava.runtime.errors import UserError
from efficientllava.runtime.files import Lines, write_whole

from ..runs import write_at_once

VALUES = [{"id": 1}, {"id": 2, "text": "\u2028é\ud800"}, {"id": 3, "sub": {"sum": 1.5, "n": float("inf")}}]


def test_lines_are_what_was_added_and_are_found_once(tmp_path):
    writer, reader = Lines(tmp_path / "new" / "a.jsonl"), Lines(tmp_path / "new" / "a.jsonl")
    assert reader.new() == []
    writer.append(VALUES[:1])
    assert reader.new() == VALUES[:1] and reader.new() == []
    writer.append(VALUES[1:])
    assert reader.new() == VALUES[1:]
    assert Lines(tmp_path / "new" / "a.jsonl").new() == VALUES


def test_a_line_that_a_kill_has_cut_off_is_no_damage(tmp_path, caplog):
    file = tmp_path / "a.jsonl"
    Lines(file).append(VALUES[:1])
    with file.open("a") as handle:
        handle.write('{"id": 9' * 20_000)
    assert Lines(file).new() == VALUES[:1]
    Lines(file).append(VALUES[1:2])
    assert Lines(file).new() == VALUES[:2] and not caplog.records


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_flipped_byte_costs_its_line_and_one_warning(tmp_path, caplog, place):
    file = tmp_path / "a.jsonl"
    Lines(file).append(VALUES)
    content = bytearray(file.read_bytes())
    start = content.index(b"\n") + 1
    content[start + place] ^= 0x02
    file.write_bytes(content)
    reader = Lines(file)
    assert reader.new() == [VALUES[0], VALUES[2]]
    assert len(caplog.records) == 1 and "1 of 3 lines" in caplog.text
    assert Lines(file).new() == [VALUES[0], VALUES[2]] and len(caplog.records) == 1
    Lines(file).append([VALUES[1]])
    assert VALUES[1] in reader.new(), "a reader follows the mended file"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\n\x00\n", b"[1]\n"])
def test_a_file_of_nothing_but_damage_starts_anew(tmp_path, caplog, content):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    assert Lines(file).new() == [] and len(caplog.records) == 1
    Lines(file).append(VALUES)
    assert Lines(file).new() == VALUES and len(caplog.records) == 1


def _write(path, name):
    for number in range(60):
        Lines(path).append([{"by": name, "number": number, "text": name * 2000}])


def test_processes_write_at_the_same_time(tmp_path):
    path = tmp_path / "v.jsonl"
    write_at_once(_write, path)
    found = [(row["by"], row["number"]) for row in Lines(path).new()]
    assert sorted(found) == sorted((name, number) for name in "xyz" for number in range(60))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def _replace(path, name):
    for _ in range(60):
        write_whole(path, name * 2000)


def test_processes_replace_a_file_at_the_same_time(tmp_path):
    path = tmp_path / "job.json"
    write_at_once(_replace, path)
    assert path.read_text() in {name * 2000 for name in "xyz"} and [*tmp_path.iterdir()] == [path]


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lines(tmp_path / "file" / "a.jsonl").append(VALUES)
