"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LICENSES = {
    "llava-hf/llava-1.5-7b-hf": "llama2",
    "BAAI/Bunny-v1_0-3B": "apache-2.0",
    "OpenGVLab/Mini-InternVL-Chat-4B-V1-5": "mit",
}


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
        provenance: ``base``, ``original_layers`` and ``history`` of the checkpoint.
        needs_import: See `usage`.
        facts: Further key figures, one line each.

    Returns:
        Markdown.
    """
    base = str(provenance["base"]["path"])
    front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["efficientllava", "pruned"]}
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        front |= {"base_model": base, "base_model_relation": "finetune"}
    # The card carries the licence of the base model, never one of its own.
    front["license"] = LICENSES.get(base, "other")
    steps = [json.dumps(step, sort_keys=True) for step in provenance.get("history", [])]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            f"# A smaller {base}",
            "",
            f"Made from `{base}` by [efficientllava](https://github.com/efficientllava/efficientllava); "
            "the licence of the base model applies.",
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
