"""Processors: the right one for a folder, those of the original pipelines, and their prompts.

LLaVA-1.5 and Bunny pad an image to a square with the mean colour and resize it (``expand2square`` in the repositories
``haotian-liu/LLaVA`` and ``BAAI-DCAI/Bunny``); InternVL cuts it into tiles and appends a thumbnail
(``dynamic_preprocess`` in ``OpenGVLab/InternVL``). Processors of video models come without what needs torchvision.
"""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaProcessor
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from ..models.chat import template_of
from ..runtime.errors import UserError, first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROTOCOLS = ("vicuna_v1",)
_CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: CONTENT{{ eos_token }}"
    "{% else %}USER: CONTENT {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\nCONTENT<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Of the 1.5 release; later releases of the InternVL repository put a Chinese sentence here.
PHI3_SYSTEM = "You are an AI assistant whose name is Phi-3."


def chat_template(text: str, image: str) -> str:
    """Fill a template in.

    Args:
        text: Jinja text in which ``CONTENT`` stands for the content of the message ``m``.
        image: What the template writes for an image.
    """
    return text.replace("CONTENT", _CONTENT).replace("IMAGE", image)


def vicuna_template() -> str:
    """``vicuna_v1`` of LLaVA-1.5 and ``bunny``: system sentence, ``USER: … ASSISTANT: …`` and the end token.

    A system message of the user's replaces the system sentence.
    """
    system = (
        f"{{% set m = messages[0] %}}{{% if m['role'] == 'system' %}}CONTENT{{% else %}}{VICUNA_SYSTEM}{{% endif %}} "
    )
    return chat_template(system + VICUNA.replace("in messages", "in messages if m['role'] != 'system'"), "<image>\n")


def phi3_template() -> str:
    """``phi3-chat`` of Mini-InternVL-Chat-4B-V1-5: no line break after ``<|end|>``, nor after an image at a turn's end.

    A system message of the user's replaces the system sentence.
    """
    system = f"{{% if messages[0]['role'] != 'system' %}}<|system|>\n{PHI3_SYSTEM}<|end|>{{% endif %}}"
    image = "<IMG_CONTEXT>{{ '' if loop.last else '\\n' }}"
    return chat_template(system + PHI3.replace("<|end|>\n", "<|end|>"), image)


VIDEO = "video_processor"
VIDEO_FILE = "video_preprocessor_config.json"


@functools.cache
def stills(stock: Any) -> Any:
    """A stock processor class without its video processor, which insists on torchvision.

    For still images it is the stock class. The files that it saves name the stock class and keep the settings of its
    video processor, so that they load in stock transformers where torchvision is installed.

    Args:
        stock: A processor class, such as ``Qwen2_5_VLProcessor``.

    Returns:
        A subclass of the same name, whose constructor takes the settings of the video processor in its place: a
        dictionary, empty for those of the model type.
    """

    # The stock signature stays: what is saved is read off it.
    @functools.wraps(stock.__init__)
    def __init__(self: Any, image_processor: Any, tokenizer: Any, video_processor: dict[str, Any], **rest: Any) -> None:
        stock.__init__(self, image_processor, tokenizer, video_processor=None, **rest)
        # Where the stock class looks for its defaults, a setting that is not there is one that was not made.
        self.video_processor = SimpleNamespace(**{"num_frames": None, "fps": None, **video_processor})
        self._video_settings = video_processor

    def attributes(_cls: Any) -> list[str]:
        return [name for name in stock.get_attributes() if name != VIDEO]

    def to_dict(self: Any) -> dict[str, Any]:
        """The saved settings; the video processor's are as they were given."""
        return {**stock.to_dict(self), VIDEO: self._video_settings}

    methods = {"__init__": __init__, "get_attributes": classmethod(attributes), "to_dict": to_dict}
    return type(stock.__name__, (stock,), {"__doc__": stills.__doc__, "__module__": __name__, **methods})


InternVLStills = stills(InternVLProcessor)


def load_processor(folder: str | Path) -> Any:
    """Load the processor of a checkpoint folder on the PIL backend, which is what the original pipelines compute.

    Args:
        folder: A checkpoint folder.

    Returns:
        The processor, with ``tokenizer``, ``image_processor`` and ``chat_template``; of still images alone.
    """
    folder = Path(folder)
    files = (folder / name for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"))
    names = (_read(file).get("processor_class") for file in files)
    stock = processor_class_from_name(next(filter(None, names), ""))
    if stock is None or VIDEO not in stock.get_attributes():
        return AutoProcessor.from_pretrained(folder, backend="pil")
    settings, _ = ProcessorMixin.get_processor_dict(str(folder))
    video = settings.pop(VIDEO, None) or _read(folder / VIDEO_FILE)
    known = {
        key: value for key, value in settings.items() if key not in ("processor_class", "auto_map", "image_processor")
    }
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return stills(stock)(images, AutoTokenizer.from_pretrained(folder), video, **known)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


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
    template = template_of(processor)
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


def processor_of(folder: Path, path: str, protocol: str | None) -> Any:
    """The processor of a checkpoint that is called ``path``, of another protocol where one is asked for.

    Raises:
        UserError: It cannot be loaded, or knows no such protocol.
    """
    try:
        processor = load_processor(folder)
    except ImportError as error:
        raise UserError(f"model.path={path}: {first_line(error)}") from error
    except Exception as error:  # as many kinds as there are tokenizers
        raise UserError(
            f"model.path={path}: the processor cannot be loaded: {first_line(error)}; the folder needs the "
            "tokenizer and processor files beside the weights"
        ) from error
    return processor if protocol is None else with_protocol(processor, protocol)


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
