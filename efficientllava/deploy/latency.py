"""What a change of layers saves in the installed runtime, for searches whose budget is the time there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..models.anatomy import decoder_of
from . import decoders
from .check import end_tokens
from .inputs import vocabulary
from .runtime import rates

CONTEXT = 256  # tokens that there is room for
REPEATS = 7


class Stopwatch:
    """Seconds of CPU, on one thread.

    Args:
        processor: Of the models, which have one vocabulary.
        kind: Type of the files, one of `efficientllava.settings.schema.GGUF_TYPES`.
        folder: Of the files, which are removed again.
    """

    def __init__(self, processor: Any, kind: str, folder: Path) -> None:
        self._processor, self._kind, self._folder = processor, kind, folder

    def __call__(
        self,
        model: Any,
        layers: Sequence[int],
        tokens: tuple[int, int],
        variants: Iterable[AbstractContextManager[Any]],
    ) -> list[float]:
        """Time some layers, with embedding and head, as they are in every variant.

        Args:
            model: An image-text-to-text model.
            layers: Those that count.
            tokens: Of the prompt, and of the answer.
            variants: In which the model is another one; every one is timed in turn with the first.

        Raises:
            UserError: The runtime does not hold the decoder, or is not installed.
        """
        words = vocabulary(self._processor, decoder_of(model).embed_tokens.num_embeddings, end_tokens(model))
        found: list[float] = []
        first = self._folder / "first.gguf"
        for variant in variants:
            file = self._folder / "other.gguf" if found else first
            with variant:
                decoder = decoders.describe(model, layers)
                keys = decoder.metadata() | words
                decoders.write(file, decoder.architecture, keys, decoder.tensors(), self._kind)
            measured = rates({"first": first, **({"other": file} if found else {})}, CONTEXT, REPEATS)
            spent = {name: tokens[0] / each["prefill"] + tokens[1] / each["decode"] for name, each in measured.items()}
            found.append(found[0] * spent["other"] / spent["first"] if found else spent["first"])
            if file != first:
                file.unlink()
        first.unlink()
        return found
