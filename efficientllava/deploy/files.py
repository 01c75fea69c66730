"""GGUF files: written tensor by tensor, in the type that is asked for where a row has a whole number of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..settings.schema import BLOCKS, GGUF_TYPES

PLAIN = ("f32", "f16", "bf16")
QUANTIZED = tuple(kind for kind in GGUF_TYPES if kind in BLOCKS)
BLOCK = 32  # weights of a row that share a scale, of all in QUANTIZED
FALLBACK = "f16"  # of a tensor whose rows are no whole number of blocks
HEAD = "q8_0"  # of the embedding and the head where the others have fewer bits, as llama-quantize keeps them wider


def storage(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Type that a tensor is stored in.

    Args:
        name: Its name in the file.
        shape: Its shape; the last dimension is that of a row.
        kind: One of `efficientllava.settings.schema.GGUF_TYPES`, that of the file.
    """
    if len(shape) < 2 or name.startswith("rope_") or "position_embd" in name:
        return "f32"  # norms, biases, positions and rotary factors: the runtime adds and multiplies nothing else
    if kind in PLAIN:
        return kind
    if len(shape) > 2 or shape[-1] % BLOCK:
        return FALLBACK
    return HEAD if name in ("token_embd.weight", "output.weight") else kind


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, Callable[[], Tensor]]],
    kind: str,
) -> list[str]:
    """Write one file.

    Args:
        path: The file.
        architecture: ``general.architecture``.
        metadata: Further keys; lists and bytes are arrays.
        tensors: Names, and what makes the tensors.
        kind: One of `efficientllava.settings.schema.GGUF_TYPES`.

    Returns:
        Names of the tensors that are stored in `FALLBACK`, since their rows are no whole number of blocks.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key == "tokenizer.ggml.precompiled_charsmap":
            writer.add_precompiled_charsmap(value)
        else:
            number = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, number)
    writer.add_uint32("general.file_type", int(gguf.LlamaFileType[_file_type(kind)]))
    writer.add_uint32("general.quantization_version", gguf.GGML_QUANT_VERSION)
    made = [(name, make, storage(name, tuple(make().shape), kind)) for name, make in tensors]
    for name, make, stored in made:
        tensor, code = make(), gguf.GGMLQuantizationType[stored.upper()]
        count, size = gguf.GGML_QUANT_SIZES[code]
        writer.add_tensor_info(
            name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // count * size, raw_dtype=code
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, make, stored in made:
        array = make().detach().cpu().float().numpy()
        writer.write_tensor_data(gguf.quants.quantize(array, gguf.GGMLQuantizationType[stored.upper()]))
    writer.close()
    return [name for name, make, stored in made if kind in QUANTIZED and stored == FALLBACK and make().ndim == 2]


def _file_type(kind: str) -> str:
    if kind == "f32":
        return "ALL_F32"
    return f"MOSTLY_{kind.upper()}"
