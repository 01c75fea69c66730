"""What a change of layers saves in the installed runtime, for searches whose budget is the time there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..models.anatomy import decoder_of
from ..models.chat import end_tokens
from . import decoders
from .inputs import vocabulary
from .runtime import rates

CONTEXT = 256  # tokens that there is room for
REPEATS = 7


def seconds(
    processor: Any,
    kind: str,
    folder: Path,
    model: Any,
    layers: Sequence[int],
    tokens: tuple[int, int],
    variants: Iterable[AbstractContextManager[Any]],
) -> list[float]:
    """Seconds of CPU, on one thread, of some layers with embedding and head, as they are in every variant.

    Args:
        processor: Of the model.
        kind: Type of the files, one of `efficientllava.settings.schema.GGUF_TYPES`.
        folder: Of the files, which are removed again.
        model: An image-text-to-text model.
        layers: Those that count.
        tokens: Of the prompt, and of the answer.
        variants: In which the model is another one; every one is timed in turn with the first.

    Raises:
        UserError: The runtime does not hold the decoder, or is not installed.
    """
    rows = decoder_of(model).embed_tokens.num_embeddings
    words = vocabulary(processor, rows, end_tokens(model, processor.tokenizer))
    files: dict[str, Path] = {}
    found: list[float] = []
    for variant in variants:
        name = "other" if files else "first"
        files[name] = folder / f"{name}.gguf"
        with variant:
            decoder = decoders.describe(model, layers)
            decoders.write(files[name], decoder.architecture, decoder.metadata() | words, decoder.tensors(), kind)
        measured = rates(files, CONTEXT, REPEATS)
        spent = {file: tokens[0] / each["prefill"] + tokens[1] / each["decode"] for file, each in measured.items()}
        found.append(found[0] * spent["other"] / spent["first"] if found else spent["first"])
    for file in files.values():
        file.unlink()
    return found
