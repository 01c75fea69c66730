"""The three tiny models of the embedded default, and the pictures that they learn from, of augmented strokes.

They are stock transformers classes, built from configurations, one per family of the study: LLaVA (CLIP + Llama), Bunny
(SigLIP + Phi, grouped key-value heads) and InternVL (its own tower + Phi-3 with fused projections). The head width
differs from hidden / heads and the MLP is narrow, so that layers, heads and channels are all partly redundant and none
is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from efficientllava.checkpoint.processors import PHI3, VICUNA, InternVLStills, chat_template
from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits, vocabulary
from efficientllava.data.embedded.scenes import COLOURS, FULL, IMAGE_SIZE, WORDS, Scene
from efficientllava.models.anatomy import decoder_of

PATCH = 8
LAYERS, HIDDEN, HEADS, HEAD_DIM = 8, 96, 8, 16
CONTEXT = 512


def word_tokenizer(specials: list[str], words: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and punctuation marks; text is lower-cased except for special tokens and role words.

    Args:
        specials: Special tokens, ids from 0.
        words: Ordinary tokens, after them.
        names: Roles of special tokens (``bos_token``, ``extra_special_tokens`` ...).

    Returns:
        The tokenizer; it adds a beginning-of-sequence token if ``bos_token`` is named.
    """
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate([*specials, *words])}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?,.]"), "isolated")]
    )
    if bos := names.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, specials.index(bos))]
        )
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **names,
    )


def _words(*roles: str) -> list[str]:
    return [*roles, "?", ",", ".", *vocabulary()]


def _vicuna_tokenizer(eos: str, bos: str | None) -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<unk>", *([bos] if bos else []), eos, "<image>"]
    return word_tokenizer(
        specials,
        _words("USER:", "ASSISTANT:"),
        pad_token="<pad>",
        eos_token=eos,
        extra_special_tokens={"image_token": "<image>"},
        **({"bos_token": bos} if bos else {}),
    )


def _phi3_tokenizer() -> PreTrainedTokenizerFast:
    images = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = ["<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", *images.values()]
    return word_tokenizer(specials, _words(), pad_token="<pad>", eos_token="<|end|>", extra_special_tokens=images)


_STILL: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,
    "do_convert_rgb": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
_SQUARE: dict[str, Any] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_TOWER: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "max_position_embeddings": CONTEXT,
    }


def _llava(tower: Any, text: Any, image_id: int, strategy: Literal["default", "full"]) -> LlavaForConditionalGeneration:
    tokens = (IMAGE_SIZE // PATCH) ** 2
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=text,
            image_token_index=image_id,
            image_seq_length=tokens,
            vision_feature_layer=-1,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=False,
        )
    )


def tiny_llava() -> tuple[Any, Any]:
    """CLIP tower and Llama decoder with multi-head attention; head width 16 with 96 / 8 = 12 on purpose."""
    tokenizer = _vicuna_tokenizer("</s>", "<s>")
    text = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=136,
        **_ids(tokenizer),
    )
    tower = CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=HIDDEN, **_TOWER)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=_SQUARE, **_STILL),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(VICUNA, "<image>\n"),
    )
    return _llava(tower, text, tokenizer.vocab["<image>"], "default"), processor


def tiny_bunny() -> tuple[Any, Any]:
    """SigLIP tower and Phi decoder with grouped heads (8 query, 4 key-value heads) and partial rotary embedding."""
    tokenizer = _vicuna_tokenizer("<|endoftext|>", None)
    text = PhiConfig(
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        intermediate_size=256,
        resid_pdrop=0.0,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        **_ids(tokenizer),
    )
    tower = SiglipVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH, vision_use_head=False, **_TOWER)
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size=_SQUARE, **_STILL),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template(VICUNA, "<image>\n"),
    )
    return _llava(tower, text, tokenizer.vocab["<image>"], "full"), processor


def tiny_internvl() -> tuple[Any, Any]:
    """InternVL tower with pixel shuffle (4 image tokens, one per quadrant) and Phi-3 decoder with fused projections."""
    tokenizer = _phi3_tokenizer()
    tokens = (IMAGE_SIZE // PATCH // 2) ** 2
    text = Phi3Config(
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=176,
        **_ids(tokenizer),
    )
    tower = InternVLVisionConfig(
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        patch_size=[PATCH, PATCH],
        layer_scale_init_value=1.0,
        attention_bias=True,
        use_qk_norm=False,
        **_TOWER,
    )
    config = InternVLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=tokenizer.vocab["<IMG_CONTEXT>"],
        image_seq_length=tokens,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = InternVLStills(
        GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=False, min_patches=1, max_patches=12, **_STILL),
        tokenizer,
        {},
        image_seq_length=tokens,
        chat_template=chat_template(PHI3, "<IMG_CONTEXT>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tiny_llava": tiny_llava,
    "tiny_bunny": tiny_bunny,
    "tiny_internvl": tiny_internvl,
}


def initialise(model: nn.Module, seed: int) -> None:
    """Fill a model with weights that keep the scale of activations: 1/sqrt(fan-in), residual outputs scaled by depth.

    Args:
        model: A freshly built tiny model; norms and the tower's class token stay as built, biases become zero.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    deep = math.sqrt(2 * len(decoder_of(model).layers))  # pyright: ignore[reportArgumentType]
    residual = ("o_proj", "down_proj", "self_attn.dense", "fc2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            std /= deep if "language_model" in name and name.endswith(residual) else 1
            module.weight.data.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()


# ---- pictures --------------------------------------------------------------------------------------------------------


def augmented(images: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Digit images after small random rotations, scalings, shears and shifts.

    Args:
        images: ``(count, size, size)``, 0..``FULL``.
        seed: Seed of this version.

    Returns:
        An int64 array of the same shape.
    """
    rng = np.random.default_rng(list(seed))
    count = len(images)
    angle, shear = rng.uniform(-0.22, 0.22, count), rng.uniform(-0.2, 0.2, count)
    scale, shift = rng.uniform(0.9, 1.12, (2, count)), rng.uniform(-0.12, 0.12, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.stack(
        [cos / scale[0], (shear - sin) / scale[0], shift[0], sin / scale[1], cos / scale[1], shift[1]], axis=1
    ).reshape(count, 2, 3)
    source = torch.from_numpy(images / FULL).float().unsqueeze(1)
    grid = nn.functional.affine_grid(torch.from_numpy(affine).float(), list(source.shape), align_corners=False)
    warped = nn.functional.grid_sample(source, grid, align_corners=False).squeeze(1)
    return (warped.clamp(0, 1) * FULL).round().long().numpy()


def scene_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What each quadrant shows: ``digits`` (10: nothing) and ``colours`` (-100: none), ``(scenes, 4)``."""
    digits = torch.full((len(scenes), 4), len(WORDS))
    colours = torch.full((len(scenes), 4), -100)
    for row, scene in enumerate(scenes):
        for glyph in scene:
            digits[row, glyph.place] = glyph.digit
            colours[row, glyph.place] = list(COLOURS).index(glyph.colour)
    return {"digits": digits, "colours": colours}


def painted(collate: Collator, data: Digits, indices: Sequence[int]) -> dict[str, Any]:
    """Pixels of scenes, and what they show."""
    images: list[Any] = [data[i].image for i in indices]
    return {**collate.prompts.pixels(images)[0], **scene_targets([data.scene(i) for i in indices])}


def quadrants(tokens: int) -> Tensor:
    """Index of the quadrant that each of ``tokens`` image tokens (a square grid, row by row) lies in."""
    side = math.isqrt(tokens)
    half = torch.arange(side) * 2 // side
    return (half[:, None] * 2 + half[None, :]).flatten()
