"""Newer models by table rows alone: pruned in both ways, recovered one step, saved, reloaded, and asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from efficientllava.errors import UserError
from efficientllava.models.anatomy import decoder_of, language_parameters, layers_of, pinned_layers, projector_of
from efficientllava.models.forward import TOKEN_TYPES, answer_loss, feature_cache, forward_hidden
from efficientllava.models.pruned import is_per_layer
from efficientllava.pruning.outline import outline
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.scores import Calibration
from efficientllava.pruning.surgery import cut
from efficientllava.recovery.recover import recover
from efficientllava.schema import PruneConfig, RecoverConfig, WeightsConfig

VOCAB, IMAGE, VIDEO, START, END = 60, 59, 58, 57, 56
LAYERS, CHANNELS, GROUPS = 4, 64, 4
IDS: dict[str, Any] = {"image_token_id": IMAGE, "tie_word_embeddings": False}
QWEN = {**IDS, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
ANYRES = {"vision_feature_layer": -1, "image_grid_pinpoints": [[16, 32], [32, 16]], "tie_word_embeddings": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def text(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": GROUPS,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**sizes, **changes}


def llava_next() -> Any:
    tower = CLIPVisionConfig(**TOWER, patch_size=8)
    decoder = MistralConfig(**text(sliding_window=None, tie_word_embeddings=False))
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=tower, text_config=decoder, image_token_index=IMAGE, **ANYRES)
    )


def llava_onevision() -> Any:
    tower = SiglipVisionConfig(**TOWER, patch_size=8, vision_use_head=False)
    decoder = Qwen2Config(**text(tie_word_embeddings=False))
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(vision_config=tower, text_config=decoder, **ids, **ANYRES)
    )


def qwen2_5_vl() -> Any:
    vision = {**VISION, "depth": 2, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    decoder = text(hidden_size=64, rope_parameters=MROPE)
    decoder.pop("head_dim")
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=decoder, vision_config=vision, **QWEN))


def qwen3_vl() -> Any:
    deepstack = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    vision = {**VISION, **deepstack, "depth": 3, "out_hidden_size": 48}
    decoder = text(head_dim=8, rope_parameters={**MROPE, "mrope_interleaved": True})
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=decoder, vision_config=vision, **QWEN))


def smolvlm() -> Any:
    options = {**IDS, "scale_factor": 2, "pad_token_id": 0}
    vision = {**TOWER, "patch_size": 4}
    decoder = LlamaConfig(**text())
    return SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=decoder, vision_config=vision, **options))


def internvl3() -> Any:
    sizes = {"image_size": [16, 16], "patch_size": [4, 4]}
    options = {**IDS, "image_seq_length": 4, "downsample_ratio": 0.5, "vision_feature_layer": -1}
    tower = InternVLVisionConfig(**{**TOWER, **sizes})
    decoder = Qwen2Config(**text())
    return InternVLForConditionalGeneration(InternVLConfig(vision_config=tower, text_config=decoder, **options))


def mini_internvl() -> Any:
    """As converted: Phi-3 with rotary factors for short and for long texts, one for each half of a head's width."""
    sizes = {"image_size": [16, 16], "patch_size": [4, 4]}
    options = {**IDS, "image_seq_length": 4, "downsample_ratio": 0.5, "vision_feature_layer": -1}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 8.0}
    decoder = text(rope_parameters={**rope, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]})
    decoder.pop("head_dim")
    tower = InternVLVisionConfig(**{**TOWER, **sizes})
    config = InternVLConfig(vision_config=tower, text_config=Phi3Config(**decoder), **options)
    return InternVLForConditionalGeneration(config)


def gemma3() -> Any:
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    decoder = text(layer_types=types, sliding_window=8, query_pre_attn_scalar=4)
    vision = {**TOWER, "patch_size": 4, "vision_use_head": False}
    ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=decoder, vision_config=vision, mm_tokens_per_image=4, **ids)
    )


MODELS: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (llava_next, llava_onevision, qwen2_5_vl, qwen3_vl, smolvlm, internvl3, mini_internvl, gemma3)
}
STOCK_ONLY = ("qwen2_5_vl",)
# The stock configuration takes hidden size / heads for a head's width, so the rotary factors do not fit fewer heads.
STOCK_WITH_ALL_HEADS = ("mini_internvl",)


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in decoder_of(model).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for parameter in projector_of(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # Gemma3's starts at zero
    return model.eval()


def make_batch(name: str, seed: int = 0) -> dict[str, Any]:
    """Two rows with an image each; the second is padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    images: dict[str, Any] = {"pixel_values": normal(2, 3, 16, 16)}
    tokens = 4
    if name.startswith("llava"):
        images = {"pixel_values": normal(2, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32], [16, 32]])}
        tokens = 14  # 4 of the whole image, 8 of its two tiles, a line break after each of their two rows
    elif name.startswith("qwen"):
        images = {"pixel_values": normal(32, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    elif name == "smolvlm":
        images["pixel_values"] = images["pixel_values"].unsqueeze(1)
    ids = torch.randint(3, 50, (2, tokens + 18), generator=generator)
    ids[:, 1], ids[:, 2 : 2 + tokens] = START, IMAGE
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : tokens + 8] = -100
    rows = {"ids": [f"{seed}/0", f"{seed}/1"], "image_ids": [f"{seed}/0", f"{seed}/1"], "image_tiles": [1, 1]}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images, **rows}


def own_inputs(name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's own forward takes, as its processor makes it."""
    inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    if name in TOKEN_TYPES:
        inputs[TOKEN_TYPES[name]] = (batch["input_ids"] == IMAGE).long()
    return inputs


@torch.no_grad()
def logits_of(name: str, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**own_inputs(name, batch), use_cache=False).logits[batch["attention_mask"].bool()]


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_the_shared_forward_is_the_models_own(name):
    model, batch = make_model(name), make_batch(name)
    expected = logits_of(name, model, batch)
    for features in (None, feature_cache(model)(batch)):
        logits = model.lm_head(forward_hidden(model, batch, features))[batch["attention_mask"].bool()]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    changed = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert not torch.allclose(logits_of(name, model, changed), expected, atol=1e-3)


def test_the_anatomy_describes_the_decoder(name):
    model = make_model(name)
    layers = layers_of(model)
    assert [(layer.attention.units, layer.mlp.units) for layer in layers] == [(GROUPS, CHANNELS)] * LAYERS
    for layer in layers:
        owned = sum(component.units * component.unit_parameters for component in layer.components)
        norms = sum(p.numel() for n, p in layer.module.named_parameters() if "norm" in n)
        assert owned + norms == sum(p.numel() for p in layer.module.parameters())
    assert sum(p.numel() for p in projector_of(model).parameters())


def plans(name: str) -> list[PruneConfig]:
    width = {"method": "widthwise", "ratio": 0.3, "refit": True}
    return [
        PruneConfig(method="layerwise", drop_layers=1),
        PruneConfig(**width, selection="local"),
        *([] if name in STOCK_ONLY else [PruneConfig(**width, selection="global")]),
    ]


class OneBatch(L.LightningDataModule):
    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader([0], collate_fn=lambda _: self.batch)


def trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["layers", "one shape", "per layer"])
def test_pruned_recovered_saved_reloaded_and_asked(name, number, tmp_path):
    if number >= len(plans(name)):
        pytest.skip("its stock class alone can hold it")
    config, model = plans(name)[number], make_model(name)
    batches = [make_batch(name, seed) for seed in range(2)]
    before = language_parameters(model)
    plan, _ = make_plan(model, Calibration(batches), config)
    smaller, report = apply_plan(model, plan, Calibration(batches), config)
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved, abs=1e-12)
    # The layer-by-layer stream computes what the model does, whatever its decoder adds between two layers.
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    sums = [float(answer_loss(smaller, b, reduction="sum").detach()) for b in batches]
    assert report.loss_pruned == pytest.approx(sum(sums) / sum(counts), rel=1e-4)
    weight = layers_of(smaller)[0].mlp.writer.weight.detach().clone()
    recipe = RecoverConfig(weights=WeightsConfig(sft=1.0), steps=1, lr=1e-2, warmup=0.0)
    recover(smaller, OneBatch(batches[0]), recipe, trainer, tmp_path / "work", batch_size=2)
    assert not torch.equal(layers_of(smaller)[0].mlp.writer.weight, weight)
    ask(name, smaller.eval(), batches[1], tmp_path / "saved")
    fewer = name in STOCK_WITH_ALL_HEADS and len(plan.layers[0].groups) < GROUPS
    assert is_per_layer(smaller.config.get_text_config()) == (fewer or not plan.uniform)


def ask(name: str, model: Any, batch: dict[str, Any], folder: Path) -> None:
    """Save, reload by the stock auto class, and compare logits and generated tokens."""
    model.save_pretrained(folder)
    again, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(name, again.eval(), batch), logits_of(name, model, batch))
    one = {key: value[:1] for key, value in own_inputs(name, batch).items() if key not in ("pixel_values",)}
    one["pixel_values"] = batch["pixel_values"][: len(batch["pixel_values"]) // 2]
    words = {"suppress_tokens": [IMAGE, VIDEO, START, END]}
    out = again.generate(**one, **words, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # With the cache as without it.
    longer = {**one, "input_ids": out[:, :-1], "attention_mask": torch.ones_like(out[:, :-1])}
    if name in TOKEN_TYPES:
        longer[TOKEN_TYPES[name]] = (longer["input_ids"] == IMAGE).long()
    with torch.no_grad():
        logits = again(**longer).logits[0, -1]
    logits[[2, IMAGE, VIDEO, START, END]] = -torch.inf
    assert logits.argmax() == out[0, -1]


def test_layers_that_deepstack_feeds_stay():
    model, config = make_model("qwen3_vl"), PruneConfig(method="layerwise", drop_layers=1)
    assert pinned_layers(model) == 2
    plan, report = make_plan(model, Calibration([make_batch("qwen3_vl")]), config)
    assert plan.kept_layers[:2] == (0, 1)
    assert len(plan.kept_layers) == 3
    assert len(report.block_influence) == LAYERS
    with pytest.raises(UserError, match=r"drop_layers=2: the model has 2 layers that can be dropped; allowed: 0\.\.1"):
        outline(model, PruneConfig(method="layerwise", drop_layers=2))


def test_a_decoder_that_only_its_stock_class_holds_keeps_heads_and_one_width():
    model, batch = make_model("qwen2_5_vl"), make_batch("qwen2_5_vl")
    plan, _ = make_plan(model, Calibration([batch]), PruneConfig(method="widthwise", ratio=0.2, selection="local"))
    assert {len(layer.groups) for layer in plan.layers} == {GROUPS}
    assert len({len(layer.channels) for layer in plan.layers}) == 1
    for options in ({"selection": "global"}, {"protect": [0]}, {"protect_mlp": [0]}):
        with pytest.raises(UserError, match="one width for all layers"):
            outline(model, PruneConfig(method="widthwise", ratio=0.2, **options))
    layers = tuple(LayerPlan(i, (0, 1), tuple(range(CHANNELS))) for i in range(LAYERS))
    with pytest.raises(UserError, match="keeps its heads"):
        cut(model, PruningPlan("widthwise", layers, LAYERS, 2, None, 0.0))
