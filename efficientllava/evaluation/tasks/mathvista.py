"""MathVista (arXiv 2310.02255): 1000 questions of mathematics in pictures (testmini).

``llava`` asks with the data set's own ``query``, whose hint wants the answer at the end of a response; ``lmms_eval``
with its "format" prompt, which wants nothing else. A judge extracts the answers that no rule finds. lmms-eval lets a
model write 16384 tokens, which for these models means one that has lost its end: it is stopped sooner here.
"""

from ..benchmark import (
    LETTER,
    Benchmark,
    Row,
    lettered,
)
from ..scorers.text import mathvista

WANTED = {
    ("integer", 0): "a single integer number.",
    ("float", 1): "a single floating-point number with one decimal place.",
    ("float", 2): "a single floating-point number with two decimal places.",
    ("list", 0): "a Python list.",
}


def _prompt(row: Row, protocol: str) -> str:
    if protocol == "llava":
        return row["query"]
    question = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
    if row["question_type"] == "multi_choice":
        return f"{question}\n{lettered(row['choices'])}{LETTER}"
    places = int(row["precision"] or 0) if row["answer_type"] == "float" else 0
    form = WANTED.get((row["answer_type"], places))
    return f"{question}\nAnswer the question using {form}" if form else question


BENCHMARK = Benchmark(
    dataset="AI4Math/MathVista",
    split="testmini",
    questions=1000,
    id="pid",
    image="decoded_image",
    columns=("question", "query", "choices", "unit", "precision", "question_type", "answer_type", "answer"),
    prompt=_prompt,
    scorer=mathvista,
    headline=("accuracy",),
    tokens=1024,
)
