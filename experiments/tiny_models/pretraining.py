"""Train a tiny model from nothing on the embedded data, once, to ship it.

Two stages. First the tower and the projector learn to place each patch near the word embeddings of what it shows
(digit, colour, place). Then the tower is frozen and the decoder learns to answer: Muon on its matrices, AdamW on
the rest.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import NOTHING, Digits
from efficientllava.data.embedded.scenes import COLOURS, PLACES, WORDS
from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.models.forward import answer_loss
from efficientllava.record import commit
from efficientllava.runtime.console import say
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.files import sha256, whole_file
from efficientllava.runtime.store import Entry, Store
from experiments.tiny_models.pretraining_data import PretrainConfig, Scenes, forced_match, painted, quadrants
from experiments.tiny_models.tiny import BUILDERS

STATE = "last.ckpt"
PROVENANCE = "provenance.json"


def initialise(model: nn.Module, seed: int) -> None:
    """Fill a model with weights that keep the scale of activations: 1/sqrt(fan-in), residual outputs scaled by depth.

    Args:
        model: A freshly built tiny model; norms and the tower's class token stay as built, biases become zero.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    deep = math.sqrt(2 * len(decoder_of(model).layers))  # pyright: ignore[reportArgumentType]
    residual = ("o_proj", "down_proj", "self_attn.dense", "fc2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(0, 0.5, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            std = module.weight[0].numel() ** -0.5
            std /= deep if "language_model" in name and name.endswith(residual) else 1
            module.weight.data.normal_(0, std, generator=generator)
            if module.bias is not None:
                module.bias.data.zero_()


def fused_parts(layers: nn.Module) -> list[tuple[nn.Parameter, slice, nn.Parameter]]:
    """The matrices inside fused projections, as parameters of their own on the same storage.

    Muon makes all directions of an update equally large. Applied to a fused matrix, it gives each input direction to
    whichever part has the largest gradient, mostly the values, and queries and keys hardly learn.

    Args:
        layers: The decoder's layers.

    Returns:
        Fused parameter, rows, and the parameter that shares these rows.
    """
    parts = []
    for name, parameter in layers.named_parameters():
        count = 3 if name.endswith("qkv_proj.weight") else 2 if name.endswith("gate_up_proj.weight") else 1
        size = len(parameter) // count
        for start in range(0, len(parameter) if count > 1 else 0, size):
            rows = slice(start, start + size)
            parts.append((parameter, rows, nn.Parameter(parameter.data[rows])))
    return parts


class Pretraining:
    """Both stages of a training, which a killed run takes up where its state was last saved.

    Args:
        config: The recipe.
        model: The freshly initialised model.
        processor: Its processor.
        folder: Where the training state is kept.
    """

    def __init__(self, config: PretrainConfig, model: nn.Module, processor: Any, folder: Path) -> None:
        self.model: Any = model.train()
        self.config, self.processor, self.folder = config, processor, folder
        words = ([*WORDS, NOTHING], list(COLOURS), list(PLACES))
        self.words = [torch.tensor(processor.tokenizer.convert_tokens_to_ids(group)) for group in words]
        self.minival = Digits("minival", 60)
        self.step, self.seconds, self.began = 0, 0.0, time.monotonic()
        self.history: list[dict[str, Any]] = []
        self.parts = fused_parts(decoder_of(model).layers)
        self.optimizers = self._optimizers()
        if (folder / STATE).exists():
            state = torch.load(folder / STATE, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def _optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """AdamW on the tower and projector for stage one; Muon and AdamW on projector and decoder for stage two."""
        tower, lr = list(self.model.model.vision_tower.parameters()), self.config.lr
        matrices = [p for p in decoder_of(self.model).layers.parameters() if p.ndim == 2]
        fused, known = {id(owner) for owner, _, _ in self.parts}, {id(p) for p in [*tower, *matrices]}
        whole = [p for p in matrices if id(p) not in fused] + [part for _, _, part in self.parts]
        rest = [p for p in self.model.parameters() if id(p) not in known]
        optimizers = (
            torch.optim.AdamW([*tower, *projector_of(self.model).parameters()], lr=lr, weight_decay=0.05),
            torch.optim.Muon(whole, lr=self.config.muon_lr),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.01),
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return optimizers

    def run(self) -> None:
        """Train through the steps that are left."""
        self.began = time.monotonic()
        for batch in DataLoader(Scenes(self.config, self.processor, self.step), batch_size=None):
            self.train(batch)
        self.seconds, self.began = self.elapsed(), time.monotonic()
        self.save_state()

    def rate(self) -> float:
        """Learning rate of this step as a share of the peak: linear warm-up, cosine to zero, in each stage."""
        align = self.step < self.config.align_steps
        total = self.config.align_steps if align else self.config.steps
        at = self.step if align else self.step - self.config.align_steps
        return min(1.0, (at + 1) / self.config.warmup) * 0.5 * (1 + math.cos(math.pi * at / total))

    def alignment(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each image token's word scores, and the share of filled quadrants whose digit is right."""
        found = self.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        projected = found if isinstance(found, Tensor) else torch.stack(list(found))
        place = quadrants(projected.shape[1])
        table = self.model.get_input_embeddings().weight.detach()
        score = [projected @ table[ids].T for ids in self.words]
        targets = (batch["digits"][:, place], batch["colours"][:, place], place.expand(len(projected), -1))
        loss = sum(
            nn.functional.cross_entropy(s.flatten(0, 1), t.flatten()) for s, t in zip(score, targets, strict=True)
        )
        votes = torch.stack([score[0][:, place == cell].mean(1) for cell in range(4)], 1).argmax(-1)
        truth = batch["digits"]
        return torch.as_tensor(loss), (votes == truth)[truth < len(WORDS)].float().mean()

    def train(self, batch: dict[str, Any]) -> None:
        """One step of the stage that is due."""
        tower, *others = self.optimizers
        align = self.step < self.config.align_steps
        used = [tower] if align else others
        for optimizer in used:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.rate()
        loss = self.alignment(batch)[0] if align else answer_loss(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for owner, rows, part in self.parts:
            part.grad = None if owner.grad is None else owner.grad[rows]
        for optimizer in used:
            optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None
        self.step += 1
        if self.step % self.config.check_every == 0 or self.step == self.config.align_steps:
            self.check(loss.item())
        if self.step % self.config.save_every == 0:
            self.save_state()

    @torch.no_grad()
    def check(self, loss: float) -> None:
        """Print and keep accuracy on scenes of held-out strokes."""
        self.model.eval()
        row: dict[str, Any] = {"step": self.step, "seconds": round(self.elapsed()), "loss": round(loss, 4)}
        if self.step <= self.config.align_steps:
            batch = painted(Collator(self.processor), Digits("minival", 400), range(400))
            row["digits"] = round(float(self.alignment(batch)[1]), 4)
        else:
            scores = forced_match(self.model, self.processor, self.minival)
            row |= {kind: round(score["accuracy"], 3) for kind, score in scores.items()}
        self.model.train()
        self.history.append(row)
        print(row, flush=True)

    def elapsed(self) -> float:
        """Seconds of training, over all starts."""
        return self.seconds + time.monotonic() - self.began

    def save_state(self) -> None:
        """Write weights, optimisers and progress, whole or not at all."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "step": self.step}
        state |= {"seconds": self.elapsed(), "history": self.history}
        with whole_file(self.folder / STATE) as file:
            torch.save(state, file)


def pretrain(config: PretrainConfig, root: Path) -> Entry:
    """Train a tiny model and leave a half-precision checkpoint folder.

    Args:
        config: The recipe.
        root: Folder of the results of all recipes; a complete one of this recipe is not trained again.

    Returns:
        The checkpoint. Its record has ``test``, the share of that split answered exactly by greedy decoding, see
        `experiments.tiny_models.pretraining_data.forced_match`.

    Raises:
        UserError: If the model's name is unknown.
    """
    if config.name not in BUILDERS:
        raise UserError(f"pretrain.name: {config.name!r} is not one of {', '.join(BUILDERS)}")

    def compute(folder: Path, work: Path) -> dict[str, Any]:
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        model, processor = BUILDERS[config.name]()
        initialise(model, config.seed)
        training = Pretraining(config, model, processor, work)
        training.run()
        return _finish(training, folder)

    return Store(root, together=False).entry(config.name, asdict(config), compute)


def train(folder: Path, **recipe: Any) -> float:
    """What ``experiment=train_<model>`` runs.

    Args:
        folder: The run's folder.
        **recipe: Fields of `PretrainConfig`.

    Returns:
        Accuracy on the test questions, [0, 1].
    """
    try:
        config = PretrainConfig(**recipe)
    except TypeError as error:
        raise UserError(f"pretrain: {error}; see experiments/tiny_models/pretraining_data.py") from error
    entry = pretrain(config, folder)
    score = entry.record["test"]["all"]
    say(f"test accuracy {score['accuracy']:.4f} over {score['n']:.0f} questions: {entry.folder}")
    return score["accuracy"]


def _finish(training: Pretraining, folder: Path) -> dict[str, Any]:
    """Round to half precision, score, and write the checkpoint with its provenance."""
    model, processor, config = training.model, training.processor, training.config
    model.half().float().eval()
    scores = forced_match(model, processor, Digits("test", config.test_questions))
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    provenance = {
        "command": f"python run.py experiment=train_{config.name} seed={config.seed}",
        "commit": commit(),
        "recipe": asdict(config),
        "minutes": round(training.seconds / 60, 1),
        "device": f"{platform.machine()} CPU, {config.threads} thread(s)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": "digits_vqa, scikit-learn load_digits",
        "test": {kind: {"accuracy": round(v["accuracy"], 4), "n": v["n"]} for kind, v in scores.items()},
        "history": training.history,
        "weights": sha256(folder / "model.safetensors"),
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
    return {"test": scores}
