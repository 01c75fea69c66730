"""Ratios of time and memory, measured in one run on one CPU thread: ``python -m efficientllava.bench``.

Absolute times depend on the machine; each line compares two ways of doing the same on the same machine, minutes apart
at most. Peak memory comes from torch's own allocator events (every allocation and release of tensor memory, temporaries
inside operators included), as the profiler records them: it depends neither on the machine nor on what the process
held before. Images and other memory outside torch's allocator are not counted.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.datamodule import RecoveryData
from .models.anatomy import layers_of
from .models.forward import answer_loss, feature_cache, to_device
from .pruning.pruner import apply_plan, make_plan
from .pruning.scores import Calibration
from .pruning.statistics import gram_dtype
from .schema import DataConfig, EvaluateConfig, PruneConfig, RecoverConfig, TeacherConfig, WeightsConfig

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
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        argument = prepare()
        began = time.time_ns()
        function(argument)
    results: Any = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    before = held = sum(size for at, size in events if at < began)
    peak = 0
    for at, size in events:
        if at >= began:
            held += size
            peak = max(peak, held - before)
    return peak


def middle_sized() -> Any:
    """A random LLaVA whose decoder is large enough that activations do not hide what its weights need."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

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
        labels = ids.clone()
        labels[:, : 3 * LENGTH // 4] = -100
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
    rows = []
    for name, config in METHODS.items():

        def prune(model: Any, config: PruneConfig = config) -> None:
            calibration = Calibration(random_batches())
            plan, _ = make_plan(model, calibration, config)
            apply_plan(model, plan, calibration, config)

        peak, bound = peak_memory(middle_sized, prune), memory_bound(middle_sized())
        rows.append(Row(f"pruning memory above the weights / bound: {name}", peak / 2**20, bound / 2**20, "MiB", "< 1"))
    return rows


def seconds(measured: Callable[[], Any], reference: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Shortest wall times of two functions, called in turn so that drift of the machine hits both; after a warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + repeats):
        for function, known in zip((measured, reference), times, strict=True):
            started = time.perf_counter()
            function()
            known.append(time.perf_counter() - started)
    return min(times[0][1:]), min(times[1][1:])


def quiet_trainer(**options: Any) -> Any:
    """A CPU Trainer that prints and writes nothing."""
    from lightning.pytorch import Trainer

    return Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            **options,
        }
    )


def evaluation_row(checkpoint: Any, questions: int = 64) -> Row:
    """Answering questions in a batch against one by one; vision features are computed beforehand."""
    from .evaluation.module import evaluate
    from .evaluation.tasks import load as load_task

    task = load_task("digits_vqa", DataConfig("digits_vqa", test_questions=questions), EvaluateConfig())
    cache = feature_cache(checkpoint.model)

    def run(size: int) -> Callable[[], Any]:
        config = EvaluateConfig(batch_size=size)
        return lambda: evaluate(checkpoint.model, checkpoint.processor, task, quiet_trainer(), config, cache)

    return Row(f"evaluation: batch of {questions} / one by one", *seconds(run(questions), run(1), 1), "s", "< 0.5")


def generation_row(checkpoint: Any, questions: int = 192, size: int = 48) -> Row:
    """An evaluation from records to scores against a loop by hand over the same batches: tower, generate, decode."""
    from .data.collator import GenerationCollator
    from .evaluation.generation import greedy_config, length_batches
    from .evaluation.module import evaluate
    from .evaluation.tasks.digits_vqa import DigitsVQA

    task = DigitsVQA(questions, answer_loss=False)
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    records, collate = task.records(), GenerationCollator(checkpoint.processor)
    config = greedy_config(model, tokenizer, task.max_new_tokens)

    @torch.inference_mode()
    def bare() -> None:
        for indices in length_batches(records, size):
            batch = collate([records[index] for index in indices])
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
            tokens = model.generate(**inputs, generation_config=config)
            tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ours() -> None:
        evaluate(model, checkpoint.processor, task, quiet_trainer(), EvaluateConfig(batch_size=size))

    return Row("evaluation / bare loop of generate", *seconds(ours, bare), "s", "< 1.15")


def training_batches(checkpoint: Any, count: int) -> tuple[RecoveryData, list[dict[str, Any]]]:
    """Recovery data of which every batch is used once, and its batches."""
    data = RecoveryData(DataConfig("digits_vqa", images=8 * count, batch_size=8), checkpoint.processor)
    return data, list(data.train_dataloader())


def recovery_row(load: Callable[[], Any], steps: int = 12) -> Row:
    """A recovery step against a plain loop with the same forward and backward pass, clipping and optimiser."""
    from .recovery.recover import recover

    checkpoint = load()
    data, batches = training_batches(checkpoint, steps)
    config = RecoverConfig("sft", WeightsConfig(sft=1.0), steps=steps, save_every=10**6)
    for batch in batches:
        answer_loss(checkpoint.model, batch)  # the first pass over the data fills caches of both sides
    with tempfile.TemporaryDirectory() as work:
        stats = recover(checkpoint.model, data, config, quiet_trainer, Path(work), batch_size=8)
    return Row("recovery step: ours / plain torch loop", stats.seconds, plain_loop(load().model, data), "s", "near 1")


def teacher_row(load: Callable[[], Any], steps: int = 12) -> Row:
    """A distillation step with cached answers, which were asked for beforehand, against one with a live teacher."""
    from .recovery.caching import open_teacher
    from .recovery.recover import recover

    config = RecoverConfig("kd_both", WeightsConfig(0.5, 0.5, 0.5), steps=steps, save_every=10**6)
    data, times = training_batches(load(), steps)[0], {}
    with tempfile.TemporaryDirectory() as work:
        for source in ("live", "cached"):
            student = load()
            teacher = open_teacher(student.path, TeacherConfig(source=source), "cpu", Path(work) / "targets")
            folder = Path(work) / source
            stats = recover(student.model, data, config, quiet_trainer, folder, batch_size=8, teacher=teacher)
            times[source] = stats.seconds
    return Row("distillation step: cached / live teacher", times["cached"], times["live"], "s", "< 1")


def plain_loop(model: Any, data: RecoveryData) -> float:
    """Seconds of supervised training written by hand: every batch once, decoder and projector train."""
    from .recovery.trainable import prepare, trainable

    prepare(model, RecoverConfig("sft", WeightsConfig(sft=1.0), steps=1), 0, train_head=True)
    optimizer = torch.optim.AdamW(list(trainable(model)), lr=1e-3, fused=True)
    started = time.perf_counter()
    for batch in data.train_dataloader():
        answer_loss(model, to_device(batch, "cpu")).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable(model)), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def vision_row(checkpoint: Any, count: int = 6) -> Row:
    """A pass over batches with kept vision features against running the tower again."""
    _, batches = training_batches(checkpoint, count)
    cache = feature_cache(checkpoint.model)

    @torch.no_grad()
    def run(features: Callable[[Any], Tensor | None]) -> None:
        for batch in batches:
            answer_loss(checkpoint.model, batch, features(batch))

    return Row(
        "forward pass: kept vision features / tower",
        *seconds(lambda: run(cache), lambda: run(nothing)),
        "s",
        "< 1",
    )


def nothing(_batch: Any) -> None:
    """No features: the tower runs."""


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'':<{width}}  {'ratio':>6}  {'measured':>12}  {'reference':>12}  wish"]
    for row in rows:
        values = "  ".join(f"{value:8.2f} {row.unit:<3}" for value in (row.measured, row.reference))
        lines.append(f"{row.what:<{width}}  {row.ratio:6.2f}  {values}  {row.wish}")
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Measure everything and print one table."""
    from .checkpoint import load
    from .console import quiet_libraries
    from .search.bench import search_rows

    torch.set_num_threads(1)
    quiet_libraries()

    def fresh() -> Any:
        return load("builtin:tiny_llava")

    with redirect_stdout(StringIO()):
        rows = memory_rows()
        checkpoint = fresh()
        rows += [
            evaluation_row(checkpoint),
            generation_row(checkpoint),
            recovery_row(fresh),
            teacher_row(fresh),
            vision_row(checkpoint),
            *search_rows(),
        ]
    print(table(rows))


if __name__ == "__main__":
    main()
