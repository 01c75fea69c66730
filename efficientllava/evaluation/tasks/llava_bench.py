"""LLaVA-Bench-in-the-Wild (arXiv 2304.08485): 60 open questions on 24 images; a judge compares with GPT-4's answers."""

from ..benchmark import Benchmark
from ..scorers.judged import llava_bench

BENCHMARK = Benchmark(
    dataset="llava-bench-in-the-wild",
    split="train",
    questions=60,
    columns=("question", "gpt_answer", "caption", "category"),
    prompt=lambda row, protocol: row["question"],
    scorer=llava_bench,
    headline=("score",),
    tokens=1024,
    stop={"llava": (), "lmms_eval": ("ASSISTANT:",)},
    verdicts=True,
)
