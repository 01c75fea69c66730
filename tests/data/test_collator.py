from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from efficientllava.data.collator import Collator, GenerationCollator, prompt
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.prompts import IGNORE
from efficientllava.data.records import Record, Turn, image_key
from efficientllava.models.forward import answer_loss, forward_hidden
from efficientllava.runtime.errors import UserError
from experiments.tiny_models.tiny import BUILDERS, PHI3, initialise

IMAGE = Image.new("RGB", (32, 32), (200, 60, 60))
# The template of the hub's LLaVA-1.5: no end token after an answer, a blank after every text.
OPEN = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = BUILDERS[request.param]()
    initialise(model, 0)
    return model.eval(), processor


@pytest.fixture
def processor() -> Any:
    return BUILDERS["tiny_llava"]()[1]


def spoken(processor: Any, labels: torch.Tensor) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORE].tolist())


def talk(*pairs: tuple[str, str], image: Any = IMAGE, name: str = "r", independent: bool = False) -> Record:
    return Record(name, image, tuple(Turn(*pair) for pair in pairs), independent, "test")


def test_packed_questions_equal_stand_alone_prompts(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    records = [Digits("train")[index] for index in range(3)]
    packed, single = Collator(processor)(records), Collator(processor, pack=False)(records)
    assert packed["input_ids"].shape[0] == 3
    assert single["input_ids"].shape[0] == 30
    assert "segment_ids" not in single
    with torch.no_grad():
        supervised = [batch["labels"].roll(-1, 1) != IGNORE for batch in (packed, single)]
        together = model.lm_head(forward_hidden(model, packed)[supervised[0]])
        alone = model.lm_head(forward_hidden(model, single)[supervised[1]])
    # Packed rows hold image questions first, then text-only ones; stand-alone rows keep the order of the turns.
    turns = [(row, turn) for row, record in enumerate(records) for turn in record.turns]
    order = sorted(range(len(turns)), key=lambda i: (turns[i][0], not turns[i][1].sees_image))
    counts = supervised[1].sum(1).tolist()
    alone = torch.cat([alone.split(counts)[i] for i in order])
    assert together.shape == alone.shape
    assert alone.std() > 0.1
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()
    assert torch.allclose(answer_loss(model, packed), answer_loss(model, single), atol=1e-5)


def test_packed_row_layout(tiny: tuple[Any, Any]) -> None:
    _, processor = tiny
    record = Record(
        "r", IMAGE, (Turn("how many digits are there?", "2"), Turn("repeat red", "red", sees_image=False),
                     Turn("where is the seven?", "top-left")), True, "t"
    )  # fmt: skip
    batch = Collator(processor)([record])
    segments, positions = batch["segment_ids"][0], batch["position_ids"][0]
    assert sorted(set(segments.tolist())) == [-1, 0, 1, 2]
    prefix = int((segments == 0).sum())
    image = batch["input_ids"][0] == processor.image_token_id
    assert image.sum() == processor.image_seq_length if hasattr(processor, "image_seq_length") else 16
    assert bool((segments[image] == 0).all())
    for segment, start in ((0, 0), (1, prefix), (2, prefix), (-1, 0)):
        own = positions[segments == segment].tolist()
        assert own == list(range(start, start + len(own)))
    end = processor.tokenizer.eos_token
    assert spoken(processor, batch["labels"][0]) == ["2", end, "top-left", end, "red", end]
    assert batch["ids"] == ["r"] and len(batch["image_ids"]) == 1
    assert batch["image_tiles"] == [1]


def test_generation_prompts_continue_with_the_answer(tiny: tuple[Any, Any]) -> None:
    _, processor = tiny
    records = [Digits("test")[index] for index in range(12)]
    asked, trained = GenerationCollator(processor)(records), Collator(processor)(records)
    assert asked["attention_mask"][:, -1].all()
    for row in range(len(records)):
        question = asked["input_ids"][row][asked["attention_mask"][row] == 1].tolist()
        whole = trained["input_ids"][row][trained["attention_mask"][row] == 1].tolist()
        assert whole[: len(question)] == question
        assert (trained["labels"][row][: len(question)] == IGNORE).all()
        assert trained["labels"][row][len(question)] == whole[len(question)]
    assert asked["answers"] == [record.turns[0].answer for record in records]
    assert asked["kinds"] == [record.turns[0].kind for record in records]
    seen = [image_key(record.image) for record in records if record.image is not None]
    assert asked["image_ids"] == trained["image_ids"] == seen
    assert len(asked["pixel_values"]) == len(seen)


def test_colours_of_a_palette_are_part_of_an_image() -> None:
    white, black = (Image.new("P", (4, 4)) for _ in range(2))
    white.putpalette([255] * 768)
    black.putpalette([0] * 768)
    assert image_key(white) != image_key(black)


def test_prompt_equals_the_processor_on_rendered_text(tiny: tuple[Any, Any]) -> None:
    _, processor = tiny
    content = [{"type": "image"}, {"type": "text", "text": "where is the seven?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    expected = processor(images=[IMAGE], text=[text], return_tensors="pt")
    got = prompt(processor, "where is the seven?", IMAGE)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["pixel_values"], expected["pixel_values"])
    assert "pixel_values" not in prompt(processor, "repeat red")


@pytest.mark.parametrize("template", ["own", OPEN, PHI3.replace("CONTENT", "{{ m['content'][-1]['text'] }}")])
@pytest.mark.parametrize("pad_is_end", [False, True])
def test_conversations_supervise_every_answer_and_its_end(processor: Any, template: str, pad_is_end: bool) -> None:
    if template != "own":
        processor.chat_template = template
    if template.startswith("{% for m in messages %}<|"):
        # As in Phi-3: a special token that is not the tokenizer's own end token.
        processor.tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    if pad_is_end:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    image = None if "<|" in template else IMAGE
    long = talk(("repeat red seven", "red seven"), ("where is the seven?", "top-left"), image=image)
    batch = Collator(processor)([long, talk(("repeat blue", "blue"), image=None, name="s")])
    end = "<|end|>" if "<|" in template else "</s>"
    assert spoken(processor, batch["labels"][0]) == ["red", "seven", end, "top-left", end]
    assert spoken(processor, batch["labels"][1]) == ["blue", end]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] > lengths[1]
    assert batch["attention_mask"][1, : lengths[1]].all()
    assert (batch["labels"][1, lengths[1] :] == IGNORE).all()
    assert batch["ids"] == ["r", "s"]
    assert "position_ids" not in batch


def test_generation_in_a_conversation_sees_earlier_answers(processor: Any) -> None:
    record = talk(("repeat red", "red"), ("repeat blue", "blue"))
    batch = GenerationCollator(processor)([record])
    text = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert text[0] == "USER: repeat red ASSISTANT:"
    assert text[1] == "USER: repeat red ASSISTANT: red USER: repeat blue ASSISTANT:"
    assert batch["image_ids"] == [image_key(record.image)] * 2


def test_long_conversation_keeps_whole_turns_and_image(processor: Any) -> None:
    record = talk(("repeat red", "red"), ("repeat blue", "blue"), ("repeat " + "green " * 40, "green"))
    whole = Collator(processor)([record])["input_ids"].shape[1]
    batch = Collator(processor, max_length=whole - 5)([record])
    assert spoken(processor, batch["labels"][0]) == ["red", "</s>", "blue", "</s>"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


def test_a_first_answer_that_does_not_fit_is_cut(processor: Any) -> None:
    record = talk(("repeat red", "red " * 60), ("repeat blue", "blue"))
    batch = Collator(processor, max_length=50)([record])
    assert batch["input_ids"].shape == (1, 50)
    said = spoken(processor, batch["labels"][0])
    assert set(said) == {"red"}
    assert 10 < len(said) < 50 - 16
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16


@pytest.mark.parametrize("independent", [False, True])
def test_prompt_that_leaves_no_room_for_an_answer_names_the_record(processor: Any, independent: bool) -> None:
    pairs = (("repeat " + "green " * 80, "green"), ("repeat red", "red"))
    collate, record = Collator(processor, max_length=80, pack=False), talk(*pairs, name="x", independent=independent)
    with pytest.raises(UserError, match=r"'x': its prompt leaves no room for the answer, the context holds 80"):
        collate.check(record)
    batch = collate([record])
    assert (batch["labels"][0] == IGNORE).all()
    assert batch["input_ids"].shape[1] == 80


def test_image_tokens_are_never_cut(processor: Any) -> None:
    with pytest.raises(UserError, match=r"'r': its 1 image.* image tokens are never cut.*data.max_length"):
        Collator(processor, max_length=12)([talk(("repeat red", "red"))])


def test_image_placeholder_in_a_question_is_refused(processor: Any) -> None:
    with pytest.raises(UserError, match="<image>"):
        Collator(processor)([talk(("what is <image>", "red"))])


def test_text_only_batches_have_no_pixels(processor: Any) -> None:
    batch = Collator(processor)([talk(("repeat red", "red"), image=None)])
    assert not {"pixel_values", "image_ids", "image_tiles"} & set(batch)


def test_processor_without_template_is_refused(processor: Any) -> None:
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Collator(processor)


def test_packed_rows_and_conversations_share_a_batch(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    record, other = Digits("train")[0], talk(("where is the seven?", "top-left"), ("which colour is it?", "red"))
    together = Collator(processor)([record, other])
    assert together["segment_ids"][1][together["attention_mask"][1] == 1].unique().tolist() == [1]
    with torch.no_grad():
        losses = [answer_loss(model, Collator(processor)([r]), reduction="sum") for r in (record, other)]
        assert torch.allclose(answer_loss(model, together, reduction="sum"), sum(losses), rtol=1e-4)  # pyright: ignore


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{{ messages | length }} {% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}",
            "rewrites earlier",
        ),
        ("{% for m in messages %}{{ m['content'][-1]['text'] | upper }}{% endfor %}", "changes the answer 'red'"),
    ],
)
def test_templates_that_cannot_be_followed_are_refused(processor: Any, template: str, says: str) -> None:
    processor.chat_template = template
    with pytest.raises(UserError, match=says):
        Collator(processor)([talk(("repeat red", "red"), ("repeat blue", "blue"), image=None)])


def test_sizes_with_the_same_tokens_share_them(processor: Any) -> None:
    prompts = GenerationCollator(processor).prompts
    found = [prompts.expansion(Image.new("RGB", (8 + n, 8)), 1, "a") for n in range(20)]
    assert len({id(tokens) for tokens in found}) == len({*found})
