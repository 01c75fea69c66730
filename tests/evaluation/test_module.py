from dataclasses import replace
from types import SimpleNamespace

import pytest

from efficientllava.data.collator import GenerationCollator
from efficientllava.evaluation.answers import EvaluationModule, answer, in_order, resume
from efficientllava.evaluation.score import as_record
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.models.anatomy import projector_of
from efficientllava.models.forward import FeatureCache
from efficientllava.runtime.files import Lines
from efficientllava.settings.schema import EvaluateConfig
from experiments.speed.rows import quiet_trainer

from .conftest import evaluate

CFG = EvaluateConfig(batch_size=7, max_new_tokens=4)
TASK = digits_vqa(24)


def test_evaluate_answers_every_question_in_order_and_deterministically(tiny, questions):
    model, processor = tiny
    first = evaluate(model, processor, TASK, quiet_trainer(), CFG)
    assert [item["question_id"] for item in first.lines] == [record.id for record in questions]
    assert [item["metadata"]["answer"] for item in first.lines] == [record.turns[0].answer for record in questions]
    assert first.scores.metrics["n"] == 24 and 0 <= first.scores.metrics["accuracy"] <= 1
    assert first.scores.metrics["answer_loss"] > 1, "an untrained model knows no answer"
    second = evaluate(model, processor, TASK, quiet_trainer(), replace(CFG, batch_size=3))
    assert [item["text"] for item in second.lines] == [item["text"] for item in first.lines]
    assert second.scores.metrics["answer_loss"] == pytest.approx(first.scores.metrics["answer_loss"], rel=1e-6)


def test_limit_takes_the_first_questions(tiny):
    model, processor = tiny
    assert evaluate(model, processor, TASK, quiet_trainer(), replace(CFG, limit=5)).scores.metrics["n"] == 5


def test_a_prompt_beyond_the_context_is_told_once(tiny, questions, monkeypatch, caplog):
    (model, processor), generated = tiny, replace(TASK, answer_loss=False)
    answer(model, processor, generated, quiet_trainer(), CFG)
    assert "context" not in caplog.text
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 16)
    answer(model, processor, generated, quiet_trainer(), CFG)
    (told,) = (message for message in caplog.messages if "context" in message)
    assert "digits_vqa: the prompt of " in told and "the model's context is 16" in told


def test_a_trainer_told_to_stop_early_scores_what_was_answered(tiny):
    model, processor = tiny
    assert evaluate(model, processor, TASK, quiet_trainer(limit_predict_batches=1), CFG).scores.metrics["n"] == 7


def test_two_ranks_answer_what_one_answers(tiny, questions):
    model, processor = tiny
    alone = evaluate(model, processor, TASK, quiet_trainer(), CFG)
    shares = []
    for rank in range(2):
        module = EvaluationModule(model, processor, TASK, questions, CFG, FeatureCache(model))
        module.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches = enumerate(module.predict_dataloader())
        shares.append([found for index, batch in batches for found in module.predict_step(batch, index)])
    assert all(shares) and sum(map(len, shares)) == 24
    together = in_order(shares[1] + shares[0], questions)
    assert [item["text"] for item in together] == [item["text"] for item in alone.lines]
    assert TASK.score([as_record(item) for item in together]).metrics == pytest.approx(alone.scores.metrics)


def test_each_image_passes_the_tower_once_over_several_models(tiny):
    model, processor = tiny
    seen = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append(args), with_kwargs=True
    )
    cache = FeatureCache(model)
    first = evaluate(model, processor, TASK, quiet_trainer(), CFG, cache)
    calls = len(seen)
    second = evaluate(model, processor, TASK, quiet_trainer(), CFG, cache)
    handle.remove()
    assert 0 < calls == len(seen)
    assert second.lines == first.lines


def test_cached_features_can_be_trained_on(tiny, questions):
    model, processor = tiny
    cache = FeatureCache(model)
    evaluate(model, processor, TASK, quiet_trainer(), CFG, cache)
    batch = GenerationCollator(processor)([record for record in questions if record.image is not None][:1])
    projector_of(model)(cache(batch)).sum().backward()
    assert all(p.grad is not None for p in projector_of(model).parameters())
    model.zero_grad(set_to_none=True)


def test_a_failing_generation_fails_the_evaluation(tiny, monkeypatch):
    model, processor = tiny

    def broken(**_kwargs):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="the model is broken"):
        evaluate(model, processor, TASK, quiet_trainer(), CFG)


def test_doubled_and_lost_answers_are_errors(questions):
    items = [{"answer_id": record.id} for record in questions]
    assert in_order(items[::-1], questions) == items
    with pytest.raises(RuntimeError, match="1 questions were answered more than once"):
        in_order([*items, items[0]], questions)
    with pytest.raises(RuntimeError, match="2 never"):
        in_order(items[2:], questions)
    assert in_order(items[2:], questions, partial=True) == items[2:]


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_evaluation_goes_on_where_it_was(tiny, questions, tmp_path, monkeypatch):
    model, processor = tiny
    whole = answer(model, processor, TASK, quiet_trainer(), CFG, model_id="m")
    count = []

    def dies(*args, **options):
        count.append(1)
        if len(count) == 3:
            raise Killed
        return generate(*args, **options)

    generate = model.generate
    monkeypatch.setattr(model, "generate", dies)
    with pytest.raises(Killed):
        answer(model, processor, TASK, quiet_trainer(), CFG, work=tmp_path / "work", model_id="m")
    (file,) = (tmp_path / "work").glob("answers-*.jsonl")
    assert file.read_bytes().count(b"\n") == 14, "two batches of seven were written as they came"
    with file.open("ab") as handle:
        handle.write(b'{"question_id": "half of a li')
    asked = []
    monkeypatch.setattr(model, "generate", lambda **kw: asked.append(len(kw["input_ids"])) or generate(**kw))
    again = answer(model, processor, TASK, quiet_trainer(), CFG, work=tmp_path / "work", model_id="m")
    assert sum(asked) == 10, "what was answered is not asked again"
    assert [item["text"] for item in again] == [item["text"] for item in whole]
    assert [item["answer_id"] for item in again] == [record.id for record in questions]
    asked.clear()
    assert answer(model, processor, TASK, quiet_trainer(), CFG, work=tmp_path / "work", model_id="m") == again
    assert asked == []


def keep(lines, folder, rank):
    Lines(folder / f"answers-{rank}.jsonl").append(lines)


def test_what_every_process_has_written_is_found_and_half_a_line_cut_off(tmp_path):
    assert resume(tmp_path / "new") == [] and (tmp_path / "new").is_dir()
    keep([{"a": 1}, {"a": "\u2028é"}], tmp_path, 0)
    keep([{"a": 3}], tmp_path, 1)
    with (tmp_path / "answers-1.jsonl").open("a") as file:
        file.write('{"a": 4')
    assert [item["a"] for item in resume(tmp_path)] == [1, "\u2028é", 3]
    keep([{"a": 5}], tmp_path, 1)
    assert [item["a"] for item in resume(tmp_path)] == [1, "\u2028é", 3, 5]


def test_questions_about_one_image_share_its_vision_pass(tiny, questions):
    model, processor = tiny
    record = next(record for record in questions if record.image is not None)
    twins = [replace(record, id=str(index), image=record.image.copy()) for index in range(5)]
    seen = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    task = SimpleNamespace(records=lambda: twins, answer_loss=False, divergence=False, stop=(), max_new_tokens=4)
    lines = answer(model, processor, task, quiet_trainer(), replace(CFG, batch_size=2))
    handle.remove()
    assert seen == [1]
    assert len(lines) == 5 and len({item["text"] for item in lines}) == 1


def test_skipped_questions_have_an_empty_answer(tiny, questions):
    model, processor = tiny
    records = [
        replace(record, details={"skipped": True}) if index % 2 else record
        for index, record in enumerate(questions[:6])
    ]
    task = SimpleNamespace(records=lambda: records, answer_loss=False, divergence=False, stop=(), max_new_tokens=4)
    lines = answer(model, processor, task, quiet_trainer(), CFG)
    assert [item["text"] == "" for item in lines] == [False, True] * 3


def test_an_answer_that_was_damaged_is_asked_for_again(tmp_path, caplog):
    keep([{"answer_id": "1", "text": "three"}, {"answer_id": "2", "text": "four"}], tmp_path, 0)
    file = tmp_path / "answers-0.jsonl"
    file.write_text(file.read_text().replace("three", "threw"))
    assert [item["answer_id"] for item in resume(tmp_path)] == ["2"]
    assert len(caplog.records) == 1
