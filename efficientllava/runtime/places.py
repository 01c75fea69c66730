"""Where a path of the configuration leads: to a file or folder here, to what comes with this package, or to the hub.

And whether a folder holds one whole model, as far as its JSON says; torch is not needed for that.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from .errors import UserError

HUB, BUILTIN = "hf://datasets/", "builtin:"
PACKAGE = Path(__file__).resolve().parents[1]
# The configuration is a part of an installed package; in a clone it is beside it, with run.py.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
COMMAND = ("efficientllava",) if CONF.parent == PACKAGE else ("python", "run.py")  # as a user types it
# Suffixes of what decides how a checkpoint computes, those of original layouts included.
CONTENT = (".json", ".safetensors", ".bin", ".jinja", ".model", ".py")
WORDS = ("merges.txt", "vocab.txt")  # of tokenizers
TEXTS = (".json", ".jinja", ".txt", ".py")  # of these, those that are text
PROVENANCE = "efficientllava.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What describes a checkpoint; tokenizer.json is left to its reader.
DESCRIBING = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"),
)
QUANTIZED = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ
UNQUANTIZED = (
    "quantized weights cannot be pruned: give the checkpoint that they were made from, in float32, float16 or bfloat16"
)


def is_id(path: str) -> bool:
    """Whether a path has the form of the hub's names, ``org/name``."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~", BUILTIN))


def is_hub_id(path: str) -> bool:
    """Whether a path names something of the hub, and nothing that is here."""
    return is_id(path) and not Path(path).exists()


def is_remote(path: str) -> bool:
    """Whether ``data.path`` names something on the hub: ``hf://datasets/org/name/file``, or a data set ``org/name``."""
    return path.startswith(HUB) or (is_hub_id(path) and not Path(path).suffix)


def is_elsewhere(path: str) -> bool:
    """Whether ``data.path`` names something on the hub or a list that comes with this package."""
    return path.startswith(BUILTIN) or is_remote(path)


def local(path: str) -> Path:
    """The place on this machine that a path names, which may not exist."""
    if path.startswith(BUILTIN):
        return PACKAGE / "assets" / path.removeprefix(BUILTIN)
    return Path(path).expanduser()


def anchored(path: str) -> str:
    """A path by which a folder is found again from wherever the next run is started; others stay as they are."""
    here = Path(path).expanduser()
    return str(here.resolve()) if here.is_dir() else path


def local_folder(path: str) -> Path | None:
    """The folder of a checkpoint that a path names; None for a hub id.

    Raises:
        UserError: There is no such folder, or no config.json in it.
    """
    if is_hub_id(path):
        return None
    folder = local(path)
    if not folder.is_dir():
        raise UserError(f"model.path={path}: no such folder; give a Hugging Face folder or a hub id such as org/name")
    return with_config(folder, path)


def with_config(folder: Path, path: str) -> Path:
    """The folder itself, if it holds one whole model that can be pruned, as far as its JSON says.

    Args:
        folder: The folder.
        path: What the user typed.

    Raises:
        UserError: There is no config.json or it cannot be read, or the folder holds an adapter or quantized weights.
    """
    adapter = next((name for name in ADAPTERS if (folder / name).is_file()), None)
    if not (folder / "config.json").is_file():
        if adapter is None:
            raise UserError(
                f"model.path={path}: has no config.json; give a folder written by save_pretrained, or its hub id"
            )
        described = folder / ADAPTERS[0]
        base = read_json(described, path).get("base_model_name_or_path") if described.is_file() else None
        raise UserError(
            f"model.path={path}: is an adapter (LoRA{f' of {base}' if base else ''}), not a whole model; merge it into "
            "its base, peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and "
            "give that folder"
        )
    if adapter:
        raise UserError(
            f"model.path={path}: holds an adapter, {adapter}, beside full weights; merge it into them, or move the "
            "files named adapter_* elsewhere"
        )
    for file in content_files(folder):
        if file.suffix in TEXTS:
            with file.open("rb") as text:
                if text.read(3) == codecs.BOM_UTF8:
                    raise UserError(
                        f"model.path={path}: {file.name} cannot be read: it begins with a byte-order mark; save it as "
                        "UTF-8 without one; mend it"
                    )
    read = {name: read_json(folder / name, path) for name in DESCRIBING if (folder / name).is_file()}
    found = _quantization(read["config.json"])
    if found or any((folder / name).is_file() for name in QUANTIZED):
        kind = found.get("quant_method") if isinstance(found, dict) else None
        raise UserError(f"model.path={path}: its weights are quantized{f' ({kind})' if kind else ''}; {UNQUANTIZED}")
    return folder


def _quantization(config: dict[str, Any]) -> Any:
    """What a configuration, or a part of it, says of its weights' quantization."""
    own = config.get("quantization_config") or config.get("compression_config")
    parts = (part for part in config.values() if isinstance(part, dict))
    return own or next(filter(None, map(_quantization, parts)), None)


def read_json(file: Path, path: str) -> dict[str, Any]:
    """What a JSON file of a checkpoint says.

    Args:
        file: The file.
        path: What the user has given as ``model.path``.

    Raises:
        UserError: It is no JSON object.
    """
    try:
        found = json.loads(file.read_bytes().decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} instead of an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path={path}: {file.name} cannot be read: {error}; mend it") from error
    return found


def peek_json(file: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it is missing or damaged, or holds no object."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def content_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that decide how it computes."""
    known = (p for p in folder.iterdir() if p.suffix in CONTENT or p.name in WORDS)
    return sorted(p for p in known if p.name != PROVENANCE and p.is_file())
