"""The families whole, stage by stage, from the published layout to a recovered checkpoint, on the CPU.

    python -m experiments.scale.full <folder>                       # all of it; again: what is not in rows.csv yet
    python -m experiments.scale.full <folder> --layers 2            # the same with two decoder layers
    python -m experiments.scale.full <folder> --models llava_1_5_7b --stages load widthwise
    python -m experiments.scale.full --table                        # rows.csv as tables

Weights are random: they say what a run costs, and nothing of quality. They are written into the folder, which needs
60 GB, one family at a time, and removed once all stages of the family are measured. Every stage is a command of
``run.py`` with one thread, under a stopwatch and a limit of memory.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientllava.report.study import table as markdown
from experiments.rows import add, read

from . import write
from .stopwatch import ROOT
from .watch import Watched, last_line, watch

ROWS = Path(__file__).with_name("rows.csv")
FIELDS: tuple[str, ...] = (
    "date",
    "model",
    "layers",
    "stage",
    "phase",
    "seconds",
    "cpu",
    "floor",
    "peak",
    "promised",
    "weights",
    "limit",
    "same",
)
# Side of an image, and tokens of a record: of Bunny's, its image takes 729 and its prompt, letter by letter, 180.
SIZES = {"llava_1_5_7b": (336, 640), "bunny_3b": (384, 1024), "mini_internvl_4b": (448, 640)}
RECORDS = 665_298  # of LLaVA's mixture
FILES, FILES_LIMIT = "widthwise, from files", 6.0  # GB that this stage may hold
MORE = f"{FILES}, 16 records"
OFF = ("evaluate=none", "evaluate.efficiency=false", "trainer=cpu", "logger=none", "callbacks=none", "threads=1")
ONE = ("recover.steps=1", "recover.epochs=null", "data.batch_size=1", "data.global_batch_size=1")
ASKED = (f"evaluate={write.QUESTIONS}", "evaluate.limit=2", "evaluate.batch_size=1", "evaluate.max_new_tokens=8")


@dataclass(frozen=True)
class Place:
    """Where one model is measured.

    Args:
        folder: Everything lies here.
        model: A family, or `MANY`.
        layers: Decoder layers; None: all.
        ratio: Share of the language model that is removed.
        round_to: Channels of the smaller MLPs are multiples of it.
    """

    folder: Path
    model: str
    layers: int | None
    ratio: float = 0.3
    round_to: int = 128

    @property
    def home(self) -> Path:
        """What goes once the model is measured."""
        return self.folder / f"{self.model}-{self.layers or 'all'}"


MANY = "llava_665k"


def prepare(place: Place, records: int) -> None:
    """Write weights, records and questions of a model, once."""
    if (place.home / "written").exists():
        return
    shutil.rmtree(place.home, ignore_errors=True)
    (place.home / "model").mkdir(parents=True)
    side, tokens = SIZES.get(place.model, (48, 64))
    write.write_data(place.home, side, tokens)
    if place.model == MANY:
        write.write_many(place.home / "records.json", records)
    else:
        write.WRITERS[place.model](place.home / "model", write.config_of(place.model, place.layers))
    (place.home / "written").touch()


def stages(place: Place) -> dict[str, list[str]]:
    """What is typed for each stage of a model."""
    home, (_, tokens) = place.home, SIZES.get(place.model, (0, 0))
    data = ["data=conversations", f"data.path={home}/records.json", f"data.image_root={home}"]
    if place.model == MANY:
        train = ["model=tiny_llava", "prune=none", "recover=sft", *ONE]
        return {"recover": [*train, *data, *OFF]}
    model = [f"model={place.model}", f"model.path={home}/model", *data]
    few = [f"data.max_length={tokens}", "calibration.samples=4", f"prune.ratio={place.ratio}"]
    alone = "calibration.generate=0"  # random weights write nothing that is worth the time
    width = [*model, *few, alone, "prune=widthwise", "prune.selection=local", f"prune.round_to={place.round_to}"]
    files = [*width, "prune.offload=disk", "recover=none", *OFF]

    def own_cache(stage: str) -> str:
        return f"paths.cache_dir={folder_of(place, stage)}/cache"

    taught = ["recover=kd_hidden", "recover.teacher.source=cached"]
    asked = [*ASKED, f"evaluate.root={home}/questions", *OFF[1:]]
    return {
        "load": [*model, "prune=none", "recover=none", *OFF],
        "layerwise": [*model, *few, "prune=layerwise", "recover=none", *OFF, own_cache("layerwise")],
        "widthwise": [*width, "recover=none", *OFF],
        FILES: [*files, own_cache(FILES)],
        MORE: [*files, own_cache(MORE), "calibration.samples=16", f"calibration.path={home}/records.json"],
        "recover, taught": [*width, *taught, *ONE, *OFF],
        "recover": [*width, "recover=sft", *ONE, *OFF],
        "two questions": [*width, "recover=none", *asked],
    }


def folder_of(place: Place, stage: str) -> Path:
    """Where a stage leaves its run and its numbers."""
    return place.home / f"run-{stage.replace(', ', '-').replace(' ', '-')}"


def same_weights(place: Place) -> str:
    """Whether what was pruned from files is what was pruned in memory, byte by byte; empty where one is not there."""
    mine, other = (folder_of(place, stage) / "run/pruned" for stage in (FILES, "widthwise"))
    names = sorted(file.name for file in mine.glob("*.safetensors"))
    if not names or not other.exists():
        return ""
    same, *_ = filecmp.cmpfiles(mine, other, names, shallow=False)
    return "yes" if same == names else "no"


def measure(place: Place, stage: str, typed: Sequence[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run a stage.

    Returns:
        Its rows, of the whole and of its phases; or why there are none.
    """
    folder = folder_of(place, stage)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    typed, environment = [*typed, f"paths.output_dir={place.home}/out"], {"HF_HOME": str(place.home / "home")}
    program = [sys.executable, "-m", "experiments.scale.stopwatch", str(folder), *typed]
    here = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    promised = _promised(typed, folder, here)
    if "promise" not in promised:
        return [], promised["error"]
    common = {"date": time.strftime("%Y-%m-%d"), "model": place.model, "layers": place.layers or "all", "stage": stage}
    if promised["promise"] > limit * 1e9:
        return [_told({**common, "promised": promised["promise"] / 1e9, "weights": promised["weights"] / 1e9})], ""
    told = folder / "phase", folder / "log"
    watched = watch([*program, f"hydra.run.dir={folder}/run"], here, int(limit * 1e9), *told)
    if watched.code:
        return [], f"exit status {watched.code}: {last_line(told[1])}"
    rows = _rows(folder, watched, promised, limit)
    if stage == FILES:
        rows[0]["same"] = same_weights(place)
    return [_told({**common, **row}) for row in rows], ""


def _promised(typed: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What the dry run says of the memory of a command, and the bytes of its weights; or its error."""
    command = [sys.executable, str(ROOT / "run.py"), *typed, "dry_run=true", f"hydra.run.dir={folder}/dry"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip()}
    found = json.loads((folder / "dry" / "dry_run.json").read_text())
    weights = found["stages"]["base"]["checkpoint_bytes"]
    stages = found["memory"]["stages"].values()
    return {"weights": weights, "promise": max((stage["bytes"] for stage in stages), default=weights)}


def _rows(folder: Path, watched: Watched, promised: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """What was measured of a stage: first the whole, then its phases."""
    phases = json.loads((folder / "phases.json").read_text())["phases"]
    floor = sum(phase["floor"] for phase in phases.values())
    whole = {"seconds": watched.seconds, "cpu": watched.cpu, "floor": floor, "peak": watched.peak / 1e9}
    whole |= {"promised": promised["promise"] / 1e9, "weights": promised["weights"] / 1e9}
    whole |= {"limit": limit if watched.limited else "none"}
    parts = [
        {"phase": name, **values, "peak": watched.peaks[name] / 1e9 if name in watched.peaks else ""}
        for name, values in phases.items()
    ]
    return [{"phase": "", **whole}, *parts]


def _told(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}


def run(
    place: Place,
    file: Path,
    limit: float,
    records: int,
    say: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
) -> bool:
    """Measure what is not in the file yet, of all stages or of some; returns whether these are then there."""
    known = {(row["model"], row["layers"], row["stage"]) for row in read(file)}
    todo = {s: t for s, t in stages(place).items() if (place.model, str(place.layers or "all"), s) not in known}
    chosen = {stage: typed for stage, typed in todo.items() if only is None or stage in only}
    failed = False
    if chosen:
        prepare(place, records)
    for stage, typed in chosen.items():
        rows, reason = measure(place, stage, typed, min(limit, FILES_LIMIT) if stage in (FILES, MORE) else limit)
        add(file, rows, FIELDS)
        failed |= bool(reason)
        say(f"{place.model}, {stage}: {reason or _line(rows[0])}")
        if stage in ("layerwise", FILES, MORE):  # nothing goes on from them
            for name in ("cache", "run"):
                shutil.rmtree(folder_of(place, stage) / name, ignore_errors=True)
    if not failed and len(chosen) == len(todo):
        shutil.rmtree(place.home, ignore_errors=True)
    return not failed


def _line(row: dict[str, Any]) -> str:
    if "peak" not in row:
        return f"does not fit, {row['promised']} GB"
    return f"{row['seconds']} s, {row['peak']} GB of {row['promised']}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows as two tables: stages, and phases that take a second or more."""
    stages, phases = [], []
    for row in rows:
        start = [f"`{row['model']}`", row["layers"], row["stage"]]
        if row["phase"]:
            over = f"{float(row['cpu']) / float(row['floor']):.1f}" if float(row["floor"]) else ""
            if float(row["cpu"]) >= 1:
                phases.append([*start, row["phase"], *_times(row), over, row["peak"]])
        elif row["peak"]:
            ratio = f"{float(row['peak']) / float(row['weights']):.2f}"
            stages.append([*start, *_times(row), row["peak"], row["promised"], ratio, row["limit"]])
        else:
            stages.append([*start, "does not fit", "", "", "", row["promised"], "", ""])
    place, times = ["model", "layers", "stage"], ["seconds", "CPU seconds", "floor"]
    whole = markdown([*place, *times, "peak, GB", "promised", "x weights", "limit"], stages, 3)
    return whole + "\n" + markdown([*place, "phase", *times, "x floor", "peak, GB"], phases, 4)


def _times(row: dict[str, str]) -> list[str]:
    return [f"{float(row[name]):.0f}" for name in ("seconds", "cpu", "floor")]


def main(arguments: Sequence[str] | None = None) -> int:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scale.full")
    parser.add_argument("folder", type=Path, nargs="?", help="takes weights and results; outside of the repository")
    parser.add_argument("--models", nargs="+", default=[*SIZES, MANY], choices=[*SIZES, MANY])
    every = [*stages(Place(Path(), next(iter(SIZES)), None))]
    parser.add_argument("--stages", nargs="+", choices=every, help="all without it")
    parser.add_argument("--layers", type=int, help="decoder layers; all without it")
    parser.add_argument("--limit", type=float, default=22.0, help="GB that a run may hold")
    parser.add_argument("--records", type=int, default=RECORDS, help=f"of {MANY}")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file that takes the rows")
    parser.add_argument("--table", action="store_true", help="print the rows as tables")
    asked = parser.parse_args(arguments)
    if asked.table:
        print(table(read(asked.rows)), end="")
        return 0
    if asked.folder is None:
        parser.error("give a folder")
    places = [Place(asked.folder.resolve(), model, asked.layers) for model in asked.models]
    done = [run(place, asked.rows, asked.limit, asked.records, only=asked.stages) for place in places]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
