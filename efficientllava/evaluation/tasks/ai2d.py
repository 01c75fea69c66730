"""AI2D (arXiv 1603.07396): 3088 multiple-choice questions about diagrams of science books.

LLaVA's scripts do not know it: the prompt is lmms-eval's under both protocols.
"""

from ..benchmark import LETTER, Benchmark, lettered
from ..scorers.choice import ai2d

BENCHMARK = Benchmark(
    dataset="ai2d",
    split="test",
    questions=3088,
    id=None,
    columns=("question", "options", "answer"),
    prompt=lambda row, protocol: f"{row['question']}\n{lettered(row['options'])}{LETTER}",
    scorer=ai2d,
    headline=("accuracy",),
    tokens=16,
)
