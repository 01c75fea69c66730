"""What the configuration files are given, and from the composed configuration to dataclasses and objects.

``experiment=vlmcompression_<family>_<w|l><label>`` are options without a file: the models of arXiv 2604.24380, named by
the labels it prints. Its "15, 30, 45, 60 %" are not ratios: widthwise they are nominal shares per pruned layer,
layerwise numbers of blocks.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..runtime import COMMAND, ConfigError, UserError, digest, former_names
from . import settings_of
from .schema import BLOCKS, PathsConfig, RecoverConfig, RunConfig, WandbConfig

SWEEP_NAME = "EFFICIENTLLAVA_SWEEP"  # variable that tells a job the name of its sweep
LENGTH = ("steps", "epochs")  # of a recovery: one of them is set
# Keys that say where and how a run is done, not what.
HOW = ("paths", "hydra", "sweep", "logger", "callbacks", "threads", "reuse", "keep", "optimized_metric")


class Family(NamedTuple):
    """What is particular to a family.

    Args:
        model: Option of the group ``model``.
        blocks: Blocks that are dropped, by label in percent.
        prune: Keys of ``prune`` beside those of ``prune=widthwise_paper``.
    """

    model: str
    blocks: Mapping[int, int] = {15: 5, 30: 10, 45: 15, 60: 21}
    prune: Mapping[str, Any] = {}


SHARES = {15: 0.2, 30: 0.4, 45: 0.6, 60: 0.8}  # nominal share of heads and channels per pruned layer, by label
FAMILIES = {
    "llava": Family("llava_1_5_7b"),
    "bunny": Family("bunny_3b"),
    # The study's script for Phi-3 prunes heads in layers 4-29 as well.
    "internvl": Family("mini_internvl_4b", {15: 5, 30: 10, 45: 15, 60: 20}, {"protect_attention": [3, -2]}),
}
SAMPLES = {"widthwise": 10, "layerwise": 50}  # calibration records


def presets() -> dict[str, dict[str, Any]]:
    """Name and content of every experiment of the study."""
    nodes = {}
    for (key, family), (label, share) in product(FAMILIES.items(), SHARES.items()):
        cuts = {"widthwise": {"share": share, **family.prune}, "layerwise": {"drop_layers": family.blocks[label]}}
        for method, cut in cuts.items():
            name = f"vlmcompression_{key}_{method[0]}{label}"
            choices = {"model": family.model, "prune": f"{method}_paper", "recover": "kd_hidden"}
            chosen = [{f"override /{group}": option} for group, option in choices.items()]
            content = {"prune": cut, "calibration": {"samples": SAMPLES[method]}}
            nodes[name] = {"defaults": [*chosen, "_self_"], "name": name, **content}
    return nodes


def register_schema() -> None:
    """Make ``_schema``, the presets and our resolvers available to the configuration files."""
    store = ConfigStore.instance()
    store.store(name="_schema", node=RunConfig)
    # --help copies everything behind the groups once per option, the store of which there is only one included.
    vars(store)["__deepcopy__"] = lambda _memo: store
    store.store(group="logger", name="wandb", node=WandbConfig)
    for name, node in presets().items():
        store.store(group="experiment", name=name, node=node, package="_global_")
    resolvers = {
        "at_home": os.path.expanduser,
        "sweep_digest": sweep_digest,
        # A dry run must not write into the folders of finished jobs.
        "sweeps_folder": lambda dry: "dry_runs" if dry else "sweeps",
        "half": lambda samples: min(32, samples // 2),
        "command": lambda: " ".join(COMMAND),
        "annotated": annotated,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def annotated(*, _root_: DictConfig) -> str:
    """The whole configuration as YAML for ``--help``, with what each key may be and means beside it."""
    said = {key: about for key, _, about, _ in settings_of(RunConfig(logger=WandbConfig()))}
    shown = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    lines, path = [], []
    for line in OmegaConf.to_yaml(shown).splitlines():
        name = line.lstrip()
        path = [*path[: (len(line) - len(name)) // 2], name.partition(":")[0]]
        about = said.get(".".join(path)) if ":" in name else None
        comment = about and ": ".join(filter(None, (about.within and about.within.text, about.help)))
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines).replace("$", "$$")  # is a template


def sweep_digest() -> str:
    """Digest of what was typed, in any order; not of how and where the sweep runs. A job is told its sweep's."""
    told = os.environ.get(SWEEP_NAME)
    what = [typed for typed in sys.argv[1:] if not typed.startswith("-") and not _is_place(key_of(typed))]
    return told or digest(sorted(what))


def _is_place(key: str) -> bool:
    """Whether a key says how and where a sweep runs, and not which jobs it has."""
    return key.startswith(("hydra", "paths.")) and not re.match("hydra[./]sweeper", key)


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
    missing = [f"{key}: not set; give it on the command line as {key}=…" for key in OmegaConf.missing_keys(config)]
    if faults := [*_unknown(config), *missing]:
        raise ConfigError(faults)
    try:
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from error
    assert isinstance(result, RunConfig)
    # No shell has seen a ``~`` behind ``key=``.
    result.paths = PathsConfig(*map(os.path.expanduser, dataclasses.astuple(result.paths)))
    # A type of files for llama.cpp stands for the width that its blocks want.
    result.prune.round_to = BLOCKS.get(str(result.prune.round_to), result.prune.round_to)
    told = {key_of(one).removeprefix("recover.") for one in overrides}
    result.recover = own_length(result.recover, told)
    return result


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


def _unknown(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that ``+key=value`` or a file added beside the schema: OmegaConf lets them pass, nothing would read them."""
    cls: Any = OmegaConf.get_type(node)
    known = {field.name for field in dataclasses.fields(cls)}
    for key in map(str, node):
        if key not in known:
            new = former_names(cls).get(key)
            yield f"{prefix}{key}: unknown key; {f'it is now {prefix}{new}' if new else 'remove it'}"
        elif dataclasses.is_dataclass(OmegaConf.get_type(node, key)):
            yield from _unknown(node[key], f"{prefix}{key}.")


def quoted(value: object) -> str:
    """A value as it has to be typed: Hydra's grammar wants quotes around most signs, and letters beyond ASCII."""
    text = str(value)
    other = re.fullmatch(r"null|true|false|[+-]?(inf|nan|\.?\d.*)", text, re.IGNORECASE)  # would be no text any more
    if not other and re.fullmatch(r"[\w./@%+:-]+", text, re.ASCII):
        return text
    return "'" + re.sub(r"\\(?=\\*('|$))", r"\\\\", text).replace("'", "\\'") + "'"


def key_of(override: str) -> str:
    """The key that an override sets, adds or removes, such as ``prune.ratio`` of ``prune.ratio=0.3``."""
    return override.lstrip("+~").partition("=")[0]
