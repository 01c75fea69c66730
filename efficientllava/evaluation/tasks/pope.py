"""POPE (arXiv 2305.10355): is an object there? 9000 questions on 500 images, in three ways of choosing the absent ones.

LLaVA's copy of the questions is older: 2910 instead of 3000 with random objects, 102 questions without corrections.
"""

from ..benchmark import SHORT, Benchmark
from ..scorers.yesno import pope

BENCHMARK = Benchmark(
    dataset="POPE",
    split="test",
    questions=9000,
    columns=("question", "answer", "category"),
    prompt=lambda row, protocol: row["question"].strip() + SHORT,
    scorer=pope,
    headline=("f1", "accuracy"),
    tokens=128,
)
