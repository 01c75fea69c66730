"""The published benchmarks, a row each, and the study's one number for nine of them.

Where a prompt depends on the protocol, ``llava`` is that of the papers' scripts and ``lmms_eval`` the leaderboard's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ...runtime import UserError
from ..scorers.choice import ai2d, mme, mmmu, pope, scienceqa
from ..scorers.text import docvqa, gqa, llava_bench, mathvista, mmvet, vizwiz
from . import LETTER, SHORT, Benchmark, Join, Row, lettered, mean, sequence

REASONING = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
# What MathVista wants, by type of the answer and its decimal places.
WANTED = {
    ("integer", 0): "a single integer number.",
    ("float", 1): "a single floating-point number with one decimal place.",
    ("float", 2): "a single floating-point number with two decimal places.",
    ("list", 0): "a Python list.",
}


def _short(row: Row, _protocol: str) -> str:
    return row["question"] + SHORT


def _choices(row: Row, _protocol: str) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{lettered(row['choices'])}{LETTER}"


def _photograph(row: Row, protocol: str) -> str:
    question = row["question"] if protocol == "llava" else row["question"].capitalize()
    return question + UNANSWERABLE + SHORT


def _mathvista(row: Row, protocol: str) -> str:
    """The data set's ``query``, whose hint wants the answer at the end; or lmms-eval's, which wants nothing else."""
    if protocol == "llava":
        return row["query"]
    question = row["question"] + (f" (Unit: {row['unit']})" if row["unit"] else "")
    if row["question_type"] == "multi_choice":
        return f"{question}\n{lettered(row['choices'])}{LETTER}"
    places = int(row["precision"] or 0) if row["answer_type"] == "float" else 0
    form = WANTED.get((row["answer_type"], places))
    return f"{question}\nAnswer the question using {form}" if form else question


def _mmmu(row: Row, protocol: str) -> str:
    """The prompt of MMMU's script for LLaVA-1.5, its line breaks as the YAML reader leaves them; or lmms-eval's."""
    gap = "" if protocol == "llava" else "\n"
    if row["question_type"] != "multiple-choice":
        return row["question"] + gap + SHORT
    options = lettered(sequence(row, "options"), "({}) {}" if protocol == "llava" else "{}. {}")
    return f"{row['question']}\n{options}\n{LETTER}"


def _several_images(row: Row, protocol: str) -> bool:
    """Options with several images: MMMU's script has them answered at random, as the scorer does with empty answers."""
    images = re.findall(r"<image \d>", " ".join(map(str, sequence(row, "options"))))
    return protocol == "llava" and len(images) > 1


SCIENCEQA = Benchmark(
    dataset="ScienceQA",
    config="ScienceQA-FULL",
    split="test",
    questions=4241,
    id=None,
    columns=("question", "choices", "answer", "hint", "subject", "grade"),
    prompt=_choices,
    scorer=scienceqa,
    headline=("accuracy", "accuracy/IMG"),
    tokens={"llava": 1024, "lmms_eval": 16},
)

BENCHMARKS: dict[str, Benchmark] = {
    # arXiv 1603.07396: diagrams of science books. LLaVA's scripts do not know it: the prompt is lmms-eval's under both.
    "ai2d": Benchmark(
        dataset="ai2d",
        split="test",
        questions=3088,
        id=None,
        columns=("question", "options", "answer"),
        prompt=lambda row, protocol: f"{row['question']}\n{lettered(row['options'])}{LETTER}",
        scorer=ai2d,
        headline=("accuracy",),
        tokens=16,
    ),
    # arXiv 2007.00398: scanned documents; the validation split, since test has no answers. LLaVA's scripts do not know
    # it: both protocols are lmms-eval's, but for the length that LLaVA's allow short answers.
    "docvqa": Benchmark(
        dataset="DocVQA",
        config="DocVQA",
        split="validation",
        questions=5349,
        id="questionId",
        columns=("question", "answers"),
        prompt=_short,
        scorer=docvqa,
        headline=("anls",),
        tokens={"llava": 128, "lmms_eval": 32},
    ),
    # arXiv 1902.09506: compositional questions of testdev; its images are a configuration of their own.
    "gqa": Benchmark(
        dataset="GQA",
        config="testdev_balanced_instructions",
        split="testdev",
        questions=12578,
        id="id",
        columns=("question", "answer", "types"),
        join=Join("testdev_balanced_images", key="imageId", id="id"),
        prompt=_short,
        scorer=gqa,
        headline=("accuracy",),
        tokens={"llava": 128, "lmms_eval": 16},
    ),
    # LLaVA-Bench-in-the-Wild (arXiv 2304.08485): open questions on 24 images; a judge compares with GPT-4's answers.
    "llava_bench": Benchmark(
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
    ),
    # arXiv 2310.02255: mathematics in pictures (testmini). A judge extracts the answers that no rule finds. lmms-eval
    # lets a model write 16384 tokens, which for these models means one that has lost its end: it is stopped sooner.
    "mathvista": Benchmark(
        dataset="AI4Math/MathVista",
        split="testmini",
        questions=1000,
        id="pid",
        image="decoded_image",
        columns=("question", "query", "choices", "unit", "precision", "question_type", "answer_type", "answer"),
        prompt=_mathvista,
        scorer=mathvista,
        headline=("accuracy",),
        tokens=1024,
    ),
    # arXiv 2306.13394: yes-or-no questions in 14 categories, two per image.
    "mme": Benchmark(
        dataset="MME",
        split="test",
        questions=2374,
        columns=("question", "answer", "category"),
        prompt=lambda row, protocol: row["question"].replace(" Please answer yes or no.", "").strip() + SHORT,
        scorer=mme,
        headline=("perception", "cognition"),
        tokens={"llava": 128, "lmms_eval": 16},
    ),
    # arXiv 2311.16502: college exams in 30 subjects. ``llava`` shows the first image only, ``lmms_eval`` all.
    "mmmu": Benchmark(
        dataset="MMMU",
        split="validation",
        questions=900,
        id="id",
        image="image_1",
        more_images={"llava": (), "lmms_eval": tuple(f"image_{number}" for number in range(2, 8))},
        columns=("question", "options", "answer", "question_type"),
        prompt=_mmmu,
        scorer=mmmu,
        headline=("accuracy", "accuracy_strict"),
        tokens=128,
        skip=_several_images,
    ),
    # MM-Vet (arXiv 2308.02490): open questions that combine capabilities; a judge grades the answers.
    "mmvet": Benchmark(
        dataset="MMVet",
        split="test",
        questions=218,
        columns=("question", "answer", "capability"),
        prompt=lambda row, protocol: ("" if protocol == "llava" else REASONING) + row["question"],
        scorer=mmvet,
        headline=("score",),
        tokens=1024,
        verdicts=True,
    ),
    # arXiv 2305.10355: is an object there? 500 images, three ways of choosing the absent objects. LLaVA's copy of the
    # questions is older: 2910 instead of 3000 with random objects, 102 questions without corrections.
    "pope": Benchmark(
        dataset="POPE",
        split="test",
        questions=9000,
        columns=("question", "answer", "category"),
        prompt=lambda row, protocol: row["question"].strip() + SHORT,
        scorer=pope,
        headline=("f1", "accuracy"),
        tokens=128,
    ),
    # arXiv 2209.09513: school science, 2017 of the questions with an image; these again alone.
    "scienceqa": SCIENCEQA,
    "scienceqa_img": replace(SCIENCEQA, config="ScienceQA-IMG", questions=2017, headline=("accuracy",)),
    # arXiv 1802.08218: questions of blind people about their photographs, ten human answers each. The papers' numbers
    # are those of the test split, which only the official server can score; this is validation.
    "vizwiz": Benchmark(
        dataset="VizWiz-VQA",
        split="val",
        questions=4319,
        columns=("question", "answers"),
        prompt=_photograph,
        scorer=vizwiz,
        headline=("accuracy",),
        tokens=128,
        stop={"llava": (), "lmms_eval": ("ASSISTANT:",)},
    ),
}

# The average of the study of structural pruning (arXiv 2604.24380, tables 2 and 5).
# Column: task, metric, factor to a scale of 0 to 100. The study does not say which POPE metric it prints; its 86.99 for
# LLaVA-1.5-7B, whose published F1 is 85.9, fits lmms-eval's accuracy.
COLUMNS = {
    "MMMU": ("mmmu", "accuracy", 100),
    "SQA": ("scienceqa_img", "accuracy", 100),
    "MathV": ("mathvista", "accuracy", 100),
    "AI2D": ("ai2d", "accuracy", 100),
    "MME-C": ("mme", "cognition", 1 / 8),
    "MME-P": ("mme", "perception", 1 / 20),
    "POPE": ("pope", "accuracy", 100),
    "DocVQA": ("docvqa", "anls", 100),
    "GQA": ("gqa", "accuracy", 100),
}
Metrics = Mapping[str, Mapping[str, float]]  # by task, as in ``results.json``: shares in [0, 1], MME in points


def average(metrics: Metrics) -> float:
    """The study's AVG, 0 to 100: the unweighted mean of its columns; a `UserError` if one is missing."""
    missing = [name for name, (task, metric, _) in COLUMNS.items() if metric not in metrics.get(task, {})]
    if missing:
        raise UserError(f"AVG: there is no result for {', '.join(missing)}; it is the mean of {', '.join(COLUMNS)}")
    return mean(factor * metrics[task][metric] for task, metric, factor in COLUMNS.values())


def study(metrics: Metrics, base: Metrics) -> dict[str, dict[str, float]]:
    """AVG and AVG-% as ``{"vlmcompression": {"avg", "avg_percent", "n"}}``; nothing unless all its tasks were run.

    AVG-% is AVG as a percentage of the unpruned model's (a ratio of means, no mean of ratios).

    Raises:
        UserError: If a column is missing, or the unpruned model's AVG is 0.
    """
    if not {task for task, _, _ in COLUMNS.values()} <= metrics.keys():
        return {}
    found, whole = average(metrics), average(base)
    if whole == 0:
        raise UserError("AVG-%: the unpruned model has an AVG of 0, of which nothing is a percentage")
    return {"vlmcompression": {"avg": found, "avg_percent": 100 * found / whole, "n": len(COLUMNS)}}
