"""A tiny model and its stock processor for every kind of checkpoint that table rows alone support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from efficientllava.checkpoint.processors import PHI3, InternVLStills, chat_template, stills
from efficientllava.data.collator import Collator
from efficientllava.data.records import Record, Turn
from efficientllava.models.anatomy import decoder_of, projector_of

LAYERS, CHANNELS, GROUPS = 4, 64, 4
ROLES = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    **dict.fromkeys(("boi_token", "start_image_token", "vision_start_token"), "<start>"),
    **dict.fromkeys(("eoi_token", "end_image_token", "vision_end_token"), "<end>"),
    "fake_image_token": "<fake>",
    "global_image_token": "<global-img>",
}
CELLS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", *dict.fromkeys(ROLES.values()), *CELLS]
# Line breaks join, as they do in real vocabularies.
WORDS = ["\n", "\n\n", "\n\n\n", *(f"w{number}" for number in range(20))]
IDS = {token: number for number, token in enumerate([*SPECIALS, *WORDS])}
IMAGE, VIDEO, START, END = (IDS[token] for token in ("<image>", "<video>", "<start>", "<end>"))
VOCAB = 60


def tokenizer() -> PreTrainedTokenizerFast:
    """All families share one vocabulary."""
    made = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    made.add_special_tokens(SPECIALS)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **names, extra_special_tokens=ROLES, model_max_length=128, padding_side="right"
    )


def template(image: str) -> str:
    return chat_template(PHI3.replace("<|end|>", "<eos>"), image)


TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
SQUARE = {"height": 16, "width": 16}
NO_TIE: dict[str, Any] = {"tie_word_embeddings": False}
QWEN = {
    **NO_TIE,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
GRID = [[16, 32], [32, 16]]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def text(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": GROUPS,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {**sizes, **changes}


def plain(decoder: Any) -> tuple[Any, Any]:
    """LLaVA-1.5's host."""
    tower = CLIPVisionConfig(**TOWER, patch_size=8)
    config = LlavaConfig(
        vision_config=tower, text_config=decoder, image_token_index=IMAGE, vision_feature_layer=-1, **NO_TIE
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer(), **options, chat_template=template("<image>\n"))
    return LlavaForConditionalGeneration(config), processor


def llava_llama() -> tuple[Any, Any]:
    return plain(LlamaConfig(**text(**NO_TIE)))


def llava_mistral() -> tuple[Any, Any]:
    return plain(MistralConfig(**text(sliding_window=None, **NO_TIE)))


def llava_phi() -> tuple[Any, Any]:
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    return plain(PhiConfig(**text(resid_pdrop=0.0, rope_parameters=rope, **NO_TIE)))


def llava_qwen3() -> tuple[Any, Any]:
    return plain(Qwen3Config(**text(**NO_TIE)))


def llava_next() -> tuple[Any, Any]:
    tower = CLIPVisionConfig(**TOWER, patch_size=8)
    decoder = MistralConfig(**text(sliding_window=None, **NO_TIE))
    anyres = {"vision_feature_layer": -1, "image_grid_pinpoints": GRID}
    config = LlavaNextConfig(vision_config=tower, text_config=decoder, image_token_index=IMAGE, **anyres, **NO_TIE)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=GRID)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaNextProcessor(images, tokenizer(), **options, chat_template=template("<image>\n"))
    return LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tower = SiglipVisionConfig(**TOWER, patch_size=8, vision_use_head=False)
    decoder = Qwen2Config(**text(**NO_TIE))
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    anyres = {"vision_feature_layer": -1, "image_grid_pinpoints": GRID}
    config = LlavaOnevisionConfig(vision_config=tower, text_config=decoder, **ids, **anyres, **NO_TIE)
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID)
    options = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    processor = stills(LlavaOnevisionProcessor)(images, tokenizer(), {}, **options, chat_template=template("<image>\n"))
    return LlavaOnevisionForConditionalGeneration(config), processor


def qwen_images() -> Any:
    size = {"shortest_edge": 64, "longest_edge": 512}
    return Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {**VISION, "depth": 2, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
    decoder = text(hidden_size=64, rope_parameters=MROPE)
    decoder.pop("head_dim")
    config = Qwen2_5_VLConfig(text_config=decoder, vision_config=vision, **QWEN)
    processor = stills(Qwen2_5_VLProcessor)(
        qwen_images(), tokenizer(), {}, chat_template=template("<start><image><end>")
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    deepstack = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    vision = {**VISION, **deepstack, "depth": 3, "out_hidden_size": 48}
    decoder = text(head_dim=8, rope_parameters={**MROPE, "mrope_interleaved": True})
    config = Qwen3VLConfig(text_config=decoder, vision_config=vision, **QWEN)
    processor = stills(Qwen3VLProcessor)(qwen_images(), tokenizer(), {}, chat_template=template("<start><image><end>"))
    return Qwen3VLForConditionalGeneration(config), processor


def smolvlm() -> tuple[Any, Any]:
    decoder = LlamaConfig(**text())
    config = SmolVLMConfig(
        text_config=decoder,
        vision_config={**TOWER, "patch_size": 4},
        scale_factor=2,
        pad_token_id=0,
        image_token_id=IMAGE,
        **NO_TIE,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = stills(SmolVLMProcessor)(images, tokenizer(), {}, image_seq_len=4, chat_template=template("<image>"))
    return SmolVLMForConditionalGeneration(config), processor


def internvl(decoder: Any) -> tuple[Any, Any]:
    tower = InternVLVisionConfig(**{**TOWER, "image_size": [16, 16], "patch_size": [4, 4]})
    options = {"image_token_id": IMAGE, "image_seq_length": 4, "downsample_ratio": 0.5, "vision_feature_layer": -1}
    config = InternVLConfig(vision_config=tower, text_config=decoder, **options, **NO_TIE)
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3)
    processor = InternVLStills(images, tokenizer(), {}, image_seq_length=4, chat_template=template("<image>\n"))
    return InternVLForConditionalGeneration(config), processor


def internvl3() -> tuple[Any, Any]:
    return internvl(Qwen2Config(**text()))


def mini_internvl() -> tuple[Any, Any]:
    """As converted: Phi-3 with rotary factors for short and for long texts, one for each half of a head's width."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 8.0}
    decoder = text(rope_parameters={**rope, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]})
    decoder.pop("head_dim")
    return internvl(Phi3Config(**decoder))


def gemma3() -> tuple[Any, Any]:
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    decoder = text(layer_types=types, sliding_window=8, query_pre_attn_scalar=4)
    vision = {**TOWER, "patch_size": 4, "vision_use_head": False}
    ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    config = Gemma3Config(text_config=decoder, vision_config=vision, mm_tokens_per_image=4, **ids)
    images = Gemma3ImageProcessorPil(size=SQUARE)
    processor = Gemma3Processor(images, tokenizer(), image_seq_length=4, chat_template=template("<start>"))
    return Gemma3ForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    build.__name__: build
    for build in (
        llava_llama,
        llava_mistral,
        llava_phi,
        llava_qwen3,
        llava_next,
        llava_onevision,
        qwen2_5_vl,
        qwen3_vl,
        smolvlm,
        internvl3,
        mini_internvl,
        gemma3,
    )
}


def make(name: str) -> tuple[Any, Any]:
    """A random model and its processor; norms and biases are random too."""
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    with torch.no_grad():
        for parameter in decoder_of(model).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for parameter in projector_of(model).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # Gemma3's starts at zero
        model.lm_head.weight[[IMAGE, VIDEO]] = 0.0  # never said
    return model.eval(), processor


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_records(seed: int = 0) -> list[Record]:
    """A wide image, a text, and a tall image; the texts differ in length."""
    draw = np.random.default_rng(seed)

    def said(words: int) -> str:
        return " ".join(f"w{number}" for number in draw.integers(0, 20, words))

    def turns(*words: int) -> tuple[Turn, ...]:
        return tuple(Turn(said(count), said(2)) for count in words)

    return [
        Record(f"{seed}/wide", picture(40, 20), turns(6, 3), False, "test"),
        Record(f"{seed}/text", None, turns(4, 4), False, "test"),
        Record(f"{seed}/tall", picture(17, 30), turns(5), False, "test"),
    ]


def make_batch(processor: Any, seed: int = 0) -> dict[str, Any]:
    return Collator(processor)(make_records(seed))
