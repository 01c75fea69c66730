"""Preprocessing and prompts of the three original pipelines, as stock processors.

LLaVA-1.5 and Bunny pad an image to a square with the mean colour and resize it (``expand2square`` in the repositories
``haotian-liu/LLaVA`` and ``BAAI-DCAI/Bunny``); InternVL cuts it into tiles and appends a thumbnail
(``dynamic_preprocess`` in ``OpenGVLab/InternVL``).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import LlavaProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from ...models.processors import InternVLStills, phi3_template, vicuna_template
from ...runtime.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROTOCOLS = ("vicuna_v1",)


def square_processor(
    tokenizer: Any, side: int, mean: tuple[float, ...], std: tuple[float, ...], patch: int, class_token: bool
) -> LlavaProcessor:
    """LLaVA's and Bunny's processor: pad to a square with the mean colour, resize, one row of tokens per image.

    Args:
        tokenizer: A tokenizer with the token ``<image>``.
        side: Side of the resized image in pixels.
        mean: Mean of each channel, in [0, 1]; also the colour of the border.
        std: Standard deviation of each channel.
        patch: Side of a patch in pixels.
        class_token: Whether the tower has a class token; it is dropped.
    """
    square = {"height": side, "width": side}
    images = LlavaImageProcessorPil(
        do_pad=True,
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        chat_template=vicuna_template(),
    )


def tile_processor(tokenizer: Any, side: int, tiles: tuple[int, int], tokens: int) -> Any:
    """InternVL's processor: tiles of the best grid, then a thumbnail where there is more than one.

    Args:
        tokenizer: A tokenizer with InternVL's image tokens as extra special tokens.
        side: Side of a tile in pixels.
        tiles: Fewest and most tiles of an image, the thumbnail not counted.
        tokens: Image tokens per tile.
    """
    square = {"height": side, "width": side}
    images = GotOcr2ImageProcessorPil(
        size=square,
        crop_to_patches=True,
        min_patches=tiles[0],
        max_patches=tiles[1],
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return InternVLStills(images, tokenizer, {"size": square}, image_seq_length=tokens, chat_template=phi3_template())


def with_protocol(processor: Any, protocol: str) -> Any:
    """Give a stock LLaVA-1.5 processor the preprocessing and prompt that the model was trained with.

    The files of ``llava-hf`` crop the centre of an image and leave the system sentence out.

    Args:
        processor: The checkpoint's processor.
        protocol: ``vicuna_v1``.

    Raises:
        UserError: The processor is not LLaVA's, or the protocol is unknown.
    """
    if protocol not in PROTOCOLS or not isinstance(processor, LlavaProcessor):
        raise UserError(
            f"model.protocol={protocol}: must be one of {', '.join(PROTOCOLS)} and the model a LLaVA-1.5, whose "
            f"processor is a LlavaProcessor; this one's is a {type(processor).__name__}; set model.protocol=null"
        )
    old = processor.image_processor
    side = int(old.crop_size["height"])
    return square_processor(
        processor.tokenizer, side, tuple(old.image_mean), tuple(old.image_std), processor.patch_size or 14, True
    )


def with_system(processor: Any, sentence: str) -> str:
    """A processor's chat template with another system sentence; a system message of the user's replaces it.

    Args:
        processor: A processor whose chat template knows system messages.
        sentence: The system sentence.

    Raises:
        UserError: The template does not write system messages, or there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    message = json.dumps([{"role": "system", "content": [{"type": "text", "text": sentence}]}])
    first = f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {message} + messages %}}{{% endif %}}"
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    try:
        shown = processor.tokenizer.apply_chat_template(question, chat_template=first + template, tokenize=False)
    except (TypeError, ValueError, TemplateError) as error:
        raise UserError(f"model.system: the chat template takes no system message ({error}); leave it out") from error
    if sentence.strip() not in shown:
        raise UserError("model.system: the chat template writes no system message; leave it out")
    return first + template


def published_system(folder: Path, template: str) -> str | None:
    """The system sentence that an InternVL folder's ``conversation.py`` gives a template; it is read, never run.

    Args:
        folder: The original folder.
        template: Name of the template, as in config.json.

    Returns:
        The sentence; None where the file is not there, or does not say.
    """
    file = folder / "conversation.py"
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (FileNotFoundError, SyntaxError):
        return None
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        said = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        sentence = said.get("system_message")
        if said.get("name") == template and isinstance(sentence, str):
            return sentence
    return None
