from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor

from efficientllava.data.collator import Collator
from efficientllava.data.conversations import Record, image_key
from efficientllava.models.forward import TOKEN_TYPES, stock_inputs
from efficientllava.models.processors import InternVLStills, load_processor
from efficientllava.models.tiny import tiny_internvl, tiny_llava

from .families import BUILDERS, make_records, without_num2words  # noqa: F401


def test_llava_folder_loads_in_stock_auto_processor(tmp_path: Path) -> None:
    processor = tiny_llava()[1]
    processor.save_pretrained(tmp_path)
    stock, ours = AutoProcessor.from_pretrained(tmp_path, backend="pil"), load_processor(tmp_path)
    assert type(stock) is type(ours) is LlavaProcessor
    image = Image.effect_noise((40, 33), 60).convert("RGB")
    batches = [p(images=[image], text=["<image>\nwhere?"], return_tensors="pt") for p in (stock, ours, processor)]
    assert all(torch.equal(batches[0]["pixel_values"], batch["pixel_values"]) for batch in batches)
    assert all(torch.equal(batches[0]["input_ids"], batch["input_ids"]) for batch in batches)


def test_internvl_files_name_the_stock_class(tmp_path: Path) -> None:
    tiny_internvl()[1].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "InternVLProcessor"
    assert settings["image_seq_length"] == 4
    assert settings["image_processor"]["image_processor_type"] == "GotOcr2ImageProcessor"
    loaded = load_processor(tmp_path)
    assert isinstance(loaded, InternVLStills)
    assert (loaded.tokenizer.start_image_token, loaded.image_token) == ("<img>", "<IMG_CONTEXT>")


def test_internvl_tiles_a_wide_image_and_adds_a_thumbnail() -> None:
    processor = tiny_internvl()[1]
    wide, square = Image.new("RGB", (96, 32)), Image.new("RGB", (32, 32))
    batch = processor(images=[wide, square], text=["<IMG_CONTEXT> a", "<IMG_CONTEXT> a"], padding=True)
    counts = [ids.count(processor.image_token_id) for ids in batch["input_ids"]]
    assert counts == [4 * 4, 4]
    assert len(batch["pixel_values"]) == 5
    assert all(ids.count(processor.start_image_token_id) == 1 for ids in batch["input_ids"])
    assert "num_patches" not in batch


def messages(record: Record) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    for turn in record.turns:
        shown = [{"type": "image", "image": record.image}] if record.image and not said else []
        said.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said


@pytest.mark.usefixtures("without_num2words")
@pytest.mark.parametrize("name", list(BUILDERS))
def test_batches_hold_what_the_stock_processor_makes(name: str, tmp_path: Path) -> None:
    model, made = BUILDERS[name]()
    made.save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert type(processor) is type(made)
    assert processor.to_dict() == made.to_dict()
    records = make_records()
    if name == "gemma3":  # its line breaks before the image join that of the template
        assert processor.tokenizer.vocab["\n\n\n"] in Collator(processor)(records[:1])["input_ids"]
    for record in records:
        stock = dict(
            processor.apply_chat_template(messages(record), tokenize=True, return_dict=True, return_tensors="pt")
        )
        ours = stock_inputs(model, Collator(processor)([record]))
        if record.image is None:
            stock.pop(TOKEN_TYPES.get(model.config.model_type), None)
            ours.pop(TOKEN_TYPES.get(model.config.model_type), None)
        stock.pop("batch_num_images", None)
        assert stock.keys() == ours.keys()
        for key, value in stock.items():
            assert torch.equal(ours[key], value), key


@pytest.mark.usefixtures("without_num2words")
@pytest.mark.parametrize("name", list(BUILDERS))
def test_images_of_a_batch_are_those_of_its_records(name: str) -> None:
    """Padding to the most tiles is the only difference."""
    _, processor = BUILDERS[name]()
    collate, records = Collator(processor), [r for r in make_records() if r.image]
    together = collate(records)
    assert together["image_ids"] == [image_key(record.image) for record in records]
    assert sum(together["image_tiles"]) == len(together["pixel_values"])
    for record, rows in zip(records, together["pixel_values"].split(together["image_tiles"]), strict=True):
        alone = collate([record])["pixel_values"]
        shown = rows[:, : alone.shape[1]] if alone.ndim == 5 else rows
        assert torch.equal(shown, alone)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "smolvlm"])
def test_saved_files_load_in_stock_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    model, made = BUILDERS[name]()
    made.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert type(stock).__module__.startswith("transformers.")
    stock.image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for record in make_records():
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batches = [p.apply_chat_template(messages(record), **options) for p in (stock, made)]
        assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
