from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from efficientllava.models.anatomy import projector_of
from efficientllava.models.forward import answer_loss
from efficientllava.recovery.recover import RESUME_POINT, BatchStream, accumulation, optimiser_steps, recover
from efficientllava.runtime.errors import NotFiniteError, UserError
from efficientllava.settings.schema import LoraConfig

from .conftest import (
    VOCAB,
    Data,
    drop_layers,
    make_batch,
    make_cfg,
    make_factory,
    make_model,
    perturb,
)

HIDDEN = {"sft": 0.5, "hidden": 0.5}


class KilledError(Exception):
    pass


class Kill(L.Callback):
    """Stops like a killed process, before a micro-batch and without any clean-up."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise KilledError


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(student: Any, workdir: Any, teacher: Any = None, data: Data | None = None, extra=(), **changes: Any) -> Any:
    data = data or Data()
    options = {k: changes.pop(k) for k in ("global_batch_size", "original_layers") if k in changes}
    cfg = make_cfg(**{**HIDDEN, **changes})
    factory = make_factory(extra)
    return recover(student, data, cfg, factory, workdir, batch_size=data.batch_size, teacher=teacher, **options)


@pytest.mark.parametrize("weights", [HIDDEN, {"sft": 1.0, "hidden": 0.0}, {"sft": 0.0, "logit": 1.0, "hidden": 0.0}])
def test_the_loss_goes_down(tmp_path, weights):
    teacher = make_model()
    student = perturb(teacher, 0.2)
    stats = run(student, tmp_path / "short", teacher, steps=1, **weights)
    after = run(student, tmp_path / "long", teacher, steps=30, lr=3e-3, **weights)
    first = sum(stats.final_losses.values())
    assert sum(after.final_losses.values()) < 0.9 * first
    assert after.steps == 30 and after.samples == 120 and after.seconds > 0 and after.tokens > 30


def test_projector_mode_changes_the_projector_only(tmp_path):
    student = perturb(make_model())
    before = state(student)
    stats = run(student, tmp_path, sft=1.0, hidden=0.0, train="projector")
    changed = {name for name, value in state(student).items() if not torch.equal(value, before[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    assert stats.trainable_parameters == sum(p.numel() for p in projector_of(student).parameters())
    assert stats.loss == "1 x CE" and stats.train == "projector"


def test_a_half_precision_model_is_left_as_it_was_but_for_its_weights(tmp_path):
    student = make_model().bfloat16()
    run(student, tmp_path, sft=1.0, hidden=0.0, train="projector", steps=1)
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in student.parameters())
    assert student.to("meta").device.type == "meta"


def test_lora_leaves_a_plain_model_that_learned(tmp_path):
    teacher = make_model()
    student = perturb(teacher)
    before, batch = state(student), make_batch()
    loss = answer_loss(student, batch).item()
    run(student, tmp_path, teacher, train="lora", lora=LoraConfig(r=4, dropout=0.1), steps=10)
    after = state(student)
    assert set(after) == set(before)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(*(s["model.language_model.layers.0.mlp.up_proj.weight"] for s in (before, after)))
    assert answer_loss(student, batch).item() < loss


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulated_micro_batches_equal_one_big_batch(tmp_path, optimizer):
    teacher, results = make_model(), []
    weights = {"sft": 0.3, "logit": 0.3, "hidden": 0.4, "hidden_layers": "all"}
    for batch_size in (2, 8):
        student = perturb(teacher)
        data = Data(batch_size=batch_size)
        stats = run(
            student, tmp_path / str(batch_size), teacher, data, steps=4, lr=1e-3, optimizer=optimizer,
            global_batch_size=8, **weights,
        )  # fmt: skip
        assert stats.steps == 4 and stats.samples == 32
        results.append(state(student))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)
    assert not torch.equal(results[0]["lm_head.weight"], perturb(teacher).state_dict()["lm_head.weight"])


@pytest.mark.parametrize(("train", "stop"), [("full", 6), ("full", 7), ("full", 17), ("full", 20), ("lora", 10)])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, train, stop):
    """Of 20 micro-batches, two a step: 6 is just after a resume point, the others lose steps; 20 ended unharmed."""
    teacher = make_model()
    options: dict[str, Any] = {
        "train": train, "steps": 10, "save_every": 3, "global_batch_size": 8, "lora": LoraConfig(r=4, dropout=0.2),
    }  # fmt: skip
    whole, killed = perturb(teacher), perturb(teacher)
    expected = run(whole, tmp_path / "whole", teacher, **options)
    for _ in range(2):  # what goes on may be killed, too
        with contextlib.suppress(KilledError) if stop == 20 else pytest.raises(KilledError):
            run(copy.deepcopy(killed), tmp_path / "killed", teacher, extra=(Kill(stop),), **options)
    saved = torch.load(tmp_path / "killed" / RESUME_POINT, weights_only=True)
    assert saved["global_step"] == 3 * (stop // 6)
    stats = run(killed, tmp_path / "killed", teacher, **options)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in killed.state_dict().items())
    assert (stats.steps, stats.tokens, stats.samples) == (expected.steps, expected.tokens, expected.samples)
    assert stats.final_losses == expected.final_losses


def test_a_run_that_ended_on_a_resume_point_is_not_trained_again(tmp_path):
    teacher = make_model()
    first, second = perturb(teacher), perturb(teacher)
    expected = run(first, tmp_path, teacher, save_every=3)
    stats = run(second, tmp_path, teacher, save_every=3)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in second.state_dict().items())
    assert (stats.steps, stats.tokens, stats.final_losses) == (expected.steps, expected.tokens, expected.final_losses)


def test_resume_points_are_small_and_whole(tmp_path):
    teacher = make_model()
    run(perturb(teacher), tmp_path, teacher, train="projector", save_every=2)
    assert [path.name for path in tmp_path.iterdir()] == [RESUME_POINT]
    weights = torch.load(tmp_path / RESUME_POINT, weights_only=True)["state_dict"]
    assert weights and all("multi_modal_projector" in name for name in weights)


def test_a_resume_point_of_another_run_is_refused(tmp_path):
    teacher = make_model()
    run(perturb(teacher), tmp_path, teacher, train="projector", save_every=2)
    with pytest.raises(UserError, match=r"last\.ckpt"):
        run(perturb(teacher), tmp_path, teacher, train="full", save_every=2)


def test_a_student_with_dropped_layers_learns_from_the_whole_teacher(tmp_path):
    teacher = make_model()
    student = drop_layers(teacher, {1})
    options = {"original_layers": [0, 2, 3], "hidden_layers": "all", "sft": 0.0, "hidden": 1.0, "lr": 1e-3}
    stats = run(student, tmp_path / "a", teacher, steps=1, **options)
    after = run(student, tmp_path / "b", teacher, steps=20, **options)
    assert after.final_losses["hidden"] < stats.final_losses["hidden"]
    with pytest.raises(UserError, match="4 layers do not match the student's 3"):
        run(student, tmp_path / "c", teacher)


@pytest.mark.parametrize(
    ("place", "weights", "told"),
    [
        ("lm_head.weight", {"sft": 1.0, "hidden": 0.0}, "loss sft, CE, is nan at step 0"),
        # The norm's gain is the student's alone: cross-entropy of a teacher that is fine stays fine.
        (
            "model.language_model.norm.weight",
            {"sft": 0.0, "hidden": 1.0},
            r"loss hidden, L2\(hidden\), is nan at step 0",
        ),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, place, weights, told):
    teacher = make_model()
    student = perturb(teacher)
    student.get_parameter(place).data.view(-1)[0] = float("nan")
    with pytest.raises(NotFiniteError, match=told):
        run(student, tmp_path, teacher, **weights)


def test_a_gradient_that_is_not_finite_ends_the_run_even_in_the_last_step(tmp_path):
    student = make_model()
    weight = student.lm_head.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(NotFiniteError, match=r"the gradient's norm is (nan|inf) at step 0"):
        run(student, tmp_path, sft=1.0, hidden=0.0, steps=1)
    assert torch.equal(weight, before)


def test_distillation_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"recover\.teacher\.path"):
        run(make_model(), tmp_path)


SCRIPT = """
import copy, sys, torch
from pathlib import Path
from tests.recovery.conftest import Data, make_cfg, make_factory, make_model, perturb
from tests.recovery.test_recover import Kill, KilledError
from efficientllava.runtime.processes import connect, finish, rank
from efficientllava.recovery.teacher import TargetCache
from efficientllava.runtime.content import Memo
from efficientllava.recovery.recover import recover
from efficientllava.recovery.student import Sharding
from efficientllava.settings.schema import LoraConfig

torch.set_num_threads(1)
out, world, strategy, train = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
connect({"accelerator": "cpu"})
teacher = make_model()
cfg = make_cfg(sft=0.3, logit=0.3, hidden=0.4, steps=6, lr=1e-3, save_every=2, train=train, lora=LoraConfig(r=4))

def run(student, source, workdir, extra=()):
    own = {"devices": world, "strategy": Sharding() if strategy == "sharded" else "ddp"} if world > 1 else {}
    options = {"batch_size": 4, "global_batch_size": 16, "teacher": source}
    return recover(student, Data(), cfg, make_factory(extra, **own), workdir, **options)

student = perturb(teacher)
if world > 1:
    cache = TargetCache(out / "targets", teacher.config, torch.float32, lambda: copy.deepcopy(teacher), Memo())
    try:
        run(copy.deepcopy(student), cache, out, (Kill(3),))
    except KilledError:
        stats = run(student, cache, out)
        assert stats.targets.computed == 0 and stats.targets.records == 24
else:
    stats = run(student, teacher, out)
torch.save((student.state_dict(), stats.steps, stats.samples, stats.trainable_parameters), out / f"{rank()}.pt")
finish()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("strategy", "train"), [("ddp", "full"), ("sharded", "full"), ("sharded", "lora")])
def test_two_processes_that_were_killed_equal_one_with_a_live_teacher(tmp_path, strategy, train):
    """Each process computes half of the teacher's answers; both go on from the resume point of step 2."""
    assert make_cfg().teacher.top_k >= VOCAB  # nothing of the teacher's logits is lost
    results = []
    for world in (1, 2):
        out = tmp_path / str(world)
        out.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        (tmp_path / "script.py").write_text(SCRIPT)
        root = Path(__file__).parents[2]
        command = [sys.executable, *launch, str(tmp_path / "script.py"), str(out), str(world), strategy, train]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        subprocess.run(command, check=True, cwd=root, env=environment, timeout=400)
        results += [torch.load(path, weights_only=True) for path in sorted(out.glob("*.pt"))]
    assert len(results) == 3
    for weights, *numbers in results[1:]:
        assert numbers == list(results[0][1:]) and numbers[:2] == [6, 96]
        torch.testing.assert_close(weights, results[0][0], atol=2e-5, rtol=1e-4)
    assert all(torch.equal(value, results[2][0][name]) for name, value in results[1][0].items())
    shards = list((tmp_path / "2" / "targets").glob("final-*.safetensors"))
    assert len(shards) == 2


def test_parity_mode_trains(tmp_path):
    teacher = make_model()
    stats = run(perturb(teacher), tmp_path, teacher, parity="vlmcompression", global_batch_size=8)
    assert stats.loss == "0.5 x CE + 0.5 x L2(hidden) [as vlmcompression]" and stats.steps == 6


def test_epochs_become_steps():
    assert optimiser_steps(7, None, 100, 4) == 7
    assert optimiser_steps(None, 2, 10, 4) == 5
    assert optimiser_steps(None, 0.5, 11, 1) == 6


def test_the_global_batch_is_a_whole_number_of_rounds():
    assert [accumulation(4, None, 2), accumulation(4, 8, 2), accumulation(4, 32, 2)] == [1, 1, 4]
    for size in (4, 12):
        with pytest.raises(UserError, match=r"data\.global_batch_size"):
            accumulation(4, size, 2)


def ids(stream: BatchStream) -> list[list[str]]:
    return [batch["ids"] for batch in stream]


def test_a_stream_covers_each_epoch_in_an_order_of_its_own():
    batches = ids(BatchStream(Data(24, 4).train_dataloader(), 12))
    assert len(batches) == 12
    first, second = ([name for batch in part for name in batch] for part in (batches[:6], batches[6:]))
    assert sorted(first) == sorted(second) == sorted(map(str, range(24)))
    assert first != second


def test_a_stream_goes_on_where_its_state_was_taken():
    whole = ids(BatchStream(Data(24, 4).train_dataloader(), 14))
    for stop in (1, 6, 9, 14):
        stream = BatchStream(Data(24, 4).train_dataloader(), 14)
        taken = [batch["ids"] for batch, _ in zip(stream, range(stop), strict=False)]
        again = BatchStream(Data(24, 4).train_dataloader(), 14)
        again.load_state_dict({"position": stop})
        assert taken + ids(again) == whole and len(again) == 14
