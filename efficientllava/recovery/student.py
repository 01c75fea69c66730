"""The student while it trains: which parameters do, in which type, in which groups, and how FSDP shares them out.

``projector`` trains the projector; ``lora`` low-rank adapters on every linear layer of the decoder's blocks, and the
projector; ``full`` the projector and the whole language model with embeddings, final norm and head. The vision tower
never trains. Trained parameters are kept in fp32 while they train (half-precision weights lose small updates) and go
back to their storage type at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import CustomPolicy

from ..data.records import Record, column
from ..models.anatomy import decoder_of, layers_of, projector_of
from ..runtime.errors import UserError
from ..settings.schema import RecoverConfig

_DROPOUT_RATES = ("attention_dropout", "dropout", "drop_prob", "drop_path_rate")


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0, in place, so that train and eval mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _DROPOUT_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def require_trainable(records: Sequence[Record], train: str) -> None:
    """Refuse records from which nothing would be learnt; none of them is opened.

    Raises:
        UserError: Only the projector trains, and no record shows it an image.
    """
    if train == "projector" and not (column(records, "length") > 0).any():
        raise UserError(
            "recover.train=projector: none of the records has an image, so nothing would train; give data with images, "
            "or set recover.train=lora or recover.train=full"
        )


def prepare(model: nn.Module, cfg: RecoverConfig, seed: int = 0) -> Callable[[], None]:
    """Choose what trains and add adapters, in place.

    The head, in mode ``full``, does not train when no loss looks at logits: it would get no gradient.

    Returns:
        A function without arguments that undoes this after training: merges adapters and restores storage types.
    """
    silence_dropout(model)
    model.requires_grad_(False)
    unload = _add_adapters(model, cfg.lora, seed) if cfg.train == "lora" else None
    head: Any = model.lm_head
    reads_head = cfg.looks("logits")
    # The head before the decoder: an embedding tied to it stays trainable, as it gets gradients from the input side.
    parts = [projector_of(model), *([head, decoder_of(model)] if cfg.train == "full" else [])]
    for part in parts:
        part.requires_grad_(reads_head or part is not head)
    for layer in layers_of(model):
        if not layer.attention.units:  # nothing reads its norms; processes wait for every gradient that is due
            layer.attention.module.requires_grad_(False)
            if cfg.train == "full" and layer.attention.writer.bias is not None:
                layer.attention.writer.bias.requires_grad_(True)  # is written all the same
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
    projector, groups = {id(p) for p in projector_of(model).parameters()}, []
    for name, rate in (("projector", lr if projector_lr is None else projector_lr), ("decoder", lr)):
        own = [p for p in trainable(model) if (id(p) in projector) == (name == "projector")]
        decaying, others = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups.append({"name": name, "lr": rate, "weight_decay": weight_decay, "params": decaying})
        groups.append({"name": f"{name}_no_decay", "lr": rate, "weight_decay": 0.0, "params": others})
    return [group for group in groups if group["params"]]


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters that train."""
    return (p for p in model.parameters() if p.requires_grad)


def weights_of(module: nn.Module) -> list[Tensor]:
    """All weights of a module; while FSDP runs it, they are plain attributes and no parameters."""
    found = (value for part in module.modules() for value in (*part._parameters.values(), *vars(part).values()))
    return [value for value in found if isinstance(value, Tensor)]


def _add_adapters(model: nn.Module, lora: Any, seed: int) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    inside = {id(m) for m in decoder_of(model).layers.modules()}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside)
    targets = [name for name, linear in linears if linear.weight.numel()]
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


class Sharding(FSDPStrategy):
    """Lightning's FSDP strategy, knowing what a student is made of.

    One unit is one decoder layer; low-rank adapters of another type than their layer are units within it, as a unit has
    one type. What else trains (the projector; embeddings, norm and head in mode ``full``) is the outermost unit. What
    is frozen outside the layers, such as the vision tower, is small and stays whole on every device. After training the
    student is a plain model again, with its full weights in the host memory of every process.

    Args:
        **options: As for `lightning.pytorch.strategies.FSDPStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"state_dict_type": "full", "use_orig_params": True, **options})
        self._weights: list[tuple[str, nn.Parameter, torch.Size, torch.dtype]] = []

    def setup(self, trainer: L.Trainer) -> None:
        """Remember what the student's weights are, before precision and sharding change them."""
        student: Any = trainer.lightning_module.student
        named = student.named_parameters(remove_duplicate=False)
        self._weights = [(name, p, p.shape, p.dtype) for name, p in named]
        super().setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        student: Any = self.lightning_module.student  # pyright: ignore[reportOptionalMemberAccess]
        layers = decoder_of(student).layers
        sharded = {id(p) for p in layers.parameters()}
        whole = [p for p in student.parameters() if id(p) not in sharded and not p.requires_grad]
        for parameter in whole:
            parameter.data = parameter.data.to(self.root_device)
        units = {id(unit) for layer in layers for unit in units_of(layer)}
        precision = self.mixed_precision_config
        if precision is not None:
            # Rotary frequencies are buffers, and too coarse in half precision.
            precision = dataclasses.replace(precision, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
        return FSDP(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
            ignored_states=whole,
            mixed_precision=precision,
            cpu_offload=self.cpu_offload,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )

    def teardown(self) -> None:
        """Make the student a plain model again, unless the training has failed."""
        module = self.lightning_module
        if isinstance(self.model, FSDP) and module is not None and not module.trainer.interrupted:
            self._unshard(module)
        super().teardown()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the first process, nothing on the others."""
        with self._whole(rank0_only=True) as root:
            return root.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole optimizer state on the first process, by position of the parameter; nothing on the others."""
        with self._whole(rank0_only=True) as root:
            state = FSDP.optim_state_dict(root, getattr(optimizer, "_optimizer", optimizer))
        return FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, root) if state else state

    @contextlib.contextmanager
    def _whole(self, rank0_only: bool) -> Iterator[Any]:
        # Where the device is the host, offloading would hand out views of memory that is used again.
        options = {"offload_to_cpu": self.root_device.type != "cpu", "rank0_only": rank0_only}
        weights, states = FullStateDictConfig(**options), FullOptimStateDictConfig(**options)
        root: Any = self.model
        with FSDP.state_dict_type(root, StateDictType.FULL_STATE_DICT, weights, states):
            yield root

    def _unshard(self, module: L.LightningModule) -> None:
        student: Any = module.student
        with self._whole(rank0_only=False) as root:
            values = root.state_dict()
        for parent in list(student.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, FSDP):
                    setattr(parent, name, child.module)
        made: dict[int, nn.Parameter] = {}  # tied weights stay tied
        for name, old, shape, dtype in self._weights:
            value: Tensor = values[f"student.{name}"].to(dtype).view(shape)
            new = made.setdefault(id(old), nn.Parameter(value, requires_grad=old.requires_grad))
            path, _, leaf = name.rpartition(".")
            owner = student.get_submodule(path)
            vars(owner).pop(leaf, None)  # FSDP leaves views as plain attributes
            owner.register_parameter(leaf, new)
        self.model = module


def units_of(layer: nn.Module) -> Iterator[nn.Module]:
    """The parts of a decoder layer that are sharded on their own: itself, and adapters of another type than it has."""
    yield layer
    if len({p.dtype for p in layer.parameters()}) > 1:
        for module in layer.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                yield module
