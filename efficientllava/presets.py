"""Families of experiments that would be a file each: their options are stored from here.

``experiment=vlmcompression_<family>_<w|l><label>``: the models of arXiv 2604.24380, named by the labels it prints. Its
"15, 30, 45, 60 %" are not ratios: widthwise they are nominal shares per pruned layer, layerwise numbers of blocks.

``experiment=train_<tiny model>`` trains a shipped model from nothing (tens of minutes on one CPU core).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass(frozen=True)
class Family:
    """What is particular to a family.

    Args:
        model: Option of the group ``model``.
        blocks: Blocks that are dropped, by label in percent.
        prune: Keys of ``prune`` beside those of ``prune=widthwise_paper``.
    """

    model: str
    blocks: Mapping[int, int] = field(default_factory=lambda: {15: 5, 30: 10, 45: 15, 60: 21})
    prune: Mapping[str, Any] = field(default_factory=dict)


SHARES = {15: 0.2, 30: 0.4, 45: 0.6, 60: 0.8}  # nominal share of heads and channels per pruned layer, by label
FAMILIES = {
    "llava": Family("llava_1_5_7b"),
    "bunny": Family("bunny_3b"),
    # The study's script for Phi-3 prunes heads in layers 4-29 as well.
    "internvl": Family("mini_internvl_4b", {15: 5, 30: 10, 45: 15, 60: 20}, {"protect_attention": [3, -2]}),
}
SAMPLES = {"widthwise": 10, "layerwise": 50}  # calibration records
TRAINING: dict[str, dict[str, Any]] = {  # of the shipped models, beside the defaults of `schema.PretrainConfig`
    "tiny_bunny": {"extra_from": 2250},
    "tiny_internvl": {
        "align_steps": 1500,
        "steps": 7000,
        "extra": ["colour_by_place", "colour_by_digit"],
        "extra_from": 4000,
    },
    "tiny_llava": {
        "align_steps": 1500,
        "steps": 8500,
        "extra": ["existence_by_colour", "existence_by_colour", "count_by_colour"],
        "extra_from": 2500,
    },
}


def _node(name: str, choices: Mapping[str, str], **keys: Any) -> dict[str, Any]:
    chosen = [{f"override /{group}": option} for group, option in choices.items()]
    return {"defaults": [*chosen, "_self_"], "name": name, **keys}


def _published(name: str, family: Family, method: str, prune: Mapping[str, Any]) -> dict[str, Any]:
    choices = {"model": family.model, "prune": f"{method}_paper", "recover": "kd_hidden"}
    return _node(name, choices, prune=dict(prune), calibration={"samples": SAMPLES[method]})


def presets() -> dict[str, dict[str, Any]]:
    """Name and content of every preset."""
    idle = {"prune": "none", "recover": "none", "evaluate": "none"}
    nodes = {}
    for model, recipe in TRAINING.items():
        keys = {"name": model, "seed": "${seed}", **recipe}
        nodes[f"train_{model}"] = _node(f"train_{model}", {"model": model, **idle}, pretrain=keys)
    for key, family in FAMILIES.items():
        for label, share in SHARES.items():
            name = f"vlmcompression_{key}_w{label}"
            nodes[name] = _published(name, family, "widthwise", {"share": share, **family.prune})
            name = f"vlmcompression_{key}_l{label}"
            nodes[name] = _published(name, family, "layerwise", {"drop_layers": family.blocks[label]})
    return nodes


def register_presets() -> None:
    """Make the presets options of the group ``experiment``."""
    for name, node in presets().items():
        ConfigStore.instance().store(group="experiment", name=name, node=node, package="_global_")
