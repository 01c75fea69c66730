"""Mutated input files: each is read right or refused by a `UserError` of one line, never by another error."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from efficientllava.checkpoint.folder import load
from efficientllava.data.records import open_images
from efficientllava.data.table import read_conversations
from efficientllava.evaluation.score import read
from efficientllava.runtime.errors import UserError

from .runs import save_tiny

SEED, EACH = 0, 75  # of four kinds
SIGNS = [
    *'{}[]",:\\0-',
    "null",
    "1e999",
    "9" * 5000,
    "[" * 100_000,
    "\\ud800",
    "\ufeff",
    "\x00",
    "é",
    "NaN",
    "true",
    '"a"',
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Content with one to three cuts, doublings, flips or insertions."""
    for _ in range(rng.randint(1, 3)):
        at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                content = content[:at] + content[to:]
            case 1:
                content = content[:to] + content[at:]
            case 2 if content:
                place = rng.randrange(len(content))
                content = content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
            case 3:
                content = content[:at] + rng.choice(SIGNS).encode() + content[at:]
            case 4:
                content = content[:at]
            case _:
                content = content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at:]
    return content


def value_of(content: bytes, suffix: str):
    """What a whole file of records means by Python's own decoder; None where that takes it for no JSON."""
    text = content.decode("utf-8-sig", "surrogateescape")
    return [json.loads(line) for line in text.split("\n") if line.strip()] if suffix == "jsonl" else json.loads(text)


def refused(kinds: Counter, kind: str, call):
    """The value of a call, or None where it has ended in the project's own error."""
    try:
        found = call()
    except UserError as error:
        assert str(error) and "\n" not in str(error) and "details:" not in str(error), str(error)
        str(error).encode()  # can be printed
        kinds[f"{kind} refused"] += 1
        return None
    kinds[f"{kind} read"] += 1
    return found


def records_file():
    records = []
    for index in range(8):
        said = [{"from": "human", "value": f"<image>\nwhich {index} ?"}, {"from": "gpt", "value": f"no. {index}"}]
        records.append({"id": f"r{index}", "image": f"a/{index}.png", "conversations": said})
    return records


@pytest.fixture
def kinds():
    return Counter()


def test_files_of_records(tmp_path, kinds):
    rng, records = random.Random(SEED), records_file()
    for number in range(EACH):
        suffix = ("json", "jsonl")[number % 2]
        whole = json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records))
        file, content = tmp_path / f"{number}.{suffix}", mutated(whole.encode(), rng)
        file.write_bytes(content)
        found = refused(kinds, "records", lambda file=file: [*read_conversations(file, tmp_path)])
        if found is not None:
            assert len(found) == len(value_of(content, suffix)), content
        refused(kinds, "predictions", lambda file=file: read(file))
    assert kinds["records read"] and kinds["records refused"], kinds


def test_images(tmp_path, kinds):
    rng = random.Random(SEED + 1)
    pixels = np.random.default_rng(SEED).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    plain, wide = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    made = {
        "png": plain,
        "jpg": plain,
        "tif": wide,
        "gif": plain.convert("P"),
        "webp": plain,
        "avif": plain,
        "bmp": plain,
    }
    said = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "that"}]
    for number in range(EACH):
        suffix, image = list(made.items())[number % len(made)]
        whole = io.BytesIO()
        image.save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
        name = f"{number}.{suffix}"
        (tmp_path / name).write_bytes(mutated(whole.getvalue(), rng))
        (tmp_path / "one.json").write_text(json.dumps([{"image": name, "conversations": said}]))
        (record,) = read_conversations(tmp_path / "one.json", tmp_path)
        found = refused(kinds, "images", lambda record=record: open_images(record))
        assert found is None or found[0].mode == "RGB"
    assert kinds["images read"] and kinds["images refused"], kinds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=1)


@pytest.fixture(scope="module")
def weights(model):
    return load(model).model.state_dict()


def changed(model, folder, name, rng, most=None):
    """A copy of a checkpoint in which one file is mutated, at its beginning where `most` bytes are given."""
    for file in model.iterdir():
        (folder / file.name).unlink(missing_ok=True)
        shutil.copyfile(file, folder / file.name)
    content = (model / name).read_bytes()
    head, rest = (content, b"") if most is None else (content[:most], content[most:])
    (folder / name).write_bytes(mutated(head, rng) + rest)


@pytest.mark.filterwarnings("ignore")
def test_files_that_describe_a_model(model, tmp_path, kinds):
    rng = random.Random(SEED + 2)
    names = sorted(file.name for file in model.glob("*.json") if file.name != "tokenizer.json")
    for number in range(EACH):
        changed(model, tmp_path, names[number % len(names)], rng)
        refused(kinds, "descriptions", lambda: load(tmp_path))
    assert kinds["descriptions refused"], kinds


@pytest.mark.filterwarnings("ignore")
def test_headers_of_weights(model, weights, tmp_path, kinds):
    rng = random.Random(SEED + 3)
    header = int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little") + 8
    for _ in range(EACH):
        changed(model, tmp_path, "model.safetensors", rng, header)
        found = refused(kinds, "headers", lambda: load(tmp_path))
        if found is not None:
            state = found.model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert kinds["headers refused"], kinds
