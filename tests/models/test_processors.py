from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from efficientllava.models.processors import InternVLPilProcessor, load_processor
from efficientllava.models.tiny import tiny_internvl, tiny_llava


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
    assert isinstance(loaded, InternVLPilProcessor)
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
