"""Checkpoints as they were published: fetched from the Hugging Face hub without any code, their name, licence, content.

torch is not needed for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime import (
    ADAPTERS,
    BUILTIN,
    MEMO,
    PROVENANCE,
    QUANTIZED,
    Memo,
    UserError,
    anchored,
    content_files,
    disk_full,
    first_line,
    is_id,
    local_folder,
    with_config,
)

# What a checkpoint consists of; never weights in other formats. The prompt of InternVL stands in a Python file, which
# is read and not run.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "conversation.py"]
# What tells of a hub id that it cannot be pruned, before its weights are fetched.
TELLING = ["config.json", ADAPTERS[0], *QUANTIZED]
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
CACHED = "models--"  # how the hub client's cache names the folder of org/name: models--org--name
LICENSES = {
    "llava-hf/llava-1.5-7b-hf": "llama2",
    "BAAI/Bunny-v1_0-3B": "apache-2.0",
    "OpenGVLab/Mini-InternVL-Chat-4B-V1-5": "mit",
}
OURS = "apache-2.0"  # of this package and the models in it
LICENCE_KEYS = ("license", "license_name", "license_link")  # of a card's front matter
# How well-known licences begin or what they say, in lower case with single spaces; the first that is found counts.
TEXTS = {
    "apache license version 2.0": "apache-2.0",
    "permission is hereby granted, free of charge": "mit",
    "neither the name of": "bsd-3-clause",
    "llama 2 community license": "llama2",
    "llama 3.3 community license": "llama3.3",
    "llama 3.2 community license": "llama3.2",
    "llama 3.1 community license": "llama3.1",
    "llama 3 community license": "llama3",
    "gemma terms of use": "gemma",
    "attribution-noncommercial-sharealike 4.0": "cc-by-nc-sa-4.0",
    "attribution-noncommercial 4.0": "cc-by-nc-4.0",
    "attribution-sharealike 4.0": "cc-by-sa-4.0",
    "attribution 4.0 international": "cc-by-4.0",
}


def download(name: str, revision: str | None = None, files: list[str] | None = None) -> Path:
    """Fetch a checkpoint from the hub into its own cache, or find it there.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None is the default branch.
        files: Names to fetch; None: everything that belongs to a checkpoint.

    Raises:
        UserError: The hub cannot be reached, knows no such model, or does not let this user have it.
    """
    from huggingface_hub import snapshot_download

    try:
        # Nothing of a checkpoint lies in folders of its own; other formats of the weights do.
        return Path(snapshot_download(name, revision=revision, allow_patterns=files or FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        known = next((REFUSALS[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in REFUSALS), None)
        if disk_full(error):
            known = "the disk is full; free some space, or set HF_HOME to a folder elsewhere"
        text = known or "cannot be fetched from the hub ({reason}); check the name and the network, or give a folder"
        told = text.format(name=name, revision=revision, reason=first_line(error))
        raise UserError(f"model.path={name}: {told}") from error


def described(name: str, revision: str | None = None) -> Path:
    """Fetch of a hub id what says whether its weights, which may be many GB, are of any use.

    Raises:
        UserError: As `download` and `efficientllava.runtime.places.with_config`.
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


def origin_of(folder: Path) -> tuple[str, str | None] | None:
    """Folder, and no revision, of the checkpoint that one of ours was pruned from; None where there is none here."""
    try:
        place = str(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["base"]["path"])
        return (place, None) if local_folder(place) else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # whoever loads it says what is wrong


def own_root() -> Path:
    """Where the store of converted checkpoints is: beside the hub client's own cache, which ``HF_HOME`` moves."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "efficientllava"


def folder_digest(folder: Path, memo: Memo | None = None) -> str:
    """Digest of the whole content of a checkpoint folder, 32 hexadecimal digits.

    Args:
        folder: The folder.
        memo: Remembers what has been read; by default one of the user's own.
    """
    files = content_files(folder)
    sums = (memo or Memo(own_root() / MEMO)).digests(files)
    listed = "".join(f"{known}  {file.name}\n" for file, known in zip(files, sums, strict=True))
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()


def named(path: str) -> str:
    """What a model is called in public: its hub id, the name of a shipped one, or that of its folder."""
    if path.startswith(BUILTIN):
        return path.removeprefix(BUILTIN)
    cached = [part.removeprefix(CACHED) for part in Path(path).parts if part.startswith(CACHED)]
    if cached:
        return cached[-1].replace("--", "/", 1)
    return path if is_id(path) else Path(path).name


def about(folder: Path, path: str) -> dict[str, str]:
    """Name and licence of a checkpoint, as far as its folder or its hub id says them.

    Args:
        folder: The folder as published, before any conversion.
        path: What the user has given.

    Returns:
        ``name`` where its own card has one, and of `LICENCE_KEYS` those that are known; "other" only where the folder
        says so itself, or holds a licence that is none of `TEXTS`.
    """
    front = _front_matter(folder / "README.md")
    name = {"name": named(str(front["model_name"]))} if front.get("model_name") else {}
    licence = {key: str(front[key]) for key in LICENCE_KEYS if front.get(key)}
    if "license" not in licence:
        known = OURS if path.startswith(BUILTIN) else LICENSES.get(named(anchored(path)))
        licence |= {"license": known} if known else next(_licence_files(folder), {})
    return name | licence


def _front_matter(file: Path) -> Mapping[str, Any]:
    """What a card says to hubs; nothing where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(file) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _licence_files(folder: Path) -> Iterator[dict[str, str]]:
    """What the licence files of a folder are, each as a card's front matter says it."""
    for file in sorted(folder.glob("LICEN[CS]E*")):
        text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
        plain = " ".join(text.lower().split())
        if known := next((name for words, name in TEXTS.items() if words in plain), None):
            yield {"license": known}
        elif plain:
            yield {"license": "other", "license_name": text.strip().splitlines()[0].strip()[:80]}
