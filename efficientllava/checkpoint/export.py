"""Checkpoints that leave a run: whole or not at all, with a model card, and proven to load in a fresh process."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.offload import Disk
from ..models.pruned import is_per_layer
from ..runtime import PROVENANCE, Memo, UserError, as_umask, is_id, processes, require_finite, whole_folder
from .folder import Checkpoint
from .hub import LICENCE_KEYS, named

# What a checkpoint consists of; anything else in its folder is the user's.
OWN = (
    "*.json",
    "*.safetensors",
    "README.md",
    "*.jinja",
    "additional_chat_templates",
    "*.model",
    "merges.txt",
    "vocab.txt",
)
SHARD = "4GB"  # of weights per file; a file is copied to the host before it is written
# The process that loads a uniform checkpoint never imports this package: it runs this text with ``python -I``.
CHECK = """
import sys
folder, probe, dtype, stored, device, package = sys.argv[1:]
if package:
    sys.path.insert(0, package)
    import efficientllava
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
inputs = load_file(probe)
expected = inputs.pop("logits")
dtype, stored = getattr(torch, dtype), getattr(torch, stored)
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=stored, output_loading_info=True)
wrong = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
if wrong:
    sys.exit(f"tensors do not fit: {wrong}")
if not package and "efficientllava" in sys.modules:
    sys.exit("a uniform checkpoint must load without efficientllava")
if stored != dtype:  # the weights stay in their file, but for those at work
    layers, held = model.get_decoder().layers, {}
    inside = {p for layer in layers for p in layer.parameters()}
    def enter(layer, _):
        for p in layer.parameters():
            held[p], p.data = p.data, p.data.to(dtype)
    def leave(layer, *_):
        for p in layer.parameters():
            p.data = held.pop(p)
    for layer in layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    for p in model.parameters():
        p.data = p.data if p in inside else p.data.to(dtype)
model.requires_grad_(False)  # on both sides: whether a weight asks for gradients has a say in the kernel of a product
with torch.no_grad():
    logits = model.to(device).eval()(**{k: v.to(device) for k, v in inputs.items()}).logits.cpu()
difference = (logits.float() - expected.float()).abs().max().item()
bound = 0.0 if device == "cpu" else 1e-2 * expected.float().abs().max().item()
if not difference <= bound:
    sys.exit(f"logits differ by {difference} (allowed {bound})")
"""


@torch.no_grad()
def round_weights(model: nn.Module, storage: torch.dtype) -> None:
    """Round all floating weights to the storage type, in place, so that memory equals what is saved.

    Raises:
        NotFiniteError: Names a tensor that is not finite, or that the type cannot hold.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != storage and parameter.is_floating_point():
            parameter.copy_(parameter.to(storage))
        require_finite(parameter, f"tensor {name}, stored as {str(storage).removeprefix('torch.')}")


def require_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are gone.

    Raises:
        UserError: They are.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UserError("the checkpoint has no weights any more, since its training has failed; load it again")


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Digest of the weights that a model has in memory."""
    require_weights(model)
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save(checkpoint: Checkpoint, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
    """Save a checkpoint as a Hugging Face folder, whole or not at all.

    Args:
        checkpoint: What to save. Weights are stored as ``checkpoint.storage``; those in memory are rounded to it, so
            that they equal the folder's.
        folder: Target; a checkpoint that was saved there is replaced.
        card: Facts for the model card, see `model_card`.

    Returns:
        The folder.

    Raises:
        UserError: The target is a file, or holds something else.
    """
    require_weights(checkpoint.model)
    folder = Path(folder).expanduser().absolute()
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give a folder")
    if other := _others(folder):
        raise UserError(f"{folder}: holds {other[0]}, which would be lost; give a folder of its own")
    with whole_folder(folder) as partial:
        write(checkpoint, partial, card)
    return folder


def _others(folder: Path) -> list[str]:
    """What a folder holds beside a checkpoint of this package."""
    own = OWN if (folder / PROVENANCE).is_file() else ()
    held = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in held if not any(path.match(pattern) for pattern in own))


def write(
    checkpoint: Checkpoint, folder: Path, card: Mapping[str, Any] | None = None, memo: Memo | None = None
) -> None:
    """Write all files of a checkpoint into an existing folder; see `save`.

    Args:
        checkpoint: As in `save`.
        folder: The folder.
        card: As in `save`.
        memo: Where given, the provenance says what the weights were, and whoever loads them later is told of a change.
    """
    model, storage = checkpoint.model, checkpoint.storage
    with _stored_as(model, storage):
        model.save_pretrained(folder, max_shard_size=SHARD)
    _declare_dtype(folder / "config.json", storage)
    checkpoint.processor.save_pretrained(folder)
    as_umask(folder)  # before the weights are digested: a change of permissions counts as one
    provenance = {**checkpoint.provenance, "base": checkpoint.base, "original_layers": checkpoint.original_layers}
    provenance.pop("weights", None)  # those of the checkpoint that this one was made of
    if memo is not None:
        weights = sorted(folder.glob("*.safetensors"))
        provenance["weights"] = dict(zip((file.name for file in weights), memo.digests(weights), strict=True))
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    needs_import = is_per_layer(model.config.get_text_config())
    (folder / "README.md").write_text(model_card(provenance, needs_import, card or {}), encoding="utf-8")


@contextmanager
def _stored_as(model: nn.Module, storage: torch.dtype) -> Iterator[None]:
    """Hold weights in the type that they are stored in, one by one in place: there is never a second copy of all."""
    tensors = [tensor for tensor in model.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    changed = {id(tensor): (tensor, tensor.dtype) for tensor in tensors if tensor.dtype != storage}.values()
    try:
        for tensor, _ in changed:
            tensor.data = tensor.data.to(storage)
        yield
    finally:
        for tensor, dtype in changed:
            tensor.data = tensor.data.to(dtype)


def _declare_dtype(file: Path, storage: torch.dtype) -> None:
    """Say in all parts of config.json what the weights are stored in; save_pretrained says what they compute in."""
    kind = {"dtype": str(storage).removeprefix("torch.")}
    config = json.loads(file.read_text("utf-8"), object_hook=lambda node: node | kind if "dtype" in node else node)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def usage(folder: str, needs_import: bool) -> str:
    """Python lines that load a checkpoint with transformers.

    Args:
        folder: What to load.
        needs_import: Whether layers differ in size, so that our registered classes are needed.
    """
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        f"model = AutoModelForImageTextToText.from_pretrained({folder!r})",
        f"processor = AutoProcessor.from_pretrained({folder!r})",
    ]
    ours = ["import efficientllava  # registers decoders whose layers differ in size"] if needs_import else []
    return "\n".join(ours + lines)


def model_card(provenance: Mapping[str, Any], needs_import: bool, facts: Mapping[str, Any]) -> str:
    """Write the card: front matter that hubs read, and what was done to the base model.

    Args:
        provenance: ``base`` (``path``, and what `about` says), ``original_layers`` and ``history`` of the checkpoint.
        needs_import: See `usage`.
        facts: Further key figures, one line each.

    Returns:
        Markdown.
    """
    base = provenance["base"]
    public = named(str(base["path"]))
    name = str(base.get("name", public))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["efficientllava", "pruned"],
        **({"base_model": public, "base_model_relation": "finetune"} if is_id(public) else {}),
        # The card carries the licence of the base model, never one of its own.
        **{key: base[key] for key in LICENCE_KEYS if key in base},
    }
    steps = [json.dumps(step, sort_keys=True) for step in provenance.get("history", [])]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
            "---",
            f"# A smaller {name}",
            "",
            f"Made from `{name}` by [efficientllava](https://github.com/efficientllava/efficientllava); "
            f"the licence of the base model applies ({front.get('license', 'which its folder does not name')}).",
            "",
            *(f"- `{step}`" for step in steps),
            *(f"- {key}: {value}" for key, value in facts.items()),
            f"- layers kept, by index in the base model: {provenance['original_layers']}",
            "",
            "```python",
            usage("<this folder>", needs_import),
            "```",
            "",
        ]
    )


@torch.no_grad()
def reload_gate(folder: Path, model: Any, inputs: Mapping[str, Tensor], disk: Disk | None = None) -> None:
    """Compare an exported folder with the model in memory.

    Args:
        folder: The exported folder.
        model: The model in memory, its weights rounded to the storage type; afterwards its shapes alone are left, since
            the fresh process needs the memory.
        inputs: Keyword tensors of ``model.forward``: a prompt with an image.
        disk: Brings the layers of a model that stays in files, in both processes.

    Raises:
        RuntimeError: The reloaded model differs, or its process was killed; the message says how.
    """
    device = next(model.parameters()).device
    stored = str(next(model.parameters()).dtype).removeprefix("torch.")
    package = str(Path(__file__).resolve().parents[2]) if is_per_layer(model.config.get_text_config()) else ""
    threads = torch.get_num_threads()
    # The number of threads decides the order of sums; one on both sides makes the comparison exact.
    torch.set_num_threads(1)
    model.requires_grad_(False)
    try:
        with disk.running(model) if disk else nullcontext():
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            logits = model(**{name: value.to(device) for name, value in inputs.items()}).logits
    finally:
        torch.set_num_threads(threads)
    model.to("meta")
    processes.release_memory()
    with tempfile.TemporaryDirectory(prefix="efficientllava-") as scratch:
        probe = str(Path(scratch) / "probe.safetensors")
        save_file({name: value.cpu().contiguous() for name, value in {**inputs, "logits": logits}.items()}, probe)
        command = [sys.executable, "-I", "-c", CHECK, str(folder), probe, dtype, stored, device.type, package]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {name: str(value) for name, value in processes.ALLOCATOR.items()}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode < 0:
        how = f"ended by {signal.Signals(-done.returncode).name}, out of memory if nobody has ended it"
        raise RuntimeError(f"{folder}: not shown to be as in memory: the process that loads it was {how}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{folder}: the reloaded checkpoint differs from the model in memory: {reason}")
