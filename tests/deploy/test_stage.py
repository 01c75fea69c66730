"""``deploy=gguf`` in a run: refused before the first stage where that can be known, else in the run's results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efficientllava.report import tabulate_deployed
from efficientllava.runtime.errors import ConfigError, UserError
from efficientllava.settings.compose import typed
from efficientllava.stages.request import check, finished

from ..runs import (
    ROOT,
    composed,
    run,
    small,
)
from .conftest import needs_runtime

ALONE = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "deploy=gguf", "deploy.repeats=1")


@needs_runtime
def test_a_run_ends_with_files_for_llama_cpp(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = small("builtin:tiny_internvl", tmp_path / "out", *ALONE, "deploy.types=[f32]", "prune.ratio=0.3")
    made = run(folder, options)["deploy"]
    entry = made["files"]["f32"]
    assert (folder / "gguf" / entry["file"]).stat().st_size == entry["bytes"] < entry["speed"]["dense"]["bytes"]
    assert entry["agreement"]["text"]["greedy_equal"] and entry["agreement"]["image"]["greedy_equal"]
    assert made["mmproj"]["cosine_min"] > 0.99999
    assert [table.row_count for table in tabulate_deployed({"deploy": made})] == [1]
    settings = typed(composed(*options), options)
    assert finished(settings, folder)
    shutil.rmtree(folder / "gguf")
    assert not finished(settings, folder)
    # A run that begins where this one ended measures beside what this one began with.
    more = ("prune=none", "deploy.types=[f32]", "deploy.check=false")
    later = run(tmp_path / "later", small(folder / "pruned", tmp_path / "out", *ALONE, *more))
    speed = later["deploy"]["files"]["f32"]["speed"]
    assert speed["dense"]["bytes"] == entry["speed"]["dense"]["bytes"] > speed["exported"]["bytes"]


@pytest.mark.slow
@needs_runtime
def test_a_search_meets_a_speed_up_in_llama_cpp_s_time(tmp_path: Path) -> None:
    options = small("builtin:tiny_internvl", tmp_path / "out", *ALONE, "prune=auto", "search=quick")
    budget = ("search.budget.resource=latency", "search.budget.device=gguf", "search.budget.target=1.2")
    made = run(tmp_path / "run", [*options, *budget, "deploy.types=[f16]"])
    searched = json.loads((tmp_path / "run" / "search.json").read_text())
    assert searched["budget"] == {"resource": "latency", "target": pytest.approx(1 / 6)}
    assert 0.02 < made["ratio"]["achieved"] < 0.5


@needs_runtime
def test_phi_without_all_its_heads_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    options = small("builtin:tiny_bunny", tmp_path / "out", *ALONE, "prune.ratio=0.4")
    with pytest.raises(UserError, match=r"a phi decoder of this shape is not exported: .* keeps all heads") as raised:
        run(tmp_path / "run", options)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("deploy.types=[q4_k_m]", r"deploy\.types=\['q4_k_m'\]: must be distinct, of f32, .*llama-quantize"),
        ("deploy.repeats=0", r"deploy\.repeats=0: must be in \[1"),
        ("prune.round_to=q9", r"prune\.round_to=q9: must be in \[1, infinity\), or one of q8_0"),
    ],
)
def test_what_is_not_allowed(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(typed(composed("deploy=gguf", override)), ["deploy=gguf", override])


def test_a_type_is_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed(composed("prune.round_to=q8_0")).prune.round_to == 32
    assert typed(composed("prune.round_to=q4_k_m")).prune.round_to == 256
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # the packages are not asked for
    masks = ["prune=auto", "search.granularity=unstructured", "deploy=gguf"]
    with pytest.raises(ConfigError, match="masks make no file for llama"):
        check(typed(composed(*masks), masks), masks)
    with pytest.raises(ConfigError, match=r"deploy\.types: has no effect here; set deploy=gguf"):
        check(typed(composed("deploy.types=[f32]")), ["deploy.types=[f32]"])


@needs_runtime
@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efficientllava.deploy"]
    options = ["--types", "f32", "--no-check", "--no-measure", "--no-mmproj", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "builtin:tiny_llava", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile",
        "README.md",
        "tiny_llava-F32.gguf",
    ]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "config.json" in done.stderr
