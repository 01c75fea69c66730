"""The last checkpoint as files for llama.cpp: a stage that is done anew in every run, since it measures."""

from __future__ import annotations

from typing import Any

from ..runtime import processes
from ..runtime.console import say
from ..runtime.files import whole_folder
from .context import Context

FOLDER = "gguf"
QUESTIONS = 4  # with an image and without one, of the run's own records


def prepare(context: Context) -> None:
    """Refuse, before the first stage, what could not be exported after the last one; warn of files that would grow.

    Args:
        context: What is opened so far: the base checkpoint and the forecast of its pruning.

    Raises:
        UserError: Says why, and what would help.
    """
    from ..deploy import decoders, export, files
    from ..models.anatomy import layers_of
    from ..runtime.keeping import require_space

    settings = context.settings
    export.describe(context.base, settings.deploy)
    needed = export.needed_bytes(context.base.model, settings.deploy, settings.prune.method != "none")
    require_space(context.folder, needed, "deploy=gguf", "export fewer deploy.types")
    options = context.forecast.plan.options
    for option in options:
        decoders.architecture(context.base.model, option)
    width = layers_of(context.base.model)[0].attention.width
    odd = {groups * width for groups, _ in options[0] if groups * width % files.BLOCK}
    odd |= {channels for _, channels in options[0] if channels % files.BLOCK}
    if odd and not {*settings.deploy.types}.isdisjoint(files.QUANTIZED):
        quantized = next(kind for kind in settings.deploy.types if kind in files.QUANTIZED)
        say(
            f"deploy.types: {quantized} takes rows in multiples of {files.BLOCK}; of widths such as {min(odd)} tensors "
            f"stay in {files.FALLBACK} and the file grows; prune.round_to={quantized} keeps channels to multiples"
        )


def deploy(context: Context, checkpoint: Any) -> dict[str, Any]:
    """Export a checkpoint into the run's folder, compare it in the installed runtime, and measure it there.

    Args:
        context: What the stages share.
        checkpoint: The run's last one.

    Returns:
        See `efficientllava.deploy.export.deploy`; nothing on processes other than the first.
    """
    import torch

    from ..checkpoint.folder import load
    from ..deploy.export import deploy as export
    from ..deploy.export import remarks

    if processes.rank() > 0:
        return {}
    settings, dense = context.settings, None
    if context.device != "cpu" or checkpoint.model.dtype != torch.float32:
        checkpoint = load(checkpoint.path, "float32", memo=context.store.memo)
    if checkpoint.provenance.get("history") and settings.deploy.measure:
        model = settings.model
        dense = load(model.path, "float32", "cpu", model.revision, model.protocol, model.system)
    say("deploy: files for llama.cpp" + ", checked and measured there" * settings.deploy.check)
    with whole_folder(context.folder / FOLDER) as folder:
        made = export(checkpoint, folder, settings.deploy, dense, _questions(context))
    for line in remarks(made):
        say(line)
    return made


def _questions(context: Context) -> list[Any]:
    """Questions of the run's own records, with and without an image."""
    from ..data.records import open_image

    records = [*context.calibration, *(record for task in context.tasks for record in task.records()[:100])]
    found: dict[bool, list[Any]] = {True: [], False: []}
    for record in records:
        turn = record.turns[0]
        seen = record.image is not None and turn.sees_image
        if len(record.images) < 2 and len(found[seen]) < QUESTIONS:
            found[seen].append((turn.question, open_image(record) if seen else None))
    return [*found[False], *found[True]]
