"""What the README shows is what works."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from efficientllava import api
from efficientllava.settings.checks import check
from efficientllava.settings.compose import register_schema, typed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = {"<folder or hub id>": "some/model", "<json>": "data.json", "<folder>": "."}
COMMANDS = [
    shlex.split(re.sub("<[^>]*>", lambda found: PLACES[found.group()], line.split("#")[0]))[2:]
    for page in (README, *(p.read_text(encoding="utf-8") for p in (ROOT / "experiments").glob("*/README.md")))
    for line in page.splitlines()
    if line.startswith("    python run.py")
]


def jobs(arguments: list[str]) -> list[list[str]]:
    """The runs that a command line stands for."""
    overrides = [a for a in arguments if not a.startswith("-")]
    if "-m" not in arguments:
        return [overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_is_a_valid_run(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    register_schema()
    for overrides in jobs(arguments):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            check(typed(compose("config", overrides)), overrides)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_it_names_exist():
    for name in re.findall(r"`((?:efficientllava|conf)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_python_lines_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "KD_HIDDEN", replace(api.KD_HIDDEN, steps=2))
    monkeypatch.setattr(api, "calibration_records", lambda config, data, seed: few(api.DIGITS, seed))
    exec(code, {})
    assert (tmp_path / "outputs/tiny_llava_half/model.safetensors").stat().st_size > 1e6


def few(data, seed):
    from efficientllava.data.splits import load_split

    return [load_split(data, "calibration", seed)[index] for index in range(8)]
