"""Checkpoints in a published layout become stock ones: Bunny (SigLIP + Phi) and Mini-InternVL-Chat (InternViT + Phi-3).

A folder is converted once, into a store beside the hub client's cache; nothing in it is executed, and no more than one
shard is in memory. To support another layout, add an entry to `efficientllava.checkpoint.convert.layouts.LAYOUTS`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...runtime import Store, UserError, keeping, library_versions, one_line, peek_json, source_digest
from ..hub import folder_digest, own_root
from ..processors import published_system, with_system
from .layouts import LAYOUTS, WEIGHTS, Layout, stored_tensors

# Fields that are made anew: names of classes and versions, the type of the weights, the rotary embedding.
DERIVED = ("architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "rope_parameters")

SHARD = 2 << 30  # bytes of weights per file, counted as if they were of 32 bits; a shard is all that is in memory
# A vocabulary that grows ends at a multiple of this, which matrix kernels like.
ROWS = 8
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
log = logging.getLogger(__name__)


def layout_of(folder: Path) -> tuple[Layout | None, dict[str, Any]]:
    """Tell an original layout by a folder's ``config.json``; no weights are needed.

    Returns:
        The layout, None where it is stock transformers', or the file says nothing of use; and what config.json says.

    Raises:
        UserError: The layout is neither stock transformers' nor in `LAYOUTS`.
    """
    raw = peek_json(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        return None, raw  # whoever loads it says what is wrong with it
    # LLaVA's original layout has the stock model_type, and names a tower that it does not hold.
    if kind not in LAYOUTS and (kind not in CONFIG_MAPPING or "mm_vision_tower" in raw):
        raise UserError(
            f"{folder}: config.json is that of a {kind!r} in a layout of its own; take a checkpoint in the layout of "
            "stock transformers (on the hub its name often ends with -hf), or add an entry to LAYOUTS in "
            "efficientllava/checkpoint/convert/layouts.py"
        )
    return LAYOUTS.get(kind), raw


def stock_folder(folder: Path) -> Path:
    """A folder that stock transformers loads: the given one, or its converted copy.

    Raises:
        UserError: The checkpoint cannot be converted; see `convert`.
    """
    layout, raw = layout_of(folder)
    if layout is None:
        return folder
    store = Store(own_root(), together=False, fix="set HF_HOME to a folder of yours")
    inputs = {
        "checkpoint": folder_digest(folder, store.memo),
        "source": source_digest("checkpoint.convert"),
        "libraries": library_versions(),
    }

    def compute(partial: Path, _work: Path) -> dict[str, Any]:
        target = store.place("converted", inputs)
        log.warning("%s is in its original layout; converting it once into %s", folder, target)
        needed = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        keeping.require_space(target, needed, "the converted copy", "free some space or set HF_HOME elsewhere")
        convert(folder, partial, layout, raw)
        return {"of": str(folder)}

    return store.entry("converted", inputs, compute).folder


def convert(source: Path, target: Path, layout: Layout, raw: Mapping[str, Any]) -> None:
    """Convert a checkpoint of a published layout, every tensor of it exactly once.

    Everything that can be wrong is found before the first tensor is written.

    Args:
        source: The original folder.
        target: An existing empty folder.
        layout: Its layout.
        raw: Its config.json.

    Raises:
        UserError: A shard is missing or truncated, a tensor is missing, unknown, stored twice or of another shape, or
            config.json asks for what the conversion does not do.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    config, tokenizer, stored = _described(source, layout, raw)
    config.image_token_id = tokenizer.convert_tokens_to_ids(next(iter(layout.image_tokens.values())))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = int(layout.text_part(raw)["vocab_size"])
    _check(layout, source, stored, {**expected, **{name: (rows, expected[name][1]) for name in VOCABULARY}})
    dtype = _write(layout, stored, model.state_dict(), target, config.text_config.vocab_size - rows)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    end = tokenizer.convert_tokens_to_ids(layout.end)
    GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id).save_pretrained(target)
    processor = layout.processor(tokenizer, config, raw)
    if sentence := published_system(source, raw.get("template", "")):
        processor.chat_template = with_system(processor, sentence)
    processor.save_pretrained(target)


def layout_config(folder: Path) -> Any:
    """The stock configuration that a folder of a published layout will be converted to; None for any other layout.

    Raises:
        UserError: As `convert`.
    """
    layout, raw = layout_of(folder)
    if layout is None:
        return None
    config, _, _ = _described(folder, layout, raw)
    config.dtype = layout.text_part(raw).get("torch_dtype")
    return config


def _described(source: Path, layout: Layout, raw: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Stock configuration, tokenizer, and every stored tensor with its file."""
    _require(layout, raw, source)
    stored = stored_tensors(source)
    try:
        tokenizer = _tokenizer(layout, source)
        config = layout.build(raw, _text_config(layout, raw, len(tokenizer)), stored)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"{source}: config.json lacks or mistakes a field ({one_line(error)}); get the original file"
        ) from error
    return config, tokenizer, stored


def _require(layout: Layout, raw: Mapping[str, Any], source: Path) -> None:
    for key, wanted in layout.required.items():
        part, _, leaf = key.rpartition(".")
        found = (raw.get(part, {}) if part else raw).get(leaf, wanted)
        if found != wanted:
            raise UserError(
                f"{source}: config.json says {key}={found!r}, only {wanted!r} is converted; take a checkpoint in the "
                "layout of stock transformers (on the hub its name often ends with -hf)"
            )


def _tokenizer(layout: Layout, source: Path) -> Any:
    """The folder's tokenizer with the stock processor's special tokens."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    fast = (source / "tokenizer.json").is_file()
    if not fast and not (source / "tokenizer.model").is_file():
        raise UserError(f"{source}: has neither tokenizer.json nor tokenizer.model; get the complete folder")
    cls: Any = PreTrainedTokenizerFast if fast else LlamaTokenizer
    try:
        known = cls.from_pretrained(source).get_vocab()
        tokenizer = cls.from_pretrained(source, extra_special_tokens=dict(layout.image_tokens))
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise UserError(
            f"{source}: the tokenizer cannot be loaded ({one_line(error)[:200]}); get the complete folder"
        ) from error
    needed = {*layout.image_tokens.values(), layout.end} - {layout.new_token}
    if lost := sorted(needed - set(known)):
        raise UserError(f"{source}: the tokenizer lacks {', '.join(lost)}; get the original tokenizer files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _text_config(layout: Layout, raw: Mapping[str, Any], tokens: int) -> Any:
    """The stock text configuration; its vocabulary has a row for every token of the tokenizer."""
    part, known = layout.text_part(raw), CONFIG_MAPPING[layout.host]().to_dict()
    fields: dict[str, Any] = {key: part[key] for key in known if key in part and key not in DERIVED}
    rope = {key: part[key] for key in ("rope_theta", "partial_rotary_factor") if key in part}
    scaling = dict(part.get("rope_scaling") or {"type": "default"})
    kind = scaling.pop("type", None) or scaling["rope_type"]
    if kind in ("su", "longrope"):
        kind, trained = "longrope", part["original_max_position_embeddings"]
        rope |= {"original_max_position_embeddings": trained, "factor": part["max_position_embeddings"] / trained}
    if tokens > fields["vocab_size"]:
        fields["vocab_size"] = -(-tokens // ROWS) * ROWS
    config: Any = CONFIG_MAPPING[layout.host]
    return config(**fields, rope_parameters={**scaling, **rope, "rope_type": kind})


def _check(layout: Layout, source: Path, stored: Mapping[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse what does not fit, by name.

    Args:
        layout: The layout.
        source: The original folder.
        stored: Every stored tensor with its file.
        expected: Shape of every stock tensor; emptied.
    """
    for name, (tensor, file) in stored.items():
        targets = layout.targets(name)
        if not targets or any(target not in expected for target in targets):
            raise UserError(f"{file}: tensor {name} has no place in the model of config.json; get the original files")
        for target in targets:
            block = expected.pop(target)
            wanted = (block[0] * len(targets), *block[1:])
            if tensor.shape != wanted:
                raise UserError(
                    f"{file}: tensor {name} is {tensor.shape}, config.json makes it {wanted}; get the original"
                )
    if expected:
        name = next(iter(expected))
        raise UserError(f"{source}: no tensor becomes {name} ({len(expected)} are missing); get the complete folder")


def _write(layout: Layout, stored: Mapping[str, Any], shapes: Mapping[str, Tensor], target: Path, grow: int) -> Any:
    """Write the stock tensors, shard by shard.

    Args:
        layout: The layout.
        stored: Every stored tensor with its file.
        shapes: The stock tensors on the meta device.
        target: The folder.
        grow: Rows that the vocabulary gains.

    Returns:
        The type of the embeddings.
    """
    blocks = {source: layout.targets(source) for source in stored}
    origins = {
        name: (stored[source][0], index, len(names))
        for source, names in blocks.items()
        for index, name in enumerate(names)
    }

    def stock(name: str) -> Tensor:
        tensor, index, count = origins[name]
        weight = _grown(tensor.read(), grow) if name in VOCABULARY else tensor.read()
        return weight.chunk(count)[index].clone() if count > 1 else weight.contiguous()

    split, size = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=SHARD), 0
    for file, names in split.filename_to_tensors.items():
        shard = {name: stock(name) for name in names}
        save_file(shard, target / file, {"format": "pt"})
        size += sum(tensor.nbytes for tensor in shard.values())
    if split.is_sharded:
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        (target / f"{WEIGHTS[0]}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return origins[VOCABULARY[0]][0].read().dtype


def _grown(weight: Tensor, rows: int) -> Tensor:
    """Append rows that equal the mean of all others.

    The logit of such a row is the mean of the logits, so its probability is at most one in the vocabulary's size
    (Jensen's inequality) and it is never the largest: new tokens leave the model's answers as they were.
    """
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows, -1)])
