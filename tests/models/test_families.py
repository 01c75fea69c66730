"""Newer models by table rows alone: pruned in both ways, recovered one step, saved, reloaded, and asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from efficientllava.checkpoint.export import save
from efficientllava.checkpoint.folder import Checkpoint, load
from efficientllava.data.collator import Collator, GenerationCollator, prompt
from efficientllava.evaluation.generation import generate
from efficientllava.models.anatomy import (
    language_parameters,
    layers_of,
    pinned_layers,
    projector_of,
)
from efficientllava.models.forward import (
    TOKEN_TYPES,
    FeatureCache,
    answer_loss,
    forward_hidden,
    stock_inputs,
)
from efficientllava.models.pruned import is_per_layer
from efficientllava.pruning.outline import outline
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.pruning.surgery import cut
from efficientllava.recovery.recover import recover
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import PruneConfig, RecoverConfig, WeightsConfig

from .families import (
    BUILDERS,
    CHANNELS,
    GROUPS,
    IMAGE,
    LAYERS,
    make,
    make_batch,
    make_records,
    picture,
)

STOCK_ONLY = ("qwen2_5_vl",)
# The stock configuration takes hidden size / heads for a head's width, so the rotary factors do not fit fewer heads.
STOCK_WITH_ALL_HEADS = ("mini_internvl",)


pytestmark = pytest.mark.usefixtures("without_num2words")


def own_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's own forward takes, as its processor makes it."""
    inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
    if model.config.model_type in TOKEN_TYPES:
        inputs[TOKEN_TYPES[model.config.model_type]] = (batch["input_ids"] == IMAGE).long()
    return inputs


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**own_inputs(model, batch), use_cache=False).logits[batch["attention_mask"].bool()]


@pytest.fixture(params=list(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_the_shared_forward_is_the_models_own(name):
    model, processor = make(name)
    batch = make_batch(processor)
    expected = logits_of(model, batch)
    for features in (None, FeatureCache(model)(batch)):
        logits = model.lm_head(forward_hidden(model, batch, features))[batch["attention_mask"].bool()]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    changed = {**batch, "pixel_values": 2 * batch["pixel_values"]}
    assert not torch.allclose(logits_of(model, changed), expected, atol=1e-3)


def test_the_anatomy_describes_the_decoder(name):
    model, _ = make(name)
    layers = layers_of(model)
    assert [(layer.attention.units, layer.mlp.units) for layer in layers] == [(GROUPS, CHANNELS)] * LAYERS
    for layer in layers:
        owned = sum(component.units * component.unit_price() for component in layer.components)
        norms = sum(p.numel() for n, p in layer.module.named_parameters() if "norm" in n)
        # A writer's bias is no unit's.
        norms += sum(c.writer.out_features for c in layer.components if c.writer.bias is not None)
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
    config, (model, processor) = plans(name)[number], make(name)
    batches = [make_batch(processor, seed) for seed in range(2)]
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
    fewer = name in STOCK_WITH_ALL_HEADS and len(plan.layers[0].groups) < GROUPS
    assert is_per_layer(smaller.config.get_text_config()) == (fewer or not plan.uniform)
    smaller.eval()
    provenance = {"original_layers": list(range(len(plan.layers)))}
    save(Checkpoint(smaller, processor, name, torch.float32, "", provenance), tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    # Weights are equal to the bit; sums are rounded differently on CPUs whose kernels depend on the layout of an input.
    state = again.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in smaller.state_dict().items())
    assert torch.allclose(logits_of(again.model, batches[1]), logits_of(smaller, batches[1]), rtol=1e-5, atol=1e-5)
    ask(again.model, again.processor)


@torch.no_grad()
def ask(model: Any, processor: Any) -> None:
    """Generate with and without an image: with the cache as without it, alone as in a padded batch."""
    records = [r for r in make_records(7) if len(r.turns) == 1 or r.image is None]
    records = [replace(record, turns=record.turns[:1]) for record in records]
    batch = GenerationCollator(processor)(records)
    together = generate(model, processor.tokenizer, batch, None, 4)
    for record, answer in zip(records, together, strict=True):
        inputs = stock_inputs(model, prompt(processor, record.turns[0].question, record.image))
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert processor.decode(out[0, length:], skip_special_tokens=True).strip() == answer
        longer = {**inputs, "input_ids": out[:, :-1], "attention_mask": torch.ones_like(out[:, :-1])}
        logits = model(**stock_inputs(model, longer)).logits[0]
        assert torch.equal(logits[length - 1 :].argmax(-1), out[0, length:])


@pytest.mark.parametrize("collate", [Collator, GenerationCollator])
def test_an_image_that_the_processor_refuses_is_named(collate):
    _, processor = make("qwen2_5_vl")
    record = replace(make_records()[0], image=picture(900, 4))
    with pytest.raises(UserError, match=r"record '0/wide': .* refuses its image of 900 x 4 pixels \(absolute aspect"):
        collate(processor)([record])


def test_layers_that_deepstack_feeds_stay():
    (model, processor), config = make("qwen3_vl"), PruneConfig(method="layerwise", drop_layers=1)
    assert pinned_layers(model) == 2
    plan, report = make_plan(model, Calibration([make_batch(processor)]), config)
    assert plan.kept_layers[:2] == (0, 1)
    assert len(plan.kept_layers) == 3
    assert len(report.block_influence) == LAYERS
    with pytest.raises(UserError, match=r"drop_layers=2: the model has 2 layers that can be dropped; allowed: 0\.\.1"):
        outline(model, PruneConfig(method="layerwise", drop_layers=2))


def test_a_decoder_that_only_its_stock_class_holds_keeps_heads_and_one_width():
    model, processor = make("qwen2_5_vl")
    plan, _ = make_plan(
        model, Calibration([make_batch(processor)]), PruneConfig(method="widthwise", ratio=0.2, selection="local")
    )
    assert {len(layer.groups) for layer in plan.layers} == {GROUPS}
    assert len({len(layer.channels) for layer in plan.layers}) == 1
    for options in ({"selection": "global"}, {"protect": [0]}, {"protect_mlp": [0]}):
        with pytest.raises(UserError, match="one width for all layers"):
            outline(model, PruneConfig(method="widthwise", ratio=0.2, **options))
    layers = tuple(LayerPlan(i, (0, 1), tuple(range(CHANNELS))) for i in range(LAYERS))
    with pytest.raises(UserError, match="keeps its heads"):
        cut(model, PruningPlan("widthwise", layers, LAYERS, 2, None, 0.0))
