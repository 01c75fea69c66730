"""What counts as the source of a result: a module and all that it imports of the package."""

import shutil

import pytest

from efficientllava.runtime import source
from efficientllava.settings.schema import EvaluateConfig, RunConfig
from efficientllava.stages.identity import STAGES, settings_key


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package whose files may be edited."""
    copy = tmp_path / "efficientllava"
    shutil.copytree(source.PACKAGE, copy, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    monkeypatch.setattr(source, "PACKAGE", copy)
    source.source_digest.cache_clear()
    yield copy
    source.source_digest.cache_clear()


def edited(file):
    file.write_text(file.read_text("utf-8") + "\n# a word more\n", encoding="utf-8")
    source.source_digest.cache_clear()


@pytest.mark.parametrize("name", ["models/forward.py", "data/collator.py", "runtime/files.py", "pruning/refit.py"])
def test_an_edit_of_what_makes_numbers_gives_a_new_run(package, name):
    before = source.source_digest(*STAGES)
    edited(package / name)
    assert source.source_digest(*STAGES) != before


@pytest.mark.parametrize("name", ["report/plots.py", "launch/local.py", "runtime/console.py"])
def test_an_edit_of_what_shows_them_does_not(package, name):
    before = source.source_digest(*STAGES)
    edited(package / name)
    assert source.source_digest(*STAGES) == before


def test_an_edit_of_a_benchmark_s_own_file_gives_a_new_run_of_it(package):
    runs = [RunConfig(evaluate=EvaluateConfig([name])) for name in ("digits_vqa", "gqa")]
    before = [settings_key(run) for run in runs]
    edited(package / "evaluation" / "tasks" / "digits_vqa.py")
    assert [settings_key(run) == key for run, key in zip(runs, before, strict=True)] == [False, True]


def test_a_stage_does_not_depend_on_the_code_of_later_ones(package):
    before = source.source_digest("stages.prune")
    edited(package / "recovery" / "losses.py")
    assert source.source_digest("stages.prune") == before != source.source_digest("stages.recover")
    edited(package / "search" / "evolution.py")
    assert source.source_digest("stages.prune") != before


def test_late_relative_and_nested_imports_are_found(tmp_path, monkeypatch):
    package = tmp_path / "efficientllava"
    (package / "a").mkdir(parents=True)
    for name, text in {
        "a/__init__.py": "from .b import (\n    x,\n    y,\n)\n",
        "a/b.py": "def late():\n    from ..c import z\n    from .. import d\n",
        "c.py": "import os\nfrom json import loads\n",
        "d.py": "from efficientllava.e import w\n",
        "e.py": "",
        "unused.py": "",
    }.items():
        (package / name).write_text(text)
    monkeypatch.setattr(source, "PACKAGE", package)
    assert {*source.closure("a")} == {"a", "a.b", "c", "d", "e"}
