"""The bench: what it compares computes the same, and its tables say what was measured."""

import pytest
import torch

from efficientllava.checkpoint.folder import load
from efficientllava.models.anatomy import layers_of
from experiments.speed import __main__ as bench
from experiments.speed import rows
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


def test_memory_rows_cover_all_methods(monkeypatch):
    for name, value in {"HIDDEN": 32, "LAYERS": 2, "HEADS": 4, "CHANNELS": 48, "VOCABULARY": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(rows, name, value)
    found = rows.memory_rows()
    assert len(found) == len(rows.METHODS)
    print("RATIOS", [row.ratio for row in found])
    assert all(row.measured > 0 and row.reference > 0 for row in found)


def test_an_evaluation_is_compared_with_a_loop_that_answers_the_same():
    row = bench.generation_row(load("builtin:tiny_llava"), questions=6, size=3)
    assert row.measured > 0 and row.reference > 0 and row.wish == "< 1.15"


@pytest.fixture
def small(monkeypatch):
    for name, value in {"PARENTS": 2, "CHILDREN": 4, "BATCH": 2}.items():
        monkeypatch.setattr(bench, name, value)


def test_each_way_of_evaluating_is_timed(small):
    found = bench.search_rows(depth=2, samples=4)
    assert all(row.measured > 0 and row.reference > 0 for row in found)
    assert found[0].ratio < found[1].ratio  # the naive way costs more than an assembled candidate


def test_all_ways_measure_the_same(small, tmp_path):
    setting = bench.make_setting(tmp_path / "table", depth=2, samples=2)
    assert len(layers_of(setting.model)) == 2
    whole = (0,) * len(setting.table.genes)
    losses = [bench.assembled_loss(setting, whole), bench.naive_loss(setting, whole)]
    assert losses == pytest.approx([setting.evaluator.dense.loss] * 2, abs=1e-5)


def test_children_keep_the_budget_and_differ_from_their_parents(small, tmp_path):
    setting = bench.make_setting(tmp_path / "table", depth=2, samples=2)
    for parents, children in (bench.exchange_children(setting.space, 2, 4), bench.default_children(setting.space)):
        assert all(setting.space.feasible(policy) for policy in (*parents, *children))
        assert parents and children and not set(parents) & set(children)
