"""Folders of checkpoints, here or fetched from the Hugging Face hub without any code; torch is not needed for that."""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from typing import Any

from ..data.sources import BUILTIN
from ..runtime.content import MEMO, Memo
from ..runtime.errors import UserError, disk_full

# What a checkpoint consists of; never weights in other formats. The prompt of InternVL stands in a Python file, which
# is read and not run.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "conversation.py"]
# Suffixes of what decides how a checkpoint computes, those of original layouts included.
CONTENT = (".json", ".safetensors", ".bin", ".jinja", ".model", ".py")
TEXTS = (".json", ".jinja", ".txt", ".py")  # of these, those that are text
WORDS = ("merges.txt", "vocab.txt")  # of tokenizers
PROVENANCE = "efficientllava.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What describes a checkpoint; tokenizer.json is left to its reader.
DESCRIBING = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"),
)
QUANTIZED = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ
# What tells of a hub id that it cannot be pruned, before its weights are fetched.
TELLING = ["config.json", ADAPTERS[0], *QUANTIZED]
UNQUANTIZED = (
    "quantized weights cannot be pruned: give the checkpoint that they were made from, in float32, float16 or bfloat16"
)
REFUSALS = {
    "GatedRepoError": "its owners ask for consent; accept their terms at https://huggingface.co/{name}, then log in "
    "with hf auth login",
    "RepositoryNotFoundError": "the hub has no such model, or it is private; check the name, log in with hf auth "
    "login, or give a local folder",
    "RevisionNotFoundError": "the hub's model has no model.revision={revision}; give a branch, tag or commit of it",
    "IncompleteSnapshotError": "only a part of it was ever downloaded, and the hub cannot be reached; run again with a "
    "network, or give a local folder",
    "LocalEntryNotFoundError": "no such folder, and the hub cannot be reached ({reason}); check the network and "
    "HF_HUB_OFFLINE, or give a local folder",
}


def is_hub_id(path: str) -> bool:
    """Whether a path names a model of the hub, such as ``org/name``, and no folder that is there."""
    plain = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return plain and not Path(path).exists()


def local_folder(path: str) -> Path | None:
    """The folder that a path names; None for a hub id.

    Raises:
        UserError: There is no such folder, or no config.json in it.
    """
    if path.startswith(BUILTIN):
        folder = Path(__file__).parents[1] / "assets" / path.removeprefix(BUILTIN)
    else:
        folder = Path(path).expanduser()
        if is_hub_id(path):
            return None
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


def download(name: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """Fetch a checkpoint from the hub into its own cache, or find it there.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None is the default branch.
        files: Names to fetch; None: everything that belongs to a checkpoint.

    Returns:
        The local folder.

    Raises:
        UserError: The hub cannot be reached, knows no such model, or does not let this user have it.
    """
    from huggingface_hub import snapshot_download

    try:
        # Nothing of a checkpoint lies in folders of its own; other formats of the weights do.
        folder = snapshot_download(name, revision=revision, allow_patterns=files or FILES, ignore_patterns=["*/*"])
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        kinds = [cls.__name__ for cls in type(error).__mro__]
        known = next((REFUSALS[kind] for kind in kinds if kind in REFUSALS), None)
        if disk_full(error):
            known = "the disk is full; free some space, or set HF_HOME to a folder elsewhere"
        text = known or "cannot be fetched from the hub ({reason}); check the name and the network, or give a folder"
        raise UserError(f"model.path={name}: {text.format(name=name, revision=revision, reason=reason)}") from error
    return Path(folder)


def described(name: str, revision: str | None = None) -> Path:
    """Fetch of a hub id what says whether its weights, which may be many GB, are of any use.

    Args:
        name: Hub id.
        revision: As for `download`.

    Raises:
        UserError: As `download` and `with_config`.
    """
    return with_config(download(name, revision, TELLING), name)


def source_folder(path: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint as it was published, which may be of a layout that is converted before it is used.

    Args:
        path: A folder, a hub id, or ``builtin:<name>``.
        revision: Hub revision.

    Raises:
        UserError: There is no such folder, or it cannot be fetched.
    """
    return local_folder(path) or download(path, revision)


def own_root() -> Path:
    """Where the store of converted checkpoints is: beside the hub client's own cache, which ``HF_HOME`` moves."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "efficientllava"


def content_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that decide how it computes."""
    known = (p for p in folder.iterdir() if p.suffix in CONTENT or p.name in WORDS)
    return sorted(p for p in known if p.name != PROVENANCE and p.is_file())


def origin_of(folder: Path) -> tuple[str, str | None] | None:
    """Folder, and no revision, of the checkpoint that one of ours was pruned from; None where there is none here."""
    try:
        place = str(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["base"]["path"])
        return (place, None) if local_folder(place) else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # whoever loads it says what is wrong


def digest(folder: Path, memo: Memo | None = None) -> str:
    """Digest of the whole content of a checkpoint folder.

    Args:
        folder: The folder.
        memo: Remembers what has been read; by default one of the user's own.

    Returns:
        32 hexadecimal digits.
    """
    files = content_files(folder)
    sums = (memo or Memo(own_root() / MEMO)).digests(files)
    listed = "".join(f"{known}  {file.name}\n" for file, known in zip(files, sums, strict=True))
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
