"""Tiny random models of every supported decoder inside stock hosts, and batches of random tokens for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start, two of which run at a time

VOCAB, IMAGE_TOKEN, IMAGE_TOKENS, PAD = 40, 39, 4, 0
HIDDEN, LAYERS, CHANNELS, HEAD_DIM = 48, 4, 64, 4
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PARTIAL = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}

# family -> text configuration, query heads, key/value heads, what else it needs. head_dim is never hidden / heads.
FAMILIES: dict[str, tuple[type, int, int, dict[str, Any]]] = {
    "llama": (LlamaConfig, 6, 6, {}),
    "llama_gqa": (LlamaConfig, 8, 4, {}),
    "mistral": (MistralConfig, 8, 4, {"sliding_window": None}),
    "qwen2": (Qwen2Config, 8, 4, {}),
    "qwen3": (Qwen3Config, 8, 4, {}),
    "phi": (PhiConfig, 8, 4, {"resid_pdrop": 0.0, "rope_parameters": _PARTIAL}),
    "phi3": (Phi3Config, 6, 6, {}),
    "phi3_gqa": (Phi3Config, 8, 4, {}),
}


def text_config(family: str, **changes: Any) -> Any:
    config, heads, groups, options = FAMILIES[family]
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config(**{**fields, **options, **changes})


def llava(text: Any) -> LlavaForConditionalGeneration:
    tower = CLIPVisionConfig(image_size=16, patch_size=8, **_TOWER)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return LlavaForConditionalGeneration(config)


def internvl(text: Any) -> InternVLForConditionalGeneration:
    tower = InternVLVisionConfig(image_size=[16, 16], patch_size=[4, 4], **_TOWER)
    config = InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return InternVLForConditionalGeneration(config)


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model; norms and biases are random too, so that nothing is hidden by ones and zeros."""
    torch.manual_seed(seed)
    model = (internvl if family.startswith("phi3") else llava)(text_config(family, **changes))
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def make_batch(
    rows: int = 3, seed: int = 0, images: bool = True, seq: int = 20, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Right-padded rows of unequal length; every third row has no image."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, IMAGE_TOKEN, (rows, seq), generator=generator)
    mask = torch.ones_like(ids)
    shown = [row for row in range(rows) if images and row % 3 != 2]
    for row in range(rows):
        mask[row, seq - 2 * (row % 3) :] = 0
        if row in shown:
            ids[row, 1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
    ids[mask == 0] = PAD
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :8] = -100
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["ids"] = [f"{seed}/{row}" for row in range(rows)]
    if shown:
        batch["pixel_values"] = torch.randn(len(shown), 3, 16, 16, generator=generator).to(dtype)
        batch["image_ids"] = [f"{seed}/{row}" for row in shown]
        batch["image_tiles"] = [1] * len(shown)
    return batch


def make_batches(count: int = 3, **options: Any) -> list[dict[str, Any]]:
    return [make_batch(seed=seed, **options) for seed in range(count)]


def stream_of(model: Any, batches: Any, tokens: str = "all", **known: Any) -> Any:
    """A calibration stream."""
    from efficientllava.pruning.stream import Calibration, CalibrationStream

    return CalibrationStream(model, Calibration(batches, **known), tokens)


def make_packed(rows: int = 2, seed: int = 0) -> dict[str, Any]:
    """Rows that pack two questions about an image and one without, as the collator lays them out."""
    batch = make_batch(3 * rows, seed)
    for key in ("input_ids", "attention_mask", "labels"):
        batch[key] = batch[key][::3]
    prefix, seq = 1 + IMAGE_TOKENS, batch["input_ids"].shape[1]
    segments = torch.tensor([0] * prefix + [1] * 6 + [2] * 5 + [-1] * (seq - prefix - 11))
    positions = [*range(prefix), *range(prefix, prefix + 6), *range(prefix, prefix + 5), *range(seq - prefix - 11)]
    batch["segment_ids"] = segments.repeat(rows, 1)
    batch["position_ids"] = torch.tensor(positions).repeat(rows, 1)
    batch["pixel_values"] = batch["pixel_values"][::2]
    batch["image_ids"], batch["image_tiles"] = batch["image_ids"][::2], [1] * rows
    batch["ids"] = batch["ids"][::3]
    return batch


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the real positions by the model's own forward, ``(positions, vocabulary)``."""
    keys = ("input_ids", "attention_mask", "pixel_values")
    logits = model(**{key: batch[key] for key in keys if key in batch}, use_cache=False).logits
    return logits[batch["attention_mask"].bool()]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> Any:
    return make_model(family)


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """What Hydra, which some tests run in this process, makes of the root logger ends with the test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)


@pytest.fixture(scope="module")
def without_fresh_processes() -> Iterator[None]:
    """No reload gate, which starts a process per export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllava.stages.run.reload_gate", lambda *_: None)
        yield


@pytest.fixture
def without_num2words(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor wants a package that it needs for videos alone."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)


@pytest.fixture(autouse=True)
def tracebacks_of_no_other_test(monkeypatch):
    """A command that a test runs in this process turns tracebacks on for its own processes; the next test has none."""
    for name in ("HYDRA_FULL_ERROR", "EFFICIENTLLAVA_TRACEBACKS"):
        monkeypatch.setenv(name, "0")
