"""Benchmarks from the published layout to scores: prompts, ids, images, protocols, and what is refused."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from lightning.pytorch import Trainer
from PIL import Image

from efficientllava.data.records import open_image
from efficientllava.evaluation import tasks
from efficientllava.evaluation.answers import line
from efficientllava.evaluation.rows import Source, images_of
from efficientllava.evaluation.score import as_record, main
from efficientllava.evaluation.tasks import PROTOCOLS
from efficientllava.evaluation.tasks.published import BENCHMARKS, COLUMNS
from efficientllava.runtime import UserError, json_lines
from efficientllava.settings.schema import DataConfig, EvaluateConfig

from ..runs import composed
from .conftest import evaluate
from .published import png, publish, tables
from .published import write as write_table

NAMES = [name for name in tasks.available() if isinstance(tasks.declared(name), tasks.Benchmark)]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FIRST = "Is there a red thing in the image?"
REASON = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
# Benchmark: (what both protocols ask first) or (under llava, under lmms_eval)
PROMPTS = {
    "pope": (FIRST + SHORT,),
    "mme": (FIRST + SHORT,),
    "gqa": (FIRST + SHORT,),
    "docvqa": (FIRST + SHORT,),
    "ai2d": (FIRST + "\nA. a\nB. b\nC. c\nD. d" + LETTER,),
    "scienceqa": ("Context: Look closely.\nWhich one is red?\nA. this\nB. that" + LETTER,),
    "scienceqa_img": ("Context: Look closely.\nWhich one is red?\nA. this\nB. that" + LETTER,),
    "vizwiz": ("What's IN this photo?" + INSUFFICIENT + SHORT, "What's in this photo?" + INSUFFICIENT + SHORT),
    "mmvet": (FIRST, REASON + FIRST),
    "llava_bench": (FIRST,),
    "mmmu": (
        "What does <image 1> show, 0?\n(A) two\n(B) three\n(C) four\n" + LETTER,
        "What does <image 1> show, 0?\nA. two\nB. three\nC. four\n" + LETTER,
    ),
    "mathvista": (
        "Hint: Please answer.\nQuestion: How large is angle 0?",
        "How large is angle 0?\nA. 30\nB. 60" + LETTER,
    ),
}


def load(name, root, **options):
    return tasks.load(name, DataConfig(), EvaluateConfig(root=str(root), **options))


def said(task, text=""):
    return [as_record(json.loads(json.dumps(line(record, text, "m")))) for record in task.records()]


def test_the_papers_benchmarks_are_here():
    assert len(NAMES) == 12
    assert {*composed("evaluate=vlmcompression").evaluate.tasks} == {task for task, _, _ in COLUMNS.values()}


@pytest.mark.parametrize("name", tasks.available())
def test_every_benchmark_is_an_option(name):
    assert composed(f"evaluate={name}").evaluate.tasks == [name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_prompts(root, name, protocol):
    task = load(name, root, protocol=protocol)
    assert task.records()[0].turns[0].question == PROMPTS[name][PROTOCOLS.index(protocol) % len(PROMPTS[name])]
    assert task.facts()["protocol"] == protocol and task.facts()["root"] == str(root)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_question_with_its_image(root, name):
    records = load(name, root).records()
    _, columns = tables()[name]
    assert len(records) == 6 == len({record.id for record in records})
    assert all(record.image is None or callable(record.image) for record in records), "no image is opened beforehand"
    column = {"mmmu": "image_1", "mathvista": "decoded_image"}.get(name, "image")
    cells = columns.get(column) or [png(i // 3) for i in range(6)]
    for record, cell in zip(records, cells, strict=True):
        assert (record.image is None) == (cell is None)
        assert cell is None or open_image(record).size == Image.open(io.BytesIO(cell["bytes"])).size


@pytest.mark.parametrize("bare", [False, True])
def test_images_are_found_in_tables_of_other_writers(tmp_path, bare):
    from pyarrow import table
    from pyarrow.parquet import write_table as write_plain

    file, columns = tables()["pope"]
    images = [cell["bytes"] for cell in columns["image"]] if bare else columns["image"]
    (tmp_path / file).parent.mkdir(parents=True)
    write_plain(table({**columns, "image": images}), tmp_path / file)
    for record, cell in zip(load("pope", tmp_path).records(), columns["image"], strict=True):
        assert open_image(record).size == Image.open(io.BytesIO(cell["bytes"])).size


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answers_hold_all_that_their_scorer_wants(root, name, protocol):
    task = load(name, root, protocol=protocol)
    metrics = task.score(said(task)).metrics
    assert metrics["n"] == 6
    if name in ("mmvet", "llava_bench"):
        assert metrics == {"n": 6, "n_unjudged": 6}
        judged = [{**record, "verdict": "1.0" if name == "mmvet" else "8 8"} for record in said(task)]
        metrics = task.score(judged).metrics
        assert metrics["score"] == 1
    assert set(task.headline) <= metrics.keys()


def right(name, record):
    """A right answer to a record, as a model would give it."""
    answer = record["answer"]
    if name in ("ai2d", "scienceqa", "scienceqa_img"):
        return "ABCD"[int(answer)]
    if name == "mathvista" and record["question_type"] == "multi_choice":
        return "(B)"
    return answer[-1] if isinstance(answer, list) else answer


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mmvet", "llava_bench")])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_right_answers_score_all(root, name, protocol):
    task = load(name, root, protocol=protocol)
    records = [{**record, "prediction": right(name, record)} for record in said(task)]
    metrics = task.score(records).metrics
    best = {"mme": 400, "vizwiz": 1.0}.get(name, 1)
    assert metrics[task.headline[0]] == best


def test_official_ids_are_kept_and_ours_are_distinct(root):
    records = load("mme", root).records()
    assert [record.id for record in records][:3] == ["existence/0.png", "existence/0.png#2", "count/1.png"]
    lines = said(load("mme", root))
    assert [row["question_id"] for row in lines][:3] == ["existence/0.png", "existence/0.png", "count/1.png"]


def test_images_of_another_configuration_are_joined(root):
    sizes = [open_image(record).size[0] for record in load("gqa", root).records()]
    assert sizes == [40, 40, 40, 41, 41, 41]


def test_other_images_are_other_data(tmp_path):
    publish(tmp_path)
    (file, columns), before = tables()["gqa images"], load("gqa", tmp_path).facts()["data"]
    assert load("gqa", tmp_path).facts()["data"] == before
    write_table(tmp_path / file, {**columns, "image": columns["image"][::-1]})
    assert load("gqa", tmp_path).facts()["data"] != before


def test_options_with_several_images_are_left_to_chance_as_in_the_official_script(root):
    assert [bool(r.details.get("skipped")) for r in load("mmmu", root).records()] == [False, True, False] * 2
    assert not any(r.details.get("skipped") for r in load("mmmu", root, protocol="lmms_eval").records())


def trainer():
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False))


@pytest.mark.parametrize("name", ["pope", "scienceqa", "gqa"])
def test_from_files_to_scores_and_the_command_finds_the_same(root, name, tiny, tmp_path, capsys):
    task = load(name, root, max_new_tokens=3)
    config = EvaluateConfig(max_new_tokens=3)
    outcome = evaluate(*tiny, task, trainer(), config)
    one_by_one = evaluate(*tiny, task, trainer(), replace(config, batch_size=1))
    assert [row["text"] for row in one_by_one.lines] == [row["text"] for row in outcome.lines]
    (tmp_path / "file.jsonl").write_text(json_lines(outcome.lines))
    main([str(tmp_path / "file.jsonl"), "--task", name])
    assert json.loads(capsys.readouterr().out)["metrics"] == outcome.scores.metrics
    assert set(outcome.lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def test_a_new_benchmark_is_one_file(root, monkeypatch, tmp_path, capsys):
    source = (
        "from . import SHORT, Benchmark\n"
        "from ..scorers.text import gqa\n"
        "BENCHMARK = Benchmark(dataset='POPE', split='test', columns=('question', 'answer'), scorer=gqa,\n"
        "    prompt=lambda row, protocol: row['question'] + SHORT, headline=('accuracy',), tokens=4)\n"
    )
    (tmp_path / "toy.py").write_text(source)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    task = load("toy", root)
    assert task.questions is None and all(load(name, root).questions > 0 for name in NAMES)
    assert "toy" in tasks.available() and len(task.records()) == 6 and task.max_new_tokens == 4
    lines = [line(record, record.turns[0].answer, "m") for record in task.records()]
    (tmp_path / "toy.jsonl").write_text(json_lines(lines))
    main([str(tmp_path / "toy.jsonl"), "--task", "toy"])
    assert json.loads(capsys.readouterr().out)["metrics"] == {"accuracy": 1, "n": 6}


def test_a_root_may_be_a_file_or_one_benchmark_s_folder(root, tmp_path):
    file, columns = tables()["pope"]
    expected = [record.turns[0].question for record in load("pope", root).records()]
    for place in (root / "POPE", root / file):
        assert [record.turns[0].question for record in load("pope", place).records()] == expected
    folder = tmp_path / "pope"
    folder.mkdir()
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
        row["image"] = f"{number}.png"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = load("pope", tmp_path).records()
    assert [record.turns[0].question for record in records] == expected
    assert open_image(records[2]).size == (41, 40)
    write_table(folder / "test.parquet", columns)  # comes before JSON, whatever it is called
    assert not isinstance(load("pope", tmp_path).records()[0].image, type(records[0].image))
    (folder / "test.parquet").unlink()
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match=r"^evaluate\.root=.*: record '1': image .*3\.png' does not exist; complete"):
        load("pope", tmp_path).records()


def test_several_files_of_a_split_are_read_in_order(tmp_path):
    _, columns = tables()["pope"]
    for part in range(2):
        half = {name: cells[3 * part : 3 * part + 3] for name, cells in columns.items()}
        write_table(tmp_path / f"data/test-0000{part}-of-00002.parquet", half)
    write_table(tmp_path / "data/testmini-00000-of-00001.parquet", columns)
    assert len(load("pope", tmp_path).records()) == 6


def test_another_configuration_s_rows_are_not_taken(tmp_path):
    _, columns = tables()["scienceqa"]
    write_table(tmp_path / "ScienceQA-IMG/test-00000-of-00001.parquet", columns)
    with pytest.raises(UserError, match=r"split is 'test' of ScienceQA-FULL .*there is: ScienceQA-IMG/test"):
        load("scienceqa", tmp_path).records()


@pytest.mark.parametrize(
    ("column", "cell", "told"), [("image", 5, "column 'image': holds a int"), ("question", None, "")]
)
def test_cells_of_another_type_are_told_in_one_line(tmp_path, column, cell, told):
    _, columns = tables()["pope"]
    count = len(columns["question"])
    rows = [{name: cells[i] for name, cells in columns.items() if name != "image"} for i in range(count)]
    (tmp_path / "test.jsonl").write_text(json_lines({**row, "image": "a.png", column: cell} for row in rows))
    with pytest.raises(UserError, match=told or "has no such question"):
        load("pope", tmp_path).records()


def test_encoded_images_may_be_of_the_large_type(tmp_path):
    table = pa.table({"image": pa.array([png(0)["bytes"], None], pa.large_binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "c"))
    first, second = images_of(rows, "image", tmp_path)
    assert first() == png(0)["bytes"] and second is None


def without(name, columns):
    return {key: cells for key, cells in columns.items() if key != name}


BAD = {
    "no such split": (
        "POPE/data/validation-0.parquet",
        lambda c: c,
        r"whose split is 'test' .*; there is: data/validation",
    ),
    "no files": ("POPE/data/notes.txt", None, "there is: no such file at all"),
    "a column is missing": (
        "POPE/data/test-0.parquet",
        lambda c: without("category", c),
        r"evaluate\.root=.*: pope needs the columns category; there are question, image, id",
    ),
    "no image": ("POPE/data/test-0.parquet", lambda c: without("image", c), "pope needs the columns image"),
    "no row": ("POPE/data/test-0.parquet", lambda c: {key: [] for key in c}, "cannot be read .*no data"),
    "broken": ("POPE/data/test-0.parquet", None, r"test-0\.parquet cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_told_in_one_line(case, tmp_path):
    file, change, message = BAD[case]
    path = tmp_path / file
    if change is None:
        path.parent.mkdir(parents=True)
        path.write_text("nothing of use")
    else:
        columns = change(tables()["pope"][1])
        path.parent.mkdir(parents=True)
        write_table(path, columns) if any(columns.values()) else Dataset.from_dict(columns).to_parquet(path)
    with pytest.raises(UserError, match=message) as caught:
        load("pope", tmp_path).records()
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(UserError, match=r"rows\.csv: is no \.parquet, \.jsonl, \.json file"):
        load("pope", tmp_path / "rows.csv").records()


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    asked = []

    def refuse(*args, **options):
        asked.append((args, options))
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    task = tasks.load("scienceqa_img", DataConfig(), EvaluateConfig(namespace="somebody"))
    with pytest.raises(UserError, match=r"data set somebody/ScienceQA: .*Couldn't reach the Hub\); give a local copy"):
        task.records()
    assert asked == [(("somebody/ScienceQA", "ScienceQA-IMG"), {"split": "test"})]
    with pytest.raises(UserError, match="data set AI4Math/MathVista"):  # an id with an account stays as it is
        tasks.load("mathvista", DataConfig(), EvaluateConfig()).records()


def test_images_of_one_question_are_all_shown_where_the_leaderboard_does(tmp_path):
    _, columns = tables()["mmmu"]
    columns["image_2"][1] = png(3)
    write_table(tmp_path / "validation.parquet", columns)
    counts = {p: [len(r.images) for r in load("mmmu", tmp_path, protocol=p).records()] for p in PROTOCOLS}
    assert counts == {"llava": [1] * 6, "lmms_eval": [1, 2, 1, 1, 1, 1]}


def test_an_image_that_cannot_be_read_names_its_record(root):
    record = SimpleNamespace(id="7", image=lambda: b"no image")
    with pytest.raises(UserError, match="record '7': its image cannot be read"):
        open_image(record)


ROWS = [{"question_id": str(i), "question": "?", "answer": "é", "image": f"{i}.png"} for i in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b""),
        ("x.jsonl", LINES.encode()[:-20]),
        ("x.jsonl", LINES.encode("latin-1")),
        ("x.jsonl", LINES.encode("utf-16")),
        ("x.jsonl", LINES.replace("é", "\\ud800").encode()),
        ("x.jsonl", LINES.encode() + b"\n" + b"[" * 100_000),
        ("x.json", (json.dumps(ROWS) + json.dumps(ROWS)).encode()),
        ("x.json", json.dumps(ROWS).replace("}, {", "} {").encode()),
        ("x.json", json.dumps(ROWS).encode()[:-1]),
    ],
)
def test_rows_are_read_to_the_end_or_not_at_all(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(content)
    source = Source("pope", BENCHMARKS["pope"], EvaluateConfig(root=str(tmp_path / name)), None)
    with pytest.raises(UserError, match=rf"^evaluate\.root=.*{name} cannot be read \(.+\); repair or replace it$"):
        source.load(["question", "answer"])
    (tmp_path / name).write_text(LINES)
    assert len(source.load(["answer"])[0]) == 3
