import pytest
import torch

from experiments.speed import rows as bench
from experiments.speed.rows import Row, peak_memory, table


def test_peak_memory_counts_what_is_held_at_once():
    def work(_):
        a = torch.zeros(1000, 250)
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert peak_memory(lambda: None, work) == pytest.approx(2 * 1_000_000, abs=100)


def test_peak_memory_starts_from_what_was_prepared_and_counts_its_release():
    held = [torch.ones(1000, 250), torch.ones(1000, 250)]
    assert peak_memory(lambda: held[0], lambda x: x.mul_(2)) < 100

    def replace(parts):
        for index in range(2):
            parts[index] = parts[index] + 1

    made = peak_memory(lambda: [torch.ones(1000, 250), torch.ones(1000, 250)], replace)
    assert made == pytest.approx(1_000_000, abs=100)


def test_the_table_shows_each_ratio():
    shown = table([Row("this / that", 3.0, 2.0, "s", "low"), Row("x", 1.0, 4.0, "MiB", "< 1")])
    lines = shown.splitlines()
    assert lines[1].split() == ["this", "/", "that", "1.50", "3.00", "s", "2.00", "s", "low"]
    assert "0.25" in lines[2]
    assert len(lines) == 3


def test_the_bound_is_layer_gram_and_hidden_states(monkeypatch):
    for name, value in {"HIDDEN": 32, "LAYERS": 2, "HEADS": 2, "CHANNELS": 48, "VOCABULARY": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(bench, name, value)
    model = bench.middle_sized()
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert bench.memory_bound(model) == 4 * layer + 8 * (32 * 32 + 48 * 48) + 4 * 4 * 4 * 16 * 32


def test_memory_rows_cover_all_methods(monkeypatch):
    for name, value in {"HIDDEN": 32, "LAYERS": 2, "HEADS": 4, "CHANNELS": 48, "VOCABULARY": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.memory_rows()
    assert len(rows) == len(bench.METHODS)
    assert all(row.measured > 0 and row.reference > 0 for row in rows)
