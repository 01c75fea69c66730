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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pandas import Series
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import NOTHING, Digits
from efficientllava.data.embedded.scenes import COLOURS, PLACES, WORDS, strokes
from efficientllava.data.records import Record
from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.models.forward import answer_loss, forward_hidden, supervised_positions
from efficientllava.record import commit
from efficientllava.runtime import Entry, Store, UserError, say, sha256, whole_file
from experiments.tiny_models.tiny import BUILDERS, augmented, initialise, painted, quadrants

Scores = dict[str, dict[str, float]]
CHUNK = 32  # records per forward pass
STATE = "last.ckpt"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class PretrainConfig:
    """How to train a tiny model from nothing."""

    name: str  # a key of `experiments.tiny_models.tiny.BUILDERS`
    seed: int = 0  # of the weights and of the scenes
    align_steps: int = 2000  # steps of the first stage (tower and projector), 0 or more
    align_images: int = 64  # images per step of the first stage
    steps: int = 6000  # steps of the second stage (projector and decoder)
    images: int = 16  # images per step of the second stage
    questions: int = 12  # questions per image, a fifth of them text-only
    easy_steps: int = 400  # first steps of the second stage, in which an image holds two digits at most
    # Kinds that every image asks in addition to its draw: those that are learnt last, since they need a digit bound to
    # its colour.
    extra: tuple[str, ...] = ("count_by_colour", "existence_by_colour")
    extra_from: int = 3750  # step of the second stage from which it does
    lr: float = 2e-3  # peak learning rate of AdamW (tower, projector, embeddings, norms, biases, head)
    muon_lr: float = 0.03  # peak learning rate of Muon (matrices of the decoder)
    warmup: int = 100  # steps of linear warm-up in each stage; a cosine to zero follows
    save_every: int = 250  # steps between saved training states; a killed run goes on from the last one
    check_every: int = 500  # steps between checks of accuracy on held-out scenes
    threads: int = 1  # CPU threads
    test_questions: int = 2000  # questions of the final score


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
        config, step = self.config, index + self.start
        align = step < config.align_steps
        easy = not align and step < config.align_steps + config.easy_steps
        images = augmented(strokes("train").images, (config.seed, step))
        extra = config.extra if step >= config.align_steps + config.extra_from else ()
        data = Digits("pretrain", None, config.seed, 2 if easy else 4, config.questions, extra, images)
        size = config.align_images if align else config.images
        # Blocks of indices that no two steps share, whatever the sizes.
        indices = range(step * 4096, step * 4096 + size)
        return painted(self.collate, data, indices) if align else self.collate([data[i] for i in indices])


@torch.no_grad()
def forced_match(model: nn.Module, processor: Any, records: Sequence[Record]) -> Scores:
    """Share of questions that greedy decoding answers exactly, end token included; all and by kind.

    Greedy decoding writes the reference if and only if each of its tokens is the most likely one after those before it,
    so that one teacher-forced pass tells.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        records: Records of independent questions.

    Returns:
        ``{"all": {"accuracy", "n"}, kind: ...}``.
    """
    right: list[bool] = []
    for batch in DataLoader(records, CHUNK, collate_fn=Collator(processor, pack=False)):  # pyright: ignore[reportArgumentType]
        mask, targets = supervised_positions(batch["labels"])
        hits = torch.ones_like(mask)
        hits[mask] = model.lm_head(forward_hidden(model, batch)[mask]).argmax(-1) == targets  # pyright: ignore[reportCallIssue]
        right += hits.all(1).tolist()
    return by_kind([turn.kind for record in records for turn in record.turns], right)


def by_kind(kinds: Sequence[str], right: Sequence[bool]) -> Scores:
    """Accuracy and number of all questions, and of those of each kind.

    Args:
        kinds: Kind of every question.
        right: Whether it was answered exactly.
    """
    hits = Series(right)
    groups = {"all": hits, **dict(iter(hits.groupby([*kinds])))}
    return {str(kind): {"accuracy": float(own.mean()), "n": len(own)} for kind, own in groups.items()}


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
        `forced_match`.

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
        raise UserError(f"pretrain: {error}; see experiments/tiny_models/pretraining.py") from error
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
