"""Memory by arithmetic: exact where it can be counted, and never in the way of a run that fits."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from efficientllava import pipeline
from efficientllava.checkpoint import export
from efficientllava.checkpoint.folder import load
from efficientllava.estimate import forecast, memory
from efficientllava.estimate.memory import require_memory, stage_memory, weight_bytes
from efficientllava.models.anatomy import layers_of
from efficientllava.models.forward import answer_loss
from efficientllava.recovery.student import prepare, trainable
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import typed

from ..conftest import make_batch
from ..runs import (
    composed,
    run,
    save_tiny,
    small,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def planned(folder, *overrides):
    return forecast(typed(composed(*small(folder, folder.parent / "out", *overrides))))


@pytest.mark.parametrize("train", ["projector", "lora", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_training_state_is_what_training_holds(folder, train, optimizer):
    options = ["prune=none", "recover=sft", f"recover.train={train}", f"recover.optimizer={optimizer}"]
    plan = planned(folder, "model.dtype=bfloat16", *options)
    model = load(str(folder), "bfloat16").model
    before = weight_bytes(model)
    prepare(model, plan.settings.recover)
    names = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimiser = names[optimizer](list(trainable(model)), lr=1e-3)
    batch = make_batch(2, images=False)
    loss = answer_loss(model.float(), batch)
    sum([loss, *(0 * p.sum() for p in trainable(model))]).backward()
    gradients = sum(p.grad.numel() * 4 for p in trainable(model))
    optimiser.step()
    moments = [v for s in optimiser.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    count, added = plan.training
    assert count == sum(p.numel() for p in trainable(model))
    # In training the frozen rest stays in half precision.
    frozen = sum(p.numel() * 2 for p in model.parameters() if not p.requires_grad)
    held = frozen + sum(p.numel() * 4 for p in trainable(model)) + gradients + sum(v.nbytes for v in moments)
    assert before + added == held


def test_weights_are_counted_in_the_type_that_computes(folder):
    stages = stage_memory(planned(folder, "recover=kd_hidden"))
    model = load(str(folder)).model
    assert list(stages) == ["evaluate", "prune", "recover", "measure speed"]
    assert stages["evaluate"].parts["base"] == sum(p.nbytes for p in model.parameters())
    tower = sum(p.nbytes for p in model.model.vision_tower.parameters())
    assert stages["recover"].parts["teacher"] == stages["evaluate"].parts["base"] - tower
    assert stages["recover"].parts["student"] < stages["evaluate"].parts["base"]
    assert all(0 < stage.least < stage.total for stage in stages.values())


def test_weights_that_stay_mapped_do_not_count_until_they_are_changed(folder):
    options = ["model.dtype=bfloat16", "recover=kd_hidden"]
    plan = planned(folder, *options)
    copied, mapped = stage_memory(plan), stage_memory(replace(plan, storage=torch.bfloat16))
    assert mapped["evaluate"].parts["base"] == mapped["measure speed"].least == 0 < copied["evaluate"].least
    layers = sum(weight_bytes(layer.module) for layer in layers_of(plan.pruned))
    assert mapped["prune"].least == mapped["prune"].parts["pruned"] == layers > 0
    dropped = replace(planned(folder, *options, "prune=layerwise"), storage=torch.bfloat16)
    assert stage_memory(dropped)["prune"].least == 0  # layers are left out, and none is changed
    assert mapped["recover"].parts["teacher"] == 0 < mapped["recover"].parts["student"]
    assert stage_memory(replace(plan, storage=torch.bfloat16, device="cuda"))["evaluate"].least > 0


def test_a_cached_teacher_is_not_there_while_the_student_trains(folder):
    stages = stage_memory(planned(folder, "recover=kd_hidden", "recover.teacher.source=cached"))
    assert "teacher" not in stages["recover"].parts
    assert stages["teacher targets"].parts["teacher"] > 0
    assert stages["teacher targets"].parts["student"] < stages["recover"].parts["student"]  # its layers make room
    assert stages["teacher targets"].certain == ("student",)


def test_text_that_the_model_writes_counts(folder):
    prunes = [stage_memory(planned(folder, f"calibration.generate={n}"))["prune"].total for n in (0, 64, 4096)]
    assert prunes[0] < prunes[1] < prunes[2]


def test_what_is_written_is_known_once_the_records_are_read(folder):
    none, some = (stage_memory(planned(folder), 20, written)["prune"].total for written in (0, 4096))
    assert none < some


def test_more_costs_more(folder):
    def total(stage, *overrides):
        return stage_memory(planned(folder, *overrides))[stage].total

    assert total("recover", "recover=sft") < total("recover", "recover=kd_hidden")
    assert total("recover", "recover.gradient_checkpointing=true") < total("recover")
    assert total("prune", "calibration.samples=8") > total("prune", "calibration.samples=4")
    assert total("recover", "data.batch_size=8") > total("recover", "data.batch_size=4")
    taylor = ["prune.importance=param_first", "prune.refit=false"]
    assert total("prune", *taylor, "prune.taylor_mean=batch") > total("prune", *taylor)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    plan = planned(folder, "evaluate.efficiency=false")
    least = max(stage.least for stage in stage_memory(plan).values())
    monkeypatch.setattr(memory, "available", lambda _: least)
    require_memory(plan, "cpu")
    monkeypatch.setattr(memory, "available", lambda _: least - 1)
    weights = "transformers.AutoModelForImageTextToText.from_pretrained"
    monkeypatch.setattr(weights, lambda *_, **__: pytest.fail("loaded"))
    overrides = small(folder, tmp_path / "out", "evaluate.efficiency=false")
    with pytest.raises(
        UserError, match=r"^memory: recover holds at least .* \(student .* \+ teacher .*\), this mac"
    ) as told:
        pipeline.run(composed(*overrides), str(tmp_path / "run"), overrides)
    assert told.value.exit_code == 2
    assert "\n" not in str(told.value)


def test_pruning_counts_whole_once_the_records_are_known(folder, monkeypatch):
    plan = planned(folder, "evaluate.efficiency=false", "prune.offload=false", "calibration.generate=0")
    base, whole = weight_bytes(plan.base), stage_memory(plan, 20)["prune"].total
    assert base < whole < stage_memory(plan, 200)["prune"].total
    monkeypatch.setattr(memory, "available", lambda _: whole - base)  # beside the base, which is loaded
    require_memory(plan, "cpu", 20)
    with pytest.raises(UserError, match=r"^memory: prune holds up to .* \(base .* \+ working set .*\), .*lower calib"):
        require_memory(plan, "cpu", 21)


def test_hidden_states_that_go_to_the_host_must_fit_there(folder, monkeypatch):
    plan = replace(planned(folder, "evaluate.efficiency=false"), device="cuda")
    plan.settings.prune.offload = True
    host = stage_memory(plan, 20)["prune"].host
    assert host > weight_bytes(plan.base)
    found = {"cuda:0": 1 << 40, "cpu": host}
    monkeypatch.setattr(memory, "available", found.get)
    require_memory(plan, "cuda:0", 20)
    found["cpu"] -= 1
    with pytest.raises(UserError, match=r"^memory: prune keeps up to .* the host has"):
        require_memory(plan, "cuda:0", 20)


def test_a_model_in_files_counts_as_its_largest_parts(folder):
    options = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "calibration.generate=0")
    memory, disk = (stage_memory(planned(folder, *options, *more), 20) for more in ((), ("prune.offload=disk",)))
    base = weight_bytes(planned(folder, *options).base)
    assert list(disk) == ["prune"]
    assert memory["prune"].parts["base"] == base
    assert disk["prune"].parts["base"] == disk["prune"].host == 0
    assert 0 < memory["prune"].total - disk["prune"].total < base


def test_what_is_measured_side_by_side_is_held_side_by_side(folder):
    stage = stage_memory(planned(folder))["measure speed"]
    assert stage.least == sum(stage.parts[name] for name in ("base", "pruned", "recovered"))
    assert "measure speed" not in stage_memory(planned(folder, "evaluate.efficiency=false"))


def test_what_is_exported_is_held_in_fp32_on_the_host(folder, monkeypatch):
    plan = replace(planned(folder, "deploy=gguf"), storage=torch.bfloat16)
    stage, dense = stage_memory(plan)["deploy"], weight_bytes(plan.base, torch.float32)
    assert stage.parts == {"exported": weight_bytes(plan.pruned, torch.float32), "dense": dense}
    assert "dense" not in stage_memory(planned(folder, "deploy=gguf", "deploy.measure=false"))["deploy"].parts
    plan = replace(plan, device="cuda")
    assert stage_memory(plan)["deploy"].host == stage.total
    monkeypatch.setattr(memory, "available", lambda device: stage.total - 1 if device == "cpu" else 1 << 40)
    with pytest.raises(UserError, match=r"^memory: deploy holds at least .* the host has"):
        require_memory(plan, "cuda:0")


def alive():
    """Models that have weights."""
    gc.collect()
    names = ("LlavaForConditionalGeneration",)
    models = [o for o in gc.get_objects() if type(o).__name__ in names]
    return [model for model in models if not all(p.is_meta for p in model.parameters())]


def optimisers():
    """Those that hold something of what they train with."""
    return [each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer) and each.state]


def test_a_process_that_loads_the_export_has_the_memory_of_all_models(folder, tmp_path, monkeypatch):
    kept, held = [*alive(), *optimisers()], []

    def look(*_args, **_options):
        held.append([each for each in (*alive(), *optimisers()) if not any(each is other for other in kept)])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=look))
    options = ["recover=sft", "prune.selection=local", "evaluate.efficiency=false", "evaluate=none"]
    run(tmp_path / "run", small(folder, tmp_path / "out", *options))
    assert held == [[], []]  # of the pruned, and of the recovered one


def test_the_base_makes_room_for_the_pruned_model(folder, tmp_path, monkeypatch):
    from efficientllava.stages import recover as stage

    kept = alive()
    held, recover, others = [], stage.train, {id(model) for model in kept}

    def watch(student, *args, **options):
        held.extend(model for model in alive() if id(model) not in others)
        assert student in held
        return recover(student, *args, **options)

    monkeypatch.setattr(stage, "train", watch)
    monkeypatch.setattr("efficientllava.stages.run.reload_gate", lambda *_: None)
    options = ["recover=sft", "prune.selection=local", "evaluate.efficiency=false", "evaluate=none"]
    run(tmp_path / "run", small(folder, tmp_path / "out", *options))
    assert len(held) == 1
    assert len(kept) == len(others)  # kept until here, so that no number is given away again


def test_processes_share_the_host(folder, monkeypatch):
    plan = planned(folder)
    least = max(stage.least for stage in stage_memory(plan).values())
    monkeypatch.setattr(memory, "available", lambda _: 2 * least)
    require_memory(plan, "cpu")
    with pytest.raises(UserError, match="memory:"):
        require_memory(replace(plan, processes=3), "cpu")


def test_the_machine_has_memory():
    assert memory.available("cpu") > 1 << 28


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_memory():
    assert memory.available("cuda:0") > 1 << 30


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [("auto", "set prune.offload=disk or model.dtype=bfloat16"), ("bfloat16", "set prune.offload=disk")],
)
def test_shorter_records_do_not_shrink_weights(folder, monkeypatch, dtype, fix):
    plan = planned(folder, "recover=none", "evaluate=none", "evaluate.efficiency=false", f"model.dtype={dtype}")
    monkeypatch.setattr(memory, "available", lambda _: 0)
    with pytest.raises(UserError, match=rf"^memory: prune holds at least .* left for it; {fix}; dry_run=true"):
        require_memory(plan, "cpu")


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (
            ["recover.train=full"],
            "recover.train=lora or recover.train=projector or recover.teacher.source=cached or "
            "recover.teacher.dtype=bfloat16 or model.dtype=bfloat16",
        ),
        (
            ["recover.train=lora", "model.dtype=bfloat16", "recover.teacher.source=cached"],
            "recover.train=projector",
        ),
    ],
    ids=["all", "little"],
)
def test_the_fix_is_what_is_not_so_already(folder, options, fix):
    assert stage_memory(planned(folder, "recover=kd_hidden", *options))["recover"].fix == f"set {fix}"
