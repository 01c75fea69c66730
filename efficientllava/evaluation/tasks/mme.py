"""MME (arXiv 2306.13394): 2374 yes-or-no questions in 14 categories, two per image."""

from ..benchmark import SHORT, Benchmark
from ..scorers.yesno import mme

BENCHMARK = Benchmark(
    dataset="MME",
    split="test",
    questions=2374,
    columns=("question", "answer", "category"),
    prompt=lambda row, protocol: row["question"].replace(" Please answer yes or no.", "").strip() + SHORT,
    scorer=mme,
    headline=("perception", "cognition"),
    tokens={"llava": 128, "lmms_eval": 16},
)
