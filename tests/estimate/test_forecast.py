"""The full-size families from the facts in conf/model: exact counts in closed form; where configurations are from."""

from __future__ import annotations

import json

import pytest
import torch

from efficientllava.checkpoint import convert
from efficientllava.checkpoint.convert import layouts
from efficientllava.checkpoint.folder import load, stock_config
from efficientllava.checkpoint.hub import TELLING
from efficientllava.estimate import forecast, meta_model
from efficientllava.models.anatomy import language_parameters, layers_of, parameters, projector_of
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.places import local_folder
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import ModelConfig

from ..models.originals import TOWER, write_original
from ..runs import composed, save_tiny


def published(option):
    model = typed(composed(f"model={option}", "dry_run=true")).model
    return meta_model(stock_config(model))


def llama(hidden, inner, layers, vocabulary):
    """Four attention matrices, three of the MLP, two norms; final norm, embeddings, head."""
    return layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden + 2 * vocabulary * hidden


def phi(hidden, inner, layers, vocabulary):
    """As Llama, with biases, one norm with bias per layer, and no gate."""
    layer = 4 * (hidden**2 + hidden) + (2 * hidden * inner + inner + hidden) + 2 * hidden
    return layers * layer + 2 * hidden + 2 * vocabulary * hidden


def transformer(hidden, inner, layers, extra=0):
    """Blocks of a vision tower: all linear layers and both norms with bias; ``extra`` vectors per block."""
    block = 4 * (hidden**2 + hidden) + (2 * hidden * inner + inner + hidden) + 4 * hidden + extra * hidden
    return layers * block


def clip(hidden, inner, layers, patch, side):
    """No bias of the patches; class token; norms before and after."""
    return transformer(hidden, inner, layers) + hidden * (3 * patch**2 + (side // patch) ** 2 + 2) + 4 * hidden


def siglip(hidden, inner, layers, patch, side):
    """Bias of the patches, no class token, a norm after."""
    return transformer(hidden, inner, layers) + hidden * (3 * patch**2 + 1 + (side // patch) ** 2) + 2 * hidden


def intern(hidden, inner, layers, patch, side):
    """Two layer scales per block; bias of the patches, class token, no norm after."""
    return transformer(hidden, inner, layers, extra=2) + hidden * (3 * patch**2 + 1 + (side // patch) ** 2 + 2)


def two_linear(inputs, hidden):
    return inputs * hidden + hidden + hidden**2 + hidden


# option -> language model, projector, tower
EXPECTED = {
    "llava_1_5_7b": (llama(4096, 11008, 32, 32064), two_linear(1024, 4096), clip(1024, 4096, 24, 14, 336)),
    "bunny_3b": (phi(2560, 10240, 32, 50296), two_linear(1152, 2560), siglip(1152, 4304, 26, 14, 384)),
    "mini_internvl_4b": (
        llama(3072, 8192, 32, 32024),
        two_linear(4096, 3072) + 2 * 4096,
        intern(1024, 4096, 24, 14, 448),
    ),
}


@pytest.mark.parametrize("option", EXPECTED)
def test_every_parameter_of_the_families_is_counted(option):
    model = published(option)
    language, projector, tower = EXPECTED[option]
    assert language_parameters(model) == language
    assert parameters(projector_of(model)) == projector
    assert parameters(model) == language + projector + tower
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_what_a_head_and_a_channel_hold():
    layer = layers_of(published("llava_1_5_7b"))[0]
    assert (layer.attention.units, layer.mlp.units, layer.head_dim) == (32, 11008, 128)
    assert layer.attention.unit_price() == 4 * 128 * 4096
    assert layer.mlp.unit_price() == 3 * 4096
    biased = layers_of(published("bunny_3b"))[0]
    assert biased.attention.unit_price() == 80 * (4 * 2560 + 3)
    assert biased.mlp.unit_price() == 2 * 2560 + 1
    fused = layers_of(published("mini_internvl_4b"))[0]
    assert fused.attention.unit_price() == 4 * 96 * 3072


def test_a_local_folder_speaks_for_itself(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    config = stock_config(ModelConfig("m", str(folder), architecture={"model_type": "nothing"}))
    assert config.dtype == torch.float16
    assert len(layers_of(meta_model(config))) == 3


@pytest.mark.parametrize(("kind", "dtype"), [("bunny", torch.float16), ("internvl", torch.bfloat16)])
def test_an_original_folder_is_described_as_it_will_be_converted(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(layouts.SIGLIP, "siglip-tiny", TOWER)
    write_original(tmp_path / kind, kind, dtype=dtype)
    described = meta_model(stock_config(ModelConfig("m", str(tmp_path / kind))))
    assert not (tmp_path / "home").exists()
    converted = load(str(tmp_path / kind))
    assert {n: p.shape for n, p in described.named_parameters()} == {
        n: p.shape for n, p in converted.model.named_parameters()
    }
    assert described.config.dtype == converted.storage
    assert convert.layout_config(convert.stock_folder(tmp_path / kind)) is None


def test_facts_count_for_their_own_hub_id_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = typed(composed("model=llava_1_5_7b", "model.path=some/other", "dry_run=true")).model
    assert local_folder(model.path) is None
    with pytest.raises(UserError, match=r"model\.path=some/other: .*give a local folder"):
        stock_config(model)


def test_a_hub_id_lends_its_config_alone(tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, files=None):
        asked.append((name, revision, files))
        return save_tiny(tmp_path / "model")

    monkeypatch.setattr("efficientllava.checkpoint.hub.download", download)
    assert stock_config(ModelConfig("m", "some/model", "v1")).model_type == "llava"
    assert asked == [("some/model", "v1", TELLING)]
    raw = {"model_type": "bunny-phi"}
    monkeypatch.setattr("efficientllava.checkpoint.hub.download", lambda *_: original(tmp_path, raw))
    with pytest.raises(UserError, match=r"^model\.path=some/model: is in its original layout; give a local copy"):
        stock_config(ModelConfig("m", "some/model"), complete=False)


def original(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_an_unknown_decoder_is_named(tmp_path):
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="decoder 'gpt2' is not supported"):
        stock_config(ModelConfig("m", str(folder)))


def test_records_longer_than_the_context_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", layers=2)
    with pytest.raises(UserError, match=r"data\.max_length=99999: the model's context holds \d+ tokens; lower it"):
        forecast(typed(composed(f"model.path={folder}", "model=checkpoint", "data.max_length=99999")))
