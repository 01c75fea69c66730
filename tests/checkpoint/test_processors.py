"""Token by token, what each published template supervises: written by hand, supervised tokens in [ ]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast

from efficientllava.checkpoint.processors import InternVLStills, load_processor, square_processor, tile_processor
from efficientllava.data.collator import Collator, GenerationCollator
from efficientllava.data.prompts import IGNORE
from efficientllava.data.records import Record, Turn, image_key
from efficientllava.models.forward import TOKEN_TYPES, stock_inputs
from experiments.tiny_models.tiny import tiny_internvl, tiny_llava

from ..models.families import BUILDERS, make_records


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


HALVES = (0.5, 0.5, 0.5)
ASKED = (Turn("what?", "a cat"), Turn("sure?", "yes"))

# Tokens are divided by blanks; ▁ and Ġ stand for a blank, ↵ for a line break.
SYSTEM = (
    "▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant ▁gives "
    "▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user ' s ▁questions ."
)
VICUNA_V1 = (
    f"<s> {SYSTEM} ▁USER : ▁ <image> <image> <image> <image> ↵ what ? ▁ASSISTANT : [ ▁a ▁cat </s> ] "
    "USER : ▁sure ? ▁ASSISTANT : [ ▁yes </s> ]"
)
VICUNA_V1_TEXT = f"<s> {SYSTEM} ▁USER : ▁sure ? ▁ASSISTANT : [ ▁yes </s> ]"
BUNNY_SYSTEM = SYSTEM.replace("▁A ", "A ", 1).replace("' s", "'s").replace("▁", "Ġ")
BUNNY = (
    f"{BUNNY_SYSTEM} ĠUSER : Ġ <image> <image> <image> <image> ↵ what ? ĠASSISTANT : [ Ġa Ġcat <|endoftext|> ] "
    "USER : Ġsure ? ĠASSISTANT : [ Ġyes <|endoftext|> ]"
)
BUNNY_TEXT = f"{BUNNY_SYSTEM} ĠUSER : Ġsure ? ĠASSISTANT : [ Ġyes <|endoftext|> ]"
PHI3_SYSTEM = "<|system|> ↵ You ▁are ▁an ▁AI ▁assistant ▁whose ▁name ▁is ▁Phi - 3 . <|end|>"
TILE = "<IMG_CONTEXT> <IMG_CONTEXT> <IMG_CONTEXT> <IMG_CONTEXT>"
PHI3_CHAT = (
    f"{PHI3_SYSTEM} <|user|> ↵ <img> {TILE} </img> ↵ what ? <|end|> <|assistant|> ↵ [ a ▁cat <|end|> ] "
    "<|user|> ↵ sure ? <|end|> <|assistant|> ↵ [ yes <|end|> ]"
)
PHI3_CHAT_TEXT = f"{PHI3_SYSTEM} <|user|> ↵ sure ? <|end|> <|assistant|> ↵ [ yes <|end|> ]"


def tokenizer(expected: str, kind: str, specials: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, which knows the expected tokens only: every other cut is an unknown token."""
    words = dict.fromkeys([*specials, "<unk>", *expected.replace("↵", "Ċ" if kind == "bytes" else "\n").split(" ")])
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    else:
        blanks = pre_tokenizers.Metaspace(prepend_scheme=kind)
        made.pre_tokenizer = pre_tokenizers.Sequence([blanks, pre_tokenizers.Split(Regex(r"\n|[^\w▁]"), "isolated")])  # pyright: ignore
    made.add_special_tokens(specials)
    if names.get("bos_token") == "<s>":
        start = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", model_max_length=256, **names)


def vicuna_v1() -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    words = tokenizer(VICUNA_V1 + " " + VICUNA_V1_TEXT, "first", ["<s>", "</s>", "<image>"], **names)
    return square_processor(words, 28, HALVES, HALVES, 14, True)


def bunny() -> Any:
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    words = tokenizer(BUNNY, "bytes", ["<|endoftext|>", "<image>"], **names)
    return square_processor(words, 28, HALVES, HALVES, 14, False)


def phi3_chat() -> Any:
    chat = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    images = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "extra_special_tokens": images}
    more = " A B same ▁ no"
    return tile_processor(tokenizer(PHI3_CHAT + more, "never", [*chat, *images.values()], **names), 28, (1, 4), 4)


TEMPLATES = {
    "vicuna_v1": (vicuna_v1, VICUNA_V1, VICUNA_V1_TEXT),
    "bunny": (bunny, BUNNY, BUNNY_TEXT),
    "phi3-chat": (phi3_chat, PHI3_CHAT, PHI3_CHAT_TEXT),
}


def picture(width: int = 28, height: int = 28) -> Image.Image:
    return Image.new("RGB", (width, height), (9, 99, 199))


def written(processor: Any, batch: dict[str, Any], row: int) -> str:
    """A row as it is written above; its padding is cut off by the attention mask."""
    length = int(batch["attention_mask"][row].sum())
    assert batch["attention_mask"][row, :length].all()
    assert (batch["labels"][row, length:] == IGNORE).all()
    ids, labels = batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    words, inside = [], False
    for word, label in zip(processor.tokenizer.convert_ids_to_tokens(ids), labels, strict=True):
        if inside != (label != IGNORE):
            words.append("]" if inside else "[")
            inside = not inside
        words.append(word)
    return " ".join([*words, *("]" * inside)]).replace("\n", "↵").replace("Ċ", "↵")


@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_tokens_are_the_answers_and_what_closes_them(name: str) -> None:
    make, expected, text = TEMPLATES[name]
    processor = make()
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    records = [Record("a", picture(), ASKED, False, "x"), Record("b", None, ASKED[1:], False, "x")]
    batch = Collator(processor)(records)
    assert written(processor, batch, 0) == expected
    assert written(processor, batch, 1) == text
    assert batch["input_ids"][1, -1] == processor.tokenizer.pad_token_id
    assert len(batch["image_ids"]) == 1
    assert (batch["labels"] != IGNORE).sum() == 7


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_conversation_keeps_its_image_and_whole_answers(name: str) -> None:
    make, expected, _ = TEMPLATES[name]
    processor: Any = make()
    whole = len(expected.replace("[ ", "").replace("] ", "").split(" ")) - 1
    batch = Collator(processor, max_length=whole - 1)([Record("a", picture(), ASKED, False, "x")])
    assert written(processor, batch, 0) == expected[: expected.index("] ") + 1]


def phi3_multi(record: Record) -> str:
    processor = phi3_chat()
    batch = Collator(processor)([record])
    share = f"/{len(record.images)}" if record.more_images else ""
    assert batch["image_ids"] == [image_key(image) + share for image in record.images]
    assert sum(batch["image_tiles"]) == len(batch["pixel_values"])
    return written(processor, batch, 0).removeprefix(PHI3_SYSTEM + " ")


def test_several_images_stand_in_place_and_share_their_tiles() -> None:
    record = Record("m", picture(56), (Turn("A B same?", "no", images_at=(2, 4)),), False, "x", (picture(),))
    wide = " ".join([TILE] * 3)  # of the four tiles, a single picture would take two and the thumbnail
    assert phi3_multi(record) == (
        f"<|user|> ↵ A ▁ <img> {wide} </img> ↵ B ▁ <img> {TILE} </img> ↵ same ? <|end|> <|assistant|> ↵ [ no <|end|> ]"
    )
    many = Record("m", picture(56), (Turn("same?", "no"),), False, "x", (picture(56),) * 2)
    assert phi3_multi(many) == (
        "<|user|> ↵ " + f"<img> {TILE} </img> ↵ " * 3 + "same ? <|end|> <|assistant|> ↵ [ no <|end|> ]"
    )


LAST = (Turn("what?\n", "a cat", images_at=(6,)), ASKED[1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_single_image_stands_where_the_models_own_training_puts_it(name: str) -> None:
    make, expected, _ = TEMPLATES[name]
    processor = make()
    if name == "phi3-chat":
        expected = expected.replace(f"<img> {TILE} </img> ↵ what ?", f"what ? ↵ <img> {TILE} </img>")
    record = Record("a", picture(), LAST, False, "x")
    assert written(processor, Collator(processor)([record]), 0) == expected
    asked = GenerationCollator(processor)([record])
    shown = written(processor, {**asked, "labels": torch.full_like(asked["input_ids"], IGNORE)}, 1)
    assert shown == expected.replace("[ ", "").replace("] ", "").rpartition(expected.rpartition("[ ")[2])[0].strip()


def test_an_image_inside_a_question_is_a_line_of_its_own() -> None:
    middle = Turn("A\n\nB", "no", images_at=(2,))
    assert phi3_multi(Record("m", picture(), (middle,), False, "x")) == (
        f"<|user|> ↵ A ↵ <img> {TILE} </img> ↵ B <|end|> <|assistant|> ↵ [ no <|end|> ]"
    )


def test_images_of_turns_that_are_cut_off_are_not_shown() -> None:
    turns = (Turn("what?", "a cat", images_at=(0,)), Turn("sure?", "yes", images_at=(0,)))
    processor = phi3_chat()
    record = Record("m", picture(), turns, False, "x", (picture(),))
    whole = Collator(processor)([record])
    assert len(whole["image_ids"]) == 2
    cut = Collator(processor, max_length=whole["input_ids"].shape[1] - 1)([record])
    assert cut["image_ids"] == whole["image_ids"][:1]
    assert len(cut["pixel_values"]) == 1
    assert written(processor, cut, 0) == PHI3_CHAT[: PHI3_CHAT.index("] ") + 1]
