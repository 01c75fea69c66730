"""FSDP for recovery: every process holds a share of the decoder's weights, gradients and optimizer states."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import CustomPolicy

from ..models.anatomy import decoder_of


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
    """The parts of a decoder layer that are sharded on their own, the layer itself among them.

    Args:
        layer: A decoder layer; adapters may be of another type than the rest.
    """
    yield layer
    if len({p.dtype for p in layer.parameters()}) > 1:
        for module in layer.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                yield module
