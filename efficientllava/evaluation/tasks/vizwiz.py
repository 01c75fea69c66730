"""VizWiz (arXiv 1802.08218): questions of blind people about their photographs, ten human answers each.

The papers' numbers are those of the test split, which only the official server can score; this is validation.
"""

from ..benchmark import SHORT, Benchmark, Row
from ..scorers.vqa import vizwiz

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _prompt(row: Row, protocol: str) -> str:
    question = row["question"] if protocol == "llava" else row["question"].capitalize()
    return question + UNANSWERABLE + SHORT


BENCHMARK = Benchmark(
    dataset="VizWiz-VQA",
    split="val",
    questions=4319,
    columns=("question", "answers"),
    prompt=_prompt,
    scorer=vizwiz,
    headline=("accuracy",),
    tokens=128,
    stop={"llava": (), "lmms_eval": ("ASSISTANT:",)},
)
