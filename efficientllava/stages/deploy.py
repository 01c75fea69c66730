"""The last checkpoint as files for llama.cpp: a stage that is done anew in every run, since it measures."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint.folder import Checkpoint, load
from ..data.records import open_image
from ..deploy import decoders, export
from ..deploy.decoders import BLOCK, FALLBACK, QUANTIZED
from ..models.anatomy import layers_of
from ..runtime import processes
from ..runtime.console import say
from ..runtime.files import whole_folder
from ..runtime.keeping import require_space
from .run import Run

FOLDER = "gguf"
QUESTIONS = 4  # with an image and without one, of the run's own records


def prepare(run: Run) -> None:
    """Refuse, before the first stage, what could not be exported after the last one; warn of files that would grow.

    Raises:
        UserError: Says why, and what would help.
    """
    config, model, shapes = run.settings.deploy, run.base.model, run.expected.shapes
    export.describe(run.base, config)
    needed = export.needed_bytes(model, config, run.settings.prune.method != "none")
    require_space(run.folder, needed, "deploy=gguf", "export fewer deploy.types")
    for shape in shapes:
        decoders.architecture(model, shape)
    width = layers_of(model)[0].attention.width
    sizes = (size for groups, channels in shapes[0] for size in (groups * width, channels))
    odd = [size for size in sizes if size % BLOCK]
    quantized = [kind for kind in config.types if kind in QUANTIZED]
    if odd and quantized:
        say(
            f"deploy.types: {quantized[0]} takes rows in multiples of {BLOCK}; of widths such as {min(odd)} tensors "
            f"stay in {FALLBACK} and the file grows; prune.round_to={quantized[0]} keeps channels to multiples"
        )


def deploy(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """Export a run's last checkpoint into its folder, compare it in the installed runtime, and measure it there.

    Returns:
        See `efficientllava.deploy.export.deploy`; nothing on processes other than the first.
    """
    if processes.rank() > 0:
        return {}
    config, model, dense = run.settings.deploy, run.settings.model, None
    if run.device != "cpu" or checkpoint.model.dtype != torch.float32:
        checkpoint = load(checkpoint.path, "float32", memo=run.store.memo)
    if checkpoint.provenance.get("history") and config.measure:
        dense = load(model.path, "float32", "cpu", model.revision, model.protocol, model.system)
    say("deploy: files for llama.cpp" + ", checked and measured there" * config.check)
    with whole_folder(run.folder / FOLDER) as folder:
        made = export.deploy(checkpoint, folder, config, dense, _questions(run))
    for line in export.remarks(made):
        say(line)
    return made


def _questions(run: Run) -> list[Any]:
    """Questions of the run's own records, with and without an image."""
    records = [*run.calibration, *(record for task in run.tasks for record in task.records()[:100])]
    found: dict[bool, list[Any]] = {True: [], False: []}
    for record in records:
        turn = record.turns[0]
        seen = record.image is not None and turn.sees_image
        if len(record.images) < 2 and len(found[seen]) < QUESTIONS:
            found[seen].append((turn.question, open_image(record) if seen else None))
    return [*found[False], *found[True]]
