"""Exported decoders compute what the models compute, in llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from efficientllava.deploy import decoders
from efficientllava.models.anatomy import decoder_of
from efficientllava.runtime.errors import UserError

from ..conftest import make_model
from .conftest import differences, needs_runtime, pruned

IDS = [3 + 7 * position % 30 for position in range(24)]
PER_LAYER = ((0, 4, 64), (1, 1, 10), (3, 3, 33))
OFF = ((0, 4, 64), (1, 0, 64), (2, 2, 0), (3, 0, 0))
FIRST_OFF = ((0, 0, 64), (1, 4, 64), (3, 0, 0))
ONE_SHAPE = tuple((index, 2, 40) for index in range(4))
LLAMA_LIKE = ("llama_gqa", "mistral", "qwen2", "phi3_gqa")


@needs_runtime
@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize(
    ("shapes", "architecture"),
    [(None, "llama"), (ONE_SHAPE, "llama"), (PER_LAYER, "deci"), (OFF, "deci"), (FIRST_OFF, "deci")],
)
def test_layers_of_any_shape(tmp_path: Path, family: str, shapes: Any, architecture: str) -> None:
    model = make_model(family)
    model = pruned(model, *shapes) if shapes else model
    found, difference = differences(model, tmp_path, IDS)
    assert found == architecture
    assert difference < 1e-4


@needs_runtime
@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("shapes", [None, PER_LAYER, ((0, 4, 64), (2, 2, 0)), ((0, 2, 64), (1, 0, 64), (2, 0, 0))])
def test_biases_of_a_llama(tmp_path: Path, biases: dict[str, bool], shapes: Any) -> None:
    model = make_model("llama_gqa", **biases)
    with torch.no_grad():
        for name, parameter in decoder_of(model).named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_()
    model = pruned(model, *shapes) if shapes else model
    assert differences(model, tmp_path, IDS)[1] < 1e-4


@needs_runtime
def test_tied_head_and_a_vocabulary_of_odd_size(tmp_path: Path) -> None:
    model = make_model("llama_gqa", tie_word_embeddings=True, vocab_size=43)
    assert differences(model, tmp_path, IDS)[1] < 1e-4


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@needs_runtime
@pytest.mark.parametrize("name", list(ROPES))
@pytest.mark.parametrize("shapes", [None, PER_LAYER])
def test_scaled_rotary_embeddings(tmp_path: Path, name: str, shapes: Any) -> None:
    rope = {"rope_theta": 10000.0, **ROPES[name]}
    model = make_model("llama_gqa", rope_parameters=rope, head_dim=8)
    model = pruned(model, *shapes) if shapes else model
    plain = make_model("llama_gqa", head_dim=8)
    ids = torch.tensor([IDS])
    with torch.no_grad():  # the scaling is felt at all
        assert (model(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 1e-2
    assert differences(model, tmp_path, IDS)[1] < 1e-4


@needs_runtime
@pytest.mark.parametrize("context", [16, 64])
@pytest.mark.parametrize("shapes", [None, PER_LAYER])
def test_short_and_long_rotary_factors(tmp_path: Path, context: int, shapes: Any) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 8.0}
    rope |= {"short_factor": [1.0, 1.1], "long_factor": [1.0, 3.0]}
    model = make_model("phi3_gqa", rope_parameters=rope, hidden_size=32)
    model = pruned(model, *shapes) if shapes else model
    ids = IDS[:12] if context == 16 else IDS  # the runtime decides by the room that it makes, the model by the text
    first = 1 if context == 16 else 17
    assert differences(model, tmp_path, ids, context=context, ends=(first, len(ids)))[1] < 1e-4


@needs_runtime
@pytest.mark.parametrize("shapes", [None, tuple((index, 4, 40) for index in (0, 3))])
def test_phi_keeps_its_heads(tmp_path: Path, shapes: Any) -> None:
    model = make_model("phi", hidden_size=64, head_dim=8)
    model = pruned(model, *shapes) if shapes else model
    architecture, difference = differences(model, tmp_path, IDS)
    assert architecture == "phi2"
    assert difference < 5e-3  # the runtime's gelu is a table in half precision


@needs_runtime
@pytest.mark.parametrize("shapes", [None, ONE_SHAPE])
def test_qwen3_of_one_shape(tmp_path: Path, shapes: Any) -> None:
    model = make_model("qwen3")
    model = pruned(model, *shapes) if shapes else model
    architecture, difference = differences(model, tmp_path, IDS)
    assert architecture == "qwen3"
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("family", "shapes", "reason"),
    [("phi", ONE_SHAPE, "keeps all heads"), ("phi", PER_LAYER, "one shape"), ("qwen3", PER_LAYER, "one shape")],
)
def test_shapes_that_the_runtime_has_not(family: str, shapes: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        decoders.describe(pruned(make_model(family), *shapes))


def test_other_activations_and_partly_rotated_heads_are_refused() -> None:
    with pytest.raises(UserError, match="no activation 'gelu'"):
        decoders.describe(make_model("llama_gqa", hidden_act="gelu"))
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    with pytest.raises(UserError, match="a part of each"):
        decoders.describe(make_model("phi3_gqa", rope_parameters=partial))


def test_a_sliding_window_limits_the_context() -> None:
    assert decoders.describe(make_model("mistral", sliding_window=24)).context == 24
    assert decoders.describe(make_model("mistral")).context == 128


@pytest.mark.parametrize(
    ("shape", "kind", "stored"),
    [
        ((64, 32), "q8_0", "q8_0"),
        ((64, 33), "q8_0", "f16"),
        ((64,), "q4_0", "f32"),
        ((64, 33), "f16", "f16"),
        ((8, 3, 4, 4), "q4_0", "f16"),
    ],
)
def test_type_of_a_tensor(shape: tuple[int, ...], kind: str, stored: str) -> None:
    assert decoders.storage("blk.0.ffn_down.weight", shape, kind) == stored
