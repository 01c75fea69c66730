"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.sources import BUILTIN

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


def named(path: str) -> str:
    """What a model is called in public: its hub id, the name of a shipped one, or that of its folder."""
    if path.startswith(BUILTIN):
        return path.removeprefix(BUILTIN)
    cached = [part.removeprefix(CACHED) for part in Path(path).parts if part.startswith(CACHED)]
    if cached:
        return cached[-1].replace("--", "/", 1)
    return path if _is_id(path) else Path(path).name


def _is_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


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
    local = Path(path).expanduser()
    public = named(str(local.absolute()) if local.is_dir() else path)
    name = {"name": named(str(front["model_name"]))} if front.get("model_name") else {}
    licence = {key: str(front[key]) for key in LICENCE_KEYS if front.get(key)}
    if "license" not in licence:
        known = OURS if path.startswith(BUILTIN) else LICENSES.get(public)
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
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        plain = " ".join(text.lower().split())
        known = next((name for words, name in TEXTS.items() if words in plain), None)
        if known:
            yield {"license": known}
        elif lines:
            yield {"license": "other", "license_name": lines[0][:80]}


def usage(folder: str, needs_import: bool) -> str:
    """Python lines that load a checkpoint with transformers.

    Args:
        folder: What to load.
        needs_import: Whether layers differ in size, so that our registered classes are needed.
    """
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor"]
    if needs_import:
        lines.insert(0, "import efficientllava  # registers decoders whose layers differ in size")
    lines.append(f"model = AutoModelForImageTextToText.from_pretrained({folder!r})")
    lines.append(f"processor = AutoProcessor.from_pretrained({folder!r})")
    return "\n".join(lines)


def model_card(provenance: Mapping[str, Any], needs_import: bool, facts: Mapping[str, Any]) -> str:
    """Write the card: front matter that hubs read, and what was done to the base model.

    Args:
        provenance: ``base`` (``path``, and what `about` says), ``original_layers`` and ``history`` of the checkpoint.
        needs_import: See `usage`.
        facts: Further key figures, one line each.

    Returns:
        Markdown.
    """
    base = provenance["base"]
    public = named(str(base["path"]))
    name = str(base.get("name", public))
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    front["tags"] = ["efficientllava", "pruned"]
    if _is_id(public):
        front |= {"base_model": public, "base_model_relation": "finetune"}
    # The card carries the licence of the base model, never one of its own.
    licence = {"license": LICENSES[public]} if public in LICENSES else {}
    front |= licence | {key: base[key] for key in LICENCE_KEYS if key in base}
    steps = [json.dumps(step, sort_keys=True) for step in provenance.get("history", [])]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            f"# A smaller {name}",
            "",
            f"Made from `{name}` by [efficientllava](https://github.com/efficientllava/efficientllava); "
            f"the licence of the base model applies ({front.get('license', 'which its folder does not name')}).",
            "",
            *(f"- `{step}`" for step in steps),
            *(f"- {key}: {value}" for key, value in facts.items()),
            f"- layers kept, by index in the base model: {provenance['original_layers']}",
            "",
            "```python",
            usage("<this folder>", needs_import),
            "```",
            "",
        ]
    )
