"""Speed of evaluation against one question at a time, and against a loop by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from efficientllava.models.forward import feature_cache
from efficientllava.settings.schema import DataConfig, EvaluateConfig
from experiments.speed.rows import Row, quiet_trainer, seconds


def evaluation_row(checkpoint: Any, questions: int = 64) -> Row:
    """Answering questions in a batch against one by one; vision features are computed beforehand."""
    from efficientllava.evaluation.answers import evaluate
    from efficientllava.evaluation.tasks import load as load_task

    task = load_task("digits_vqa", DataConfig("digits_vqa", test_questions=questions), EvaluateConfig())
    cache = feature_cache(checkpoint.model)

    def run(size: int) -> Callable[[], Any]:
        config = EvaluateConfig(batch_size=size)
        return lambda: evaluate(checkpoint.model, checkpoint.processor, task, quiet_trainer(), config, cache)

    return Row(f"evaluation: batch of {questions} / one by one", *seconds(run(questions), run(1), 1), "s", "< 0.5")


def generation_row(checkpoint: Any, questions: int = 192, size: int = 48) -> Row:
    """An evaluation from records to scores against a loop by hand over the same batches: tower, generate, decode."""
    from efficientllava.data.collator import GenerationCollator
    from efficientllava.evaluation.answers import evaluate, greedy_config, length_batches, unadvised
    from efficientllava.evaluation.tasks.digits_vqa import DigitsVQA

    task = DigitsVQA(questions, answer_loss=False)
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    records, collate = task.records(), GenerationCollator(checkpoint.processor)
    config = greedy_config(model, tokenizer, task.max_new_tokens)

    @torch.inference_mode()
    def bare() -> None:
        for indices in length_batches(records, size):
            batch = collate([records[index] for index in indices])
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
            with unadvised(model):
                tokens = model.generate(**inputs, generation_config=config)
            tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def ours() -> None:
        evaluate(model, checkpoint.processor, task, quiet_trainer(), EvaluateConfig(batch_size=size))

    return Row("evaluation / bare loop of generate", *seconds(ours, bare), "s", "< 1.15")
