import copy
import importlib.util

import pytest
import torch
from torch import nn

from efficientllava.evaluation import efficiency
from efficientllava.evaluation.efficiency import GROUP, quantized
from efficientllava.models.anatomy import decoder_of, parameters
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import typed
from efficientllava.stages.request import check

from ..runs import composed, run, small
from .conftest import build


def logits(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_missing_torchao_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        UserError, match=r"evaluate\.quantization=int8: torchao is not installed; pip install"
    ) as caught:
        check(typed(composed("evaluate.quantization=int8")))
    assert caught.value.exit_code == 2
    check(typed(composed("evaluate.quantization=none")))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("int4", 0.5)])
def test_the_copy_is_smaller_close_and_the_model_untouched(tiny, kind, most):
    pytest.importorskip("torchao")
    model = copy.deepcopy(tiny[0]).float()
    before = logits(model)
    twin = quantized(model, kind)
    assert torch.equal(logits(model), before), "the model itself stays as it is"
    error = (logits(twin) - before).norm() / before.norm()
    assert 0 < error < most
    assert twin.lm_head.weight is model.lm_head.weight
    linears = {n: m for n, m in decoder_of(twin).named_modules() if isinstance(m, nn.Linear)}
    whole = dict(decoder_of(model).named_modules())
    assert linears and all(efficiency.tensor_bytes(m.weight) < 2 * m.weight.numel() for m in linears.values())
    if kind == "int4":
        narrow = [name for name in linears if whole[name].in_features % GROUP]
        assert narrow and all(m.in_features % GROUP == 0 for m in linears.values())
    else:
        assert parameters(twin) == parameters(model)


@pytest.mark.parametrize("width", [1, 31, 32, 45])
def test_int4_of_any_width_is_a_rounding_of_the_weights(width):
    pytest.importorskip("torchao")
    model = copy.deepcopy(build("tiny_llava")[0]).float()
    mlp = decoder_of(model).layers[0].mlp
    mlp.down_proj = nn.Linear(width, mlp.down_proj.out_features)
    weight = mlp.down_proj.weight.detach()
    twin = decoder_of(quantized(model, "int4")).layers[0].mlp.down_proj
    rounded = (twin(torch.eye(width)) - twin.bias).T
    # 15 steps over a group's range, in which zero lies
    step = [(g.amax(1).clamp(min=0) - g.amin(1).clamp(max=0)) / 15 for g in weight.split(GROUP, 1)]
    for group, exact, size in zip(rounded.split(GROUP, 1), weight.split(GROUP, 1), step, strict=True):
        assert ((group - exact).abs() <= 1.01 * size[:, None]).all()


def test_a_run_evaluates_every_stage_quantized_beside_itself(tmp_path, capfd):
    pytest.importorskip("torchao")
    options = ["evaluate.quantization=int4", "recover=none", "data.test_questions=60"]
    stages = run(tmp_path / "run", small("builtin:tiny_llava", tmp_path, *options))["stages"]
    assert list(stages) == ["base", "pruned", "base_int4", "pruned_int4"]
    for name in ("base", "pruned"):
        whole, twin = stages[name], stages[f"{name}_int4"]
        assert twin["memory_bytes"]["weights"] < whole["memory_bytes"]["weights"]
        assert twin["parameters"] == whole["parameters"] and twin["flops"] == whole["flops"]
        assert {*twin["tokens_per_second"]} == {*whole["tokens_per_second"]}
        assert abs(twin["metrics"]["digits_vqa"]["accuracy"] - whole["metrics"]["digits_vqa"]["accuracy"]) < 0.2
    said = capfd.readouterr()
    assert "base_int4" in said.out and "tokens/s" in said.out
    assert "Failed to load" not in said.err and "register_constant" not in said.err
