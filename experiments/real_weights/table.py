"""The table of the real decoder: methods, ratios and draws of calibration records, a row at a time.

python -m experiments.real_weights.table <decoder folder> <rows.csv> --draws <json> ... --texts <json> ... [--rows main]

Rows that the file has are not made again, so that a killed table goes on; CPU seconds are those of the whole command,
from its start to the pruned folder.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from efficientllava import record
from experiments.real_weights.measure import nats
from experiments.rows import add, read

ROOT = Path(__file__).parents[2]
METHODS = {
    "widthwise": ["prune=widthwise"],
    # The shape that widthwise chooses at 20 %, without the trials that it is chosen by.
    "fixed": ["prune=widthwise", "prune.selection=floor", "prune.round_to=64"],
    "global": ["prune=widthwise", "prune.selection=global"],
    "auto": ["prune=auto", "search=quick"],
    "written": ["prune=widthwise", "calibration.generate=96"],
    "flap": ["prune=flap"],
    "wanda_sp": ["prune=wanda_sp"],
    "no_refit": ["prune=widthwise", "prune.refit=false", "prune.selection=local"],
}
# Method, ratio and number of calibration records.
PARTS = {
    "main": [(name, 0.2, 64) for name in ("widthwise", "flap", "wanda_sp", "global", "auto")],
    "ratios": [(name, ratio, 64) for ratio in (0.1, 0.3) for name in ("widthwise", "flap", "wanda_sp", "global")],
    "auto": [("auto", ratio, 64) for ratio in (0.1, 0.3)],
    "few": [(name, 0.2, samples) for samples in (8, 16, 64) for name in ("widthwise", "no_refit")],
    "written": [("written", 0.2, 64)],
}
FIELDS = ("method", "ratio", "samples", "draw", "achieved", "cpu_seconds")


def pruned(decoder: str, work: Path, draw: Path, overrides: list[str]) -> tuple[Path, float, float]:
    """Prune the decoder by the command line in a fresh cache.

    Args:
        decoder: Folder of `experiments.real_weights.build`.
        work: Empty folder of the run.
        draw: Calibration records.
        overrides: Of the method.

    Returns:
        The pruned checkpoint, the share that is gone, and CPU seconds (user and system) of the command.
    """
    given = [f"model.path={decoder}", f"calibration.path={draw}", f"paths.output_dir={work}"]
    fixed = ["model=checkpoint", "recover=none", "evaluate=none", "evaluate.efficiency=false", "threads=2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "run.py", *fixed, *given, f"paths.cache_dir={work / 'cache'}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder,) = work.glob("runs/*/*/pruned")
    return folder, record.read(folder.parent)["ratio"]["achieved"], seconds


def missing(rows: Path, parts: list[str], draws: list[Path]) -> Iterator[tuple[str, float, int, Path]]:
    """What the file lacks: all methods of one draw before those of the next."""
    done = {tuple(row[name] for name in FIELDS[:4]) for row in read(rows)}
    for draw, part in itertools.product(draws, parts):
        for method, ratio, samples in PARTS[part]:
            if (method, str(ratio), str(samples), draw.stem) not in done:
                yield method, ratio, samples, draw


def losses(folder: Path | str, texts: list[Path]) -> list[str]:
    """Answer loss of a checkpoint on each text."""
    return [f"{nats(str(folder), text):.4f}" for text in texts]


def main() -> None:
    """Make the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--draws", type=Path, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", dest="parts", nargs="+", default=["main"], choices=PARTS)
    given = parser.parse_args()
    names = [*FIELDS, *(text.stem for text in given.texts)]
    if not given.rows.exists():
        row = ["dense", "0", "0", "", "0", "0", *losses(given.decoder, given.texts)]
        add(given.rows, [row], names)
    for method, ratio, samples, draw in missing(given.rows, given.parts, given.draws):
        with tempfile.TemporaryDirectory() as work:
            overrides = [*METHODS[method], f"prune.ratio={ratio}", f"calibration.samples={samples}"]
            folder, achieved, seconds = pruned(given.decoder, Path(work), draw.resolve(), overrides)
            row = [method, ratio, samples, draw.stem, f"{achieved:.4f}", f"{seconds:.0f}", *losses(folder, given.texts)]
        add(given.rows, [row], names)
        print(*row, flush=True)


if __name__ == "__main__":
    main()
