from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor

from efficientllava.checkpoint import convert
from efficientllava.checkpoint.convert import layouts
from efficientllava.checkpoint.export import save
from efficientllava.checkpoint.folder import load, stock_config
from efficientllava.checkpoint.processors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_processor,
    with_protocol,
    with_system,
)
from efficientllava.data.collator import Collator
from efficientllava.data.records import Record, Turn
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import typed
from experiments.tiny_models.tiny import tiny_llava

from ..models.originals import (
    TOWER,
    bunny_logits,
    internvl_logits,
    sentencepiece_tokenizer,
    write_original,
    write_shards,
)
from ..runs import composed

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ASKED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where?"}]},
    {"role": "assistant", "content": "here"},
    {"role": "user", "content": "and now?"},
]
KINDS = ["bunny", "internvl"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(layouts.SIGLIP, "siglip-tiny", TOWER)
    return tmp_path / "home"


@pytest.fixture
def bunny(tmp_path: Path) -> Path:
    write_original(tmp_path / "bunny", "bunny")
    return tmp_path / "bunny"


@pytest.fixture
def internvl(tmp_path: Path) -> Path:
    write_original(tmp_path / "internvl", "internvl")
    return tmp_path / "internvl"


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def stock(folder: Path) -> Any:
    """The converted model as stock transformers loads it; nothing may be missing or left over."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


# ---- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tower_layers", "selected"), [(2, -1), (3, -2)], ids=["as released", "whole tower"])
@torch.no_grad()
def test_a_converted_bunny_computes_what_the_original_does(tmp_path, tower_layers, selected):
    weights = write_original(tmp_path / "bunny", "bunny", tower_layers=tower_layers)
    model = stock(convert.stock_folder(tmp_path / "bunny"))
    assert model.config.vision_feature_layer == selected
    image, ids = torch.randn(3, 28, 28), [5, 6, 7, 8, 9, 10]
    expected = bunny_logits(weights, ids, image, at=2)
    inputs = torch.tensor([ids[:2] + [model.config.image_token_id] * 4 + ids[2:]])
    logits = model(input_ids=inputs, pixel_values=image.unsqueeze(0)).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("more", [2, 30], ids=["short", "beyond the original context"])
@torch.no_grad()
def test_a_converted_internvl_computes_what_the_original_does(tmp_path, suffix, more):
    weights = write_original(tmp_path / "internvl", "internvl", suffix)
    model = stock(convert.stock_folder(tmp_path / "internvl"))
    context, tiles = model.config.image_token_id, torch.randn(2, 3, 28, 28)
    ids = [5, 6] + [context] * 8 + list(range(10, 10 + more))
    expected = internvl_logits(weights, ids, tiles, context)
    logits = model(input_ids=torch.tensor([ids]), pixel_values=tiles).logits[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_new_tokens_are_never_likely(tmp_path, kind):
    rows = len(
        write_original(tmp_path / kind, kind)[{"bunny": "", "internvl": "language_model."}[kind] + "lm_head.weight"]
    )
    model = stock(convert.stock_folder(tmp_path / kind))
    head = model.lm_head.weight
    assert rows < len(head) < rows + 2 * convert.ROWS
    assert len(head) % convert.ROWS == 0
    logits = torch.randn(50, head.shape[1]) @ head.T
    assert (logits.softmax(-1)[:, rows:] <= 1 / rows).all()
    assert (logits.argmax(-1) < rows).all()


@pytest.mark.parametrize(("kind", "dtype"), [("bunny", torch.float16), ("internvl", torch.bfloat16)])
def test_weights_keep_their_type_and_every_bit(tmp_path, kind, dtype):
    weights = write_original(tmp_path / kind, kind, dtype=dtype)
    checkpoint = load(str(tmp_path / kind))
    assert checkpoint.storage == dtype
    found = load_file(convert.stock_folder(tmp_path / kind) / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    layout = layouts.LAYOUTS[{"bunny": "bunny-phi", "internvl": "internvl_chat"}[kind]]
    used: set[str] = set()
    for name, tensor in weights.items():
        targets = layout.targets(name)
        assert not used & set(targets)
        used |= set(targets)
        together = torch.cat([found[target] for target in targets])
        assert torch.equal(together[: len(tensor)], tensor)
    assert used == set(found)


def test_large_checkpoints_are_written_in_shards(bunny, home, monkeypatch):
    whole = load_file(convert.stock_folder(bunny) / "model.safetensors")
    shutil.rmtree(home)
    monkeypatch.setattr(convert, "SHARD", 100_000)
    folder = convert.stock_folder(bunny)
    files = sorted(folder.glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    assert len(parts) > 3
    assert all(sum(tensor.nbytes for tensor in part.values()) <= 100_000 for part in parts)
    assert files[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert all(torch.equal(tensor, whole[name]) for part in parts for name, tensor in part.items())
    stock(folder)


# ---- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_folder_is_a_checkpoint_like_any_other(tmp_path, kind):
    write_original(tmp_path / kind, kind)
    checkpoint = load(str(tmp_path / kind))
    assert checkpoint.base == {"path": str(tmp_path / kind), "digest": checkpoint.digest}
    turns = (Turn("he a", "a"), Turn("he", "he"))
    batch = Collator(checkpoint.processor)([Record("r", picture(60, 28), turns, False, "t")])
    answers = batch["labels"][batch["labels"] != -100]
    end = {"bunny": "<|endoftext|>", "internvl": "<|end|>"}[kind]
    assert (answers == checkpoint.processor.tokenizer.convert_tokens_to_ids(end)).sum() == 2
    assert checkpoint.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "labels")}).loss > 0
    assert checkpoint.model.generation_config.eos_token_id == checkpoint.processor.tokenizer.convert_tokens_to_ids(end)


def test_a_folder_is_converted_once(bunny, home, caplog):
    folder = convert.stock_folder(bunny)
    assert folder.parent == home / "efficientllava" / "converted"
    assert "in its original layout" in caplog.text
    caplog.clear()
    assert convert.stock_folder(bunny) == folder
    assert not caplog.text
    os.utime(bunny / "config.json", ns=(1, 1))
    assert convert.stock_folder(bunny) == folder
    (bunny / "config.json").write_text((bunny / "config.json").read_text() + " ")
    assert convert.stock_folder(bunny) != folder


def test_a_damaged_copy_is_converted_again(bunny, caplog):
    folder = convert.stock_folder(bunny)
    before = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    caplog.clear()
    assert convert.stock_folder(bunny) == folder
    assert [r.getMessage().endswith("set aside and computed again") for r in caplog.records] == [True, False]
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stock_folders_pass_through(bunny):
    folder = convert.stock_folder(bunny)
    assert convert.stock_folder(folder) == folder


def test_a_failed_conversion_leaves_nothing(bunny, home, monkeypatch):
    monkeypatch.setattr(convert, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.stock_folder(bunny)
    assert [path for path in (home / "efficientllava" / "converted").iterdir() if path.is_dir()] == []


# ---- refusals -------------------------------------------------------------------------------------------------------


def refuses(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def change(folder: Path, **changes: Any) -> None:
    """Rewrite the shards with some tensors replaced, added, or (None) left out."""
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = {name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}
    write_shards(folder, weights)


def test_a_missing_shard(bunny):
    (bunny / "model-00002-of-00002.safetensors").unlink()
    refuses(bunny, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 40, -100])
def test_a_truncated_shard(tmp_path, suffix, kept):
    write_original(tmp_path / "internvl", "internvl", suffix)
    shard = next((tmp_path / "internvl").glob(f"*-00002-of-00002.{suffix}"))
    shard.write_bytes(shard.read_bytes()[:kept])
    refuses(tmp_path / "internvl", shard.name, "truncated")


@pytest.mark.parametrize("stored", [{"a": print}, [1], {"a": 1}], ids=["code", "list", "number"])
def test_a_file_that_holds_more_than_tensors(tmp_path, stored):
    write_original(tmp_path / "internvl", "internvl", "bin")
    torch.save(stored, tmp_path / "internvl" / "pytorch_model-00001-of-00002.bin")
    refuses(tmp_path / "internvl", "pytorch_model-00001-of-00002.bin", "more than tensors")


def test_no_weights_at_all(bunny):
    for file in [*bunny.glob("*.safetensors"), bunny / "model.safetensors.index.json"]:
        file.unlink()
    refuses(bunny, "has none of model.safetensors, pytorch_model.bin")


def test_a_broken_index(bunny):
    (bunny / "model.safetensors.index.json").write_text("{")
    refuses(bunny, "model.safetensors.index.json: cannot be read")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.layers.1.mlp.fc1.weight", None, "no tensor becomes model.language_model.layers.1.mlp.fc1.weight"),
        ("model.layers.1.mlp.fc1.weight", torch.zeros(96, 79), "tensor model.layers.1.mlp.fc1.weight is (96, 79)"),
        ("lm_head.bias", torch.zeros(10), "tensor lm_head.bias has no place"),
        ("model.layers.2.mlp.fc1.weight", torch.zeros(96, 80), "tensor model.layers.2.mlp.fc1.weight has no place"),
        ("lm_head.weight", torch.zeros(100, 80), "tensor lm_head.weight is (100, 80)"),
    ],
)
def test_tensors_that_do_not_fit(bunny, name, tensor, said):
    change(bunny, **{name: tensor})
    refuses(bunny, said)


def test_a_fused_tensor_of_another_width(internvl):
    name = "vision_model.encoder.layers.0.attn.qkv.bias"
    change(internvl, **{name: torch.zeros(71)})
    refuses(internvl, f"tensor {name} is (71,), config.json makes it (72,)")


def test_a_tensor_in_two_shards(bunny):
    first, second = sorted(bunny.glob("*.safetensors"))
    twice = next(iter(load_file(first)))
    save_file({**load_file(second), twice: load_file(first)[twice]}, second, {"format": "pt"})
    refuses(bunny, second.name, f"tensor {twice} is in {first.name} and in {second.name}")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("bunny", {"mm_vision_tower": "org/eva-clip"}, "mm_vision_tower='eva-clip' is not supported"),
        ("bunny", {"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ("bunny", {"hidden_size": "wide"}, "hidden_size"),
        ("internvl", {"template": "Hermes-2"}, "template='Hermes-2'"),
        ("internvl", {"ps_version": "v1"}, "ps_version='v1'"),
        ("internvl", {"force_image_size": 56}, "force_image_size=56"),
        ("internvl", {"llm_config": {"model_type": "internlm2"}}, "llm_config.model_type='internlm2'"),
        ("internvl", {"vision_config": {}}, "image_size"),
    ],
)
def test_configurations_that_are_not_converted(tmp_path, kind, changes, said):
    write_original(tmp_path / kind, kind, **changes)
    refuses(tmp_path / kind, said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_tokenizer(tmp_path, kind):
    write_original(tmp_path / kind, kind)
    for file in (tmp_path / kind).glob("tokenizer*"):
        file.unlink()
    refuses(tmp_path / kind, "has neither tokenizer.json nor tokenizer.model")


def test_a_broken_tokenizer(bunny):
    (bunny / "tokenizer.json").write_text("{")
    refuses(bunny, "the tokenizer cannot be loaded")


def test_a_tokenizer_without_image_tokens(internvl):
    file = internvl / "tokenizer.json"
    file.write_text(file.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    settings = internvl / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    refuses(internvl, "the tokenizer lacks <IMG_CONTEXT>")


def test_a_cache_that_cannot_be_made(bunny, tmp_path):
    (tmp_path / "home").write_text("a file")
    refuses(bunny, "cannot be made", "HF_HOME")


def test_too_little_disk(bunny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    refuses(bunny, "1e-08 GB are free", "HF_HOME")


# ---- preprocessing and prompts --------------------------------------------------------------------------------------


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return ((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)


def padded(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (301, 7)])
def test_bunny_pads_with_grey_and_resizes(bunny, size):
    processor = load_processor(convert.stock_folder(bunny))
    pixels = processor(images=[picture(*size)], text=["<image>"], return_tensors="np")["pixel_values"]
    square = padded(picture(*size), (127, 127, 127)).resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[0], normalised(square, (0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (640, 427)])
@pytest.mark.parametrize("side", [336, 32])
def test_llava_pads_with_the_mean_colour_and_resizes(size, side):
    tokenizer = tiny_llava()[1].tokenizer
    cropping = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = with_protocol(LlavaProcessor(cropping, tokenizer), "vicuna_v1")
    batch = processor(images=[picture(*size)], text=["<image>"], return_tensors="np")
    square = padded(picture(*size), (122, 116, 104)).resize((side, side), Image.Resampling.BICUBIC)
    expected = normalised(square, CLIP_MEAN, CLIP_STD)
    assert np.array_equal(batch["pixel_values"][0], expected)
    assert (batch["input_ids"] == processor.image_token_id).sum() == (side // 14) ** 2


def original_tiles(image: Image.Image, most: int, side: int) -> list[Image.Image]:
    """InternVL's ``dynamic_preprocess``: the grid of the nearest aspect ratio, then a thumbnail."""
    grids = {(a, b) for a in range(1, most + 1) for b in range(1, most + 1) if a * b <= most}
    best, smallest = (1, 1), float("inf")
    for a, b in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(image.width / image.height - a / b)
        if distance < smallest:
            best, smallest = (a, b), distance
        elif distance == smallest and image.width * image.height > 0.5 * side * side * a * b:
            best = (a, b)
    columns, rows = best
    large = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(columns)]
    thumbnail = [image.resize((side, side), Image.Resampling.BICUBIC)] if len(boxes) > 1 else []
    return [large.crop(box) for box in boxes] + thumbnail


@pytest.mark.parametrize(
    ("size", "tiles"), [((30, 29), 1), ((60, 28), 3), ((200, 100), 9), ((90, 120), 13), ((20, 300), 13)]
)
def test_internvl_cuts_tiles_and_adds_a_thumbnail(internvl, size, tiles):
    processor = load_processor(convert.stock_folder(internvl))
    batch = processor(images=[picture(*size)], text=["<IMG_CONTEXT>"], return_tensors="np")
    wanted = original_tiles(picture(*size), 12, 28)
    assert len(wanted) == tiles
    expected = [normalised(tile, IMAGENET_MEAN, IMAGENET_STD) for tile in wanted]
    assert np.array_equal(batch["pixel_values"], np.stack(expected))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * tiles


def published(option: str, tokenizer: Any) -> Any:
    """The processor that a model of the sizes in conf/model is converted with."""
    raw = typed(composed(f"model={option}", "dry_run=true")).model
    layout = layouts.LAYOUTS[{"bunny_3b": "bunny-phi", "mini_internvl_4b": "internvl_chat"}[option]]
    return layout.processor(tokenizer, stock_config(raw), {})


@pytest.mark.parametrize("size", [(640, 427), (300, 500), (384, 384), (1000, 120)])
def test_bunny_at_its_real_size(bunny, size):
    processor = published("bunny_3b", load_processor(convert.stock_folder(bunny)).tokenizer)
    batch = processor(images=[picture(*size)], text=["<image>"], return_tensors="np")
    square = padded(picture(*size), (127, 127, 127)).resize((384, 384), Image.Resampling.BICUBIC)
    assert np.array_equal(batch["pixel_values"][0], normalised(square, (0.5,) * 3, (0.5,) * 3))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 729


@pytest.mark.parametrize(
    ("size", "tiles"), [((448, 448), 1), ((640, 427), 7), ((427, 640), 7), ((1600, 1200), 13), ((3000, 240), 13)]
)
def test_internvl_at_its_real_size(internvl, size, tiles):
    processor = published("mini_internvl_4b", load_processor(convert.stock_folder(internvl)).tokenizer)
    batch = processor(images=[picture(*size)], text=["<IMG_CONTEXT>"], return_tensors="np")
    wanted = original_tiles(picture(*size), 12, 448)
    assert len(wanted) == len(batch["pixel_values"]) == tiles
    for found, tile in zip(batch["pixel_values"], wanted, strict=True):
        assert np.array_equal(found, normalised(tile, IMAGENET_MEAN, IMAGENET_STD))
    assert (batch["input_ids"] == processor.image_token_id).sum() == 256 * tiles


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bunny", SYSTEM + "USER: <image>\nwhere? ASSISTANT: here<|endoftext|>USER: and now? ASSISTANT:"),
        (
            "internvl",
            "<|system|>\nYou are an AI assistant whose name is Phi-3.<|end|><|user|>\n<IMG_CONTEXT>\nwhere?<|end|>"
            "<|assistant|>\nhere<|end|><|user|>\nand now?<|end|><|assistant|>\n",
        ),
    ],
)
def test_prompts_are_the_original_ones(tmp_path, kind, expected):
    write_original(tmp_path / kind, kind)
    processor = load_processor(convert.stock_folder(tmp_path / kind))

    def prompt(messages: list[dict[str, Any]]) -> str:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert prompt(ASKED) == expected
    own = prompt([{"role": "system", "content": "Be brief."}, *ASKED])
    assert own.startswith({"bunny": "Be brief. USER: ", "internvl": "<|system|>\nBe brief.<|end|><|user|>\n"}[kind])
    assert own.endswith(expected[-60:])


def prompt_of(processor: Any, *more: dict[str, Any]) -> str:
    return processor.apply_chat_template([*more, *ASKED], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("said", ["你好, \"you\" are\\n'brief'.", "You are {{ kind }}."])
def test_a_system_sentence_of_ones_own_is_saved_with_the_model(tmp_path, said):
    write_original(tmp_path / "internvl", "internvl")
    plain = load(str(tmp_path / "internvl"))
    own = load(str(tmp_path / "internvl"), system=said)
    assert own.digest != plain.digest
    save(own, tmp_path / "saved")
    before = prompt_of(plain.processor)
    after = prompt_of(load(str(tmp_path / "saved")).processor)
    assert after == before.replace("You are an AI assistant whose name is Phi-3.", said) != before
    assert prompt_of(own.processor, {"role": "system", "content": "Else."}).startswith("<|system|>\nElse.<|end|><|us")


def test_a_system_sentence_for_llava(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    own = load(str(tmp_path), protocol="vicuna_v1", system="Be brief.").processor
    assert prompt_of(own).startswith("Be brief. USER: <image>\nwhere? ASSISTANT: here</s>")
    processor.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"^model\.system: the chat template writes no system message; leave it out$"):
        with_system(processor, "Be brief.")
    processor.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(UserError, match=r"^model\.system: the chat template takes no system message \(no system\); le"):
        with_system(processor, "Be brief.")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Conversation(name='phi3-chat', system_message='Published.')", "Published."),
        ("Conversation(name='Hermes-2', system_message='Other.')", "You are an AI assistant whose name is Phi-3."),
        ("not Python", "You are an AI assistant whose name is Phi-3."),
    ],
)
def test_the_published_system_sentence_is_taken(internvl, text, said):
    (internvl / "conversation.py").write_text(f"import nothing_that_is_there\n{text}\n")
    assert f"<|system|>\n{said}<|end|>" in prompt_of(load_processor(convert.stock_folder(internvl)))


def test_a_tokenizer_of_sentencepiece_alone(tmp_path):
    pieces = pytest.importorskip("sentencepiece")
    write_original(tmp_path / "internvl", "internvl", tokenizer=sentencepiece_tokenizer)
    tokenizer = load_processor(convert.stock_folder(tmp_path / "internvl")).tokenizer
    model = pieces.SentencePieceProcessor(model_file=str(tmp_path / "internvl" / "tokenizer.model"))
    for text in ("the red house", "Tür?\nzwei  Zeilen", "a" * 30):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)
    rows = model.get_piece_size()
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<IMG_CONTEXT>", "<video>"]) == [rows, rows + 7, rows + 8]
    ids = tokenizer("<|user|>\nred<|end|>", add_special_tokens=False)["input_ids"]
    assert ids == [rows + 4, model.piece_to_id("red"), rows + 3]  # the line break belongs to the marker


def test_the_llava_protocol_survives_saving(tmp_path):
    processor = with_protocol(tiny_llava()[1], "vicuna_v1")
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    loaded = load_processor(tmp_path)
    text = loaded.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert text == SYSTEM + "USER: <image>\nwhere? ASSISTANT: here</s>USER: and now? ASSISTANT:"
    batches = [p(images=[picture(50, 20)], text=["<image>"], return_tensors="np") for p in (processor, loaded)]
    assert np.array_equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


def test_a_checkpoint_is_loaded_with_a_protocol(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored, original = load(str(tmp_path)), load(str(tmp_path), protocol="vicuna_v1")
    assert original.processor.chat_template != stored.processor.chat_template
    assert original.processor.image_processor.do_pad
    assert original.digest != stored.digest


def test_a_protocol_of_another_family(internvl):
    with pytest.raises(UserError, match=r"model\.protocol=vicuna_v1: .* InternVLProcessor"):
        with_protocol(load_processor(convert.stock_folder(internvl)), "vicuna_v1")
