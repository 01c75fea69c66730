from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, StaticCache

from efficientllava.models.anatomy import decoder_of, language_parameters, layers_of
from efficientllava.models.forward import going_on
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_for, whole_layers
from efficientllava.pruning.surgery import check_plan, cut

from ..conftest import (
    CHANNELS,
    FAMILIES,
    IMAGE_TOKEN,
    LAYERS,
    logits_of,
    make_batch,
    make_model,
)

LOAD = """
import json, sys, torch
from transformers import AutoModelForImageTextToText
batch = torch.load("batch.pt")
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.eval()(**batch, use_cache=False).logits, folder + "/logits.pt")
assert "efficientllava" not in sys.modules
"""


DOUBLE = torch.float64  # so that different orders of summation agree to 1e-9


def plan_of(model: Any, layers: Any) -> PruningPlan:
    return plan_for(model, "widthwise", layers, None)


def uniform(model: Any, groups: int, channels: int, skip: tuple[int, ...] = ()) -> PruningPlan:
    """Every layer keeps other units, but equally many."""
    units = layers_of(model)[0].attention.units
    return plan_of(
        model,
        [
            LayerPlan(
                i,
                tuple(sorted((i + g) % units for g in range(groups))),
                tuple(sorted((7 * i + 3 * c) % CHANNELS for c in range(channels))),
            )
            for i in range(len(layers_of(model)))
            if i not in skip
        ],
    )


def ragged(model: Any, skip: tuple[int, ...] = ()) -> PruningPlan:
    """Every layer keeps other numbers of units; the first one all."""
    layers = [
        LayerPlan(i, tuple(range(layer.attention.units - i % 3)), tuple(range(i % 2, layer.mlp.units - 5 * i)))
        for i, layer in enumerate(layers_of(model))
        if i not in skip
    ]
    return plan_of(model, [LayerPlan(0, *whole_of(model, 0)), *layers[1:]])


def off(model: Any) -> PruningPlan:
    """A layer without heads, one without channels, one without either, and the others whole."""
    layers = list(whole_layers(model))
    layers[0] = replace(layers[0], groups=())
    layers[1] = replace(layers[1], channels=())
    layers[2] = replace(layers[2], groups=(), channels=())
    return plan_of(model, layers)


def whole_of(model: Any, index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    layer = whole_layers(model)[index]
    return layer.groups, layer.channels


def masked(model: Any, plan: PruningPlan) -> Any:
    """The same model with the removed units' writer columns set to zero; dropped layers write nothing."""
    kept = {layer.index: layer for layer in plan.layers}
    with torch.no_grad():
        for i, layer in enumerate(layers_of(model)):
            for kind, component in zip(("groups", "channels"), layer.components, strict=True):
                units = getattr(kept[i], kind) if i in kept else ()
                mask = torch.zeros_like(component.writer.weight)
                mask[:, component.columns(units)] = 1
                component.writer.weight.mul_(mask)
                if i not in kept and component.writer.bias is not None:
                    component.writer.bias.zero_()
    return model


PLANS = {
    "uniform": lambda m: uniform(m, layers_of(m)[0].attention.units - 1, 33),
    "one unit": lambda m: uniform(m, 1, 1),
    "fewer layers": lambda m: uniform(m, layers_of(m)[0].attention.units, CHANNELS, skip=(1, 2)),
    "both": lambda m: uniform(m, 2, 20, skip=(3,)),
    "ragged": ragged,
    "ragged, fewer layers": lambda m: ragged(m, skip=(2,)),
    "off": off,
}


@pytest.mark.parametrize("plan", list(PLANS))
def test_surgery_equals_masking_the_writers(family, plan):
    model = make_model(family, dtype=DOUBLE)
    made, batch = PLANS[plan](model), make_batch(seed=9, dtype=DOUBLE)
    expected = logits_of(masked(make_model(family, dtype=DOUBLE), made), batch)
    assert torch.allclose(logits_of(cut(model, made), batch), expected, atol=1e-9)


def test_keeping_everything_is_the_identity(family):
    model, batch = make_model(family), make_batch(seed=9)
    expected = logits_of(model, batch)
    same = cut(model, plan_of(model, whole_layers(model)))
    assert type(same) is type(model)
    assert decoder_of(same).config.model_type == decoder_of(model).config.model_type
    assert torch.equal(logits_of(same, batch), expected)


def test_cut_removes_what_the_plan_counts(family):
    for make in PLANS.values():
        model = make_model(family)
        before, plan = language_parameters(model), make(model)
        assert 1 - language_parameters(cut(model, plan)) / before == pytest.approx(plan.achieved, abs=1e-12)


@pytest.mark.parametrize("plan", ["both", "ragged, fewer layers", "off"])
def test_a_saved_model_loads_bit_for_bit(family, plan, tmp_path):
    model = make_model(family)
    smaller, batch = cut(model, PLANS[plan](model)), make_batch(seed=9)
    smaller.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded.eval(), batch), logits_of(smaller, batch))
    text, reloaded = decoder_of(smaller).config, decoder_of(loaded).config
    assert text.model_type.startswith("pruned_") == (plan != "both")
    assert reloaded.model_type == text.model_type
    told = [{**config.to_dict(), "dtype": None, "transformers_version": None} for config in (text, reloaded)]
    assert told[0] == told[1]
    assert [layer.head_dim for layer in layers_of(loaded)] == [4] * len(layers_of(smaller))


def test_uniform_models_load_without_this_package(tmp_path):
    batch, expected = make_batch(seed=9), {}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    torch.save(inputs, tmp_path / "batch.pt")
    for name in FAMILIES:
        model = make_model(name)
        smaller = cut(model, PLANS["uniform"](model))
        smaller.save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = smaller(**inputs, use_cache=False).logits
    subprocess.run([sys.executable, "-c", LOAD, *FAMILIES], check=True, cwd=tmp_path)
    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), logits)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("plan", ["ragged", "off"])
def test_logits_with_a_cache_equal_those_without(family, plan, static):
    model = make_model(family, dtype=DOUBLE)
    smaller, batch = cut(model, PLANS[plan](model)), make_batch(rows=1, seed=9, dtype=DOUBLE)
    ids, seen = batch["input_ids"], {"pixel_values": batch["pixel_values"]}
    more = torch.cat([ids, ids[:, -3:]], 1)
    with torch.no_grad():
        expected = smaller(input_ids=more, **seen, use_cache=False).logits[:, -3:]
        first = smaller(input_ids=ids, **seen, use_cache=True)
        if static:
            name = next(iter(going_on(first)))
            cache = StaticCache(config=decoder_of(smaller).config, max_cache_len=30)
            first = smaller(input_ids=ids, **seen, use_cache=True, **{name: cache})
        found = smaller(input_ids=ids[:, -3:], **going_on(first), use_cache=True).logits
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("plan", ["both", "ragged, fewer layers", "off"])
def test_generation_with_a_cache_equals_the_full_forward(family, plan):
    model = make_model(family)
    smaller, batch = cut(model, PLANS[plan](model)), make_batch(rows=1, seed=9)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    smaller.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        cached = smaller.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, suppress_tokens=[IMAGE_TOKEN])
        for _ in range(6):
            logits = smaller(input_ids=ids, pixel_values=pixels, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:, :IMAGE_TOKEN].argmax(-1)], 1)
    assert cached.tolist() == ids.tolist()
    indices = [layer.self_attn.layer_idx for layer in decoder_of(smaller).layers]
    assert indices == list(range(LAYERS if plan == "off" else LAYERS - 1))


def test_plans_compose_from_uniform_to_per_layer_and_back(family):
    batch, model = make_batch(seed=9, dtype=DOUBLE), make_model(family, dtype=DOUBLE)
    reference, original = make_model(family, dtype=DOUBLE), list(range(LAYERS))
    for make, prefix in ((PLANS["fewer layers"], ""), (ragged, "pruned_"), (lambda m: uniform(m, 1, 9), "")):
        plan = make(model)
        reference = masked(reference, original_plan(reference, plan, original))
        original = [original[index] for index in plan.kept_layers]
        model = cut(model, plan)
        assert decoder_of(model).config.model_type.startswith("pruned_") == bool(prefix)
        expected = logits_of(reference, batch)
        assert torch.allclose(logits_of(model, batch), expected, atol=1e-9)
    assert original == [0, 3]


def original_plan(reference: Any, plan: PruningPlan, original: list[int]) -> PruningPlan:
    """A plan in units of the original model; which of them are left is read off the writer's zero columns."""
    found = layers_of(reference)
    layers = []
    for entry in plan.layers:
        left = []
        for component, units in zip(
            found[original[entry.index]].components, (entry.groups, entry.channels), strict=True
        ):
            used = component.writer.weight.detach().view(-1, component.units, component.width).abs().sum((0, 2)) > 0
            alive = used.nonzero().flatten().tolist()
            left.append(tuple(alive[unit] for unit in units))
        layers.append(LayerPlan(original[entry.index], *left))
    return plan_of(reference, layers)


def test_a_llama_whose_heads_do_not_divide_the_hidden_size_becomes_mistral():
    model, batch = make_model("llama", dtype=DOUBLE), make_batch(seed=9, dtype=DOUBLE)
    plan = uniform(model, 5, CHANNELS)
    expected = logits_of(masked(make_model("llama", dtype=DOUBLE), plan), batch)
    smaller = cut(model, plan)
    text = decoder_of(smaller).config
    assert (text.model_type, text.num_attention_heads, text.head_dim) == ("mistral", 5, 4)
    assert text.sliding_window is None
    assert torch.allclose(logits_of(smaller, batch), expected, atol=1e-9)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_has_no_mistral_and_becomes_per_layer(bias):
    options = {"dtype": DOUBLE, bias: True}
    model, batch = make_model("llama", **options), make_batch(seed=9, dtype=DOUBLE)
    plan = uniform(model, 5, 30)
    expected = logits_of(masked(make_model("llama", **options), plan), batch)
    smaller = cut(model, plan)
    assert decoder_of(smaller).config.model_type == "pruned_llama"
    assert torch.allclose(logits_of(smaller, batch), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_tied_embeddings_stay_tied(name, tmp_path):
    options = {"dtype": DOUBLE, "tie_word_embeddings": True}
    model, batch = make_model(name, **options), make_batch(seed=9, dtype=DOUBLE)
    before, plan = language_parameters(model), uniform(model, 2, 20)
    expected = logits_of(masked(make_model(name, **options), plan), batch)
    smaller = cut(model, plan)
    assert smaller.lm_head.weight is smaller.get_input_embeddings().weight
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved)
    smaller.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for found in (smaller, loaded.eval()):
        assert torch.allclose(logits_of(found, batch), expected, atol=1e-9)


def test_flags_type_and_mode_survive():
    model = make_model("qwen3", dtype=torch.bfloat16).train()
    model.get_decoder().requires_grad_(False)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    smaller = cut(model, uniform(model, 2, 20))
    assert smaller.training
    assert smaller.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in smaller.get_decoder().parameters())
    assert smaller.lm_head.weight.requires_grad
    assert smaller.generation_config.max_new_tokens == 7
    assert not any(t.is_meta for t in [*smaller.parameters(), *smaller.buffers()])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LayerPlan(1, (1, 0), (0,))], "attention of layer 1"),
        ([LayerPlan(0, (0, 0), (0,))], "attention of layer 0"),
        ([LayerPlan(0, (0,), (CHANNELS,))], f"0..{CHANNELS - 1}"),
        ([], "layers"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        check_plan(make_model(), PruningPlan("widthwise", tuple(layers), LAYERS, 1, None, 0.0))


def test_plans_survive_json(tmp_path: Path):
    plan = uniform(make_model(), 2, 5, skip=(1,))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert PruningPlan.read(tmp_path / "plan.json") == plan
    told = json.loads(plan.to_json())
    assert told["layers"][0]["index"] == 0
    found = layers_of(make_model())
    assert plan.source_units == tuple((layer.attention.units, layer.mlp.units) for layer in found)
    assert told["source_units"][0] == [found[0].attention.units, CHANNELS]
    del told["source_units"]  # as earlier versions wrote it
    assert PruningPlan.from_json(json.dumps(told)) == replace(plan, source_units=())
    assert plan.uniform
    assert plan.kept_layers == (0, 2, 3)
    assert not ragged(make_model()).uniform
