"""Put what was measured of the shipped adapters beside them.

python run.py model=smol_llava prune=none recover=none
python -m experiments.real_weights.build <folder>
python run.py model=checkpoint model.path=<folder> data=digits_vqa evaluate=prose prune=none recover=none
python -m experiments.smol_llava.record efficientllava/assets/smol_llava <first run> <second run>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from efficientllava.record import read

FILE = "provenance.json"


def main(folder: Path, trained: Path, untrained: Path) -> None:
    """Read both runs and write the numbers."""
    metrics, before = (read(run)["stages"]["base"]["metrics"] for run in (trained, untrained))
    found, provenance = metrics["digits_vqa"], json.loads((folder / FILE).read_text("utf-8"))
    names = [name for name in found if name.startswith("accuracy")]
    test: dict[str, Any] = {
        name: {"accuracy": round(found[name], 4), "n": found[name.replace("accuracy", "n")]} for name in names
    }
    sides = {"smol_llava": metrics["prose"], "SmolLM2-135M-Instruct, dequantized": before["prose"]}
    prose = {side: {k: round(v, 2) for k, v in of.items() if "perplexity" in k} for side, of in sides.items()}
    (folder / FILE).write_text(json.dumps({**provenance, "test": test, "prose": prose}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
