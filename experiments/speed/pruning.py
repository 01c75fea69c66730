"""Memory of pruning against its bound."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.scores import Calibration
from efficientllava.pruning.statistics import gram_dtype
from efficientllava.settings.schema import PruneConfig
from experiments.speed.rows import Row, peak_memory

HIDDEN, LAYERS, HEADS, CHANNELS, VOCABULARY = 512, 4, 8, 1408, 512
ROWS, BATCHES, LENGTH = 1, 16, 128
METHODS = {
    "layerwise": PruneConfig("layerwise", "layerwise", 0.3),
    "widthwise, obs, refit": PruneConfig("widthwise", "widthwise", 0.3, refit=True),
    "widthwise, obs, local, refit": PruneConfig("widthwise", "widthwise", 0.3, selection="local", refit=True),
    "widthwise, Taylor": PruneConfig("widthwise", "widthwise", 0.3, "param_first", "local"),
}


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
