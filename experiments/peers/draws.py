"""Draws of calibration records: questions about digits and pieces of prose, no document in two of them.

python -m experiments.peers.draws <folder> <prose.json> [...]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientllava.data.embedded.digits import Digits
from efficientllava.data.records import open_image

DRAWS, EACH, QUESTIONS = 3, 32, 5  # images, and as many pieces of prose; questions about an image


def prose(files: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """Text-only records of LLaVA-style files, in as many parts as there are draws; a document is in one of them.

    Raises:
        ValueError: A draw does not get enough.
    """
    documents: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for record in json.loads(file.read_text(encoding="utf-8")):
            documents.setdefault(record["id"].rpartition("/")[0], []).append(record)
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


def questions(number: int, folder: Path) -> list[dict[str, Any]]:
    """Conversations about the images of a draw, which are put into the folder."""
    found = []
    for record in Digits("calibration", EACH, 1 + number, questions=QUESTIONS):
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


def main() -> None:
    """Write the draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prose", type=Path, nargs="+")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(prose(given.prose)):
        pairs = zip(questions(number, given.folder), part, strict=True)
        records = [record for pair in pairs for record in pair]
        (given.folder / f"draw{number}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
