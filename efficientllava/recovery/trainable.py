"""Which parameters train, in which type, and how they are grouped for the optimizer.

``projector`` trains the projector; ``lora`` low-rank adapters on every linear layer of the decoder's blocks, and the
projector; ``full`` the projector and the whole language model with embeddings, final norm and head. The vision tower
never trains. Trained parameters are kept in fp32 while they train (half-precision weights lose small updates) and go
back to their storage type at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.records import Record, column
from ..models.anatomy import decoder_of, projector_of
from ..runtime.errors import UserError

_DROPOUT_RATES = ("attention_dropout", "dropout", "drop_prob", "drop_path_rate")


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0, so that train and eval mode compute the same.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _DROPOUT_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def require_trainable(records: Sequence[Record], train: str) -> None:
    """Refuse records from which nothing would be learnt; none of them is opened.

    Args:
        records: What a recovery trains on.
        train: ``recover.train``.

    Raises:
        UserError: Only the projector trains, and no record shows it an image.
    """
    if train == "projector" and not (column(records, "length") > 0).any():
        raise UserError(
            "recover.train=projector: none of the records has an image, so nothing would train; give data with images, "
            "or set recover.train=lora or recover.train=full"
        )


def prepare(model: nn.Module, cfg: Any, seed: int = 0, train_head: bool = True) -> Callable[[], None]:
    """Choose what trains and add adapters.

    Args:
        model: The student; changed in place.
        cfg: A `efficientllava.settings.schema.RecoverConfig`; reads ``train``, ``lora`` and ``gradient_checkpointing``.
        seed: Seed of the adapters' initial values.
        train_head: Train the head in mode ``full``; False when no loss reads logits (it would get no gradient).

    Returns:
        A function without arguments that undoes this after training: merges adapters and restores storage types.
    """
    silence_dropout(model)
    model.requires_grad_(False)
    unload = _add_adapters(model, cfg.lora, seed) if cfg.train == "lora" else None
    parts = [projector_of(model)]
    if cfg.train == "full":
        # The head first: an embedding tied to it stays trainable, as it gets gradients from the input side.
        parts += [model.lm_head.requires_grad_(train_head), decoder_of(model)]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    for part in parts:
        if part is not model.lm_head:
            part.requires_grad_(True)
    restore = _upcast(parts)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    model.train()

    def finish() -> None:
        if cfg.gradient_checkpointing:
            model.gradient_checkpointing_disable()  # pyright: ignore[reportCallIssue]
        if unload is not None:
            unload()
        restore()
        model.requires_grad_(False).eval()

    return finish


def parameter_groups(model: nn.Module, lr: float, projector_lr: float | None, weight_decay: float) -> list[dict]:
    """Group trainable parameters: {decay, no decay (norms, biases)} x {projector, decoder}.

    Args:
        model: The student, after `prepare`.
        lr: Learning rate of the decoder and its adapters.
        projector_lr: Learning rate of the projector; None is ``lr``.
        weight_decay: Decay of matrices.

    Returns:
        Groups with ``name``, ``lr``, ``weight_decay`` and ``params``; empty ones are left out.
    """
    projector = {id(p) for p in projector_of(model).parameters()}
    groups = {}
    for name, rate in (("projector", lr if projector_lr is None else projector_lr), ("decoder", lr)):
        groups[name, True] = {"name": f"{name}", "lr": rate, "weight_decay": weight_decay, "params": []}
        groups[name, False] = {"name": f"{name}_no_decay", "lr": rate, "weight_decay": 0.0, "params": []}
    for parameter in trainable(model):
        name = "projector" if id(parameter) in projector else "decoder"
        groups[name, parameter.ndim > 1]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters that train."""
    return (p for p in model.parameters() if p.requires_grad)


def weights_of(module: nn.Module) -> list[Tensor]:
    """All weights of a module; while FSDP runs it, they are plain attributes and no parameters.

    Args:
        module: Any module.
    """
    found = (value for part in module.modules() for value in (*part._parameters.values(), *vars(part).values()))
    return [value for value in found if isinstance(value, Tensor)]


def _add_adapters(model: nn.Module, lora: Any, seed: int) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    inside = {id(m) for m in decoder_of(model).layers.modules()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)  # pyright: ignore[reportArgumentType]

    def unload() -> None:
        adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
        if hasattr(model, "peft_config"):
            del model.peft_config

    return unload


def _upcast(parts: list[nn.Module]) -> Callable[[], None]:
    """Hold the floating parameters of modules in fp32; the returned function restores their types."""
    stored: list[tuple[nn.Module, str, torch.dtype]] = []  # by place: sharding makes new parameters
    for module in (module for part in parts for module in part.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.itemsize < 4:
                stored.append((module, name, parameter.dtype))
                parameter.data = parameter.data.float()

    def restore() -> None:
        for module, name, dtype in stored:
            parameter: nn.Parameter = getattr(module, name)
            parameter.data = parameter.data.to(dtype)

    return restore
