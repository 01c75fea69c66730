import pytest
import torch
from torch import nn

from efficientllava.data.collator import prompt
from efficientllava.evaluation import efficiency
from efficientllava.evaluation.efficiency import checkpoint_bytes, measure, prefill_flops
from efficientllava.models.anatomy import parameters
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import EvaluateConfig

CFG = EvaluateConfig(repeats=3, new_tokens=3, speed_batches=[1])


@pytest.fixture
def batch(family, questions):
    record = next(record for record in questions if record.image is not None)
    return prompt(family[1], record.turns[0].question, record.image)


def _decoder_linears(model):
    return sum(m.weight.numel() for m in model.model.language_model.modules() if isinstance(m, nn.Linear))


def test_language_flops_equal_the_closed_form(family, batch):
    model, _ = family
    config, tokens = model.config.text_config, batch["input_ids"].shape[1]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = 2 * tokens * _decoder_linears(model) + 2 * model.lm_head.weight.numel()
    # Scores and weighted sum, each tokens x tokens x head_dim products per head and layer.
    attention = 4 * tokens**2 * head_dim * config.num_attention_heads * config.num_hidden_layers
    flops = prefill_flops(model, batch)
    assert flops["prefill_language"] == linear + attention
    assert flops["prefill"] > flops["prefill_language"]


def test_linear_flops_are_twice_parameters_times_tokens(tiny, questions):
    model, processor = tiny
    record = next(record for record in questions if record.image is None)
    tokens = prompt(processor, record.turns[0].question)
    flops = prefill_flops(model, tokens)
    length = tokens["input_ids"].shape[1]
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    attention = 4 * length**2 * 16 * 8 * 8
    assert flops["prefill_language"] - attention == pytest.approx(2 * layers * length, rel=0.02)
    assert flops["prefill"] == flops["prefill_language"], "a prompt without image needs no tower"


def test_measure_gives_the_entries_of_a_stage(family, batch):
    model, _ = family
    stage = measure({"base": model}, batch, CFG)["base"]
    assert stage["parameters"] == parameters(model) > stage["language_parameters"] > 0
    embeddings = model.get_input_embeddings().weight
    assert stage["language_parameters"] >= _decoder_linears(model) + 2 * embeddings.numel()
    assert stage["memory_bytes"]["weights"] >= 8 * stage["parameters"]
    assert stage["latency_ms"]["prefill"] > 0 and stage["latency_ms"]["decode"] > 0
    assert stage["setup"]["prompt_tokens"] == batch["input_ids"].shape[1]
    assert stage["setup"]["image_size"] == [32, 32] and stage["setup"]["dtype"] == "float64"


def test_tied_weights_count_once(tiny):
    model, _ = tiny
    untied = parameters(model)
    head = model.lm_head.weight
    try:
        model.lm_head.weight = model.get_input_embeddings().weight
        assert parameters(model) == untied - head.numel()
    finally:
        model.lm_head.weight = head


def test_rounds_are_interleaved_and_reported_as_medians(tiny, monkeypatch):
    model, processor = tiny
    other = nn.Module.__new__(type(model))
    other.__dict__ = model.__dict__.copy()
    order = []
    times = iter([9.0] * 4 + [1.0, 10.0, 20.0, 2.0, 3.0, 30.0])

    def fake(measured, inputs, new_tokens):
        order.append("a" if measured is model else "b")
        value = next(times)
        return value, value / 2

    monkeypatch.setattr(efficiency, "_round", fake)
    monkeypatch.setattr(efficiency, "_held_peak", lambda *_: 0)
    stages = measure({"a": model, "b": other}, prompt(processor, "is there a seven?"), CFG)
    assert order == list("abba" + "abbaab"), "the first two rounds warm up, then the order turns"
    assert stages["a"]["latency_ms"] == {"prefill": 2.0, "decode": 1.0, "prefill_iqr": 1.0, "decode_iqr": 0.5}
    assert stages["b"]["latency_ms"]["prefill"] == 20.0 and stages["b"]["latency_ms"]["prefill_iqr"] == 10.0


def test_tokens_per_second_count_the_whole_batch_and_the_prefill(tiny, monkeypatch):
    model, processor = tiny
    seen = []

    def fake(_model, inputs, _new_tokens):
        seen.append(len(inputs["input_ids"]))
        return 20.0, 5.0  # ms: 20 + 2 * 5 for three tokens

    monkeypatch.setattr(efficiency, "_round", fake)
    monkeypatch.setattr(efficiency, "_held_peak", lambda *_: 0)
    cfg = EvaluateConfig(repeats=2, new_tokens=3, speed_batches=[4, 8])
    stage = measure({"base": model}, prompt(processor, "is there a seven?"), cfg)["base"]
    assert stage["tokens_per_second"] == {"batch_4": 400, "batch_4_iqr": 0, "batch_8": 800, "batch_8_iqr": 0}
    assert sorted(seen) == [1] * 4 + [4] * 4 + [8] * 4, "latency is measured at batch 1, asked for or not"
    assert stage["latency_ms"]["prefill"] == 20 and stage["latency_ms"]["decode"] == 5


def test_a_batch_of_equal_prompts_gives_equal_rows(family, batch):
    model, _ = family
    inputs = efficiency._inputs(model, batch)
    with torch.no_grad():
        one, three = (model(**efficiency._repeat(inputs, n), logits_to_keep=1).logits for n in (1, 3))
    torch.testing.assert_close(three, one.expand_as(three))


def test_peak_memory_is_what_decoding_holds_beside_the_weights(tiny):
    model, processor = tiny
    inputs = efficiency._inputs(model, prompt(processor, "is there a seven?"))
    peaks = [efficiency._memory(model, efficiency._repeat(inputs, n), 3) for n in (1, 8)]
    held = [memory["peak"] - memory["weights"] for memory in peaks]
    config, tokens = model.config.text_config, inputs["input_ids"].shape[1] + 2
    keys_and_values = 2 * config.num_hidden_layers * config.hidden_size * tokens * model.lm_head.weight.element_size()
    assert held[0] > keys_and_values and 4 * held[0] < held[1] < 9 * held[0]


def test_a_round_decodes_what_generate_decodes(tiny, monkeypatch):
    model, processor = tiny
    lengths = []
    handle = model.model.language_model.register_forward_hook(
        lambda _m, _a, kwargs, _o: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    inputs = {"input_ids": prompt(processor, "is there a seven?")["input_ids"]}
    prefill, decode = efficiency._round(model, inputs, 4)
    handle.remove()
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1]
    assert prefill > 0 and decode > 0


def test_measuring_leaves_the_models_mode_and_threads(tiny):
    model, processor = tiny
    threads = torch.get_num_threads()
    model.train()
    try:
        measure({"base": model}, prompt(processor, "is there a seven?"), CFG)
        assert model.training
    finally:
        model.eval()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("key", "value"), [("repeats", 0), ("new_tokens", 1)])
def test_too_few_repeats_or_tokens_are_user_errors(tiny, key, value):
    model, processor = tiny
    with pytest.raises(UserError, match=rf"evaluate\.{key}={value}: must be in"):
        measure({"base": model}, prompt(processor, "is there a seven?"), EvaluateConfig(**{key: value}))


def test_latency_is_measured_on_one_prompt(tiny):
    model, processor = tiny
    ids = prompt(processor, "is there a seven?")["input_ids"]
    with pytest.raises(ValueError, match="one prompt, got 2"):
        measure({"base": model}, {"input_ids": ids.repeat(2, 1)}, CFG)


def test_checkpoint_bytes_counts_the_weights_only(tmp_path):
    (tmp_path / "model-00001.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-00002.safetensors").write_bytes(b"x" * 23)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 999)
    assert checkpoint_bytes(tmp_path) == 123
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        checkpoint_bytes(tmp_path / "nowhere")
