"""Small copies of the published data sets: their folders, column names and types, synthetic content."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "white")


def png(index: int, size: int = 40) -> dict[str, Any]:
    """An encoded image as `datasets` stores it."""
    buffer = io.BytesIO()
    Image.new("RGB", (size + index, size), COLOURS[index % 4]).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{index}.png"}


def _science(count: int, all_images: bool) -> dict[str, list[Any]]:
    return {
        "image": [png(i) if all_images or i % 2 else None for i in range(count)],
        "question": [f"Which one is {COLOURS[i % 4]}?" for i in range(count)],
        "choices": [["this", "that", "both"][: 2 + i % 2] for i in range(count)],
        "answer": [i % 2 for i in range(count)],
        "hint": ["Look closely." if i % 3 == 0 else "" for i in range(count)],
        "task": ["closed choice"] * count,
        "grade": [f"grade{1 + i}" for i in range(count)],
        "subject": [("natural science", "social science", "language science")[i % 3] for i in range(count)],
        "topic": ["colours"] * count,
    }


def _mmmu(count: int) -> dict[str, list[Any]]:
    options = ["['two', 'three', 'four']", "['<image 1>', '<image 2>']", "[]"]
    columns: dict[str, list[Any]] = {
        "id": [f"validation_{('Art', 'Math')[i % 2]}_{i + 1}" for i in range(count)],
        "question": [f"What does <image 1> show, {i}?" for i in range(count)],
        "options": [options[i % 3] for i in range(count)],
        "answer": [("B", "A", "12")[i % 3] for i in range(count)],
        "question_type": [("multiple-choice", "multiple-choice", "open")[i % 3] for i in range(count)],
        "subfield": ["x"] * count,
    }
    return columns | {f"image_{k}": [png(i) if k == 1 else None for i in range(count)] for k in range(1, 8)}


def _mathvista(count: int) -> dict[str, list[Any]]:
    kinds = [("multi_choice", "text"), ("free_form", "integer"), ("free_form", "float"), ("free_form", "list")]
    chosen = [kinds[i % 4] for i in range(count)]
    return {
        "pid": [str(i + 1) for i in range(count)],
        "question": [f"How large is angle {i}?" for i in range(count)],
        "image": [f"images/{i}.jpg" for i in range(count)],
        "decoded_image": [png(i) for i in range(count)],
        "choices": [["30", "60"] if kind == "multi_choice" else None for kind, _ in chosen],
        "unit": ["degrees" if i % 2 else None for i in range(count)],
        "precision": [1.0 if kind == "float" else None for _, kind in chosen],
        "answer": [("60", "7", "1.5", "[1, 2]")[i % 4] for i in range(count)],
        "question_type": [kind for kind, _ in chosen],
        "answer_type": [kind for _, kind in chosen],
        "query": [f"Hint: Please answer.\nQuestion: How large is angle {i}?" for i in range(count)],
    }


def tables(count: int = 6) -> dict[str, tuple[str, dict[str, list[Any]]]]:
    """Per benchmark the file inside its data set's folder, and the columns; GQA has a second one for its images."""
    n = range(count)
    asked = [f"Is there a {COLOURS[i % 4]} thing in the image?" for i in n]
    common = {"question": asked, "image": [png(i // 2) for i in n]}
    yes = [("yes", "no")[i % 2] for i in n]
    return {
        "pope": (
            "POPE/data/test-00000-of-00001.parquet",
            {
                **common,
                "id": [str(i) for i in n],
                "question_id": [str(i // 3) for i in n],
                "answer": yes,
                "image_source": [f"COCO_{i // 2}" for i in n],
                "category": [("adversarial", "popular", "random")[i % 3] for i in n],
            },
        ),
        "mme": (
            "MME/data/test-00000-of-00001.parquet",
            {
                **common,
                "question_id": [f"{('existence', 'count', 'code_reasoning')[i // 2 % 3]}/{i // 2}.png" for i in n],
                "question": [f"{question} Please answer yes or no." for question in asked],
                "answer": [answer.capitalize() for answer in yes],
                "category": [("existence", "count", "code_reasoning")[i // 2 % 3] for i in n],
            },
        ),
        "gqa": (
            "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet",
            {
                "id": [f"0{i}" for i in n],
                "imageId": [f"n{i // 3}" for i in n],
                "question": asked,
                "answer": yes,
                "fullAnswer": yes,
                "isBalanced": [True] * count,
                "types": [{"structural": "verify", "semantic": "obj", "detailed": "existC"}] * count,
            },
        ),
        "gqa images": (
            "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet",
            {"id": [f"n{i}" for i in reversed(n)], "image": [png(i) for i in reversed(n)]},
        ),
        "docvqa": (
            "DocVQA/DocVQA/validation-00000-of-00001.parquet",
            {
                **common,
                "questionId": [str(100 + i) for i in n],
                "question_types": [["handwritten"]] * count,
                "docId": list(n),
                "answers": [["yes", "Yes!"] for _ in n],
            },
        ),
        "ai2d": (
            "ai2d/data/test-00000-of-00001.parquet",
            {**common, "options": [["a", "b", "c", "d"]] * count, "answer": [str(i % 4) for i in n]},
        ),
        "scienceqa": ("ScienceQA/ScienceQA-FULL/test-00000-of-00001.parquet", _science(count, False)),
        "scienceqa_img": ("ScienceQA/ScienceQA-IMG/test-00000-of-00001.parquet", _science(count, True)),
        "vizwiz": (
            "VizWiz-VQA/data/val-00000-of-00001.parquet",
            {
                **common,
                "question_id": [f"VizWiz_val_{i:08}" for i in n],
                "question": ["What's IN this photo?"] * count,
                "answers": [["yes"] * 4 + ["no"] * 6 for _ in n],
                "category": ["other"] * count,
            },
        ),
        "mmvet": (
            "MMVet/data/test-00000-of-00001.parquet",
            {
                **common,
                "question_id": [f"v1_{i}" for i in n],
                "answer": ["a<AND>b"] * count,
                "capability": ["rec,ocr", "math"] * (count // 2),
            },
        ),
        "llava_bench": (
            "llava-bench-in-the-wild/data/train-00000-of-00001.parquet",
            {
                **common,
                "question_id": [str(i) for i in n],
                "category": [("conv", "detail", "complex")[i % 3] for i in n],
                "caption": ["A thing."] * count,
                "gpt_answer": ["There is one."] * count,
            },
        ),
        "mmmu": ("MMMU/data/validation-00000-of-00001.parquet", _mmmu(count)),
        "mathvista": ("MathVista/data/testmini-00000-of-00001.parquet", _mathvista(count)),
    }


def write(path: Path, columns: Mapping[str, list[Any]]) -> Path:
    """Write a parquet file whose image columns have the type that the hub's have."""
    from datasets import Dataset
    from datasets import Image as ImageType

    table = Dataset.from_dict(dict(columns))
    for name, cells in columns.items():
        encoded = {type(cell) for cell in cells if cell} <= {dict}
        if encoded and name.startswith(("image", "decoded_image")):
            table = table.cast_column(name, ImageType())
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)
    return path


def publish(root: Path, count: int = 6) -> Path:
    """Write all benchmarks under one root, as a user who has downloaded them would have them."""
    for file, columns in tables(count).values():
        write(root / file, columns)
    return root


if __name__ == "__main__":
    import sys

    publish(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
