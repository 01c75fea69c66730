from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import efficientllava
from efficientllava.models.anatomy import layers_of
from efficientllava.models.forward import forward_hidden
from efficientllava.pruning import self_text
from efficientllava.pruning.self_text import (
    ENOUGH,
    MOST,
    SEARCHED,
    sequences,
    write_text,
)
from efficientllava.pruning.stream import Beginning
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import CalibrationConfig, PruneConfig

from ..conftest import stream_of

LENGTH = 40
MODELS = ("tiny_llava", "tiny_bunny", "tiny_internvl")
# What stands before a question, between it and its answer, and between that and the next question.
TEMPLATES = {
    "tiny_llava": ("<s>USER:", "ASSISTANT:", "</s>USER:"),
    "tiny_bunny": ("USER:", "ASSISTANT:", "<|endoftext|>USER:"),
    "tiny_internvl": ("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>\n"),
}


@cache
def checkpoint(name: str) -> Any:
    return efficientllava.load(f"builtin:{name}")


def written(name: str, count: int = 6, seed: int = 0, length: int = LENGTH, **options: Any) -> dict[str, torch.Tensor]:
    loaded = checkpoint(name)
    batches = write_text(loaded.model, loaded.processor, count, length, seed, **options)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels", "attention_mask")}


def ids_of(name: str, text: str) -> list[int]:
    return checkpoint(name).processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def places(row: list[int], part: list[int]) -> list[int]:
    return [at for at in range(len(row) - len(part) + 1) if row[at : at + len(part)] == part]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_writes_the_same_text_and_another_seed_another(name):
    first, again, other = written(name), written(name), written(name, seed=1)
    assert first["input_ids"].shape == (6, LENGTH)
    assert first["attention_mask"].all()
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert len({tuple(row) for row in first["input_ids"].tolist()}) > 1


def test_a_sequence_does_not_depend_on_how_many_are_written_at_once(monkeypatch):
    whole = written("tiny_llava")["input_ids"]
    assert torch.equal(written("tiny_llava", count=3)["input_ids"], whole[:3])
    monkeypatch.setattr(self_text, "MEMORY", 1)  # one row at a time
    seen = []
    assert torch.equal(written("tiny_llava", tick=lambda *step: seen.append(step))["input_ids"], whole)
    assert seen == [("write text", row + 1, 6) for row in range(6)]


@pytest.mark.parametrize("name", MODELS)
def test_the_template_stands_where_it_belongs(name):
    opening, between, closing = (ids_of(name, part) for part in TEMPLATES[name])
    tokenizer = checkpoint(name).processor.tokenizer
    found = {key: value[::2] for key, value in written(name, count=32, length=60).items()}
    turns = 0
    for ids, labels in zip(found["input_ids"].tolist(), found["labels"].tolist(), strict=True):
        assert ids[: len(opening)] == opening
        answers, closed = places(ids, between), places(ids, closing)
        assert sorted([*answers, *closed])[::2] == answers  # user and assistant take turns
        expected = [-100] * len(ids)
        for index, at in enumerate(answers):
            begin = at + len(between)
            end = closed[index] + 1 if index < len(closed) else len(ids)
            expected[begin:end] = ids[begin:end]  # the answer and the token that closes it
        whole = [place for place, label in enumerate(labels) if label != -100]
        assert [labels[place] for place in whole] == [ids[place] for place in whole]
        # The last turn may end within what the template puts behind it.
        assert labels[: len(ids) - len(closing)] == expected[: len(ids) - len(closing)]
        turns += len(closed)
        assert not set(ids) & {*tokenizer.all_special_ids} - {*opening, *between, *closing}
    assert turns > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_other_sequence_is_free_of_the_template(name):
    tokenizer, found = checkpoint(name).processor.tokenizer, written(name)
    free = found["input_ids"][1::2]
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert free[:, 0].tolist() == [first] * len(free)
    assert torch.equal(found["labels"][1::2, 1:], free[:, 1:]) and (found["labels"][:, 0] == -100).all()
    assert len({tuple(row) for row in free.tolist()}) == len(free)


def test_a_model_may_name_several_end_tokens():
    named = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"eos_token_id": [1, 106], "boi_token_index": 7}))
    assert {1, 106, 7} <= self_text._unwritten(named, checkpoint("tiny_llava").processor)


@pytest.mark.parametrize("name", MODELS)
def test_no_image_token_and_no_other_special_token_is_ever_written(name, monkeypatch):
    loaded = checkpoint(name)
    image = loaded.processor.image_token_id
    head = loaded.model.lm_head
    forced = torch.zeros(head.weight.shape[0])
    forced[[image, loaded.processor.tokenizer.pad_token_id]] = 50.0
    handle = head.register_forward_hook(lambda _module, _args, logits: logits + forced)
    try:
        ids = written(name)["input_ids"]
    finally:
        handle.remove()
    assert not torch.isin(ids, torch.tensor([image, loaded.processor.tokenizer.pad_token_id])).any()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_as_it_is(name, monkeypatch):
    monkeypatch.setattr(self_text, "SMALL", 0)
    monkeypatch.setattr(self_text, "_bf16_is_fast", lambda: True)
    model = checkpoint(name).model
    model.model.language_model.layers[0].train()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {key: (module.training, type(module)) for key, module in model.named_modules()}
    gradients = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    attention = model.get_decoder().config._attn_implementation
    random = torch.get_rng_state()
    try:
        written(name, count=2)
        assert flags == {key: (module.training, type(module)) for key, module in model.named_modules()}
    finally:
        model.eval()
    assert model.state_dict().keys() == weights.keys()
    assert all(tensor.dtype == weights[key].dtype for key, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert gradients == {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config.to_dict(), generation.to_dict())
    assert model.get_decoder().config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", MODELS)
def test_it_samples_from_what_the_model_says(name):
    """Written step by step with a cache, the text must be what draws from the whole forward give."""
    loaded = checkpoint(name)
    found = written(name, count=4)
    draws = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.model.lm_head(forward_hidden(loaded.model, found)).float()
    opening, between, closing = (ids_of(name, part) for part in TEMPLATES[name])
    special = {i for i, token in loaded.processor.tokenizer.added_tokens_decoder.items() if token.special}
    ends = sorted({between[0], closing[0]} & special)
    logits[..., sorted(special - {*ends})] = -torch.inf
    logits[1::2][..., ends] = -torch.inf  # text without a template does not end
    agree = []
    for row in range(4):
        chats = row % 2 == 0
        for place in range(len(opening) if chats else 1, LENGTH):
            token = int(found["input_ids"][row, place])
            if chats and token in between[1:] + closing[1:]:
                continue  # put in by the template
            cdf = logits[row, place - 1].softmax(-1).cumsum(-1)
            # In place of an end that is not the template's stands the template's.
            meant = [token, closing[0]] if chats and token == between[0] else [token]
            low, high = ([float(cdf[t - shift]) for t in meant] for shift in (1, 0))
            draw = float(draws[row, place])
            agree.append(any(a - 1e-4 <= draw <= b + 1e-4 for a, b in zip(low, high, strict=True)))
    assert sum(agree) >= 0.98 * len(agree) > 30


def test_the_calibration_stream_reads_the_batches():
    loaded = checkpoint("tiny_llava")
    batches = write_text(loaded.model, loaded.processor, 5, LENGTH, 0, batch_size=2)
    assert [batch["ids"] for batch in batches] == [["self/0", "self/1"], ["self/2", "self/3"], ["self/4"]]
    assert Beginning.of(batches, loaded.processor.image_token_id).ids[:1] == tuple(ids_of("tiny_llava", "<s>USER:"))[:1]
    stream = stream_of(loaded.model, batches)
    assert sum(int(counted.sum()) for counted in stream.counted) == 5 * LENGTH
    hidden = stream.start()
    for index, layer in enumerate(loaded.model.get_decoder().layers):
        stream.advance(layer, index, hidden)
    assert 0 < stream.answer_loss(hidden) < 10


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_position_is_torch_s(masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, heads, seq, 8, generator=generator) for heads, seq in ((6, 1), (2, 9), (2, 9)))
    mask = torch.arange(9).ge(4).view(1, 1, 1, 9) if masked else None
    mine, _ = self_text._attend(None, query, key, value, mask, scaling=0.3)
    known = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(mine, known.transpose(1, 2))


def test_processes_share_the_writing():
    loaded = checkpoint("tiny_llava")

    def made(*part: int) -> dict[str, list[int]]:
        batches = write_text(loaded.model, loaded.processor, 7, LENGTH, 0, batch_size=2, part=part)
        return {name: ids for b in batches for name, ids in zip(b["ids"], b["input_ids"].tolist(), strict=True)}

    parts = [made(rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert made(0, 1) == {name: ids for part in parts for name, ids in part.items()}
    assert made(8, 9) == {}


def test_a_template_that_changes_the_question_lets_the_model_run_free(monkeypatch):
    processor = copy.copy(checkpoint("tiny_llava").processor)
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'][0]['text'] | upper }} {% else %}"
        "ASSISTANT: {{ m['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    monkeypatch.setattr(processor, "chat_template", template)
    batch = write_text(checkpoint("tiny_llava").model, processor, 2, 12, 0)[0]
    assert batch["input_ids"][:, 0].tolist() == [processor.tokenizer.bos_token_id] * 2
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_length_that_does_not_fit_is_refused(length):
    with pytest.raises(UserError, match=r"calibration\.generate_length=\d+: must be in"):
        written("tiny_llava", length=length)


def test_logits_that_are_not_finite_are_refused():
    head = checkpoint("tiny_llava").model.lm_head
    handle = head.register_forward_hook(lambda _module, _args, logits: logits * torch.nan)
    try:
        with pytest.raises(UserError, match="logits are not finite"):
            written("tiny_llava")
    finally:
        handle.remove()


def test_text_joins_records_of_few_tokens_by_default(monkeypatch):
    monkeypatch.setattr(self_text, "SMALL", 0)
    model, prune = checkpoint("tiny_llava").model, PruneConfig("widthwise", "widthwise", 0.3, refit=True)
    width = max(layer.mlp.units for layer in layers_of(model))

    def count(positions: int, config: PruneConfig = prune, context: int | None = None, **options: Any) -> int:
        return sequences(CalibrationConfig(**options), config, positions, model, context)

    assert count(ENOUGH * width) == 0
    assert [count(ENOUGH * width - lacking) for lacking in (1, 128, 129)] == [1, 1, 2]
    assert [count(0, generate_length=length) for length in (64, 2)] == [-(-ENOUGH * width // 64), MOST]
    for how, alone in (({"method": "auto"}, SEARCHED), ({"selection": "global"}, MOST)):
        known = (CalibrationConfig(generate_length=2), replace(prune, **how), 0, model, None)
        assert [sequences(*known, images) for images in (True, False)] == [MOST, alone]
    assert count(0, context=127) == count(0, replace(prune, offload="disk")) == 0
    assert count(0, PruneConfig("layerwise", "layerwise", 0.3)) == 0
    assert [count(0, generate=n) for n in (0, 3)] == [0, 3]
    monkeypatch.setattr(self_text, "SMALL", 1 << 40)
    assert [count(0), count(0, generate=3)] == [0, 3]
