from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel

from efficientllava.models.anatomy import DECODERS
from efficientllava.models.pruned import (
    LayerShape,
    is_per_layer,
    register,
    require_supported,
    text_config_for,
)
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut
from efficientllava.runtime.errors import UserError

from ..conftest import (
    FAMILIES,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    make_model,
    text_config,
)


def shapes(family: str, *groups: int) -> list[LayerShape]:
    _, heads, all_groups, _ = FAMILIES[family]
    return [LayerShape(g * heads // all_groups, g, 10 + g) for g in groups]


def test_equal_shapes_make_a_stock_configuration(family):
    source = text_config(family)
    config = text_config_for(source, [0, 2], shapes(family, 1, 1), HEAD_DIM)
    assert not is_per_layer(config)
    assert config.num_hidden_layers == 2
    assert config.num_key_value_heads == 1
    assert config.intermediate_size == 11
    assert (getattr(config, "head_dim", None) or HIDDEN // config.num_attention_heads) == HEAD_DIM
    assert config.rope_parameters == source.rope_parameters


def test_unequal_shapes_make_a_per_layer_configuration(family, tmp_path):
    wanted = shapes(family, 2, 1, 3)
    config = text_config_for(text_config(family), [0, 1, 3], wanted, HEAD_DIM)
    assert is_per_layer(config)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for found in (config, loaded):
        assert found.model_type == "pruned_" + text_config(family).model_type
        for index, shape in enumerate(wanted):
            layer = found.per_layer_config[index]
            assert {name: getattr(layer, name) for name in shape.overrides()} == shape.overrides()


def test_building_from_a_per_layer_configuration_makes_layers_of_these_sizes(family):
    config = text_config_for(text_config(family), [0, 1, 3], shapes(family, 2, 1, 3), HEAD_DIM)
    decoder = AutoModel.from_config(config)
    writer = DECODERS[text_config(family).model_type].mlp_out
    assert [getattr(layer.mlp, writer).in_features for layer in decoder.layers] == [12, 11, 13]
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2]
    assert decoder.config.num_hidden_layers == 3
    assert not any(p.is_meta or p.isnan().any() for p in decoder.parameters())


def test_the_source_stays_as_it_is(family):
    source = text_config(family)
    before = source.to_dict()
    text_config_for(source, [0, 1], shapes(family, 2, 1), HEAD_DIM)
    assert source.to_dict() == before


def test_layer_types_follow_the_kept_layers():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    source = text_config("qwen2", layer_types=types, use_sliding_window=True, sliding_window=8)
    for wanted in (shapes("qwen2", 1, 1), shapes("qwen2", 1, 2)):
        config = text_config_for(source, [1, 2], wanted, HEAD_DIM)
        assert config.layer_types == types[1:3]
        assert len(AutoModel.from_config(config).layers) == 2


def test_registering_again_changes_nothing():
    before = AutoConfig.for_model("pruned_llama").__class__
    register()
    assert AutoConfig.for_model("pruned_llama").__class__ is before


def test_phi_with_norms_as_wide_as_the_attention_is_refused():
    with pytest.raises(UserError, match="qk_layernorm"):
        require_supported(text_config("phi", qk_layernorm=True))
    for family in FAMILIES:
        require_supported(text_config(family))


CHEAP = """
import sys
import efficientllava
heavy = {"transformers", "torch", "lightning", "peft", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
AFTER = """
import transformers, efficientllava
transformers.AutoModelForImageTextToText.from_pretrained("model")
"""
BEFORE = """
import efficientllava
from transformers import AutoModelForImageTextToText
AutoModelForImageTextToText.from_pretrained("model")
"""
LOADED = """
from transformers import AutoModel, AutoModelForImageTextToText
import efficientllava
_, info = AutoModelForImageTextToText.from_pretrained("model", output_loading_info=True)
assert not any(info.values()), info
"""
NEVER = """
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained("model")
except (ValueError, KeyError) as error:
    assert "pruned_llama" in str(error), error
else:
    raise AssertionError("loaded without registration")
"""


def script(text: str, folder: str | os.PathLike[str]) -> None:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", text], check=True, cwd=folder, env=environment)


def per_layer_folder(folder: os.PathLike[str]) -> None:
    layers = tuple(LayerPlan(i, tuple(range(1 + i)), tuple(range(20 + i))) for i in range(LAYERS))
    cut(make_model("llama"), PruningPlan("widthwise", layers, LAYERS, 1, None, 0.0)).save_pretrained(folder)


def test_importing_the_package_is_cheap(tmp_path):
    script(CHEAP, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BEFORE, id="this package first"),
        pytest.param(AFTER, id="transformers first", marks=pytest.mark.slow),
    ],
)
def test_per_layer_folders_load_in_either_order_of_imports(text, tmp_path):
    per_layer_folder(tmp_path / "model")
    script(text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("text", [LOADED, NEVER], ids=["auto classes first", "never imported"])
def test_per_layer_folders_need_the_import_and_nothing_else(text, tmp_path):
    per_layer_folder(tmp_path / "model")
    script(text, tmp_path)


@torch.no_grad()
def test_per_layer_decoders_take_the_attention_implementation(family):
    config = text_config_for(text_config(family), [0, 1], shapes(family, 2, 1), HEAD_DIM)
    ids = torch.arange(3, 20).unsqueeze(0)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model(input_ids=ids, use_cache=False).last_hidden_state)
        assert all(layer.self_attn.config._attn_implementation == implementation for layer in model.layers)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)


# ---- registration ---------------------------------------------------------------------------------------------------


REGISTERED = "from transformers.models.auto import configuration_auto, modeling_auto; "
REGISTERED += "configuration_auto.CONFIG_MAPPING['pruned_llama']"


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel; import efficientllava",
        "import efficientllava.models.pruned",
        pytest.param("import efficientllava", marks=pytest.mark.slow),
        pytest.param("import transformers; import efficientllava", marks=pytest.mark.slow),
        pytest.param("import efficientllava.data.collator", marks=pytest.mark.slow),
    ],
)
def test_the_order_of_imports_does_not_matter(first):
    done = subprocess.run([sys.executable, "-c", f"{first}; {REGISTERED}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
