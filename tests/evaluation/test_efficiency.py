import copy
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from efficientllava.data.collator import prompt
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
    # The angles of the rotary embedding were a matrix product in earlier versions of transformers.
    assert 0 <= flops["prefill_language"] - linear - attention <= tokens * head_dim
    assert flops["prefill"] > flops["prefill_language"]


def test_a_prompt_without_image_needs_no_tower(tiny):
    model, processor = tiny
    flops = prefill_flops(model, prompt(processor, "is there a seven?"))
    assert flops["prefill"] == flops["prefill_language"]


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


class Rounds:
    """Rounds of decoding as models run them, and a clock that only they move.

    Attributes:
        times: Milliseconds to the first token of the next rounds, then 20; another token takes half of it.
        seen: Of every round the model's name, the lengths that it was called with, and the logits of its first call.
    """

    def __init__(self, monkeypatch, **models):
        self.times, self.seen, self.now = [], [], 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for name, model in models.items():
            model.register_forward_hook(partial(self._call, name), with_kwargs=True)

    def _call(self, name, _model, _args, kwargs, output):
        if not kwargs.get("use_cache"):
            return  # FLOPs are counted
        begins = "logits_to_keep" in kwargs
        if begins:
            self.first = self.times.pop(0) if self.times else 20.0
            self.seen.append((name, [], output.logits))
        self.seen[-1][1].append(kwargs["input_ids"].shape[1])
        self.now += self.first / (1e3 if begins else 2e3)


def test_rounds_are_interleaved_and_reported_as_medians(tiny, monkeypatch):
    model, processor = tiny
    models = {name: copy.deepcopy(model) for name in "ab"}
    rounds = Rounds(monkeypatch, **models)
    rounds.times = [9.0] * 4 + [1.0, 10.0, 20.0, 2.0, 3.0, 30.0]
    stages = measure(models, prompt(processor, "is there a seven?"), CFG)
    order = [name for name, _, _ in rounds.seen]
    assert order[:10] == list("abba" + "abbaab"), "the first two rounds warm up, then the order turns"
    assert stages["a"]["latency_ms"] == pytest.approx(
        {"prefill": 2.0, "decode": 1.0, "prefill_iqr": 1.0, "decode_iqr": 0.5}
    )
    assert stages["b"]["latency_ms"]["prefill"] == pytest.approx(20)
    assert stages["b"]["latency_ms"]["prefill_iqr"] == pytest.approx(10)


def test_tokens_per_second_count_the_whole_batch_and_the_prefill(tiny, monkeypatch):
    model = copy.deepcopy(tiny[0])
    rounds = Rounds(monkeypatch, base=model)
    cfg = EvaluateConfig(repeats=2, new_tokens=3, speed_batches=[4, 8])
    stage = measure({"base": model}, prompt(tiny[1], "is there a seven?"), cfg)["base"]
    # 20 + 2 * 10 ms for three tokens.
    speeds = {"batch_4": 300, "batch_4_iqr": 0, "batch_8": 600, "batch_8_iqr": 0}
    assert stage["tokens_per_second"] == pytest.approx(speeds, abs=1e-6)
    assert {len(logits) for _, _, logits in rounds.seen} == {1, 4, 8}, (
        "latency is measured at batch 1, asked for or not"
    )
    assert stage["latency_ms"]["prefill"] == pytest.approx(20) and stage["latency_ms"]["decode"] == pytest.approx(10)


def test_a_round_decodes_what_generate_decodes_and_equal_prompts_give_equal_rows(family, batch, monkeypatch):
    model = copy.deepcopy(family[0])
    rounds = Rounds(monkeypatch, base=model)
    measure({"base": model}, batch, EvaluateConfig(repeats=1, new_tokens=4, speed_batches=[3]))
    assert all(lengths == [batch["input_ids"].shape[1], 1, 1, 1] for _, lengths, _ in rounds.seen)
    first = {len(logits): logits for _, _, logits in rounds.seen}
    torch.testing.assert_close(first[3], first[1].expand_as(first[3]))


def test_peak_memory_is_what_decoding_holds_beside_the_weights(tiny):
    model, processor = tiny
    asked, held = prompt(processor, "is there a seven?"), {}
    for tokens in (3, 43):
        found = measure({"base": model}, asked, replace(CFG, repeats=1, new_tokens=tokens))["base"]["memory_bytes"]
        held[tokens] = found["peak"] - found["weights"]
    config = model.config.text_config
    token = 2 * config.num_hidden_layers * config.hidden_size * model.lm_head.weight.element_size()  # keys and values
    assert held[3] > (asked["input_ids"].shape[1] + 2) * token
    assert 35 * token < held[43] - held[3] < 2 * 40 * token, "further tokens leave nothing else behind"


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
