"""Teach SmolLM2 to see digits: a projector in closed form, then adapters on all questions of an image at once.

python -m experiments.smol_llava.train --state <folder> --minutes 90 --to efficientllava/assets/smol_llava

A part ends after its minutes, with the learning rate at zero, and writes what is to be committed; the next one goes on
from the state. Every question is a branch behind the image (text-only: behind the system sentence), which sees its own
stem and itself. Half precision is for the frozen weights; what trains is in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from efficientllava.checkpoint.smol import ADAPTER, TOWER, linears, smol
from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import NOTHING, Digits
from efficientllava.data.embedded.scenes import COLOURS, PLACES, WORDS, strokes
from efficientllava.data.prompts import IGNORE
from efficientllava.data.records import Record
from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.models.forward import supervised_positions, vision_features
from efficientllava.pruning.self_text import write_text
from efficientllava.record import commit
from efficientllava.runtime import local, sha256, whole_file
from experiments.tiny_models.pretraining import by_kind
from experiments.tiny_models.tiny import augmented, painted, quadrants

RANK, ROWS, QUESTIONS = 8, 4, 16  # of an adapter; images per step; questions per image
LR, WARMUP, DECAY = 2e-3, 20, 0.3  # peak; steps; share of a part's time in which the rate falls to zero
PROSE, LENGTH, PROSE_ROWS = 24, 128, 1  # sequences that the model writes itself; their tokens; rows per step
FITTED, RIDGE = 3000, 1e-3  # images that the projector is fitted to; times the mean diagonal
STATE = "state.ckpt"


class Adapted(nn.Module):
    """A frozen linear layer and what is added to it.

    Args:
        frozen: The layer, in half precision.
    """

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Parameter(torch.randn(RANK, frozen.in_features) / math.sqrt(frozen.in_features))
        self.b = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """As of a linear layer."""
        return self.frozen(x) + (x @ self.a.T.to(x.dtype)) @ self.b.T.to(x.dtype)


@dataclass
class Row:
    """All questions of an image.

    Attributes:
        ids, labels, positions: One number per token.
        branch: 0 for the system sentence, 1 for the image, -k and k for a text-only question and one that sees it.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    branch: list[int]

    def add(self, ids: Sequence[int], labels: Sequence[int], start: int, branch: int) -> None:
        """Append tokens whose positions start anywhere."""
        self.ids += ids
        self.labels += labels
        self.positions += range(start, start + len(ids))
        self.branch += [branch] * len(ids)


def packed(collate: Collator, record: Record) -> Row:
    """The questions of a record as branches; what no supervised token is predicted from is left out."""
    prompts, row = collate.prompts, Row([], [], [], [])
    seen = [prompts.encode([turn], int(turn.sees_image)) for turn in record.turns]
    pictured = next(ids for (ids, *_), turn in zip(seen, record.turns, strict=True) if turn.sees_image)
    plain = prompts.encode([record.turns[0]], 0)[0]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(pictured, plain, strict=False)))
    at, tokens = pictured.index(prompts.image_token_id), prompts.expansion(record.image, 1, record.id)  # pyright: ignore[reportArgumentType]
    stems = (min(shared, at), at + len(tokens))
    row.add(pictured[: stems[0]], [IGNORE] * stems[0], 0, 0)
    stem = [*pictured[stems[0] : at], *tokens]
    row.add(stem, [IGNORE] * len(stem), stems[0], 1)
    for number, ((ids, labels, *_), turn) in enumerate(zip(seen, record.turns, strict=True), 2):
        last = max(place for place, label in enumerate(labels) if label != IGNORE)
        begin = at + 1 if turn.sees_image else stems[0]
        place = stems[1] if turn.sees_image else stems[0]
        row.add(ids[begin : last + 1], labels[begin : last + 1], place, number if turn.sees_image else -number)
    return row


def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """``ids``, ``labels``, ``positions`` ``(rows, seq)`` and an additive ``mask`` ``(rows, 1, seq, seq)``."""
    fills = {"ids": 0, "labels": IGNORE, "positions": 0, "branch": 1 << 20}
    made = {
        name: nn.utils.rnn.pad_sequence([torch.tensor(getattr(row, name)) for row in rows], True, fill)
        for name, fill in fills.items()
    }
    branch = made.pop("branch")
    query, key = branch.unsqueeze(2), branch.unsqueeze(1)
    allowed = ((query == key) | (key == 0) | ((key == 1) & (query > 1))).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)
    return {**made, "mask": mask.unsqueeze(1)}


@torch.no_grad()
def fit_projector(model: Any, collate: Collator, seed: int) -> float:
    """Least squares, with a ridge, from patch features to the sum of the embeddings of the words that a patch shows.

    The first layer is the features themselves, since gelu(x) - gelu(-x) = x, and random ones.

    Returns:
        Share of the variance of the targets that is explained.
    """
    images = augmented(strokes("train").images, (seed, 0))
    batch = painted(collate, Digits("pretrain", None, seed, images=images), range(FITTED))
    features = vision_features(model, batch["pixel_values"]).flatten(0, 1)
    place = quadrants(len(features) // FITTED)
    table = model.get_input_embeddings().weight

    def embedded(words: Sequence[str]) -> Tensor:
        ids = [collate.prompts.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
        return torch.stack([table[each].mean(0) for each in ids])

    colours = torch.cat([embedded([*COLOURS]), torch.zeros(1, table.shape[1])])  # the last: no colour
    digits = embedded([*WORDS, NOTHING])
    targets = digits[batch["digits"][:, place]] + colours[batch["colours"][:, place].clamp(min=-1)]
    targets = (targets + embedded(PLACES)[place]).flatten(0, 1)
    projector: Any = projector_of(model)
    first, second = projector.linear_1, projector.linear_2
    mean, scale = features.mean(0), 1 / features.std(0)
    wide, whole = features.shape[1], first.out_features
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(whole - 2 * wide, wide, generator=generator) * 2 / math.sqrt(wide)
    weight = torch.cat([torch.eye(wide), -torch.eye(wide), random]) * scale
    first.weight.copy_(weight)
    first.bias.copy_(-weight @ mean)
    first.bias[2 * wide :] += torch.randn(whole - 2 * wide, generator=generator)
    inputs = nn.functional.gelu(first(features))
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, inputs.T @ targets)
    second.weight.copy_(solution[:-1].T)
    second.bias.copy_(solution[-1])
    left = targets - inputs @ solution
    return 1 - float(left.square().sum() / (targets - targets.mean(0)).square().sum())


class Training:
    """The adapters' training, which goes on from the state of the last part.

    Args:
        state: Folder of the state.
        minutes: Of this part.
        seed: Of scenes and adapters.
    """

    def __init__(self, state: Path, minutes: float, seed: int) -> None:
        self.folder, self.minutes, self.seed = state, minutes, seed
        state.mkdir(parents=True, exist_ok=True)
        self.model, processor = smol(local(f"builtin:{TOWER}"))
        self.collate, self.step, self.seconds = Collator(processor), 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.explained = fit_projector(self.model, self.collate, seed)
        self.prose = self._written(processor)
        self.model.requires_grad_(False).bfloat16()
        self.head, self.projector = self.model.lm_head, projector_of(self.model).float().requires_grad_(True)
        self.decoder: Any = decoder_of(self.model)
        with torch.no_grad():
            self.known = torch.cat([self.decoder(ids).last_hidden_state for ids in self.prose.split(16)])
        torch.manual_seed(seed)
        self.adapted = {name: Adapted(linear) for name, linear in linears(self.model).items()}
        for name, module in self.adapted.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.decoder.layers.get_submodule(parent), leaf, module)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
        if (state / STATE).exists():
            saved = torch.load(state / STATE, weights_only=True)
            self.put(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        self.begun, self.first = time.monotonic(), self.step

    def _written(self, processor: Any) -> Tensor:
        """What the untrained model writes, ``(PROSE, LENGTH)``."""
        file = self.folder / "prose.pt"
        if not file.exists():
            batches = write_text(self.model, processor, PROSE, LENGTH, self.seed)
            torch.save(torch.cat([batch["input_ids"] for batch in batches]), file)
        return torch.load(file, weights_only=True)

    def weights(self) -> dict[str, Tensor]:
        """What trains, by the names of `efficientllava.checkpoint.smol.merge`."""
        found = {f"projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        for name, module in self.adapted.items():
            found |= {f"{name}.a": module.a.data, f"{name}.b": module.b.data}
        return found

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Set what trains."""
        for name, tensor in self.weights().items():
            tensor.copy_(weights[name])

    def hidden(self, batch: dict[str, Tensor], pixels: Tensor) -> Tensor:
        """Hidden states ``(rows, seq, width)``."""
        with torch.no_grad():
            features = vision_features(self.model, pixels.bfloat16()).float()
            inputs = self.model.get_input_embeddings()(batch["ids"])
        shown = (batch["ids"] == self.collate.prompts.image_token_id).unsqueeze(-1)
        inputs = inputs.masked_scatter(shown, self.projector(features).to(inputs.dtype))
        found = self.decoder(inputs_embeds=inputs, attention_mask=batch["mask"], position_ids=batch["positions"])
        return found.last_hidden_state

    def answers(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Logits and targets of supervised tokens."""
        batch = batch_of([packed(self.collate, record) for record in records])
        images: list[Any] = [record.image for record in records]
        states = self.hidden(batch, self.collate.prompts.pixels(images)[0]["pixel_values"])
        places, targets = supervised_positions(batch["labels"])
        return self.head(states[places]).float(), targets

    def kept(self) -> Tensor:
        """Divergence from the untrained model on a sequence that it wrote, in nats per token."""
        rows = torch.arange(PROSE_ROWS) + self.step * PROSE_ROWS
        rows %= len(self.prose)
        with torch.no_grad():
            truth = self.head(self.known[rows]).float().log_softmax(-1)
        found = self.head(self.decoder(self.prose[rows]).last_hidden_state).float().log_softmax(-1)
        return (truth.exp() * (truth - found)).sum(-1).mean()

    def scenes(self) -> Iterator[list[Record]]:
        """Fresh scenes of augmented strokes, step by step, without end."""
        while True:
            images = augmented(strokes("train").images, (self.seed, self.step))
            data = Digits("pretrain", None, self.seed, 4, QUESTIONS, (), images)
            yield [data[index] for index in range(self.step * 4096, self.step * 4096 + ROWS)]

    def rate(self) -> float:
        """The learning rate as a share of its peak: a ramp in steps, flat, and a ramp in time."""
        left = 1 - (time.monotonic() - self.begun) / (60 * self.minutes)
        return max(0.0, min(1.0, (self.step - self.first + 1) / WARMUP, left / DECAY))

    def run(self) -> None:
        """Train until the part's time is over."""
        for records in self.scenes():
            if not (rate := self.rate()):
                break
            for group in self.optimizer.param_groups:
                group["lr"] = LR * rate
            logits, targets = self.answers(records)
            loss = nn.functional.cross_entropy(logits, targets)
            drift = self.kept()
            (loss + drift).backward()
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            hits = float((logits.argmax(-1) == targets).float().mean())
            elapsed = time.monotonic() - self.begun
            print(
                f"{self.step} {elapsed:.0f} s: loss {loss.item():.4f}, tokens right {hits:.3f}, "
                f"drift {drift.item():.4f}",
                flush=True,
            )
            if self.step % 50 == 0:
                self.save()
        self.save()

    def elapsed(self) -> float:
        """Seconds of training, over all parts."""
        return self.seconds + time.monotonic() - self.begun

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Questions about held-out strokes answered exactly, by kind."""
        data: Any = Digits("minival", 48)
        right: list[bool] = []
        for records in DataLoader(data, 8, collate_fn=list):
            logits, targets = self.answers(records)
            ends = (targets == self.collate.prompts.tokenizer.eos_token_id).nonzero()[:, 0]
            right += [bool(hits.all()) for hits in (logits.argmax(-1) == targets).tensor_split(ends[:-1] + 1)]
        scores = by_kind([turn.kind for record in data for turn in record.turns], right)
        shares = {kind: round(score["accuracy"], 3) for kind, score in scores.items()}
        whole = round(scores["all"]["accuracy"], 4)
        return {"step": self.step, "seconds": round(self.elapsed()), **shares, "all": whole}

    def save(self) -> None:
        """Check, and write the state, whole or not at all."""
        self.history.append(self.check())
        print(self.history[-1], flush=True)
        state = {"weights": self.weights(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with whole_file(self.folder / STATE) as file:
            torch.save({**state, "seconds": self.elapsed(), "history": self.history}, file)


def main() -> None:
    """One part of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--minutes", type=float, required=True, help="of this part")
    parser.add_argument("--to", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    # Beside other programs a second thread waits more than it works.
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = commit()  # before this command changes what is shipped
    training = Training(args.state, args.minutes, args.seed)
    training.run()
    args.to.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in training.weights().items()}
    save_file(weights, args.to / ADAPTER, {"format": "pt"})
    provenance = {
        "command": "python -m experiments.smol_llava.train --state <folder> --minutes <minutes> --to <folder>",
        "commit": source,
        "recipe": {
            **{"name": "smol_llava", "seed": args.seed, "rank": RANK, "images": ROWS, "questions": QUESTIONS, "lr": LR},
            **{"decay": DECAY, "prose": PROSE, "prose_tokens": LENGTH, "fitted_images": FITTED, "ridge": RIDGE},
        },
        "steps": training.step,
        "explained_by_the_closed_form": round(training.explained, 3),
        "minutes": round(training.elapsed() / 60, 1),
        "device": f"{platform.machine()} CPU, {args.threads} thread(s)",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": "digits_vqa, scikit-learn load_digits; text that the untrained model wrote",
        "history": training.history,
        "weights": sha256(args.to / ADAPTER),
    }
    (args.to / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
