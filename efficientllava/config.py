"""From a composed configuration to dataclasses and objects."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, UserError
from .presets import register_presets
from .runtime.content import digest
from .schema import BLOCKS, PathsConfig, RecoverConfig, RunConfig, WandbConfig

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
