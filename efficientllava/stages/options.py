"""What can be chosen: what is given to the configuration files, and docs/options.md.

``python -m efficientllava.stages.options > docs/options.md`` writes every option of every group, and every key with its
range, its meaning and when it has an effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ..evaluation.tasks import register_benchmarks
from ..runtime.places import CONF
from ..settings.compose import register_schema, typed
from ..settings.fields import About, settings_of
from ..settings.schema import GpuPoolConfig, RunConfig, WandbConfig

BEGINNING = """# Options

Written by `python -m efficientllava.stages.options > docs/options.md`.

`group=option` chooses a file of `conf/`, or one of your own: write `conf/<group>/mine.yaml`, or write
`<folder>/<group>/mine.yaml` and add `--config-dir <folder>`. `key=value` sets one value of what is chosen; a key that
is typed must have an effect.

## Groups"""
HEAD = "| key | default | allowed | meaning | to have an effect |\n|---|---|---|---|---|"


def register() -> None:
    """Make all options that are not files known to Hydra."""
    register_schema()
    register_benchmarks()


def composed(*overrides: str) -> RunConfig:
    """The configuration of what is typed, for programs of their own."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", [*overrides]), overrides)


def page() -> str:
    """The text of the page."""
    register()
    parts = [BEGINNING]
    for group in sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"):
        made = {option.removesuffix(".yaml"): "" for option in ConfigStore.instance().repo.get(group.name, {})}
        options = made | {file.stem: _comment(file) for file in group.glob("*.yaml")}
        parts += [f"\n### {group.name}=\n", *(f"- `{name}`{about}" for name, about in sorted(options.items()))]
    parts += ["\n## Keys\n", *_node(RunConfig())]
    parts += ["\n### logger=wandb\n", *_node(WandbConfig(), "logger.")]
    parts += ["\n### hydra/launcher=gpu_pool\n", *_node(GpuPoolConfig(), "hydra.launcher.")]
    return "\n".join(parts) + "\n"


def _comment(file: Path) -> str:
    """What a configuration file says of itself before it begins."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    said = " ".join(line[2:] for line in lines if not line.startswith("# @package"))
    return said and f": {_plain(said)}"


def _plain(text: str) -> str:
    """Text without what Markdown would take for its own."""
    return re.sub(r"([<|*_])", r"\\\1", text)


def _node(node: Any, prefix: str = "") -> Iterator[str]:
    """The table of a node's own keys, and then the nodes in it."""
    own = [each for each in settings_of(node, prefix) if "." not in each[0].removeprefix(prefix)]
    yield f"{node.__doc__}\n\n{HEAD}"
    for key, value, about, _ in own:
        if not is_dataclass(value):
            shown = "" if value == MISSING else f"`{json.dumps(value)}`"
            cells = (about.within.text if about.within else "", about.help, _needs(about))
            yield f"| `{key}` | {shown} | {' | '.join(map(_plain, cells))} |"
    for key, value, about, _ in own:
        if is_dataclass(value):
            needs = _plain(_needs(about))
            yield f"\n### {key}\n" + (needs and f"\nTo have an effect: {needs}.\n")
            yield from _node(value, f"{key}.")


def _needs(about: About) -> str:
    return "; ".join(when.fix for when in (*about.when, *about.inside))


if __name__ == "__main__":
    print(page(), end="")
