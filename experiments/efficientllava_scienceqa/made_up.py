"""Made-up questions in ScienceQA's format, and a small LLaVA that can write the letters of their options.

    python -m experiments.efficientllava_scienceqa.made_up <folder> [images] [questions]

Writes ``model`` (the embedded LLaVA with the letters as new tokens), ``train.json`` with ``images/`` (conversations as
LLaVA is finetuned with) and ``ScienceQA/`` (the test split as published). The questions are those of ``digits_vqa``, of
handwritten digits, as far as they have five answers at most, which are their options.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL.Image import Image as Picture
from tokenizers import AddedToken

from efficientllava.checkpoint.folder import load
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.records import Record, Turn
from efficientllava.evaluation.tasks.published import SCIENCEQA

LETTERS = "ABCDE"
TEST = "ScienceQA/ScienceQA-FULL/test-00000-of-00001.parquet"


def questions(records: list[Record]) -> list[list[dict[str, Any]]]:
    """The turns of every record as rows of ScienceQA; the options are all answers to questions of their kind."""
    answers: dict[str, set[str]] = defaultdict(set)
    for turn in (turn for record in records for turn in record.turns):
        answers[turn.kind].add(turn.answer)
    options = {kind: sorted(found) for kind, found in answers.items() if len(found) <= len(LETTERS)}
    return [[_row(turn, options[turn.kind]) for turn in r.turns if turn.kind in options] for r in records]


def _row(turn: Turn, choices: list[str]) -> dict[str, Any]:
    return {
        "question": turn.question,
        "choices": choices,
        "answer": choices.index(turn.answer),
        "hint": "",
        "subject": "natural science",
        "grade": "grade2",
    }


def write(folder: Path, images: int, count: int) -> None:
    """Write model, training conversations and test split."""
    (folder / "images").mkdir(parents=True)
    (folder / TEST).parent.mkdir(parents=True)
    loaded = load("builtin:tiny_llava")
    loaded.processor.tokenizer.add_tokens([AddedToken(letter, single_word=True) for letter in LETTERS])
    loaded.model.resize_token_embeddings(len(loaded.processor.tokenizer), mean_resizing=False)
    loaded.model.save_pretrained(folder / "model")
    loaded.processor.save_pretrained(folder / "model")
    train = list(Digits("train", images))
    conversations = []
    for index, (record, asked) in enumerate(zip(train, questions(train), strict=True)):
        turns = []
        for place, row in enumerate(asked):
            prompt = ("<image>\n" if record.image is not None and not place else "") + SCIENCEQA.prompt(row, "llava")
            turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": LETTERS[row["answer"]]}]
        conversations.append({"id": str(index), "conversations": turns})
        if isinstance(record.image, Picture):  # digits are in memory
            record.image.save(folder / "images" / f"{index}.png")
            conversations[-1]["image"] = f"{index}.png"
    (folder / "train.json").write_text(json.dumps(conversations), encoding="utf-8")
    test = list(Digits("test", count))
    rows = [{**row, "image": r.image} for r, asked in zip(test, questions(test), strict=True) for row in asked]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(folder / TEST)


if __name__ == "__main__":
    write(Path(sys.argv[1]), *(int(number) for number in (sys.argv[2:] or (2000, 1000))))
