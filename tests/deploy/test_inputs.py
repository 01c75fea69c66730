"""The runtime splits text into the tokens that the checkpoint's tokenizer makes of it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from efficientllava.checkpoint.folder import load
from efficientllava.deploy import check, inputs
from efficientllava.deploy.decoders import write
from efficientllava.deploy.runtime import probe_decoder, serve
from efficientllava.runtime.errors import UserError

from .conftest import needs_runtime

CORPUS = [
    check.TEXT,
    *(f"the {word} of 12 and 1 999 is {word}'s, naïve\n" for word in ("colour", "digit", "largest")),
] * 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS: dict[str, Any] = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), PLAIN]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"), PLAIN]
    ),
}


def bytes_bpe(split: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", "<image>"]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", extra_special_tokens=["<image>"])


def sentence_pieces(folder: Path, legacy: bool) -> Any:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return LlamaTokenizer.from_pretrained(folder, legacy=legacy)


PLAINLY = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def keys_of(tokenizer: Any, template: str = PLAINLY) -> dict[str, Any]:
    size = max(tokenizer.get_vocab().values()) + 3  # rows without a token
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=template)
    return inputs.vocabulary(processor, size, [tokenizer.eos_token_id])


def require_same(tokenizer: Any, folder: Path) -> None:
    """Compare in the runtime, with a decoder that is of no further interest."""
    metadata, tensors = probe_decoder(64, 64)
    keys = {key: value for key, value in metadata.items() if key.startswith("llama.")} | keys_of(tokenizer)
    made = dict(tensors)
    rows = len(keys["tokenizer.ggml.tokens"])
    made["token_embd.weight"] = lambda: torch.zeros(rows, 64)
    write(folder / "words.gguf", "llama", keys, made.items(), "f32")
    with serve(folder / "words.gguf", context=64) as runtime:
        check.require_tokens(runtime, tokenizer)


@needs_runtime
@pytest.mark.parametrize("name", list(SPLITS))
def test_byte_level_pairs(tmp_path: Path, name: str) -> None:
    tokenizer = bytes_bpe(SPLITS[name])
    assert keys_of(tokenizer)["tokenizer.ggml.pre"] == name
    require_same(tokenizer, tmp_path)


@needs_runtime
@pytest.mark.parametrize("legacy", [True, False])
def test_sentence_pieces(tmp_path: Path, legacy: bool) -> None:
    tokenizer = sentence_pieces(tmp_path, legacy)
    assert keys_of(tokenizer)["tokenizer.ggml.model"] == "llama"
    assert keys_of(tokenizer)["tokenizer.ggml.add_space_prefix"] == legacy
    require_same(tokenizer, tmp_path)


@needs_runtime
@pytest.mark.parametrize("name", ["tiny_llava", "tiny_bunny", "tiny_internvl"])
def test_whole_words(tmp_path: Path, name: str) -> None:
    tokenizer = load(f"builtin:{name}").processor.tokenizer
    require_same(tokenizer, tmp_path)


@needs_runtime
def test_another_rule_of_splitting_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inputs.SPLITS, ("bytes",), "llama-bpe")
    with pytest.raises(UserError, match="the runtime splits text into other tokens"):
        require_same(bytes_bpe(BYTES), tmp_path)


def test_what_the_runtime_has_no_tokenizer_for() -> None:
    with pytest.raises(UserError, match="no name for a tokenizer that splits text by"):
        keys_of(bytes_bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), PLAIN])))
    tokenizer = load("builtin:tiny_llava").processor.tokenizer
    with pytest.raises(UserError, match="has token 63, the embedding has 60 rows"):
        inputs.vocabulary(SimpleNamespace(tokenizer=tokenizer, chat_template=PLAINLY), 60, [3])


def test_a_line_break_behind_an_image_stays() -> None:
    from jinja2 import Environment

    processor = load("builtin:tiny_llava").processor
    show = Environment().from_string(inputs.chat_template(processor))
    marker = "<__media_x__>"
    for content in (f"{marker}what", [{"type": "text", "text": marker}, {"type": "text", "text": "what"}]):
        said = show.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        assert said == f"USER: {marker}\nwhat ASSISTANT:"
    plain = [{"role": "user", "content": "no image here__>"}]
    assert show.render(messages=plain) == "USER: no image here__> "
