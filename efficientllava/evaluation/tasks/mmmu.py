"""MMMU (arXiv 2311.16502): 900 questions of college exams, 30 subjects.

``llava`` is the prompt of MMMU's own script for LLaVA-1.5 (its line breaks as the YAML reader leaves them), which has
questions whose options hold several images answered at random, as the scorer does with empty answers, and shows the
first image only. ``lmms_eval`` differs in the form of the options, and shows all images.
"""

import re

from ..benchmark import (
    LETTER,
    SHORT,
    Benchmark,
    Row,
    lettered,
)
from ..scorers import sequence
from ..scorers.choice import mmmu


def _prompt(row: Row, protocol: str) -> str:
    gap = "" if protocol == "llava" else "\n"
    if row["question_type"] != "multiple-choice":
        return row["question"] + gap + SHORT
    options = lettered(sequence(row, "options"), "({}) {}" if protocol == "llava" else "{}. {}")
    return f"{row['question']}\n{options}\n{LETTER}"


def _skip(row: Row, protocol: str) -> bool:
    images = re.findall(r"<image \d>", " ".join(map(str, sequence(row, "options"))))
    return protocol == "llava" and len(images) > 1


BENCHMARK = Benchmark(
    dataset="MMMU",
    split="validation",
    questions=900,
    id="id",
    image="image_1",
    more_images={"llava": (), "lmms_eval": tuple(f"image_{number}" for number in range(2, 8))},
    columns=("question", "options", "answer", "question_type"),
    prompt=_prompt,
    scorer=mmmu,
    headline=("accuracy", "accuracy_strict"),
    tokens=128,
    skip=_skip,
)
