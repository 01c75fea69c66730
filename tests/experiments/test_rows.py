"""Rows of measurements that a killed one goes on with."""

from __future__ import annotations

from experiments.rows import add, read


def test_rows_are_read_as_they_were_written(tmp_path):
    file, names = tmp_path / "rows.csv", ["stage", "layers", "peak"]
    assert read(file) == []
    add(file, [{"stage": "recover, taught", "layers": 2}], names)
    add(file, [["none", "all", 0.10]], names)
    assert file.read_text() == 'stage,layers,peak\n"recover, taught",2,\nnone,all,0.1\n'
    assert read(file) == [
        {"stage": "recover, taught", "layers": "2", "peak": ""},
        {"stage": "none", "layers": "all", "peak": "0.1"},
    ]
