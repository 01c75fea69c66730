"""From a composed configuration to dataclasses and objects.

Families of experiments that would be a file each: their options are stored from here.

``experiment=vlmcompression_<family>_<w|l><label>``: the models of arXiv 2604.24380, named by the labels it prints. Its
"15, 30, 45, 60 %" are not ratios: widthwise they are nominal shares per pruned layer, layerwise numbers of blocks.

"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..runtime.content import digest
from ..runtime.errors import ConfigError, UserError
from .schema import (
    BLOCKS,
    PathsConfig,
    RecoverConfig,
    RunConfig,
    WandbConfig,
)


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


def _node(name: str, choices: Mapping[str, str], **keys: Any) -> dict[str, Any]:
    chosen = [{f"override /{group}": option} for group, option in choices.items()]
    return {"defaults": [*chosen, "_self_"], "name": name, **keys}


def _published(name: str, family: Family, method: str, prune: Mapping[str, Any]) -> dict[str, Any]:
    choices = {"model": family.model, "prune": f"{method}_paper", "recover": "kd_hidden"}
    return _node(name, choices, prune=dict(prune), calibration={"samples": SAMPLES[method]})


def presets() -> dict[str, dict[str, Any]]:
    """Name and content of every preset."""
    nodes = {}
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


SWEEP_NAME = "EFFICIENTLLAVA_SWEEP"  # variable that tells a job the name of its sweep
LENGTH = ("steps", "epochs")  # of a recovery: one of them is set


def register_schema() -> None:
    """Make ``_schema``, the presets and our resolvers available to the configuration files."""
    store = ConfigStore.instance()
    store.store(name="_schema", node=RunConfig)
    # --help copies everything behind the groups once per option, the store of which there is only one included.
    vars(store)["__deepcopy__"] = lambda _memo: store
    store.store(group="logger", name="wandb", node=WandbConfig)
    register_presets()
    OmegaConf.register_new_resolver("at_home", at_home, replace=True)
    OmegaConf.register_new_resolver("sweep_digest", sweep_digest, replace=True)
    # A dry run must not write into the folders of finished jobs.
    OmegaConf.register_new_resolver("sweeps_folder", lambda dry: "dry_runs" if dry else "sweeps", replace=True)


def sweep_digest() -> str:
    """Digest of what was typed, in any order; not of how and where the sweep runs. A job is told its sweep's."""
    told = os.environ.get(SWEEP_NAME)
    return told or digest(sorted(typed for typed in sys.argv[1:] if not typed.startswith(("-", "hydra", "paths."))))


def instantiate(node: Any, **overrides: Any) -> Any:
    """Build the object that a node with ``_target_`` describes; every instantiation goes through here.

    Args:
        node: A plain dictionary or configuration node.
        **overrides: Arguments that only the program knows.

    Raises:
        UserError: The target does not exist or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    try:
        return build(node, **overrides, _convert_="all")
    except InstantiationException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{node.get('_target_')}: cannot be built: {'; '.join(lines)}") from error


def typed(config: DictConfig, overrides: Sequence[str] = ()) -> RunConfig:
    """Turn the composed configuration into dataclasses.

    Args:
        config: The composed configuration.
        overrides: What the user typed; see `own_length`.

    Raises:
        ConfigError: A value is missing, of the wrong type, or an interpolation leads nowhere.
    """
    unknown = [f"{key}: unknown key; remove it" for key in _unknown(config)]
    missing = [f"{key}: not set; give it on the command line as {key}=…" for key in OmegaConf.missing_keys(config)]
    if unknown or missing:
        raise ConfigError([*unknown, *missing])
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    assert isinstance(result, RunConfig)
    result.paths = PathsConfig(*map(at_home, dataclasses.astuple(result.paths)))
    # A type of files for llama.cpp stands for the width that its blocks want.
    result.prune.round_to = BLOCKS.get(result.prune.round_to, result.prune.round_to)
    result.recover = own_length(result.recover, {key_of(one).removeprefix("recover.") for one in overrides})
    return result


def at_home(path: str) -> str:
    """A path whose ``~``, which no shell has seen behind ``key=``, is the user's home."""
    return os.path.expanduser(path)


def own_length(recover: RecoverConfig, told: Collection[str]) -> RecoverConfig:
    """Let the user's steps take the place of a preset's epochs, and the other way round.

    Args:
        recover: The node, in which both may be set.
        told: Fields that the user has set; where both are, they stay.
    """
    for name, other in (LENGTH, LENGTH[::-1]):
        if name in told and other not in told and getattr(recover, name) is not None:
            return dataclasses.replace(recover, **{other: None})
    return recover


def _unknown(config: DictConfig) -> Iterator[str]:
    """Keys that ``+key=value`` added beside the schema: OmegaConf lets them pass, nothing would read them."""

    def walk(node: Any, cls: type, prefix: str) -> Iterator[str]:
        names = {field.name: field for field in dataclasses.fields(cls)}
        for key in node:
            if key not in names:
                yield prefix + str(key)
                continue
            child = OmegaConf.get_type(node, key)
            if isinstance(child, type) and dataclasses.is_dataclass(child):
                yield from walk(node[key], child, f"{prefix}{key}.")

    yield from walk(config, RunConfig, "")


def quoted(value: object) -> str:
    """A value as it has to be typed: Hydra's grammar wants quotes around most signs, and letters beyond ASCII."""
    text = str(value)
    return text if re.fullmatch(r"[\w./@%+:-]+", text, re.ASCII) else "'" + text.replace("'", "\\'") + "'"


def key_of(override: str) -> str:
    """The key that an override sets, adds or removes, such as ``prune.ratio`` of ``prune.ratio=0.3``."""
    return override.lstrip("+~").partition("=")[0]
