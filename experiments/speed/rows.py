"""Lines of the table, how their numbers are taken, and those of the memory of pruning against its bound.

Absolute times depend on the machine; each line compares two ways of doing the same on the same machine, minutes apart
at most. Peak memory comes from torch's own allocator events (every allocation and release of tensor memory, temporaries
inside operators included), as the profiler records them: it depends neither on the machine nor on what the process
held before. Images and other memory outside torch's allocator are not counted.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from timeit import timeit
from typing import Any

import torch
from lightning.pytorch import Trainer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.statistics import gram_dtype
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.schema import PruneConfig

HIDDEN, LAYERS, HEADS, CHANNELS, VOCABULARY = 512, 4, 8, 1408, 512
ROWS, BATCHES, LENGTH = 1, 16, 128
METHODS = {
    "layerwise": PruneConfig("layerwise", "layerwise", 0.3),
    "widthwise, obs, refit": PruneConfig("widthwise", "widthwise", 0.3, refit=True),
    "widthwise, obs, local, refit": PruneConfig("widthwise", "widthwise", 0.3, selection="local", refit=True),
    "widthwise, Taylor": PruneConfig("widthwise", "widthwise", 0.3, "param_first", "local"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: What is compared.
        measured: Numerator, with its unit in ``unit``.
        reference: Denominator.
        unit: ``MiB`` or ``s``.
        wish: Whether the ratio should be high or low, and its bound where the project states one.
    """

    what: str
    measured: float
    reference: float
    unit: str
    wish: str

    @property
    def ratio(self) -> float:
        """Measured over reference."""
        return self.measured / self.reference


def peak_memory(prepare: Callable[[], Any], function: Callable[[Any], Any]) -> int:
    """Highest amount of tensor memory that a call holds above what was held before it, in bytes.

    Args:
        prepare: Makes the argument. It runs under the profiler too, which knows the size of a released block only if it
            has seen it allocated.
        function: What to measure; on a CPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write lines between those of the table
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        argument = prepare()
        began = time.time_ns()
        function(argument)
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate((size for at, size in events if at >= began), initial=0))


def seconds(measured: Callable[[], Any], reference: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Shortest wall times of two functions, called in turn so that drift of the machine hits both; after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + repeats):
        for function, known in zip((measured, reference), times, strict=True):
            known.append(timeit(function, number=1))
    return min(times[0][1:]), min(times[1][1:])


def quiet_trainer(**options: Any) -> Any:
    """A CPU Trainer that prints and writes nothing."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        **{"accelerator": "cpu", "use_distributed_sampler": False, **dict.fromkeys(silent, False), **options}
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'':<{width}}  {'ratio':>6}  {'measured':>12}  {'reference':>12}  wish"]
    for row in rows:
        values = "  ".join(f"{value:8.2f} {row.unit:<3}" for value in (row.measured, row.reference))
        lines.append(f"{row.what:<{width}}  {row.ratio:6.2f}  {values}  {row.wish}")
    return "\n".join(line.rstrip() for line in lines)


def middle_sized() -> Any:
    """A random LLaVA whose decoder is large enough that activations do not hide what its weights need."""
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=VOCABULARY - 1, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


def random_batches() -> list[dict[str, Any]]:
    """Batches of random text; the last quarter of every row is supervised."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(BATCHES):
        ids = torch.randint(3, VOCABULARY - 1, (ROWS, LENGTH), generator=generator)
        labels = ids.index_fill(1, torch.arange(3 * LENGTH // 4), -100)
        names = [f"{number}/{row}" for row in range(ROWS)]
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "ids": names})
    return batches


def memory_bound(model: Any) -> int:
    """What pruning may hold above the weights, in bytes.

    One decoder layer's parameters in fp32, its two Gram matrices, and the calibration hidden states at one layer
    boundary.
    """
    layer = layers_of(model)[0]
    parameters = 4 * sum(p.numel() for p in layer.module.parameters())
    widths = [component.writer.in_features for component in layer.components]
    grams = sum(width * width * gram_dtype(width).itemsize for width in widths)
    return parameters + grams + 4 * BATCHES * ROWS * LENGTH * HIDDEN


def memory_rows() -> list[Row]:
    """Peak memory of scoring, refit and cutting above the weights, against the bound."""

    def prune(model: Any, config: PruneConfig) -> None:
        calibration = Calibration(random_batches())
        plan, _ = make_plan(model, calibration, config)
        apply_plan(model, plan, calibration, config)

    bound = memory_bound(middle_sized()) / 2**20
    peaks = {name: peak_memory(middle_sized, partial(prune, config=config)) for name, config in METHODS.items()}
    what = "pruning memory above the weights / bound"
    return [Row(f"{what}: {name}", peak / 2**20, bound, "MiB", "< 1") for name, peak in peaks.items()]
