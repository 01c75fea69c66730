import pytest

from efficientllava.checkpoint.folder import load
from efficientllava.models.anatomy import layers_of
from experiments.speed import __main__ as bench


def test_an_evaluation_is_compared_with_a_loop_that_answers_the_same():
    row = bench.generation_row(load("builtin:tiny_llava"), questions=6, size=3)
    assert row.measured > 0 and row.reference > 0 and row.wish == "< 1.15"


@pytest.fixture
def small(monkeypatch):
    for name, value in {"PARENTS": 2, "CHILDREN": 4, "BATCH": 2}.items():
        monkeypatch.setattr(bench, name, value)


def test_each_way_of_evaluating_is_timed(small):
    rows = bench.search_rows(depth=2, samples=4)
    assert len(rows) == 3
    assert all(row.measured > 0 and row.reference > 0 for row in rows)
    assert rows[0].ratio < rows[1].ratio  # the naive way costs more than an assembled candidate


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
