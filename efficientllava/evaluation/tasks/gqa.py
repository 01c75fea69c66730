"""GQA (arXiv 1902.09506): 12578 compositional questions of testdev; its images are a configuration of their own."""

from ..benchmark import SHORT, Benchmark, Join
from ..scorers.text import gqa

BENCHMARK = Benchmark(
    dataset="GQA",
    config="testdev_balanced_instructions",
    split="testdev",
    questions=12578,
    id="id",
    columns=("question", "answer", "types"),
    join=Join("testdev_balanced_images", key="imageId", id="id"),
    prompt=lambda row, protocol: row["question"] + SHORT,
    scorer=gqa,
    headline=("accuracy",),
    tokens={"llava": 128, "lmms_eval": 16},
)
