"""A row per arm of ``experiment=peers``, ratio and draw of calibration records: what it costs, and what is left.

    python -m experiments.peers <rows.csv> --work <folder> --draws <draw0.json> <draw1.json> ... [--minutes 100]
    python -m experiments.peers <rows.csv> --experiment real_samples ...   # the arms of another one on smol_llava
    python -m experiments.peers <rows.csv> --arms flap --ratios 0.2 ...    # some of them
    python -m experiments.peers <rows.csv> --experiment peers_recovered --typed data=conversations data.path=<json> ...

A row is written at once, and what has one is not made again. `draws` makes the records; images lie beside the JSON. The
loss ``compare`` is that on the records of the next draw, of other documents: a peer's variant is chosen by it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from efficientllava import record
from efficientllava.data.embedded.prose import TEXTS
from experiments.real_weights.measure import nats
from experiments.rows import add, read
from experiments.scale.watch import watch

ROOT = Path(__file__).parents[2]
PEERS, DENSE = "peers", "dense"
KEYS = ["arm", "ratio", "draw"]
FIELDS = [*KEYS, "achieved", "cpu_seconds", "peak_gb", "compare", "digits", "kl", "perplexity", *TEXTS]
MOST = 20 * 10**9  # bytes of a run


def read_arms(experiment: str) -> tuple[dict[str, list[str]], list[str]]:
    """Arms of an experiment, with what is typed for each, and its ratios."""
    found: Any = OmegaConf.load(ROOT / f"conf/experiment/{experiment}.yaml")
    ratios = str(found.hydra.sweeper.params.get("prune.ratio") or found.prune.ratio).split(",")
    return OmegaConf.to_container(found.sweep.arms), ratios  # pyright: ignore


def run(typed: list[str], work: Path) -> tuple[Path, float, float]:
    """Run one arm.

    Returns:
        The run's folder, CPU seconds, and peak memory in GB.

    Raises:
        RuntimeError: It failed; says where its log is.
    """
    folder, log = work / "run", work / "log"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "run.py", "hydra.mode=RUN", f"hydra.run.dir={folder}", *typed]
    watched = watch(command, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, MOST, work / "phase", log)
    if watched.code:
        raise RuntimeError(f"exit status {watched.code}, see {log}")
    return folder, watched.cpu, watched.peak / 1e9


def row(arm: list[str], ratio: str, draw: Path, other: Path, work: Path) -> dict[str, Any]:
    """What is known of an arm.

    Args:
        arm: What is typed for it, the experiment first.
        ratio: Share that it removes.
        draw: Its calibration records.
        other: Records of other documents.
        work: Folder that takes the run, and keeps the base's numbers for the next one.
    """
    shutil.rmtree(work / "cache" / "prune", ignore_errors=True)
    typed = [
        *arm,
        f"prune.ratio={ratio}",
        f"calibration.path={draw}",
        "threads=1",
        "logger=none",
        f"paths.cache_dir={work}/cache",
    ]
    folder, seconds, peak = run([*typed, "evaluate=none"], work)
    found = record.read(folder)
    last = [*found["stages"]][-1]
    compare = nats(str(folder / last), other)
    folder, _, _ = run(typed, work)
    cost = {"achieved": found["ratio"]["achieved"], "cpu_seconds": seconds, "peak_gb": peak, "compare": compare}
    return {**cost, **scores(folder, last)}


def scores(folder: Path, stage: str) -> dict[str, float]:
    """What the benchmarks say of a stage; the base has no divergence."""
    found = record.read(folder)["stages"][stage]["metrics"]
    named = {name: found["prose"][f"perplexity/{name}"] for name in TEXTS}
    prose = {"kl": found["prose"].get("kl", 0.0), "perplexity": found["prose"]["perplexity"], **named}
    return {"digits": found["digits_vqa"]["accuracy"], **prose}


def missing(rows: Path, draws: list[Path], arms: Iterable[str], ratios: list[str]) -> list[tuple[str, str, int]]:
    """Arm, ratio and number of the draw of what the file lacks: all of one draw before the next."""
    done = {tuple(row[key] for key in KEYS) for row in read(rows)}
    every = [(arm, ratio, number) for number in range(len(draws)) for ratio in ratios for arm in arms]
    return [each for each in every if (*each[:2], draws[each[2]].stem) not in done]


def main() -> None:
    """Make the missing rows, as far as the minutes go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--experiment", default=PEERS)
    parser.add_argument("--work", type=Path, required=True, help="takes runs and a cache")
    parser.add_argument("--draws", type=Path, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", help="all without it")
    parser.add_argument("--ratios", nargs="+", help="all without it")
    parser.add_argument("--typed", nargs="+", default=[], help="overrides for all of them")
    parser.add_argument("--minutes", type=float, default=100, help="no row is begun after them")
    given = parser.parse_args()
    if len(given.draws) < 2:
        parser.error("--draws: give two or more; a row is compared on the records of the next draw")
    draws, end = [draw.resolve() for draw in given.draws], time.monotonic() + 60 * given.minutes
    given.work.mkdir(parents=True, exist_ok=True)
    arms, ratios = read_arms(given.experiment)
    if unknown := {*(given.arms or ())} - {*arms}:
        parser.error(f"--arms: {', '.join(sorted(unknown))}: unknown; choose from {', '.join(arms)}")
    for arm, ratio, number in missing(given.rows, draws, given.arms or arms, given.ratios or ratios):
        if time.monotonic() > end:
            break
        other, typed = draws[(number + 1) % len(draws)], [f"experiment={given.experiment}", *arms[arm], *given.typed]
        measured = row(typed, ratio, draws[number], other, given.work.resolve())
        made = [{"arm": arm, "ratio": ratio, "draw": draws[number].stem, **_told(measured)}]
        if not read(given.rows):
            made = [{"arm": DENSE, "ratio": "0", **_told(scores(given.work / "run", "base"))}, *made]
        add(given.rows, made, FIELDS)
        print(*made, flush=True)


def _told(numbers: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4f}" for key, value in numbers.items()}


if __name__ == "__main__":
    main()
