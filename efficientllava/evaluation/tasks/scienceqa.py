"""ScienceQA (arXiv 2209.09513): 4241 multiple-choice questions of school science, 2017 of them with an image."""

from ..benchmark import (
    LETTER,
    Benchmark,
    Row,
    lettered,
)
from ..scorers.choice import scienceqa


def _prompt(row: Row, protocol: str) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{lettered(row['choices'])}{LETTER}"


BENCHMARK = Benchmark(
    dataset="ScienceQA",
    config="ScienceQA-FULL",
    split="test",
    questions=4241,
    id=None,
    columns=("question", "choices", "answer", "hint", "subject", "grade"),
    prompt=_prompt,
    scorer=scienceqa,
    headline=("accuracy", "accuracy/IMG"),
    tokens={"llava": 1024, "lmms_eval": 16},
)
