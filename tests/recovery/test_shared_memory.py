from __future__ import annotations

import copy

import pytest
import torch

from efficientllava.models.anatomy import decoder_of
from efficientllava.models.forward import FeatureCache, supervised_positions
from efficientllava.models.offload import Offload
from efficientllava.recovery.recover import recover
from efficientllava.recovery.teacher import FINAL, Teacher

from .conftest import (
    Data,
    make_batch,
    make_cfg,
    make_factory,
    make_model,
    perturb,
)


def storages(*models) -> set[int]:
    return {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}


@pytest.fixture
def copying(monkeypatch):
    """A device whose memory is not the host's."""
    monkeypatch.setattr(Offload, "take", lambda _, tensor: tensor.data.clone())


def places(model) -> list[list[int]]:
    """Where the weights of every decoder layer lie."""
    return [[p.data_ptr() for p in block.parameters()] for block in decoder_of(model).layers]


def away(model, home: list[list[int]]) -> list[int]:
    """Layers all of whose weights are somewhere else."""
    return [i for i, (now, at) in enumerate(zip(places(model), home, strict=True)) if not {*now} & {*at}]


def test_one_layer_at_a_time_is_on_the_device_and_the_answers_are_the_same(copying):
    model, batch = make_model(), make_batch()
    mask, _ = supervised_positions(batch["labels"])
    features = FeatureCache(model)(batch)
    expected = Teacher(copy.deepcopy(model), model)(batch, features, [0, 2], mask)
    teacher = Teacher(model, copy.deepcopy(model), offloaded=True).to("cpu")
    layers, visits = decoder_of(model).layers, []
    home = places(model)
    for block in layers:
        block.mlp.register_forward_hook(lambda *_: visits.append(away(model, home)))
    got = teacher(batch, features, [0, 2], mask)
    assert visits == [[index] for index in range(len(layers))] and places(model) == home
    assert all(torch.equal(got.states[layer], expected.states[layer]) for layer in (FINAL, 0, 2))


def test_a_layer_leaves_also_when_it_fails(copying):
    model = make_model()
    Teacher(model, copy.deepcopy(model), offloaded=True).to("cpu")
    layer, visits, home = decoder_of(model).layers[0], [], places(model)
    layer.self_attn.register_forward_pre_hook(lambda *_: visits.append(away(model, home)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(torch.zeros(1, 2, 24), position_embeddings=None)
    assert visits == [[0]] and places(model) == home


def test_an_offloaded_teacher_trains_the_same_student(tmp_path):
    teacher, students = make_model(), []
    for offload in (False, True):
        student = perturb(teacher)
        cfg = make_cfg(sft=0.5, hidden=0.5, logit=0.5)
        cfg.teacher.offload = offload
        recover(student, Data(), cfg, make_factory(), tmp_path / str(offload), batch_size=4, teacher=teacher)
        students.append(student.state_dict())
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_the_weights_of_an_equal_tower_are_in_memory_once():
    for dtype in (torch.float32, torch.bfloat16):
        model, student = make_model().to(dtype), perturb(make_model()).to(dtype)
        tower = [name for name, _ in model.named_parameters() if "vision_tower" in name]
        apart = len(storages(model, student))
        teacher = Teacher(model, student).to("cpu")
        assert len(storages(teacher.model, student)) == apart - len(tower)
        assert tower and all(
            teacher.model.get_parameter(name).data_ptr() == student.get_parameter(name).data_ptr() for name in tower
        )


def test_towers_that_differ_stay_apart():
    model, student = make_model(0), make_model(1)
    apart = len(storages(model, student))
    Teacher(model, student).to("cpu")
    assert len(storages(model, student)) == apart
    half = copy.deepcopy(model).half()
    Teacher(half, model)  # equal, but of another type
    assert not storages(half) & storages(model)


def test_training_keeps_the_shared_tower(tmp_path):
    teacher = make_model()
    student = perturb(teacher)
    tower = {name: p.clone() for name, p in teacher.named_parameters() if "vision_tower" in name}
    cfg = make_cfg(sft=0.5, hidden=0.5, train="full")
    recover(student, Data(), cfg, make_factory(), tmp_path, batch_size=4, teacher=teacher)
    assert storages(teacher) & storages(student)
    assert all(torch.equal(teacher.get_parameter(name), value) for name, value in tower.items())
