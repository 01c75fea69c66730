import copy
import importlib.util

import pytest
import torch
from torch import nn

from efficientllava.checks import check
from efficientllava.config import typed
from efficientllava.errors import UserError
from efficientllava.evaluation import efficiency, quantization
from efficientllava.evaluation.quantization import quantized, require_groups
from efficientllava.models.anatomy import decoder_of
from tests.runs import composed


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


def test_widths_that_int4_would_skip_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(quantization, "GROUP", 8)
    model, _ = tiny
    require_groups(model)
    layer = decoder_of(model).layers[0].mlp
    whole = layer.down_proj
    layer.down_proj = nn.Linear(44, 96)
    try:
        with pytest.raises(
            UserError, match=r"int4: the input width 44 of layers\.0\.mlp\.down_proj must be a multiple"
        ):
            require_groups(model)
    finally:
        layer.down_proj = whole


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("int4", 0.5)])
def test_the_copy_is_smaller_close_and_the_model_untouched(tiny, kind, most, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantization, "GROUP", 8)
    model = copy.deepcopy(tiny[0]).float()
    before = logits(model)
    twin = quantized(model, kind)
    assert torch.equal(logits(model), before), "the model itself stays as it is"
    error = (logits(twin) - before).norm() / before.norm()
    assert 0 < error < most
    assert twin.lm_head.weight is model.lm_head.weight
    linears = [m for m in decoder_of(twin).modules() if isinstance(m, nn.Linear)]
    assert linears and all(efficiency.tensor_bytes(m.weight) < m.weight.numel() * 2 for m in linears)
    assert efficiency.parameters(twin) == efficiency.parameters(model)
