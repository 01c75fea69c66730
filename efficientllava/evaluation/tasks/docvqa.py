"""DocVQA (arXiv 2007.00398): questions about scanned documents; the validation split, since test has no answers.

LLaVA's scripts do not know it: both protocols are lmms-eval's, but for the length that LLaVA's allow short answers.
"""

from ..benchmark import SHORT, Benchmark
from ..scorers.text import docvqa

BENCHMARK = Benchmark(
    dataset="DocVQA",
    config="DocVQA",
    split="validation",
    questions=5349,
    id="questionId",
    columns=("question", "answers"),
    prompt=lambda row, protocol: row["question"] + SHORT,
    scorer=docvqa,
    headline=("anls",),
    tokens={"llava": 128, "lmms_eval": 32},
)
