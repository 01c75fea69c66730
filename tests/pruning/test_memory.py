from __future__ import annotations

from dataclasses import replace

import pytest

from efficientllava.estimate import forecast
from efficientllava.pruning.memory import (
    MARGIN,
    CalibrationSize,
    PruningMemory,
    micro_batch,
    pruning_memory,
    store_on_host,
)
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import PruneConfig
from experiments.speed import rows as bench

from ..conftest import make_batches
from ..runs import composed

LAYERWISE = PruneConfig("layerwise", "layerwise", 0.3)
WIDTHWISE = PruneConfig("widthwise", "widthwise", 0.3, refit=True)
TAYLOR = PruneConfig("widthwise", "widthwise", 0.3, "param_first", "local")
CONFIGS = [
    LAYERWISE,
    replace(WIDTHWISE, selection="local"),
    replace(WIDTHWISE, selection="local", refit_target="layer", importance="magnitude"),
    TAYLOR,
    replace(TAYLOR, importance="param_mix", taylor_mean="batch"),
    PruneConfig("flap", "widthwise", 0.3, "flap", "floor", bias=True),
]
USUAL = CalibrationSize(64, 700, 8)


@pytest.fixture(scope="module")
def llava_7b():
    return forecast(typed(composed("model=llava_1_5_7b", "dry_run=true"))).base


@pytest.mark.parametrize("size", [USUAL, CalibrationSize(64, 2048, 8), CalibrationSize(512, 2048, 8)], ids=str)
@pytest.mark.parametrize("config", [LAYERWISE, WIDTHWISE], ids=["layerwise", "widthwise"])
def test_llava_7b_is_pruned_within_the_margin(llava_7b, config, size):
    memory = pruning_memory(llava_7b, config, size)
    assert memory.model == 2 * 7_063_427_072 + 8 * 577 + 2 * 2 * 64  # bf16; position ids and rotary frequencies
    assert 1 < memory.ratio <= MARGIN


@pytest.mark.parametrize("importance", ["param_first", "vectorize", "param_second", "param_mix"])
@pytest.mark.parametrize("mean", ["sample", "batch"])
def test_llava_7b_is_scored_record_by_record_within_the_margin(llava_7b, importance, mean):
    config = replace(TAYLOR, importance=importance, taylor_mean=mean)
    size = CalibrationSize(64, 2048, micro_batch(config, 8))
    assert (
        pruning_memory(llava_7b, config, size).ratio
        <= MARGIN
        < pruning_memory(llava_7b, config, replace(size, batch_size=8)).ratio
    )


def test_llava_7b_is_pruned_from_host_memory_on_a_small_card(llava_7b):
    for config in (LAYERWISE, WIDTHWISE, replace(TAYLOR, taylor_mean="batch")):
        memory = pruning_memory(llava_7b, replace(config, offload=True), USUAL)
        assert memory.peak < 5e9
        assert memory.host > memory.model


def test_hidden_states_go_to_the_host_only_where_they_must(llava_7b):
    assert not store_on_host(llava_7b, WIDTHWISE, CalibrationSize(8, 700, 8))
    assert store_on_host(llava_7b, WIDTHWISE, CalibrationSize(512, 700, 8))
    assert store_on_host(llava_7b, replace(WIDTHWISE, offload=True), CalibrationSize(8, 700, 8))


def small(monkeypatch, **sizes):
    for name, value in {"HIDDEN": 128, "LAYERS": 2, "HEADS": 4, "CHANNELS": 352, "VOCABULARY": 64, **sizes}.items():
        monkeypatch.setattr(bench, name, value)


@pytest.mark.parametrize("config", CONFIGS, ids=["layerwise", "obs", "magnitude", "taylor", "taylor, batch", "flap"])
@pytest.mark.parametrize("wide", [False, True], ids=["many tokens", "wide layers"])
def test_no_run_takes_more_than_the_bound(monkeypatch, config, wide):
    small(monkeypatch, **({"LENGTH": 16, "BATCHES": 2} if wide else {"LENGTH": 256, "BATCHES": 4, "ROWS": 2}))

    def prune(model):
        batches = bench.random_batches()
        last = [len(batches) - 1] if config.refit else []
        calibration = Calibration(batches, validated=last)
        plan, _ = make_plan(model, calibration, config)
        apply_plan(model, plan, calibration, config)

    measured = bench.peak_memory(lambda: bench.middle_sized().bfloat16(), prune)
    model = bench.middle_sized().bfloat16()
    bound = pruning_memory(model, config, CalibrationSize.of(bench.random_batches()), stored=False)
    assert measured < bound.peak - bound.model < 4 * measured


def test_the_size_of_batches_is_that_of_their_longest_rows():
    assert CalibrationSize.of(make_batches(2)) == CalibrationSize(6, 20, 3)
    assert CalibrationSize.of([]) == CalibrationSize(0, 0, 1)


def test_the_peak_is_the_largest_phase():
    assert PruningMemory(10, {"a": 12, "b": 11}, 0).ratio == 1.2
