"""MM-Vet (arXiv 2308.02490): 218 open questions that combine capabilities; a judge grades the answers."""

from ..benchmark import Benchmark, Row
from ..scorers.judged import mmvet

REASONING = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)


def _prompt(row: Row, protocol: str) -> str:
    return row["question"] if protocol == "llava" else REASONING + row["question"]


BENCHMARK = Benchmark(
    dataset="MMVet",
    split="test",
    questions=218,
    columns=("question", "answer", "capability"),
    prompt=_prompt,
    scorer=mmvet,
    headline=("score",),
    tokens=1024,
    verdicts=True,
)
