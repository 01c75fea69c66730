import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator, GenerationCollator
from efficientllava.evaluation.answers import length_batches, reference_losses
from efficientllava.evaluation.generation import MEANINGLESS, generate, greedy_config, set_aside
from efficientllava.models.forward import (
    answer_loss,
    decoder_inputs,
    to_device,
    vision_features,
)
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.places import local_folder


def _features(model, batch):
    return vision_features(model, batch["pixel_values"].double()) if "pixel_values" in batch else None


def _answers(model, processor, records):
    batch = GenerationCollator(processor)(records)
    return generate(model, processor.tokenizer, batch, _features(model, batch), 6)


def test_batched_generation_equals_one_by_one(family, questions):
    model, processor = family
    prompts = GenerationCollator(processor)(questions)
    assert (prompts["attention_mask"] == 0).any(), "the batch must hold padding"
    assert {record.image is None for record in questions} == {True, False}
    together = _answers(model, processor, questions)
    assert together == [_answers(model, processor, [record])[0] for record in questions]
    assert len(set(together)) > 3, "answers that do not depend on the question would prove nothing"


def test_features_give_the_same_answer_as_pixels(family, questions):
    model, processor = family
    batch = GenerationCollator(processor)([record for record in questions if record.image is not None][:4])
    config = greedy_config(model, processor.tokenizer, 6)
    stock = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"].double(),
        generation_config=config,
    )
    expected = processor.tokenizer.batch_decode(stock[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    actual = generate(model, processor.tokenizer, batch, _features(model, batch), 6)
    assert actual == [text.strip() for text in expected]


def test_generation_equals_full_forward_without_cache(family, questions):
    model, processor = family
    batch = GenerationCollator(processor)(questions[:1])
    inputs = decoder_inputs(model, to_device(batch, "cpu", torch.float64))
    config = greedy_config(model, processor.tokenizer, 5)
    with torch.no_grad():
        cached = model.generate(**inputs, generation_config=config)
        ids = batch["input_ids"]
        for _ in range(cached.shape[1] - ids.shape[1]):
            features = {key: value for key, value in inputs.items() if key == "mm_encoder_outputs"}
            logits = model(input_ids=ids, use_cache=False, **features).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, cached)


# Fields of generation_config.json, each with a value that would change answers or fail.
ADVICE = {
    "do_sample": True, "temperature": 5.0, "top_k": 2, "top_p": 0.1, "num_beams": 3, "repetition_penalty": 3.0,
    "min_length": 40, "min_new_tokens": 5, "max_length": 3, "max_time": 1e-9, "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 2.0, "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[5]],
    "suppress_tokens": [*range(3, 40)], "begin_suppress_tokens": [*range(3, 40)], "sequence_bias": [[[5], 50.0]],
    "forced_bos_token_id": 5, "forced_eos_token_id": 5, "exponential_decay_length_penalty": [1, 9.0],
    "stop_strings": ["e"], "token_healing": True, "guidance_scale": 3.0, "renormalize_logits": True, "min_p": 0.9,
    "typical_p": 0.3, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "num_return_sequences": 2, "length_penalty": 9.0,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
    "cache_implementation": "static", "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.5, "dola_layers": "low",
    "num_beam_groups": 2, "constraints": [1], "force_words_ids": [[5]], "use_cache": False, "prefill_chunk_size": 2,
    "assistant_early_exit": 1, "is_assistant": True, "use_mtp": True, "watermarking_config": {"bias": 5.0},
    "remove_invalid_values": True, "of_nobody": 3,
}  # fmt: skip


def test_decoding_is_greedy_whatever_the_folder_suggests(tiny, questions, monkeypatch):
    model, processor = tiny
    plain, own = _answers(model, processor, questions[:6]), model.generation_config
    for name, value in ADVICE.items():
        advised = copy.deepcopy(own)
        setattr(advised, name, value)
        monkeypatch.setattr(model, "generation_config", advised)
        assert _answers(model, processor, questions[:6]) == plain, name
        told = {} if name in MEANINGLESS or not value else {name: value}
        assert model.generation_config is advised and set_aside(model) == told, name
    monkeypatch.setattr(model, "generation_config", own)
    assert set_aside(model) == {}


@pytest.mark.parametrize("advice", [{"num_return_sequences": 2}, {"compile_config": {"mode": "default"}}])
def test_advice_that_the_library_refuses_keeps_no_model_from_loading(tmp_path, caplog, advice):
    folder = shutil.copytree(local_folder("builtin:tiny_llava"), tmp_path / "advised")
    file = folder / "generation_config.json"
    tokens = json.loads(file.read_text())
    file.write_text(json.dumps({**tokens, **advice}))
    loaded = load(folder).model
    assert loaded.generation_config.eos_token_id == tokens["eos_token_id"] and set_aside(loaded) == {}
    assert "only the special tokens count" in caplog.text
    file.write_text(json.dumps({**tokens, "eos_token_id": "end"}))
    with pytest.raises(UserError, match="eos_token_id='end' must be a token's number"):
        load(folder)


def test_logits_and_losses_that_are_not_finite_are_told_by_record(tiny, questions, monkeypatch):
    model, processor = tiny
    head = model.lm_head.forward

    def broken(hidden):
        logits = head(hidden).clone()
        logits[2] = float("nan")
        return logits

    monkeypatch.setattr(model.lm_head, "forward", broken)
    records = questions[:4]
    with pytest.raises(UserError, match=f"record {records[2].id!r}: the model's logits are not finite"):
        _answers(model, processor, records)
    batch = Collator(processor, pack=False)(records)
    row = int((batch["labels"][:, 1:] != -100).nonzero()[2, 0])  # that of the third supervised position
    with pytest.raises(UserError, match=f"record {records[row].id!r}: the loss of the reference answer: not finite"):
        reference_losses(model, batch, _features(model, batch))


def test_end_token_of_the_model_wins_over_the_tokenizer(tiny, monkeypatch):
    model, _ = tiny
    tokenizer = SimpleNamespace(eos_token_id=3, pad_token_id=None)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 8])
    config = greedy_config(model, tokenizer, 3)
    assert config.eos_token_id == [7, 8] and config.pad_token_id == 7
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    config = greedy_config(model, tokenizer, 3)
    assert config.eos_token_id == [3] and config.pad_token_id == 3


def test_reference_losses_per_row_sum_to_the_answer_loss(family, questions):
    model, processor = family
    batch = Collator(processor, pack=False)(questions)
    features = _features(model, batch)
    sums, counts = reference_losses(model, batch, features)
    with torch.no_grad():
        expected = answer_loss(model, batch, features, reduction="sum").item()
    assert sum(sums) == pytest.approx(expected, rel=1e-5)
    assert counts == (batch["labels"] != -100).sum(1).tolist() and min(counts) >= 1
    alone = Collator(processor, pack=False)(questions[3:4])
    assert reference_losses(model, alone, _features(model, alone))[0][0] == pytest.approx(sums[3], rel=1e-5)


@pytest.mark.parametrize(("size", "batch_size", "world"), [(24, 5, 1), (24, 128, 2), (24, 4, 3), (3, 8, 4), (1, 1, 2)])
def test_every_question_lies_in_exactly_one_batch(questions, size, batch_size, world):
    records = questions[:size]
    shares = [length_batches(records, batch_size, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(size))
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    assert sum(1 for share in shares if share) == min(size, world), "no process may idle while there is work"


def test_batches_hold_questions_of_like_length(questions):
    batches = length_batches(questions, 6)
    mixed = [batch for batch in batches if len({questions[i].image is None for i in batch}) > 1]
    assert len(mixed) <= 1
    lengths = [len(questions[i].turns[0].question) for batch in batches for i in batch if questions[i].image]
    assert lengths == sorted(lengths, reverse=True)


def test_a_stop_text_ends_an_answer_and_is_cut_off(tiny, questions):
    model, processor = tiny
    batch = GenerationCollator(processor)(questions[:6])
    features, tokenizer = _features(model, batch), processor.tokenizer
    whole = generate(model, tokenizer, batch, features, 8)
    mark = next(text for text in whole if len(text) > 3)[1:3]
    stopped = generate(model, tokenizer, batch, features, 8, (mark, "never"))
    assert stopped == [text.split(mark)[0].strip() for text in whole]
    assert any(mark in text for text in whole)
