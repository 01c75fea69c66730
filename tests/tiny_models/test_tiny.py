from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from efficientllava.checkpoint.processors import load_processor
from efficientllava.data.embedded.digits import vocabulary
from efficientllava.models.anatomy import decoder_of
from experiments.tiny_models.tiny import BUILDERS

IMAGE = Image.effect_noise((32, 32), 80).convert("RGB")


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = BUILDERS[request.param]()
    return model.eval(), processor


def inputs(processor: Any) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": "where is the seven?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(images=[IMAGE], text=[text], return_tensors="pt")


def test_shape_is_worth_pruning_and_small(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    text = model.config.get_text_config()
    assert len(decoder_of(model).layers) == text.num_hidden_layers >= 8  # pyright: ignore[reportArgumentType]
    assert text.num_attention_heads >= 8
    assert text.intermediate_size <= 2 * text.hidden_size
    assert 2 * sum(p.numel() for p in model.parameters()) <= 6e6
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not text.tie_word_embeddings


def test_families_cover_grouped_heads_and_fused_projections() -> None:
    texts = {name: build()[0].config.get_text_config() for name, build in BUILDERS.items()}
    assert {name: text.model_type for name, text in texts.items()} == {
        "tiny_llava": "llama", "tiny_bunny": "phi", "tiny_internvl": "phi3"
    }  # fmt: skip
    assert texts["tiny_bunny"].num_key_value_heads == texts["tiny_bunny"].num_attention_heads // 2
    llava = texts["tiny_llava"]
    assert llava.head_dim != llava.hidden_size / llava.num_attention_heads


def test_tokenizer_knows_every_word_and_its_place_in_the_text(tiny: tuple[Any, Any]) -> None:
    _, processor = tiny
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids([*vocabulary(), "?", ","])
    assert tokenizer.unk_token_id not in ids
    text = "which is larger, seven or top-left?"
    out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert [text[a:b] for a, b in out["offset_mapping"]] == text.replace(",", " ,").replace("?", " ?").split()
    assert (
        tokenizer.decode(tokenizer("red seven top-left 3")["input_ids"], skip_special_tokens=True)
        == "red seven top-left 3"
    )


def test_processor_expands_the_image_to_what_the_model_expects(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    batch = inputs(processor)
    assert (batch["input_ids"] == processor.image_token_id).sum() == model.config.image_seq_length
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert batch["pixel_values"].abs().max() <= 1
    with torch.no_grad():
        assert model(**{k: v for k, v in batch.items() if k != "token_type_ids"}).logits.isfinite().all()


def test_saved_folder_loads_unchanged_and_stops_at_the_end_token(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForImageTextToText.from_pretrained(tmp_path), load_processor(tmp_path)
    assert type(loaded) is type(model)
    assert type(again) is type(processor)
    first, second = inputs(processor), inputs(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        keys = ("input_ids", "attention_mask", "pixel_values")
        logits = [m(**{key: first[key] for key in keys}).logits for m in (model, loaded)]
    assert torch.equal(*logits)
    assert loaded.generation_config.eos_token_id == again.tokenizer.eos_token_id
    assert again.chat_template == processor.chat_template
