"""Train a tiny model from nothing on the embedded data, once, to ship it.

Two stages. First the tower and the projector learn to place each patch near the word embeddings of what it shows
(digit, colour, place). Then the tower is frozen and the decoder learns to answer: Muon on its matrices, AdamW on
the rest.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.collator import Collator, GenerationCollator
from ..data.conversations import Record
from ..data.digits import Digits
from ..data.questions import NOTHING
from ..data.scenes import COLOURS, FULL, PLACES, WORDS, Scene, strokes
from ..errors import UserError
from .anatomy import decoder_of, projector_of
from .forward import answer_loss, forward_hidden, supervised_positions
from .tiny import BUILDERS

STATE = "training.pt"


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a tiny model from nothing.

    Attributes:
        name: A key of `efficientllava.models.tiny.BUILDERS`.
        seed: Seed of the weights and of the scenes.
        align_steps: Steps of the first stage (tower and projector), 0 or more.
        align_images: Images per step of the first stage.
        steps: Steps of the second stage (projector and decoder).
        images: Images per step of the second stage.
        questions: Questions per image, a fifth of them text-only.
        easy_steps: First steps of the second stage, in which an image holds two digits at most.
        lr: Peak learning rate of AdamW (tower, projector, embeddings, norms, biases, head).
        muon_lr: Peak learning rate of Muon (matrices of the decoder).
        warmup: Steps of linear warm-up in each stage; a cosine to zero follows.
        save_every: Steps between saved training states; a killed run goes on from the last one.
        check_every: Steps between checks of accuracy on held-out scenes.
        threads: CPU threads.
    """

    name: str
    seed: int = 0
    align_steps: int = 1500
    align_images: int = 64
    steps: int = 7000
    images: int = 16
    questions: int = 12
    easy_steps: int = 400
    lr: float = 2e-3
    muon_lr: float = 0.03
    warmup: int = 100
    save_every: int = 250
    check_every: int = 500
    threads: int = 1


def initialise(model: nn.Module, seed: int) -> None:
    """Fill a model with weights that keep the scale of activations: 1/sqrt(fan-in), residual outputs scaled by depth.

    Args:
        model: A freshly built tiny model; norms keep their ones, biases become zero.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = len(decoder_of(model).layers)  # pyright: ignore[reportArgumentType]
    residual = ("o_proj", "down_proj", "self_attn.dense", "fc2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            if "language_model" in name and name.endswith(residual):
                std /= math.sqrt(2 * depth)
            module.weight.data.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()


def augmented(images: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Digit images after small random rotations, scalings, shears and shifts.

    Args:
        images: ``(count, size, size)``, 0..``FULL``.
        seed: Seed of this version.

    Returns:
        An int64 array of the same shape.
    """
    rng = np.random.default_rng(list(seed))
    count = len(images)
    angle, shear = rng.uniform(-0.22, 0.22, count), rng.uniform(-0.2, 0.2, count)
    scale, shift = rng.uniform(0.9, 1.12, (2, count)), rng.uniform(-0.12, 0.12, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    affine = np.stack(
        [cos / scale[0], (shear - sin) / scale[0], shift[0], sin / scale[1], cos / scale[1], shift[1]], axis=1
    ).reshape(count, 2, 3)
    source = torch.from_numpy(images / FULL).float().unsqueeze(1)
    grid = nn.functional.affine_grid(torch.from_numpy(affine).float(), list(source.shape), align_corners=False)
    warped = nn.functional.grid_sample(source, grid, align_corners=False).squeeze(1)
    return (warped.clamp(0, 1) * FULL).round().long().numpy()


def scene_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What each quadrant shows: ``digits`` (10: nothing) and ``colours`` (-100: none), ``(scenes, 4)``."""
    digits = torch.full((len(scenes), 4), len(WORDS))
    colours = torch.full((len(scenes), 4), -100)
    for row, scene in enumerate(scenes):
        for glyph in scene:
            digits[row, glyph.place] = glyph.digit
            colours[row, glyph.place] = list(COLOURS).index(glyph.colour)
    return {"digits": digits, "colours": colours}


def quadrants(tokens: int) -> Tensor:
    """Index of the quadrant that each of ``tokens`` image tokens (a square grid, row by row) lies in."""
    side = math.isqrt(tokens)
    half = torch.arange(side) * 2 // side
    return (half[:, None] * 2 + half[None, :]).flatten()


class Scenes(Dataset[Any]):
    """One item per training step: scenes with their pixels in the first stage, a collated batch in the second.

    Args:
        config: The recipe.
        processor: The model's processor.
        start: First step.
    """

    def __init__(self, config: PretrainConfig, processor: Any, start: int) -> None:
        self.config, self.start = config, start
        self.collate = Collator(processor)

    def __len__(self) -> int:
        return self.config.align_steps + self.config.steps - self.start

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        config, step = self.config, index + self.start
        align = step < config.align_steps
        easy = not align and step < config.align_steps + config.easy_steps
        images = augmented(strokes("train").images, (config.seed, step))
        data = Digits("pretrain", None, config.seed, 2 if easy else 4, config.questions, images)
        size = config.align_images if align else config.images
        # Blocks of indices that no two steps share, whatever the sizes.
        indices = range(step * 4096, step * 4096 + size)
        records = [data[i] for i in indices]
        if not align:
            return self.collate(records)
        pixels, _ = self.collate.prompts.pixels([record.image for record in records if record.image is not None])  # pyright: ignore[reportArgumentType]
        return {"pixel_values": pixels, **scene_targets([data.scene(i) for i in indices])}


class PretrainModule(lightning.LightningModule):
    """Both stages, with optimisers driven by hand.

    Args:
        config: The recipe.
        model: The freshly initialised model.
        processor: Its processor.
        folder: Where the training state is kept.
    """

    def __init__(self, config: PretrainConfig, model: nn.Module, processor: Any, folder: Path) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.model, self.processor, self.folder = config, model, processor, folder
        words = ([*WORDS, NOTHING], list(COLOURS), list(PLACES))
        self.words = [torch.tensor(processor.tokenizer.convert_tokens_to_ids(group)) for group in words]
        self.step = 0
        self.seconds = 0.0
        self.began = time.monotonic()
        self.history: list[dict[str, Any]] = []
        minival = Digits("minival", 60)
        self.minival = [minival[i] for i in range(len(minival))]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """AdamW on the tower and projector for stage one; Muon and AdamW on projector and decoder for stage two."""
        model, config = self.model, self.config
        tower = [*model.model.vision_tower.parameters(), *projector_of(model).parameters()]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        layers = list(decoder_of(model).layers.parameters())  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        matrices = [p for p in layers if p.ndim == 2]
        known = {id(p) for p in [*model.model.vision_tower.parameters(), *matrices]}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        rest = [p for p in model.parameters() if id(p) not in known]
        return [
            torch.optim.AdamW(tower, lr=config.lr, weight_decay=0.05),
            torch.optim.Muon(matrices, lr=config.muon_lr),
            torch.optim.AdamW(rest, lr=config.lr, weight_decay=0.01),
        ]

    def rate(self) -> float:
        """Learning rate of this step as a share of the peak: linear warm-up, cosine to zero, in each stage."""
        align = self.step < self.config.align_steps
        total = self.config.align_steps if align else self.config.steps
        at = self.step if align else self.step - self.config.align_steps
        return min(1.0, (at + 1) / self.config.warmup) * 0.5 * (1 + math.cos(math.pi * at / total))

    def alignment(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each image token's word scores, and the share of filled quadrants whose digit is right."""
        found = self.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output  # pyright: ignore[reportCallIssue]
        projected = found if isinstance(found, Tensor) else torch.stack(list(found))
        place = quadrants(projected.shape[1])
        table = self.model.get_input_embeddings().weight.detach()  # pyright: ignore[reportCallIssue]
        score = [projected @ table[ids].T for ids in self.words]
        targets = (batch["digits"][:, place], batch["colours"][:, place], place.expand(len(projected), -1))
        loss = sum(
            nn.functional.cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in zip(score, targets, strict=True)
        )
        votes = torch.stack([score[0][:, place == cell].mean(1) for cell in range(4)], 1).argmax(-1)
        truth = batch["digits"]
        return torch.as_tensor(loss), (votes == truth)[truth < len(WORDS)].float().mean()

    def training_step(self, batch: dict[str, Any], _index: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the stage that is due."""
        tower, muon, adam = self.optimizers()  # pyright: ignore[reportGeneralTypeIssues]
        align = self.step < self.config.align_steps
        used = (tower,) if align else (muon, adam)
        for optimizer in used:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate()
        loss = self.alignment(batch)[0] if align else answer_loss(self.model, batch)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in used:
            optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.step += 1
        self.log("loss", loss.detach(), prog_bar=True)
        if self.step % self.config.check_every == 0 or self.step == self.config.align_steps:
            self.check(float(loss))
        if self.step % self.config.save_every == 0:
            self.save_state()

    @torch.no_grad()
    def check(self, loss: float) -> None:
        """Print and keep accuracy on scenes of held-out strokes."""
        self.model.eval()
        row: dict[str, Any] = {"step": self.step, "seconds": round(self.elapsed()), "loss": round(loss, 4)}
        if self.step <= self.config.align_steps:
            data = Digits("minival", 400)
            pixels, _ = Collator(self.processor).prompts.pixels([record.image for record in data])  # pyright: ignore[reportArgumentType]
            batch = {"pixel_values": pixels, **scene_targets([data.scene(i) for i in range(len(data))])}
            row["digits"] = round(float(self.alignment(batch)[1]), 4)
        else:
            row |= {
                k: round(v["accuracy"], 3) for k, v in forced_match(self.model, self.processor, self.minival).items()
            }
        self.model.train()
        self.history.append(row)
        print(row, flush=True)

    def elapsed(self) -> float:
        """Seconds of training, over all starts."""
        return self.seconds + time.monotonic() - self.began

    def save_state(self) -> None:
        """Write weights, optimisers and progress, whole or not at all."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers()]  # pyright: ignore[reportGeneralTypeIssues]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}
        state |= {"seconds": self.elapsed(), "history": self.history, "config": asdict(self.config)}
        torch.save(state, self.folder / f"{STATE}.part")
        os.replace(self.folder / f"{STATE}.part", self.folder / STATE)

    def on_train_start(self) -> None:
        """Set the peak rates, and go on from a saved state where there is one."""
        optimizers: list[Any] = list(self.optimizers())  # pyright: ignore[reportArgumentType]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        if (self.folder / STATE).exists():
            state = torch.load(self.folder / STATE, weights_only=True)
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.model.train()
        self.began = time.monotonic()


def _score(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted(set(kinds))):
        hits = [hit for name, hit in zip(kinds, right, strict=True) if kind in ("all", name)]
        scores[kind] = {"accuracy": sum(hits) / len(hits), "n": len(hits)}
    return scores


def _chunks(records: Sequence[Record], size: int) -> Iterator[list[Record]]:
    for start in range(0, len(records), size):
        yield [records[i] for i in range(start, min(start + size, len(records)))]


@torch.no_grad()
def forced_match(model: nn.Module, processor: Any, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Share of questions whose answer is the most likely continuation, token by token; all and by kind.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    collate = Collator(processor, pack=False)
    right: list[bool] = []
    for chunk in _chunks(records, 32):
        batch = collate(chunk)
        mask, targets = supervised_positions(batch["labels"])
        hits = torch.ones_like(mask)
        hits[mask] = model.lm_head(forward_hidden(model, batch)[mask]).argmax(-1) == targets  # pyright: ignore[reportCallIssue]
        right += hits.all(1).tolist()
    return _score([turn.kind for record in records for turn in record.turns], right)


@torch.no_grad()
def exact_match(
    model: nn.Module, processor: Any, records: Sequence[Record], batch_size: int = 100
) -> dict[str, dict[str, float]]:
    """Share of questions whose generated text equals the answer; all and by kind.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.
        batch_size: Records per call of ``generate``.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    collate = GenerationCollator(processor)
    kinds: list[str] = []
    right: list[bool] = []
    for chunk in _chunks(records, batch_size):
        batch = collate(chunk)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # pyright: ignore[reportCallIssue]
        texts = processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [text.strip() == answer for text, answer in zip(texts, batch["answers"], strict=True)]
        kinds += batch["kinds"]
    return _score(kinds, right)


def pretrain(config: PretrainConfig, out_dir: str | Path) -> dict[str, dict[str, float]]:
    """Train a tiny model and leave a half-precision checkpoint folder.

    Args:
        config: The recipe.
        out_dir: Folder of the checkpoint; the training state lies beside its files until the run is complete.

    Returns:
        Exact match of generated text on ``test``, ``{"all": {"accuracy", "n"}, kind: ...}``.

    Raises:
        UserError: If the model's name is unknown or the folder holds the state of another recipe.
    """
    if config.name not in BUILDERS:
        raise UserError(f"pretrain.name: {config.name!r} is not one of {', '.join(BUILDERS)}")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    model, processor = BUILDERS[config.name]()
    initialise(model, config.seed)
    module = PretrainModule(config, model, processor, folder)
    if (folder / STATE).exists():
        _resume(module, folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    steps = Scenes(config, processor, module.step)
    if len(steps):
        trainer.fit(module, DataLoader(steps, batch_size=None))
        module.seconds = module.elapsed()
        module.save_state()
    return _finish(module, folder)


def _resume(module: PretrainModule, folder: Path) -> None:
    state = torch.load(folder / STATE, weights_only=True)
    if state["config"] != asdict(module.config):
        raise UserError(
            f"{folder}: holds the training state of another recipe; choose another folder or remove {STATE}"
        )
    module.model.load_state_dict(state["model"])
    module.step, module.seconds, module.history = state["step"], state["seconds"], state["history"]


def _finish(module: PretrainModule, folder: Path) -> dict[str, dict[str, float]]:
    """Round to half precision, score, and write the checkpoint with its provenance."""
    model, processor, config = module.model, module.processor, module.config
    model.half().float().eval()
    scores = exact_match(model, processor, Digits("test"))
    model.half().save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    processor.save_pretrained(folder)
    provenance = {
        "command": f"python run.py experiment=train_{config.name} seed={config.seed}",
        "commit": _commit(),
        "recipe": asdict(config),
        "minutes": round(module.seconds / 60, 1),
        "device": f"{platform.machine()} CPU, {config.threads} thread(s)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": "digits_vqa, scikit-learn load_digits",
        "test": {kind: {"accuracy": round(v["accuracy"], 4), "n": v["n"]} for kind, v in scores.items()},
        "history": module.history,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
    return scores


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
