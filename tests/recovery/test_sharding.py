from __future__ import annotations

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.recovery.student import prepare, units_of, weights_of
from efficientllava.settings.schema import LoraConfig

from ..runs import RUN, save_tiny, small
from .conftest import make_cfg, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["projector", "lora", "full"])
def test_every_unit_has_one_type(train, dtype):
    student = make_model().to(dtype)
    prepare(student, make_cfg(sft=1.0, train=train, lora=LoraConfig(r=4)))
    layers = decoder_of(student).layers
    for layer in layers:
        units = list(units_of(layer))
        assert units[0] is layer and len(units) == (15 if (train, dtype) == ("lora", torch.bfloat16) else 1)
        own = {id(p) for unit in units[1:] for p in unit.parameters()}
        groups = [[p for p in layer.parameters() if id(p) not in own], *(list(u.parameters()) for u in units[1:])]
        assert all(len({p.dtype for p in group}) == 1 for group in groups)
    sharded = {id(p) for p in layers.parameters()}
    assert len({p.dtype for p in student.parameters() if p.requires_grad and id(p) not in sharded}) == 1


def test_weights_are_found_where_they_are_no_parameters():
    projector = projector_of(make_model())
    expected = sorted(p.sum().item() for p in projector.parameters())
    weight = projector.linear_1.weight
    del projector.linear_1.weight
    projector.linear_1.weight = weight.detach()
    assert len(list(projector.parameters())) == 3
    assert sorted(p.sum().item() for p in weights_of(projector)) == pytest.approx(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_sharded_recovery_leaves_an_ordinary_checkpoint(tmp_path, train):
    model = save_tiny(tmp_path / "model")
    typed = [
        o for o in small(model, tmp_path / "out", "prune.ratio=0.3", f"recover.train={train}") if o != "trainer=cpu"
    ]
    command = [*RUN, *typed, "trainer=fsdp", "recover.save_every=1", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("pruned", "recovered"))
    assert {name: (v.shape, v.dtype) for name, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())
