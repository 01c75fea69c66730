"""The folder for llama.cpp: files of every type, the image side, how to run them, and what they were found to do."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..checkpoint.hub import named
from ..models.anatomy import decoder_of, layers_of
from ..models.chat import end_tokens
from ..runtime import UserError, disk_full, put, write_whole
from ..runtime.keeping import require_space
from ..settings.checks import require_valid
from ..settings.schema import BLOCKS, DeployConfig, RunConfig
from . import check, decoders
from .decoders import BLOCK, FALLBACK
from .inputs import ImageSide, image_side, side, vocabulary
from .runtime import speeds, version

TEMPLATE = Path(__file__).with_name("README.md.jinja")
# What is written beside the files, and what tells that from pages of other people's.
SIGNS = {"README.md": " for llama.cpp\n\nArchitecture `", "Modelfile": "\nPARAMETER temperature 0\nPARAMETER num_ctx "}


def describe(checkpoint: Any, config: DeployConfig) -> tuple[decoders.Decoder, dict[str, Any], ImageSide | None]:
    """Find out whether a checkpoint can be exported; nothing is written.

    Returns:
        The decoder, keys of its tokenizer, and keys and tensors of the image side where it is exported.

    Raises:
        UserError: It cannot; says why and what would help.
    """
    require_valid(config, "deploy.")
    model = checkpoint.model
    rows = decoder_of(model).embed_tokens.num_embeddings
    return (
        decoders.describe(model),
        vocabulary(checkpoint.processor, rows, end_tokens(model, checkpoint.processor.tokenizer)),
        image_side(model, checkpoint.processor) if config.mmproj else None,
    )


def name_of(checkpoint: Any) -> str:
    """The part of the file names that says which model it is."""
    base = checkpoint.base
    called = str(base.get("name") or named(str(base["path"]))).rpartition("/")[2].partition(" (")[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", called)
    history = checkpoint.provenance.get("history")
    if not history:
        return name
    return f"{name}-{'recovered' if history[-1].get('stage') == 'recover' else 'pruned'}"


def foresee(model: Any, shapes: Sequence[Any], config: DeployConfig) -> list[str]:
    """What shapes alone say of the files of a pruned model: which would grow.

    Args:
        model: What will be pruned; the meta device is enough.
        shapes: KV groups and channels of every layer, for each plan that may come out.
        config: ``types``.

    Raises:
        UserError: A model of such a shape cannot be exported.
    """
    for shape in shapes:
        decoders.architecture(model, shape)
    width = layers_of(model)[0].attention.width
    odd = [size for groups, channels in shapes[0] for size in (groups * width, channels) if size % BLOCK]
    quantized = [kind for kind in config.types if kind in BLOCKS]
    if not odd or not quantized:
        return []
    return [
        f"deploy.types: {quantized[0]} takes rows in multiples of {BLOCK}; of widths such as {min(odd)} tensors "
        f"stay in {FALLBACK} and the file grows; prune.round_to={quantized[0]} keeps channels to multiples"
    ]


def compared(settings: RunConfig) -> bool:
    """Whether a run measures what it exports beside the model that it was made of."""
    return settings.deploy.measure and (settings.prune.method, settings.recover.name) != ("none", "none")


def needed_bytes(model: Any, config: DeployConfig, dense: bool) -> int:
    """Bytes of all files, and of the dense ones beside them while speeds are measured."""
    bits = {"f32": 32, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
    whole = sum(parameter.numel() for parameter in model.parameters())
    return int(whole * sum(bits.get(kind, 16) for kind in config.types) / 8) * (2 if dense else 1) + 2 * whole


def write(checkpoint: Any, folder: Path, config: DeployConfig) -> dict[str, Any]:
    """Write the files, and how to use them.

    Args:
        checkpoint: What to export.
        folder: An existing folder.
        config: ``types`` and ``mmproj``.

    Returns:
        ``architecture``, ``context``, ``files`` by type with ``file``, ``bytes`` and ``fallback`` (tensors that are
        stored wider, since their rows are no whole number of blocks), and ``mmproj``.

    Raises:
        UserError: It cannot be exported, or the disk is full.
    """
    (decoder, words, images), name = describe(checkpoint, config), name_of(checkpoint)
    general = {"general.name": name, "general.type": "model"}
    made: dict[str, Any] = {"architecture": decoder.architecture, "context": decoder.context, "files": {}}
    try:
        for kind in config.types:
            file, keys = folder / f"{name}-{kind.upper()}.gguf", general | decoder.metadata() | words
            fallback = decoders.write(file, decoder.architecture, keys, decoder.tensors(), kind)
            made["files"][kind] = {"file": file.name, "bytes": file.stat().st_size, "fallback": fallback}
        if images is not None:
            kind = "f32" if set(config.types) == {"f32"} else "f16"  # it stays in 16 or 32 bits
            file, (keys, tensors) = folder / f"mmproj-{name}-{kind.upper()}.gguf", images
            decoders.write(file, "clip", {**general, "general.type": "mmproj", **keys}, tensors, kind)
            made["mmproj"] = {"file": file.name, "bytes": file.stat().st_size}
    except OSError as error:
        if disk_full(error):
            raise UserError(f"{folder}: the disk is full; free some space, or export fewer deploy.types") from error
        raise
    return made


def deploy(
    checkpoint: Any,
    folder: Path,
    config: DeployConfig,
    dense: Callable[[], Any] | None = None,
    questions: Sequence[check.Question] = (),
) -> dict[str, Any]:
    """Export a checkpoint, check the files in the installed runtime, and measure them.

    Args:
        checkpoint: What to export; its model is on the CPU, in float32.
        folder: The folder; made if it does not exist.
        config: What to do.
        dense: Gives the checkpoint that it was made of, measured beside it; None measures it alone.
        questions: What is asked of both sides; empty: questions of this package's own.

    Returns:
        What `write` says, and: ``runtime``; per type ``agreement`` (see `efficientllava.deploy.check.compare`) and
        ``speed`` by ``dense`` and ``exported``; of the image side ``cosine``.

    Raises:
        UserError: It cannot be exported, the runtime does not take it, or it computes something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    both = dense is not None and config.measure
    require_space(folder, needed_bytes(checkpoint.model, config, both), "deploy=gguf", "export fewer deploy.types")
    _require_own(folder)
    with tempfile.TemporaryDirectory(prefix=".made-", dir=folder) as scratch:  # what is refused leaves nothing
        place = Path(scratch)
        made = write(checkpoint, place, config)
        if config.check or config.measure:
            made["runtime"] = version()
        paths = {kind: place / entry["file"] for kind, entry in made["files"].items()}
        if config.check:
            _check(checkpoint, place, made, paths, questions)
        if config.measure:
            _measure(made, paths, config, dense, place)
        tell(place, name_of(checkpoint), made)
        for file in place.iterdir():
            put(file, folder / file.name)
    return made


def _require_own(folder: Path) -> None:
    """Refuse a folder in which `tell` would write over a page or a recipe of somebody else's."""
    for name, sign in SIGNS.items():
        file = folder / name
        if file.exists() and sign not in file.read_text("utf-8", errors="replace"):
            raise UserError(f"{file}: is not of an export and would be lost; give a folder of its own, such as gguf")


def _check(checkpoint: Any, folder: Path, made: dict[str, Any], paths: dict[str, Path], questions: Any) -> None:
    model, processor = checkpoint.model, checkpoint.processor
    mmproj = folder / made["mmproj"]["file"] if "mmproj" in made else None
    if mmproj is not None:
        made["mmproj"] |= check.image_agreement(model, processor, mmproj, folder)
    size = side(model.config.vision_config.image_size) if mmproj is not None else 32
    asked = questions or check.questions(processor.tokenizer, size)
    for kind, found in check.agreements(paths, mmproj, model, processor, asked):
        made["files"][kind]["agreement"] = found


def _measure(made: dict[str, Any], paths: dict[str, Path], config: DeployConfig, dense: Any, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".dense-", dir=folder) as scratch:
        beside = {}
        if dense is not None:
            plain = DeployConfig(types=config.types, mmproj=False)
            beside = {kind: entry["file"] for kind, entry in write(dense(), Path(scratch), plain)["files"].items()}
        for kind, path in paths.items():
            measured = {"dense": Path(scratch) / beside[kind]} if beside else {}
            context = min(512, made["context"])
            made["files"][kind]["speed"] = speeds({**measured, "exported": path}, context, config.repeats)


def remarks(made: dict[str, Any]) -> list[str]:
    """What a user has to know of an export, a line each."""
    lines = []
    for kind, entry in made["files"].items():
        if entry["fallback"]:
            heads = [name for name in entry["fallback"] if "attn" in name]
            fixes = [f"prune.round_to={kind} helps the MLPs"] if len(heads) < len(entry["fallback"]) else []
            fixes += ["another number of heads would help the attentions"] if heads else []
            lines.append(
                f"{kind}: {len(entry['fallback'])} tensors stay in {decoders.FALLBACK} and the file grows, since their "
                f"rows are no multiple of {decoders.BLOCK}, such as {entry['fallback'][0]}; {', '.join(fixes)}"
            )
    sees = made.get("mmproj", {}).get("cosine", 1.0) >= check.SAME
    if not sees:
        equal = all(each["text"]["greedy_equal"] for kind, each in _agreements(made).items() if kind in check.BOUNDS)
        lines.append(
            f"the installed runtime sees images otherwise than the model (cosine {made['mmproj']['cosine']:.3f}), do "
            f"not trust its answers about them; text side {'equal' if equal else 'not equal in its greedy answers'}; "
            "the file follows the model, see docs/deployment.md"
        )
    for kind, groups in _agreements(made).items():
        for group in (groups[name] for name in ("image", "resized") if name in groups):
            if not group["chat_equal"]:
                lines.append(f"{kind}: the server writes another prompt around an image than the model's chat template")
            if not group["lengths_equal"]:
                lines.append(f"{kind}: in the runtime a prompt with an image has another number of tokens")
        resized = groups.get("resized")
        if kind in check.BOUNDS and resized and sees and resized["logprob_error"] > 10 * check.BOUNDS["f16"]:
            lines.append(
                f"images that have to be resized: the runtime fits them in otherwise (log-probabilities differ by "
                f"{resized['logprob_error']:.2g}); give it squares of the tower's size"
            )
    return [*dict.fromkeys(lines)]


def _agreements(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was found of each type, where it was checked."""
    return {kind: entry["agreement"] for kind, entry in made["files"].items() if "agreement" in entry}


def tell(folder: Path, name: str, made: dict[str, Any]) -> None:
    """Write ``README.md`` and ``Modelfile``.

    Args:
        folder: The folder of the files.
        name: See `name_of`.
        made: Output of `deploy`.
    """
    files = [entry["file"] for entry in made["files"].values()]
    mmproj = [made["mmproj"]["file"]] if "mmproj" in made else []
    page = jinja2.Template(TEMPLATE.read_text("utf-8"), keep_trailing_newline=True)
    image = "".join(f" --mmproj {file}" for file in mmproj)
    told = page.render(name=name, made=made, files=made["files"], model=files[0], image=image, remarks=remarks(made))
    modelfile = "".join(f"FROM ./{file}\n" for file in [files[0], *mmproj])
    modelfile += f"PARAMETER temperature 0\nPARAMETER num_ctx {made['context']}\n"
    write_whole(folder / "README.md", told)
    write_whole(folder / "Modelfile", modelfile)
