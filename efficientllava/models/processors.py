"""Processors: the right one for a folder, and those of video models without what needs torchvision.

Chat templates: the prompts of LLaVA-1.5, Bunny and Mini-InternVL, and the short ones of the tiny models.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import processor_class_from_name
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

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
    stock = processor_class_from_name(_processor_class(folder) or "")
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


def _processor_class(folder: Path) -> str | None:
    files = (folder / name for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"))
    return next((found for file in files if (found := _read(file).get("processor_class"))), None)
