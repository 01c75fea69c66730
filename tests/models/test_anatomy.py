from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from efficientllava.models.anatomy import (
    decoder_of,
    final_norm_of,
    host_type,
    language_parameters,
    layers_of,
    projector_of,
    reader_rows,
)
from efficientllava.runtime.errors import UserError

from ..conftest import (
    CHANNELS,
    FAMILIES,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    logits_of,
    make_batch,
    make_model,
)


def test_sizes_are_read_off_the_weights(family):
    _, heads, groups, _ = FAMILIES[family]
    layers = layers_of(make_model(family))
    assert len(layers) == LAYERS
    for layer in layers:
        assert (layer.attention.units, layer.mlp.units) == (groups, CHANNELS)
        assert (layer.heads_per_group, layer.head_dim) == (heads // groups, HEAD_DIM)
        assert layer.head_dim != HIDDEN // heads
        assert layer.attention.width == HEAD_DIM * heads // groups


def test_units_own_every_weight_of_a_layer_but_norms_and_writer_biases(family):
    for layer in layers_of(make_model(family)):
        owned = sum(component.units * component.unit_price() for component in layer.components)
        biases = sum(c.writer.bias.numel() for c in layer.components if c.writer.bias is not None)
        norms = sum(p.numel() for n, p in layer.module.named_parameters() if "norm" in n)
        assert owned + biases + norms == sum(p.numel() for p in layer.module.parameters())


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_rows_and_columns_of_a_unit_are_what_its_output_depends_on(family, kind):
    """Noise in the rows of some units changes the writer's input in exactly their columns."""
    model, batch = make_model(family), make_batch()
    component = getattr(layers_of(model)[0], kind)
    seen: list[torch.Tensor] = []
    component.writer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits_of(model, batch)
    units = [0, component.units - 1]
    with torch.no_grad():
        for linear, rows in reader_rows(component, units):
            linear.weight[rows] += torch.randn(len(rows), HIDDEN)
    logits_of(model, batch)
    real = batch["attention_mask"].bool()
    changed = (seen[0][real] != seen[1][real]).any(0)
    assert changed.nonzero().flatten().tolist() == component.columns(units).tolist()


def test_every_reader_row_belongs_to_one_unit(family):
    for component in layers_of(make_model(family))[0].components:
        for linear, rows in reader_rows(component, range(component.units)):
            assert rows.tolist() == list(range(linear.out_features))


def test_unit_sums(family):
    for component in layers_of(make_model(family))[0].components:
        columns = torch.arange(component.writer.in_features, dtype=torch.float64)
        expected = [float(columns[component.columns([u])].sum()) for u in range(component.units)]
        assert component.reduce_columns(columns).tolist() == expected
        lines = {weight: torch.arange(weight.shape[axis]) + 1.0 for weight, axis in component.axes.items()}
        for u in range(component.units):
            rows = [lines[linear.weight][rows].sum() for linear, rows in reader_rows(component, [u])]
            expected[u] += float(sum(rows)) + len(component.columns([u]))
        assert component.reduce(lines).tolist() == expected


def test_language_parameters_leave_out_tower_and_projector(family):
    model = make_model(family)
    everything = sum(p.numel() for p in model.parameters())
    tower = model.model.vision_tower
    others = sum(p.numel() for m in (tower, projector_of(model)) for p in m.parameters())
    assert language_parameters(model) == everything - others


def test_tied_weights_count_once():
    untied, tied = make_model("qwen2"), make_model("qwen2", tie_word_embeddings=True)
    assert language_parameters(untied) - language_parameters(tied) == tied.lm_head.weight.numel()


def test_the_final_norm_stands_between_decoder_and_head(family):
    model, batch = make_model(family), make_batch()
    seen: list[torch.Tensor] = []
    final_norm_of(model).register_forward_hook(lambda _m, _a, out: seen.append(out))
    logits = logits_of(model, batch)
    assert torch.equal(model.lm_head(seen[0])[batch["attention_mask"].bool()], logits)


def test_an_unknown_decoder_names_the_supported_ones():
    with pytest.raises(UserError, match=r"'gpt2' is not supported.*llama.*anatomy\.py"):
        host_type(SimpleNamespace(model_type="gpt2"))
    assert host_type(SimpleNamespace(model_type="pruned_phi3")) == "phi3"


def test_a_model_without_projector_is_refused():
    model = nn.Module()
    model.model = nn.Module()
    with pytest.raises(UserError, match="no vision projector"):
        projector_of(model)


def test_the_decoder_is_the_bare_one(family):
    decoder = decoder_of(make_model(family))
    assert len(decoder.layers) == LAYERS
    assert not hasattr(decoder, "lm_head")
