"""Checkpoints: Hugging Face folders or hub ids, found, described, and loaded strictly."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..models.anatomy import decoder_of
from ..models.pruned import require_supported
from ..runtime import (
    PROVENANCE,
    UNQUANTIZED,
    Memo,
    UserError,
    anchored,
    first_line,
    local_folder,
    read_json,
    require_finite,
    with_config,
)
from ..settings.schema import ModelConfig
from .convert import layout_config, layout_of, stock_folder
from .convert.layouts import stored_tensors
from .hub import about, described, download, folder_digest
from .processors import processor_of, with_system
from .smol import stored

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # how safetensors names them
FEW_BITS = ("F8_", "F6_", "F4", "I8", "U8")  # those of quantized weights


@dataclass
class Checkpoint:
    """A model with its processor and where it comes from.

    Args:
        model: An image-text-to-text model in eval mode.
        processor: Its processor.
        path: Folder or hub id as given, and ``revision`` of the hub.
        storage: Type the weights are stored in; exports keep it.
        content: Content digest of the folder, or what finds it out when it is first asked for.
        provenance: Base checkpoint, original layer indices and history.
        about: Name and licence, see `efficientllava.checkpoint.hub.about`.
    """

    model: Any
    processor: Any
    path: str
    storage: torch.dtype
    content: str | Callable[[], str]
    provenance: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    about: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Content digest of the folder."""
        if callable(self.content):
            self.content = self.content()
        return self.content

    @property
    def original_layers(self) -> list[int]:
        """For every decoder layer, its index in the original unpruned model."""
        return self.provenance["original_layers"]

    @property
    def base(self) -> dict[str, str]:
        """Path, digest, name, licence and revision, where there are, of the original unpruned checkpoint.

        This checkpoint's own when it was never pruned.
        """
        if "base" in self.provenance:
            return self.provenance["base"]
        revision = {"revision": self.revision} if self.revision else {}
        return {"path": anchored(self.path), "digest": self.digest, **revision, **self.about}

    def after(self, model: Any, step: Mapping[str, Any], kept: Sequence[int] | None = None) -> Checkpoint:
        """The checkpoint that a stage makes of this one.

        Args:
            model: The stage's model.
            step: What the stage did, for the provenance.
            kept: Indices of the layers that are left; None where none was dropped.
        """
        original = self.original_layers
        provenance = {
            **self.provenance,
            "base": self.base,
            "original_layers": original if kept is None else [original[index] for index in kept],
            "history": [*self.provenance.get("history", []), dict(step)],
        }
        return replace(self, model=model, content="", provenance=provenance)


def resolve(path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; hub ids are downloaded, original layouts are converted.

    Args:
        path: A folder, a hub id, or ``builtin:<name>``.
        revision: Hub revision.

    Raises:
        UserError: There is no such checkpoint, or a file of it is missing or truncated.
    """
    folder = local_folder(path) or _fetched(path, revision)
    with _of(path, folder):
        folder = stored(stock_folder(with_config(folder, path)))
        if not any(folder.glob("*.safetensors")):
            raise UserError("the folder has no *.safetensors weights; only safetensors are read")
        kinds = {name: tensor.kind for name, (tensor, _) in stored_tensors(folder).items()}
        # Of weights of a few bits the scales would be left out.
        if found := next((f"{name}: {kind}" for name, kind in kinds.items() if kind.startswith(FEW_BITS)), None):
            raise UserError(f"its weights are quantized ({found}); {UNQUANTIZED}")
    return folder


def _fetched(path: str, revision: str | None) -> Path:
    """Fetch a hub id, whose weights may be many GB; whether they are of any use, config.json says."""
    folder = described(path, revision)
    with _of(path, folder):
        original, _ = layout_of(folder)
    if original is None:
        read_config(folder, path)
    return download(path, revision)


@contextmanager
def _of(path: str, folder: Path) -> Iterator[None]:
    """Start what is said about a folder with the key that the user has typed."""
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix(f"model.path={path}: ").removeprefix(f"{folder}: ").replace(f"{folder}/", "")
        raise UserError(f"model.path={path}: {reason}") from error


def compute_dtype(name: str, storage: torch.dtype, device: str) -> torch.dtype:
    """Type that a model computes in: float32 on a CPU and the stored type elsewhere, unless named."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device == "cpu" else storage


def stock_config(model: ModelConfig, complete: bool = True) -> Any:
    """The configuration of an image-text-to-text model that stock transformers loads; weights are not read.

    Args:
        model: ``path``, ``revision``, and the facts in ``architecture``, which count for the hub id that they name.
        complete: Fetch the whole of a hub id where its config.json alone does not say enough.

    Raises:
        UserError: There is no configuration, it cannot be read, or the model is not supported.
    """
    from transformers import AutoConfig

    here, facts = local_folder(model.path), dict(model.architecture or {})
    if here is None and facts.pop("_name_or_path", None) == model.path:
        try:
            return AutoConfig.for_model(**facts)
        except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise UserError(f"model.architecture: is no configuration ({first_line(error)}); mend it") from error
    folder = here or described(model.path, model.revision)
    with _of(model.path, folder):
        if here is None and layout_of(folder)[0]:
            if not complete:
                raise UserError("is in its original layout; give a local copy as model.path=…")
            folder = resolve(model.path, model.revision)
        config = layout_config(folder)
    return config or read_config(folder, model.path)[0]


def read_config(folder: Path, path: str) -> tuple[Any, torch.dtype]:
    """The configuration of a checkpoint's folder, and the type that the weights are stored in.

    Args:
        folder: See `resolve`.
        path: What the user has given, for messages.

    Raises:
        UserError: It cannot be read, or the model is not supported.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a configuration's class raises whatever its code stumbles over
        raise UserError(f"model.path={path}: config.json cannot be read: {first_line(error)}; mend it") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"model.path={path}: a {config.model_type!r} model takes no images; give an image-text-to-text checkpoint"
        )
    require_supported(config.get_text_config())
    storage = getattr(config, "dtype", None) or torch.float32
    if storage not in DTYPES.values():
        raise UserError(
            f"model.path={path}: config.json: dtype={str(storage).removeprefix('torch.')}: must be "
            f"{', '.join(DTYPES)}; mend it, where the weights are of one of these"
        )
    return config, storage


def load(
    path: str | Path,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    protocol: str | None = None,
    system: str | None = None,
    offload: bool | str = False,
    memo: Memo | None = None,
) -> Checkpoint:
    """Load a checkpoint in eval mode, strictly: every tensor of the model is in the folder, and the other way round.

    Args:
        path: A folder, a hub id, or ``builtin:<name>``.
        dtype: ``auto``, ``float32``, ``float16`` or ``bfloat16``; see `compute_dtype`.
        device: Device that the weights are loaded to.
        revision: Hub revision.
        protocol: ``vicuna_v1`` gives a LLaVA-1.5 its own preprocessing and prompt; None leaves them as the folder says.
        system: System sentence of every prompt, written into the processor; None leaves the chat template's.
        offload: True leaves the weights in host memory, in the type that the device computes in; ``disk`` in the files,
            from which they are mapped, in the type that is stored.
        memo: See `efficientllava.checkpoint.hub.folder_digest`.

    Raises:
        UserError: Missing, unexpected or mismatched tensors, weights that are not finite, an unsupported model, or an
            unreadable folder.
    """
    from transformers import AutoModelForImageTextToText

    path = str(path)
    folder = resolve(path, revision)
    config, storage = read_config(folder, path)
    if offload == "disk":
        _require_stored_as(storage, folder, path)
    processor, tokens = processor_of(folder, path, protocol), _tokens_alone(folder, path)
    # Many a tokenizer knows no limit; the decoder's positions are one.
    said = processor.tokenizer.model_max_length
    limit = getattr(config.get_text_config(), "max_position_embeddings", said)
    if not all(type(each) in (int, float) and each >= 1 for each in (said, limit)):
        raise UserError(
            f"model.path={path}: model_max_length={said!r} of tokenizer_config.json, or max_position_embeddings="
            f"{limit!r} of config.json, is no number of tokens; mend it"
        )
    processor.tokenizer.model_max_length = min(said, limit)
    if system is not None:
        processor.chat_template = with_system(processor, system)
    with _load_report() as report:
        try:
            model, info = AutoModelForImageTextToText.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                folder,
                config=config,
                generation_config=tokens,
                dtype=storage if offload == "disk" else compute_dtype(dtype, storage, device),
                output_loading_info=True,
                device_map=None if device == "cpu" or offload else {"": device},
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"model.path={path}: the weights do not fit into the memory of {device}; prune.offload=true "
                "prunes from host memory, trainer=cpu does everything there"
            ) from error
        except Exception as error:  # safetensors, transformers and torch raise different kinds for a broken folder
            reason = next((line for line in report if "MISMATCH" in line), None) or first_line(error)
            raise UserError(
                f"model.path={path}: the weights cannot be loaded: {reason}; get the complete folder, or mend its "
                "config.json"
            ) from error
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        listed = "; ".join(f"{name}: {', '.join(keys[:3])} ({len(keys)})" for name, keys in problems.items())
        raise UserError(f"model.path={path}: the weights do not fit config.json ({listed}); get the complete folder")
    for name, tensor in model.state_dict(keep_vars=True).items():
        require_finite(tensor, f"model.path={path}: tensor {name}", "get the complete folder, or another model.dtype")
    provenance = _provenance(folder, path, len(decoder_of(model).layers))
    spoken = system and hashlib.blake2b(system.encode(), digest_size=4).hexdigest()

    def content() -> str:
        _tell_changed(folder, path, provenance, memo or Memo())
        return "-".join(filter(None, [folder_digest(folder, memo), protocol, spoken]))

    told = about(local_folder(path) or folder, path)
    return Checkpoint(model.eval(), processor, path, storage, content, provenance, revision, told)


def _require_stored_as(storage: torch.dtype, folder: Path, path: str) -> None:
    """Refuse weights of other types than config.json says: a cast would be a copy in memory."""
    for name, (tensor, file) in stored_tensors(folder).items():
        if tensor.kind in KINDS.values() and tensor.kind != KINDS[storage]:
            raise UserError(
                f"model.path={path}: {file.name}: {name} is stored as {tensor.kind}, and config.json says {storage}; "
                "for prune.offload=disk save it anew in one type"
            )


def _tokens_alone(folder: Path, path: str) -> Any:
    """The special tokens of a generation_config.json that transformers refuses for what else it says; else None.

    Raises:
        UserError: These are no token ids.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    tokens = {k: v for k, v in read_json(file, path).items() if k.endswith("_token_id") and v is not None}
    for name, value in tokens.items():
        if not all(type(each) is int for each in (value if isinstance(value, list) and value else [value])):
            raise UserError(
                f"model.path={path}: {file.name}: {name}={value!r} must be a token's number, or a list; mend it"
            )
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # ValueError, TypeError and AttributeError of many fields
        log.warning("model.path=%s: of %s only the special tokens count (%s)", path, file.name, first_line(error))
        return GenerationConfig(**tokens)
    return None


def _provenance(folder: Path, path: str, layers: int) -> dict[str, Any]:
    """What was done to a checkpoint before; of one that was never pruned, that its layers are the original ones."""
    if not (folder / PROVENANCE).is_file():
        return {"original_layers": list(range(layers))}
    provenance = read_json(folder / PROVENANCE, path)
    original, base, steps = provenance.get("original_layers"), provenance.get("base"), provenance.get("history", [])
    numbers = isinstance(original, list) and all(type(index) is int and index >= 0 for index in original)
    named = list(original or ()) if numbers else []
    faults = {
        "original_layers is no list of numbers": not numbers,
        "original_layers do not rise": named != sorted({*named}),
        f"it names {len(named)} layers, the model has {layers}": len(named) != layers,
        "base has no path or no digest": not isinstance(base, dict)
        or not all(isinstance(base.get(key), str) for key in ("path", "digest")),
        "history is no list of objects": not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps),
        "weights is no object": not isinstance(provenance.get("weights", {}), dict),
    }
    if reason := next((said for said, wrong in faults.items() if wrong), None):
        raise UserError(f"model.path={path}: {PROVENANCE} does not fit ({reason}); restore it, or remove it")
    return provenance


def _tell_changed(folder: Path, path: str, provenance: Mapping[str, Any], memo: Memo) -> None:
    """Warn of weights of ours that are not what was written: large ones may be links that others share."""
    written = {folder / name: known for name, known in provenance.get("weights", {}).items()}
    files = [file for file in written if file.is_file()]
    changed = [file.name for file, found in zip(files, memo.digests(files), strict=True) if found != written[file]]
    if changed:
        log.warning(
            "model.path=%s: %s has changed since it was written; if that was not you, something has written through a "
            "link from another run's folder: make this one anew",
            path,
            changed[0],
        )


@contextmanager
def _load_report() -> Iterator[list[str]]:
    """Catch the table that transformers prints when tensors do not fit; we say the same in one line."""
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        ours = "LOAD REPORT" in text
        lines.extend(" ".join(line.split()) for line in text.splitlines() if ours)
        return not ours

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield lines
    finally:
        logger.removeFilter(keep)
