"""Pruned and quantized files beside each other: size, speed and quality, all of it computed in llama.cpp.

    python -m experiments.edge <rows.csv> --work <folder> dense=builtin:smol_llava uniform_20=<checkpoint> ...

A row per model and type, written at once; what a row has is not made again, so that ``--only quality`` can run beside
other programs, and ``--only cost`` once the machine is quiet. Every model is timed in turn with the dense one of its
type. Questions are those of ``digits_vqa``, texts those of ``prose``: loss and divergence from the dense model
in float32 come from the final states of all positions, which the runtime gives, and the head as the file holds it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator, prompt
from efficientllava.data.embedded.prose import TEXTS, shipped
from efficientllava.data.prompts import Prompts
from efficientllava.data.records import Record, open_image
from efficientllava.deploy.check import BOUNDS, rendered
from efficientllava.deploy.export import write
from efficientllava.deploy.runtime import Runtime, serve, speeds
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.models.forward import supervised_positions
from efficientllava.runtime import quiet_libraries, whole_file
from efficientllava.settings.schema import DeployConfig
from experiments.rows import add, read

DENSE, DENSE_TYPES, TYPES = "dense", ["f16", "q8_0", "q4_1", "q4_0"], ["f16", "q8_0", "q4_0"]
QUESTIONS, ANSWER, PIECES, CONTEXT, REPEATS = 300, 8, 30, 1024, 9
SPEEDS = ("prefill", "decode")  # tokens per second of CPU
PARTS = {
    "cost": [
        *("bytes", "bytes_per_token", "flops_per_token", "load_seconds"),
        *(f"{side}_{name}" for name in SPEEDS for side in ("dense", "own", "ideal", "share")),
    ],
    "quality": ["digits", "kl", "perplexity", *(f"perplexity_{name}" for name in TEXTS)],
}


@torch.no_grad()
def reference(dense: Any) -> Iterator[tuple[str, list[int], Tensor, Tensor, Tensor]]:
    """Pieces of prose with what the dense model says of them, in float32.

    Yields:
        Text, token ids, at which of them the next token counts, these tokens, and log-probabilities of all.
    """
    collate = Collator(dense.processor)
    for record in shipped()[:PIECES]:
        batch = collate([record])
        places, targets = supervised_positions(batch["labels"])
        truth = dense.model(input_ids=batch["input_ids"]).logits[places].log_softmax(-1)
        yield record.turns[0].kind, batch["input_ids"][0].tolist(), places[0], targets, truth


def _tensors(file: Path) -> tuple[Any, list[Any]]:
    """The head of a file and what lies in its layers, as they are stored."""
    import gguf

    named = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    layers = [tensor for name, tensor in named.items() if name.startswith("blk.")]
    return named.get("output.weight", named["token_embd.weight"]), layers


def head_of(file: Path) -> Tensor:
    """The head as the file holds it, ``(vocabulary, width)`` in float32."""
    import gguf

    head, _ = _tensors(file)
    return torch.from_numpy(np.array(gguf.dequantize(head.data, head.tensor_type), np.float32))


def work_of(file: Path) -> tuple[int, int]:
    """What one token costs: bytes that are read, and operations of the layers."""
    head, layers = _tensors(file)
    read = sum(int(tensor.n_bytes) for tensor in (head, *layers))
    return read, sum(2 * int(tensor.n_elements) for tensor in layers if len(tensor.shape) == 2)


def prose(file: Path, exact: bool, dense: Any) -> dict[str, float]:
    """Perplexity of all texts and of each, and the divergence from the dense model in nats per token."""
    losses: dict[str, list[Tensor]] = {name: [] for name in TEXTS}
    divergences, head = [], head_of(file)
    with serve(file, context=CONTEXT, embeddings=True, exact=exact) as runtime:
        for text, ids, places, targets, truth in reference(dense):
            states = torch.tensor(runtime.ask("embedding", content=ids)[0]["embedding"])
            found = (states[places] @ head.T).log_softmax(-1)
            losses[text].append(-found.gather(1, targets.unsqueeze(1)).squeeze(1))
            divergences.append((truth.exp() * (truth - found)).sum(-1))
    every = torch.cat([loss for each in losses.values() for loss in each])
    named = {f"perplexity_{name}": math.exp(torch.cat(each).mean()) for name, each in losses.items()}
    return {"kl": float(torch.cat(divergences).mean()), "perplexity": math.exp(every.mean()), **named}


def digits(file: Path, mmproj: Path, processor: Any) -> float:
    """Accuracy of greedy answers."""
    task = digits_vqa(QUESTIONS)
    with serve(file, mmproj, context=CONTEXT) as runtime:
        rows = [
            {
                "id": record.id,
                "kind": turn.kind,
                "answer": turn.answer,
                "prediction": answer(runtime, processor, record),
            }
            for record in task.records()
            for turn in record.turns
        ]
    return task.score(rows).metrics["accuracy"]


def answer(runtime: Runtime, processor: Any, record: Record) -> str:
    """What the runtime answers to the one question of a record."""
    (turn,), image = record.turns, open_image(record)
    prompts = Prompts(processor)
    ids = prompt(processor, turn.question)["input_ids"][0].tolist()
    text = ids if image is None else rendered(prompts, turn.question, 1)
    asked = runtime.prompt(text, image, prompts.image_token)
    return runtime.complete(asked, tokens=ANSWER)["content"]


def exported(checkpoint: Any, folder: Path, types: list[str]) -> tuple[dict[str, Path], Path]:
    """Files of a checkpoint by type, and its image side."""
    folder.mkdir(parents=True, exist_ok=True)
    made = write(checkpoint, folder, DeployConfig("gguf", types))
    return {kind: folder / entry["file"] for kind, entry in made["files"].items()}, folder / made["mmproj"]["file"]


def cost(file: Path, dense: Path) -> dict[str, Any]:
    """Size and speed of a file, beside the dense one of its type."""
    (read, flops), (dense_read, dense_flops) = work_of(file), work_of(dense)
    ideal = {"prefill": dense_flops / flops, "decode": dense_read / read}
    timed = speeds({"dense": dense, "own": file}, CONTEXT, REPEATS)
    found: dict[str, Any] = {
        "bytes": file.stat().st_size,
        "bytes_per_token": read,
        "flops_per_token": flops,
        "load_seconds": timed["own"]["load_seconds"],
    }
    for name in SPEEDS:
        plain, own = timed["dense"][name], timed["own"][name]
        sides = {"dense": plain, "own": own, "ideal": ideal[name], "share": own / plain / ideal[name]}
        found |= {f"{side}_{name}": value for side, value in sides.items()}
    return found


def quality(kind: str, file: Path, mmproj: Path, dense: Any, processor: Any) -> dict[str, float]:
    """What a file of a type answers."""
    return {"digits": digits(file, mmproj, processor), **prose(file, kind in BOUNDS, dense)}


def _lacks(row: dict[str, Any], only: str | None) -> list[str]:
    """Parts that a row is to get."""
    return [part for part in ([only] if only else PARTS) if not row.get(PARTS[part][0])]


def main() -> None:
    """Make the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("models", nargs="+", metavar="name=checkpoint", help="the dense one first")
    parser.add_argument("--work", type=Path, required=True, help="folder of the files")
    parser.add_argument("--only", choices=PARTS, help="make this part of the rows; all of it without")
    given = parser.parse_args()
    quiet_libraries()
    rows: dict[tuple[str, str], dict[str, Any]] = {(row["model"], row["type"]): row for row in read(given.rows)}
    plain = load(given.models[0].partition("=")[2], "float32")
    dense = exported(plain, given.work / DENSE, DENSE_TYPES)
    for name, _, path in (model.partition("=") for model in given.models):
        wanted = {
            kind: _lacks(rows.get((name, kind), {}), given.only) for kind in (DENSE_TYPES if name == DENSE else TYPES)
        }
        if not any(wanted.values()):
            continue
        checkpoint = plain if name == DENSE else load(path, "float32")
        files, mmproj = dense if name == DENSE else exported(checkpoint, given.work / name, [*wanted])
        for kind, parts in wanted.items():
            made: dict[str, Any] = {}
            if "cost" in parts:
                made |= cost(files[kind], dense[0][kind])
            if "quality" in parts:
                made |= quality(kind, files[kind], mmproj, plain, checkpoint.processor)
            shown = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in made.items()}
            rows[name, kind] = {**rows.get((name, kind), {}), "model": name, "type": kind, **shown}
            with whole_file(given.rows) as file:
                add(file, [*rows.values()], ["model", "type", *chain(*PARTS.values())])
            print(name, kind, shown, flush=True)


if __name__ == "__main__":
    main()
