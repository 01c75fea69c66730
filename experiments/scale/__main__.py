"""Memory of pruning LLaVA-1.5-7B by the closed form, and what was measured on a CPU of one layer of it.

    python -m experiments.scale              # the closed form, from shapes alone
    python -m experiments.scale --measure    # one decoder layer of that size

The families whole, through ``run.py``: ``python -m experiments.scale.full``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from efficientllava.estimate import forecast
from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.memory import CalibrationSize, micro_batch, pruning_memory
from efficientllava.pruning.obs import OBS_ROUNDS, eliminate
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_ratio
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.statistics import layer_statistics
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.report.study import table
from efficientllava.settings.schema import PruneConfig
from efficientllava.stages.request import composed
from experiments.speed import rows as bench

LAYERWISE = PruneConfig("layerwise", "layerwise", 0.3)
WIDTHWISE = PruneConfig("widthwise", "widthwise", 0.3, refit=True)
PAPER = PruneConfig("widthwise_paper", "widthwise", 0.3, "param_first", "local", taylor_mean="batch")


def closed_form() -> None:
    """Print peaks of all methods for LLaVA-1.5-7B, of the sizes in ``conf/model``."""
    model: Any = forecast(composed("model=llava_1_5_7b", "dry_run=true")).base
    head = ("records x tokens, micro-batch", "method", "one GPU, GB", "x weights", "offload: card, GB", "host, GB")
    rows = []
    for records, tokens, batch in ((64, 700, 2), (64, 2048, 2), (64, 2048, 8)):
        for config in (LAYERWISE, WIDTHWISE, PAPER):
            size = CalibrationSize(records, tokens, micro_batch(config, batch))
            memory = pruning_memory(model, config, size)
            small = pruning_memory(model, replace(config, offload=True), size)
            peaks = (
                f"{memory.peak / 1e9:.1f}",
                f"{memory.ratio:.2f}",
                f"{small.peak / 1e9:.1f}",
                f"{small.host / 1e9:.1f}",
            )
            rows.append((f"{records} x {tokens}, {size.batch_size}", f"`{config.name}`", *peaks))
    print(table(head, dict.fromkeys(rows), 2), end="")


def one_layer(device: str = "cpu") -> Any:
    """A random LLaVA with one decoder layer of the 7B model's size, bf16."""
    with torch.device("meta"):
        model = bench.middle_sized().bfloat16()
    if device == "meta":
        return model
    model, generator = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data = drawn.mul_(0.04).sub_(0.02) if parameter.ndim > 1 else torch.ones_like(parameter)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def report(
    what: str, config: PruneConfig, phase: str, function: Callable[[Any], Any], prepare: Any = one_layer
) -> None:
    """Print what a call holds above what was prepared, next to the bound of its phase."""
    spent = 0.0

    def timed(argument: Any) -> None:
        nonlocal spent
        began = time.process_time()
        function(argument)
        spent = time.process_time() - began

    peak = bench.peak_memory(prepare, timed)
    memory = pruning_memory(one_layer("meta"), config, CalibrationSize.of(bench.random_batches()), stored=False)
    bound = memory.phases[phase] - memory.model
    print(f"| {what} | {peak / 1e6:.0f} | {bound / 1e6:.0f} | {spent:.0f} |", flush=True)


def measure_layer() -> None:
    """Measure statistics, an OBS round, refit with cut, and Taylor scores of one layer."""
    torch.set_num_threads(1)
    bench.LAYERS, bench.HIDDEN, bench.CHANNELS, bench.HEADS, bench.VOCABULARY = 1, 4096, 11008, 32, 512
    bench.BATCHES, bench.LENGTH = 2, 128
    generator = torch.Generator().manual_seed(0)
    kept = LayerPlan(0, tuple(range(22)), tuple(sorted(torch.randperm(11008, generator=generator)[:7680].tolist())))
    ratio = plan_ratio(one_layer("meta"), [kept])
    plan = PruningPlan("widthwise", (kept,), 1, 1, None, ratio, ())

    def statistics(model: Any) -> None:
        stream = CalibrationStream(model, Calibration(bench.random_batches()))
        layer_statistics(stream, layers_of(model)[0], 0, stream.start())

    def gram() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(512, 11008, generator=generator)
        return torch.rand(4096, 11008, generator=generator).bfloat16(), inputs.T @ inputs

    def round_of_obs(given: tuple[torch.Tensor, torch.Tensor]) -> None:
        list(eliminate(*given, 1, 0.01, [11008 - 11008 // OBS_ROUNDS]))

    print("| one layer, 4096 x 11008, 256 tokens | measured, MB | bound, MB | CPU seconds |\n|---|---:|---:|---:|")
    report("statistics", WIDTHWISE, "statistics", statistics)
    batches = Calibration(bench.random_batches())
    report("refit and cut", WIDTHWISE, "refit and cut", lambda model: apply_plan(model, plan, batches, WIDTHWISE))
    report("Taylor scores", PAPER, "scores", lambda model: make_plan(model, batches, PAPER))
    report(f"OBS, one of {OBS_ROUNDS} rounds, beside its Gram matrix", WIDTHWISE, "scores", round_of_obs, gram)


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        measure_layer()
    else:
        closed_form()
