"""Draws of calibration records: questions about digits and pieces of prose, no document in two of them.

    python -m experiments.peers.draws <folder> <prose.json> [...]
    python -m experiments.peers.draws <folder> <prose.json> [...] --train 200

The second one writes ``train.json`` beside them, to recover what was calibrated on the first draw: so many images of
the training split with questions, and as many pieces of documents that are not in that draw.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientllava.data.embedded.digits import Digits
from efficientllava.data.records import open_image

DRAWS, EACH, QUESTIONS = 3, 32, 5  # images, and as many pieces of prose; questions about an image


def read(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Text-only records of LLaVA-style files, by document."""
    documents: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for record in json.loads(file.read_text(encoding="utf-8")):
            documents.setdefault(record["id"].rpartition("/")[0], []).append(record)
    return documents


def prose(documents: Mapping[str, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The records of documents in as many parts as there are draws; a document is in one of them.

    Raises:
        ValueError: A draw does not get enough.
    """
    parts: list[list[dict[str, Any]]] = [[] for _ in range(DRAWS)]
    names = sorted(documents)
    random.Random(0).shuffle(names)
    for name in sorted(names, key=lambda name: len(documents[name]), reverse=True):
        min(parts, key=len).extend(documents[name])
    for number, part in enumerate(parts):
        if len(part) < EACH:
            raise ValueError(f"draw {number} gets {len(part)} pieces of prose, not {EACH}: give more documents")
        random.Random(number).shuffle(part)
    return [part[:EACH] for part in parts]


def questions(digits: Digits, folder: Path) -> list[dict[str, Any]]:
    """Conversations about images, which are put into the folder."""
    found = []
    for record in digits:
        image = open_image(record)
        assert image is not None
        image.save(folder / f"{record.id}.png")
        talk = [
            {"from": speaker, "value": said}
            for turn in record.turns
            for speaker, said in (("human", turn.question), ("gpt", turn.answer))
        ]
        talk[0]["value"] = f"<image>\n{talk[0]['value']}"
        found.append({"id": record.id, "image": f"{record.id}.png", "conversations": talk})
    return found


def others(documents: Mapping[str, list[dict[str, Any]]], draw: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all documents that a draw has nothing of, shuffled."""
    known = {record["id"].rpartition("/")[0] for record in draw}
    left = [record for name in sorted(documents) if name not in known for record in documents[name]]
    random.Random(0).shuffle(left)
    return left


def main() -> None:
    """Write the draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prose", type=Path, nargs="+")
    parser.add_argument("--train", type=int, default=0, help="images in train.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, digits: Digits, pieces: Sequence[dict[str, Any]]) -> None:
        records = [each for pair in zip(questions(digits, given.folder), pieces, strict=True) for each in pair]
        (given.folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")

    documents = read(given.prose)
    parts = prose(documents)
    left = others(documents, parts[0])[: given.train]
    if len(left) < given.train:
        parser.error(
            f"--train {given.train}: beside draw 0 there are {len(left)} pieces of prose; give more, or ask for fewer"
        )
    for number, part in enumerate(parts):
        write(f"draw{number}", Digits("calibration", EACH, 1 + number, questions=QUESTIONS), part)
    if given.train:
        write("train", Digits("train", given.train, questions=QUESTIONS), left)


if __name__ == "__main__":
    main()
