"""Processors: the right one for a folder, and an InternVL processor that needs no torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

INTERNVL_CLASSES = {"InternVLProcessor", "InternVLPilProcessor"}


class InternVLPilProcessor(ProcessorMixin):
    """InternVL's processor for still images on the PIL backend, with the call surface of the stock class.

    The stock ``InternVLProcessor`` insists on a video processor and with it on torchvision. The files that this class
    saves name the stock class, so that they load in stock transformers where torchvision is installed.

    Args:
        image_processor: A ``GotOcr2ImageProcessorPil``.
        tokenizer: A tokenizer with the extra special tokens ``start_image_token``, ``end_image_token``,
            ``context_image_token`` and ``video_token``.
        image_seq_length: Image tokens per tile.
        chat_template: Jinja template that writes one ``context_image_token`` per image.
    """

    text_kwargs = {"padding_side": "left"}  # noqa: RUF012 - the stock class's own convention
    images_kwargs = {"crop_to_patches": True}  # noqa: RUF012 # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of the tokens that stand for an image: context, start and end."""
        return [self.image_token_id, self.start_image_token_id, self.end_image_token_id]

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the image processor that the model does not take."""
        return ["num_patches"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_kwargs: Any) -> str:
        """The text that stands for an image: start, ``image_seq_length`` context tokens per tile, end."""
        count = self.image_seq_length * int(image_inputs["num_patches"][image_idx])
        return f"{self.start_image_token}{self.image_token * count}{self.end_image_token}"

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The saved settings, under the stock class's name."""
        return super().to_dict(*args, **kwargs) | {"processor_class": "InternVLProcessor"}


def _processor_class(folder: str | Path) -> str | None:
    from transformers.utils.hub import cached_file

    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
        if path is not None and (found := json.loads(Path(path).read_text("utf-8")).get("processor_class")):
            return found
    return None


def load_processor(folder: str | Path) -> Any:
    """Load the processor of a checkpoint; InternVL's on the PIL backend, every other by stock ``AutoProcessor``.

    Args:
        folder: A checkpoint folder or a hub id.

    Returns:
        The processor, with ``tokenizer``, ``image_processor`` and ``chat_template``.
    """
    if _processor_class(folder) not in INTERNVL_CLASSES:
        return AutoProcessor.from_pretrained(folder, backend="pil")
    from transformers import AutoTokenizer
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    settings, _ = ProcessorMixin.get_processor_dict(str(folder))
    return InternVLPilProcessor(
        GotOcr2ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        image_seq_length=settings.get("image_seq_length", 256),
        chat_template=settings.get("chat_template"),
    )
