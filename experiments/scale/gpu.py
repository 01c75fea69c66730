"""What needs an accelerator, in eight minutes on one card of 80 GB: LLaVA-1.5-7B's sizes, random weights made there.

    python -m experiments.scale.gpu [outputs/gpu]             # or: make bench-gpu
    python -m experiments.scale.gpu [outputs/gpu] --rehearse  # the tiny LLaVA, anywhere

Every part is a process of its own that is killed at its limit, and a line is in ``rows.csv`` as soon as it is measured:
a kill loses what was under way. ``table.md`` comes last. No hub is asked; a part's files are removed when it ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
import transformers

from efficientllava.checkpoint.export import save
from efficientllava.checkpoint.folder import Checkpoint, stock_config
from efficientllava.data.datamodule import RecoveryData
from efficientllava.estimate import meta_model
from efficientllava.evaluation.efficiency import latencies, now
from efficientllava.models.anatomy import language_parameters
from efficientllava.models.forward import FeatureCache, decoder_inputs, to_device
from efficientllava.pruning.memory import CalibrationSize, pruning_memory, store_on_host
from efficientllava.pruning.outline import outline
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.pruning.surgery import pruned_config
from efficientllava.recovery.recover import recover
from efficientllava.recovery.student import Sharding
from efficientllava.recovery.teacher import TargetCache
from efficientllava.runtime import Memo
from efficientllava.settings.schema import DataConfig, PruneConfig, WeightsConfig
from efficientllava.stages.request import composed
from experiments.rows import add, read
from experiments.scale.decode import decode_ms
from experiments.scale.watch import last_line
from experiments.speed import __main__ as bench
from experiments.speed.rows import quiet_trainer
from experiments.tiny_models.tiny import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
NEEDS_CUDA = "needs CUDA"
GOALS = {45: 1.6, 60: 1.8}  # times as fast, at so many percent removed


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        model: Option of ``model=`` whose sizes are taken.
        depths: Decoder layers of what is pruned: few first, so that a kill leaves a number; None: all.
        search_layers: Decoder layers of what is searched; a level table of 32 takes tens of GB on disk.
        records: Calibration records.
        tokens: Of a record and of a prompt, those of its image included.
        rows: Records of a micro-batch of pruning.
        batch: Prompts of a large batch, and records of a training step.
        steps: Optimiser steps of a training.
        new_tokens: Tokens that are timed in one go.
        repeats: How often.
        removed: Percent of the language model.
    """

    model: str = "llava_1_5_7b"
    depths: tuple[int | None, ...] = (4, None)
    search_layers: int = 4
    records: int = 16
    tokens: int = 640
    rows: int = 2
    batch: int = 8
    steps: int = 20
    new_tokens: int = 32
    repeats: int = 5
    removed: tuple[int, ...] = (45, 60, 30, 15)


REHEARSED = Sizes("tiny_llava", (2, None), 2, 4, 40, 2, 2, 2, 2, 1, (45,))


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        part: The part it belongs to.
        what: What it is of.
        measured: The number; None where there is none, as ``note`` says.
        unit: Of both numbers.
        beside: What it is to be seen beside: a bound, an ideal, another way.
        goal: What is asked of the number.
        note: What else is known.
    """

    part: str
    what: str
    measured: float | None
    unit: str
    beside: float | None = None
    goal: str = ""
    note: str = ""

    def write(self, folder: Path) -> None:
        """Add the row to the folder's ``rows.csv``, whole and at once."""
        add(folder / "rows.csv", [asdict(self)], [field.name for field in fields(self)])
        print(self, flush=True)


class Bench:
    """What a part works with.

    Args:
        part: Its name.
        folder: Where rows go; ``scratch`` in it is the part's own.
        sizes: How much is measured.
    """

    def __init__(self, part: str, folder: Path, sizes: Sizes) -> None:
        self.part, self.folder, self.sizes = part, folder, sizes
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.scratch = folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.processor = tiny_llava()[1]  # its words are few, the vocabulary stays as large as it is
        recipe = ("prune=widthwise", "recover=kd_both", "recover.train=lora", "recover.epochs=null")
        steps = f"recover.steps={sizes.steps}"
        self.settings = composed(f"model={sizes.model}", "dry_run=true", *recipe, steps)
        self.config = stock_config(self.settings.model)
        self.config.image_token_index = self.processor.tokenizer.convert_tokens_to_ids("<image>")

    def row(self, what: str, measured: float | None, unit: str, *more: Any, **facts: Any) -> None:
        """Write down what was measured."""
        Row(self.part, what, measured, unit, *more, **facts).write(self.folder)

    @contextmanager
    def phase(self, what: str, promised: int | None = None) -> Iterator[None]:
        """Write down seconds and peak memory of a block.

        Args:
            what: Its name.
            promised: Bytes that it may hold.
        """
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = now(self.device)
        yield
        self.row(what, now(self.device) - start, "s")
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None
        goal = "" if promised is None else "<= beside"
        self.row(f"{what}: memory", peak, "GB", promised and promised / 1e9, goal, "" if self.cuda else NEEDS_CUDA)

    def pruning(self, kind: str, percent: int, selection: str = "shape") -> PruneConfig:
        """How some percent of the language model go, of its ``width`` or ``depth``."""
        method = {"width": "widthwise", "depth": "layerwise"}[kind]
        changed = {"method": method, "refit": kind == "width", "selection": selection, "ratio": percent / 100}
        return replace(self.settings.prune, name=method, **changed)

    def model(self, config: Any = None, layers: int | None = None) -> Any:
        """A random model in bf16, made on the device.

        Args:
            config: Its configuration; None: the dense model's.
            layers: Decoder layers; None: as many as the configuration says.
        """
        config = type(self.config).from_dict((config or self.config).to_dict())
        config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
        torch.manual_seed(0)
        with torch.device(self.device):
            made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        return made.eval()

    def pruned(self, kind: str, percent: int) -> Any:
        """A random model of the sizes that pruning leaves.

        Args:
            kind: ``width`` or ``depth``.
            percent: Of the language model's parameters that are gone.
        """
        dense = meta_model(self.config)
        plan = outline(dense, self.pruning(kind, percent))
        return self.model(pruned_config(dense, range(len(plan.options[0])), plan.options[0]))

    def batches(self, size: int) -> list[dict[str, Any]]:
        """Records of an image and random text, the last quarter of the text supervised, in batches."""
        text, vision = self.config.text_config, self.config.vision_config
        image = (vision.image_size // vision.patch_size) ** 2
        draw, made = torch.Generator().manual_seed(0), []
        for first in range(0, self.sizes.records, size):
            ids = torch.randint(10, text.vocab_size, (size, self.sizes.tokens), generator=draw)
            ids[:, 1 : 1 + image] = self.config.image_token_index
            labels = ids.index_fill(1, torch.arange(self.sizes.tokens - (self.sizes.tokens - image) // 4), -100)
            pixels = torch.randn(size, 3, vision.image_size, vision.image_size, generator=draw)
            names = [str(first + row) for row in range(size)]
            texts = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "ids": names}
            made.append({**texts, "pixel_values": pixels, "image_ids": names})
        return made


def prune(part: Bench) -> None:
    """Seconds and memory of scoring, refit, cut and export, and of dropping layers."""
    for depth in part.sizes.depths:
        made = cut(part, "width", depth)
    with part.phase("export"):
        save(made, part.scratch / "export")
    del made
    cut(part, "depth")


def cut(part: Bench, what: str, depth: int | None = None) -> Checkpoint:
    """Take 30 % of the width or depth of a model of so many layers; the result as a checkpoint."""
    config, batches = part.pruning(what, 30, "local"), part.batches(part.sizes.rows)
    model, size = part.model(layers=depth), CalibrationSize.of(batches)
    phases = pruning_memory(model, config, size).phases
    closing = [phases.pop(name) for name in [*phases][-2:]]
    storage = "cpu" if part.cuda and store_on_host(model, config, size) else None
    calibration = Calibration(batches, FeatureCache(model), storage=storage)
    name = f"{model.config.text_config.num_hidden_layers} layers, 30 % of the {what}"
    with part.phase(f"{name}: scoring", max(phases.values())):
        plan, _ = make_plan(model, calibration, config)
    with part.phase(f"{name}: {'refit and cut' if config.refit else 'cut'}", max(closing)):
        model, _ = apply_plan(model, plan, calibration, config)
    provenance = {"original_layers": [*plan.kept_layers], "base": {"path": "random"}}
    return Checkpoint(model, part.processor, "random", torch.bfloat16, "", provenance)


def speed(part: Bench) -> None:
    """Prefill of a large batch, and decoding of a small and a large one, dense against pruned."""
    sizes, dense = part.sizes, part.model()
    batch = to_device(part.batches(sizes.batch)[0], part.device, torch.bfloat16)
    note = "compiled layers, static cache, CUDA graph" if part.cuda else f"static cache; a CUDA graph {NEEDS_CUDA}"
    prompts = {
        size: {"input_ids": batch["input_ids"][:size], "pixel_values": batch["pixel_values"][:size]}
        for size in (1, sizes.batch)
    }
    whole = {size: decode_ms(dense, prompt, sizes.new_tokens, sizes.repeats) for size, prompt in prompts.items()}
    for size, spent in whole.items():
        part.row(f"decode, batch {size}: dense", spent, "ms a token", note=note)
    for percent in sizes.removed:
        for kind in ("width", "depth"):
            small = part.pruned(kind, percent)
            ideal = language_parameters(dense) / language_parameters(small)
            goal = f">= {0.9 * ideal:.2f}" + (f", >= {GOALS[percent]}" if percent in GOALS else "")
            what = f"{percent} % of the {kind}"
            first = prefill_ms({"dense": dense, "small": small}, prompts[sizes.batch], sizes.repeats)
            said = f"{first['dense']:.2f} to {first['small']:.2f} ms, without the tower"
            part.row(f"prefill, batch {sizes.batch}: {what}", first["dense"] / first["small"], "x", ideal, goal, said)
            for size, prompt in prompts.items():
                spent = decode_ms(small, prompt, sizes.new_tokens, sizes.repeats)
                said = f"{whole[size]:.2f} to {spent:.2f} ms a token, {note}"
                part.row(f"decode, batch {size}: {what}", whole[size] / spent, "x", ideal, goal, said)


@torch.no_grad()
def prefill_ms(models: dict[str, Any], prompt: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median milliseconds to the first token by model, from vision features on."""
    inputs = {name: decoder_inputs(model, prompt) for name, model in models.items()}
    times = latencies(models, inputs, repeats, 2, 1)
    return {name: statistics.median(first for first, _ in rounds) for name, rounds in times.items()}


def train(part: Bench) -> None:
    """Samples per second and memory of LoRA on a pruned student: alone, with a live teacher, with a cached one."""
    recovery(part, "SFT")
    recovery(part, "KD, live teacher", part.model())
    config, folder = part.config, part.scratch / "targets"
    folder.mkdir()
    cache = TargetCache(folder, config, torch.bfloat16, part.model, Memo())
    recovery(part, "KD, teacher asked once", cache)
    recovery(part, "KD, cached teacher", cache)


def recovery(part: Bench, what: str, teacher: Any = None, **trainer: Any) -> None:
    """Train for some steps: with the losses of ``kd_both`` where there is a teacher, else with cross-entropy."""
    sizes, student, processor = part.sizes, part.pruned("width", 30), part.processor
    vision, config = part.config.vision_config, part.settings.recover
    processor.image_processor.crop_size = {"height": vision.image_size, "width": vision.image_size}
    processor.image_processor.size = {"shortest_edge": vision.image_size}
    processor.patch_size, processor.tokenizer.model_max_length = vision.patch_size, 2048
    images = DataConfig("digits_vqa", images=sizes.steps * sizes.batch, batch_size=sizes.batch)
    config = config if teacher else replace(config, name="sft", weights=WeightsConfig(sft=1.0))
    options = {"accelerator": "gpu" if part.cuda else "cpu", "devices": 1, "precision": "bf16-mixed", **trainer}
    factory, given = partial(quiet_trainer, **options), {"batch_size": sizes.batch, "teacher": teacher}
    with part.phase(what):
        stats = recover(student, RecoveryData(images, processor), config, factory, part.scratch / what, **given)
    part.row(f"{what}: training", stats.samples / stats.seconds, "samples/s", note=stats.loss)
    if stats.targets and stats.targets.computed:
        asked = stats.targets.computed / stats.targets.seconds
        part.row(f"{what}: asked", asked, "samples/s", note=f"{stats.targets.bytes / 1e6:.1f} MB on disk")


def fsdp(part: Bench) -> None:
    """The training of `train` with its weights in the hands of FSDP, on one device."""
    # Lightning's precision of FSDP casts automatically on CUDA alone.
    own = {} if part.cuda else {"precision": "32-true"}
    recovery(part, "SFT, FSDP with one device", strategy=Sharding(), **own)


def search(part: Bench) -> None:
    """The level table of a search, and how many candidates a second it evaluates."""
    model = part.model(layers=part.sizes.search_layers)
    calibration = Calibration(part.batches(part.sizes.batch), FeatureCache(model))
    with part.phase(f"level table of {part.sizes.search_layers} layers"):
        setting = bench.setting_of(model, calibration, part.scratch / "table", part.settings.prune.round_to)
    parents, children = bench.exchange_children(setting.space, bench.PARENTS, bench.CHILDREN)
    setting.evaluator.evaluate(parents, keep=parents)
    setting.evaluator.evaluate(children)  # makes all modules
    some = children[:: bench.SINGLE]
    clock = partial(now, part.device)
    together = timeit(lambda: setting.evaluator.evaluate(children, keep=parents), timer=clock, number=1)
    single = timeit(lambda: [bench.assembled_loss(setting, child) for child in some], timer=clock, number=1)
    rates = len(children) / together, "1/s", len(some) / single
    part.row("candidates", *rates, "> beside", "beside it: assembled one by one")


# Seconds that a part may take, imports included: 8 minutes together.
PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "prune": (prune, 150),
    "speed": (speed, 145),
    "train": (train, 100),
    "fsdp": (fsdp, 45),
    "search": (search, 40),
}


def run_part(name: str, folder: Path, limit: float, command: Sequence[str]) -> None:
    """Run a part in a process of its own, and say how it ended."""
    began, log = time.monotonic(), folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)
        try:
            ended = f"failed: {last_line(log)}" if process.wait(limit) else "ended"
        except subprocess.TimeoutExpired:
            ended = "killed at its limit"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    Row(name, "the whole part", time.monotonic() - began, "s", limit, "<= beside", ended).write(folder)
    shutil.rmtree(folder / "scratch", ignore_errors=True)


def table(folder: Path, options: Sequence[str]) -> str:
    """The rows as a table, below what they were measured on and how."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    on = f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}"
    lines = [f"`{' '.join(['python -m experiments.scale.gpu', *options])}` on {on}:", ""]
    lines += ["| part | what | measured | beside it | goal | |", "|---|---|---:|---:|---|---|"]
    for row in read(folder / "rows.csv"):
        numbers = [f"{float(row[key]):.3g} {row['unit']}" if row[key] else "" for key in ("measured", "beside")]
        lines.append(f"| {' | '.join([row['part'], row['what'], *numbers, row['goal'], row['note']])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Measure all parts, or one of them in this process."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scale.gpu", description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("folder", nargs="?", default="outputs/gpu", type=Path, help="where the rows go")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--part", choices=PARTS, help="measure this part, in this process and without a limit")
    given = parser.parse_args(arguments)
    folder, options = given.folder.resolve(), ["--rehearse"] * given.rehearse
    if given.part:
        PARTS[given.part][0](Bench(given.part, folder, REHEARSED if given.rehearse else Sizes()))
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.scale.gpu", str(folder), *options]
    slower = 4 if given.rehearse else 1  # a processor that others use, too
    for name, (_, limit) in PARTS.items():
        run_part(name, folder, slower * limit, [*command, "--part", name])
    (folder / "table.md").write_text(table(folder, options), encoding="utf-8")
    print((folder / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
