"""What the README and the pages of docs/ show is what works."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from efficientllava import api
from efficientllava.settings.compose import typed
from efficientllava.stages.request import check, register

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {file: file.read_text(encoding="utf-8") for file in FILES}
README = PAGES[ROOT / "README.md"]
STUDIES = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "experiments").glob("*/README.md"))]
PLACES = {"<folder or hub id>": "some/model", "<json>": "data.json", "<folder>": ".", "<name>": "a_name"}
EXTRA = "hydra/sweeper=optuna"  # is not there where tests run
CODE = re.compile(r"^(?:    )?python (run\.py|-m efficientllava\S*) *(.*)$", re.MULTILINE)
LINES = [found for text in (*PAGES.values(), *STUDIES) for found in CODE.findall(text.replace("\\\n", " "))]


def words(line: str) -> list[str]:
    return shlex.split(re.sub("<[^>]*>", lambda found: PLACES.get(found.group(), "some"), line.split("#")[0]))


COMMANDS = [words(line) for line in {line: None for start, line in LINES if start == "run.py" and EXTRA not in line}]
MODULES = sorted({(start.removeprefix("-m "), line) for start, line in LINES if start != "run.py"})


def jobs(arguments: list[str]) -> list[list[str]]:
    """Runs that a command line stands for: as many as it takes to see every value of a grid."""
    overrides = [a for a in arguments if not a.startswith("-")]
    if "-m" not in arguments:
        return [overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [[job[0] for job in BasicSweeper.split_arguments([override], None)[0]] for override in parsed]
    return [[one[index % len(one)] for one in values] for index in range(max(map(len, values)))]


def test_there_are_commands():
    assert len(COMMANDS) >= 30
    assert len(MODULES) >= 3


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_is_a_valid_run(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    register()
    for overrides in jobs(arguments):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            check(typed(compose("config", overrides)), overrides)


@pytest.mark.parametrize("module, line", MODULES, ids=" ".join)
def test_every_module_has_its_options(module, line):
    found = find_spec(module)
    if found is not None and found.submodule_search_locations:
        found = find_spec(f"{module}.__main__")
    assert found is not None and found.origin is not None
    text = Path(found.origin).read_text(encoding="utf-8")
    assert found.name.endswith("__main__") or "__main__" in text
    assert all(f'"{word}"' in text for word in words(line) if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"(?:^    |`)make ([a-z -]+)", PAGES[page], re.MULTILINE):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda file: file.name)
def test_files_that_it_names_exist(page):
    """A path starts at the repository or in the package; what is told to be made is called mine or colours."""
    for name in re.findall(
        r"`([\w.]+/[\w/.]+\.(?:py|yaml|yml|md)|(?:efficientllava|experiments)/[\w/]+)`", PAGES[page]
    ):
        made = Path(name).stem in ("mine", "colours")
        assert made or (ROOT / name).exists() or (ROOT / "efficientllava" / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (page.parent / link).exists(), link


def test_nothing_is_said_twice():
    """A sentence of seven words or more stands on one page, once; the options are written by a program."""
    seen: dict[str, str] = {}
    for page, text in ((page, text) for page, text in PAGES.items() if page.name != "options.md"):
        prose = re.sub(r"^```.*?^```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
        for part in re.split(r"\n\s*\n|\n(?=[|#-])", prose):
            for sentence in re.split(r"(?<=[.:;])\s+", " ".join(part.split())):
                assert len(sentence.split()) < 7 or sentence not in seen, f"{page.name}, {seen[sentence]}: {sentence}"
                seen[sentence] = page.name


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
