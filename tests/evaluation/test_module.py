import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from efficientllava.data.collator import GenerationCollator
from efficientllava.evaluation.module import EvaluationModule, evaluate, gather, in_order
from efficientllava.evaluation.tasks.digits_vqa import DigitsVQA
from efficientllava.models.anatomy import projector_of
from efficientllava.models.forward import feature_cache
from efficientllava.schema import EvaluateConfig

CFG = EvaluateConfig(batch_size=7, max_new_tokens=4)
TASK = DigitsVQA(24)


def _trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def test_evaluate_answers_every_question_in_order_and_deterministically(tiny, questions):
    model, processor = tiny
    first = evaluate(model, processor, TASK, _trainer(), CFG)
    assert [item["id"] for item in first.predictions] == [record.id for record in questions]
    assert [item["answer"] for item in first.predictions] == [record.turns[0].answer for record in questions]
    assert first.metrics["n"] == 24 and 0 <= first.metrics["accuracy"] <= 1
    assert first.metrics["answer_loss"] > 1, "an untrained model knows no answer"
    second = evaluate(model, processor, TASK, _trainer(), replace(CFG, batch_size=3))
    assert [item["prediction"] for item in second.predictions] == [item["prediction"] for item in first.predictions]
    assert second.metrics["answer_loss"] == pytest.approx(first.metrics["answer_loss"], rel=1e-6)


def test_limit_takes_the_first_questions(tiny):
    model, processor = tiny
    assert evaluate(model, processor, TASK, _trainer(), replace(CFG, limit=5)).metrics["n"] == 5


def test_a_trainer_told_to_stop_early_scores_what_was_answered(tiny):
    model, processor = tiny
    assert evaluate(model, processor, TASK, _trainer(limit_predict_batches=1), CFG).metrics["n"] == 7


def test_two_ranks_answer_what_one_answers(tiny, questions):
    model, processor = tiny
    alone = evaluate(model, processor, TASK, _trainer(), CFG)
    shares = []
    for rank in range(2):
        module = EvaluationModule(model, processor, questions, CFG, feature_cache(model))
        module._trainer = SimpleNamespace(global_rank=rank, world_size=2)
        for index, batch in enumerate(module.predict_dataloader()):
            module.predict_step(batch, index)
        shares.append(module.predictions)
    assert all(shares) and sum(map(len, shares)) == 24
    together = in_order(shares[1] + shares[0], questions)
    assert [item["prediction"] for item in together] == [item["prediction"] for item in alone.predictions]
    assert TASK.score(together) == pytest.approx(alone.metrics)


def test_each_image_passes_the_tower_once_over_several_models(tiny):
    model, processor = tiny
    seen = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append(args), with_kwargs=True
    )
    cache = feature_cache(model)
    first = evaluate(model, processor, TASK, _trainer(), CFG, cache)
    calls = len(seen)
    second = evaluate(model, processor, TASK, _trainer(), CFG, cache)
    handle.remove()
    assert 0 < calls == len(seen)
    assert second.predictions == first.predictions


def test_cached_features_can_be_trained_on(tiny, questions):
    model, processor = tiny
    cache = feature_cache(model)
    evaluate(model, processor, TASK, _trainer(), CFG, cache)
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
        evaluate(model, processor, TASK, _trainer(), CFG)


def test_doubled_and_lost_answers_are_errors(questions):
    items = [{"id": record.id} for record in questions]
    assert in_order(items[::-1], questions) == items
    with pytest.raises(RuntimeError, match="1 questions were answered more than once"):
        in_order([*items, items[0]], questions)
    with pytest.raises(RuntimeError, match="2 never"):
        in_order(items[2:], questions)
    assert in_order(items[2:], questions, partial=True) == items[2:]


def _gather_in_process(rank, port, queue):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queue.put((rank, gather([{"id": f"{rank}-{i}"} for i in range(rank + 1)])))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_rank_gets_the_predictions_of_all():
    assert gather([{"id": "a"}]) == [{"id": "a"}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_gather_in_process, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found[0] == found[1] == [{"id": "0-0"}, {"id": "1-0"}, {"id": "1-1"}]
