"""A tiny stock LLaVA with random weights, and batches of random tokens for it: no trained weights, no processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from efficientllava.settings.schema import RecoverConfig, WeightsConfig

VOCAB, IMAGE_TOKEN, IMAGE_TOKENS, SEQ = 37, 36, 4, 14
LAYERS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_model(seed: int = 0, layers: int = LAYERS, **text: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    language = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        initializer_range=0.3,
        **text,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).eval()


def drop_layers(model: nn.Module, dropped: set[int]) -> nn.Module:
    """A copy of a model without some layers."""
    student: Any = copy.deepcopy(model)
    decoder = student.get_decoder()
    decoder.layers = nn.ModuleList(block for i, block in enumerate(decoder.layers) if i not in dropped)
    for i, block in enumerate(decoder.layers):
        block.self_attn.layer_idx = i
    decoder.config.num_hidden_layers = len(decoder.layers)
    return student


def perturb(model: nn.Module, scale: float = 0.1, seed: int = 9) -> nn.Module:
    """A copy of a model whose decoder is off a little, as after pruning."""
    student: Any = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in student.get_decoder().layers:
            for p in block.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * scale)
    return student


class Samples(torch.utils.data.Dataset):
    """Random token sequences, every fourth text-only, with answers of unequal length."""

    def __init__(self, size: int = 24, images: bool = True, supervised: bool = True) -> None:
        self.size, self.images, self.supervised = size, images, supervised

    def __len__(self) -> int:
        return self.size

    def column(self, _name: str) -> np.ndarray:
        return np.array([str(index) for index in range(self.size)], dtype=object)

    def image_files(self, indices: np.ndarray) -> list[list[Path]]:
        return [[] for _ in indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(100 + index)
        ids = torch.randint(0, IMAGE_TOKEN, (SEQ,), generator=generator)
        seen = self.images and index % 4 != 3
        if seen:
            ids[1 : 1 + IMAGE_TOKENS] = IMAGE_TOKEN
        labels = ids.clone()
        length = SEQ - index % 3
        labels[: 6 + index % 5] = -100
        labels[length:] = -100
        if not self.supervised:
            labels[:] = -100
        pixels = torch.randn(1, 3, 16, 16, generator=generator) if seen else None
        return {"id": str(index), "ids": ids, "labels": labels, "length": length, "pixels": pixels}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = torch.tensor([row["length"] for row in rows])
    batch: dict[str, Any] = {
        "input_ids": torch.stack([row["ids"] for row in rows]),
        "attention_mask": (torch.arange(SEQ) < lengths[:, None]).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
        "ids": [row["id"] for row in rows],
    }
    seen = [row for row in rows if row["pixels"] is not None]
    if seen:
        batch["pixel_values"] = torch.cat([row["pixels"] for row in seen])
        batch["image_ids"] = [row["id"] for row in seen]
        batch["image_tiles"] = [1] * len(seen)
    return batch


def make_batch(size: int = 8, **options: Any) -> dict[str, Any]:
    data = Samples(size, **options)
    return collate([data[i] for i in range(size)])


class Shuffled(BatchSampler):
    """An order of its own for each epoch."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.epoch = size, batch_size, 0
        self.share = slice(rank, None, world)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(self.size // self.batch_size)[self.share])

    def __iter__(self):
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        batches = [order[i : i + self.batch_size] for i in range(0, self.size, self.batch_size)]
        return iter(batches[self.share])


class Data(L.LightningDataModule):
    def __init__(self, size: int = 24, batch_size: int = 4, **options: Any) -> None:
        super().__init__()
        self.samples, self.batch_size = Samples(size, **options), batch_size

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = Shuffled(len(self.samples), self.batch_size, rank, world)
        return DataLoader(self.samples, batch_sampler=sampler, collate_fn=collate)


def make_cfg(**changes: Any) -> RecoverConfig:
    options: dict[str, Any] = {"steps": 6, "lr": 1e-2, "save_every": 1000, "warmup": 0.2, **changes}
    weights = {each.name: options.pop(each.name) for each in fields(WeightsConfig) if each.name in options}
    return RecoverConfig(weights=WeightsConfig(**weights), **options)


@pytest.fixture
def trainer_factory(tmp_path: Path) -> Callable[..., L.Trainer]:
    return make_factory()


def make_factory(extra: tuple[L.Callback, ...] = (), **options: Any) -> Callable[..., L.Trainer]:
    def build(callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(callbacks=[*callbacks, *extra], **{**settings, **options, **kwargs})

    return build
