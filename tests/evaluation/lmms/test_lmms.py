"""lmms-eval on models of ours: a real run of a small task from this disk; skipped without the extra."""

import json
import os
import subprocess
import sys

import pytest
import torch

from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.models.forward import FeatureCache
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import EvaluateConfig, LmmsConfig

pytest.importorskip("lmms_eval")
pytestmark = pytest.mark.timeout(600)

TASK = """
task: tiny_digits
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_utils.visuals
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
process_results: !function tiny_utils.results
"""
UTILS = """
def visuals(doc):
    return [image.convert("RGB") for image in doc["images"]]

def shown(docs):
    return docs.filter(lambda doc: len(doc["images"]) > 0)

def results(doc, answers):
    return {"exact_match": float(answers[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="session")
def digits():
    """Questions with one image and without any."""
    return list(digits_vqa(24).records())


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, digits):
    """A folder with the digits as a task of lmms-eval."""
    from datasets import Dataset, Features, Image, Sequence, Value

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"images": [r.image] if r.image else [], "question": r.turns[0].question, "answer": r.turns[0].answer}
        for r in digits
    ]
    features = Features({"images": Sequence(Image()), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / "digits.parquet")
    (folder / "tiny_digits.yaml").write_text(TASK.format(file=folder / "digits.parquet"))
    with_image = TASK.replace("tiny_digits", "tiny_shown") + "process_docs: !function tiny_utils.shown\n"
    (folder / "tiny_shown.yaml").write_text(with_image.format(file=folder / "digits.parquet"))
    (folder / "tiny_utils.py").write_text(UTILS)
    os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return folder


@pytest.fixture(scope="session")
def checkpoint():
    from efficientllava.checkpoint.folder import load

    return load("builtin:tiny_llava")


def _config(tasks, *names, **options):
    return EvaluateConfig(lmms_eval=LmmsConfig(list(names or ["tiny_digits"]), str(tasks)), batch_size=7, **options)


def test_answers_and_score_are_those_of_our_own_evaluation(tasks, checkpoint, digits):
    from efficientllava.data.collator import GenerationCollator
    from efficientllava.evaluation.generation import generate
    from efficientllava.evaluation.lmms import evaluate, prepare

    config = _config(tasks)
    prepare(config)
    state = torch.get_rng_state()
    metrics, samples = evaluate(checkpoint.model, checkpoint.processor, config)
    assert torch.equal(torch.get_rng_state(), state)
    collate, cache = GenerationCollator(checkpoint.processor), FeatureCache(checkpoint.model)
    batches = [collate([record]) for record in digits]
    own = [generate(checkpoint.model, checkpoint.processor.tokenizer, b, cache(b), 4)[0] for b in batches]
    right = [text == record.turns[0].answer for text, record in zip(own, digits, strict=True)]
    assert metrics["tiny_digits"]["exact_match"] == pytest.approx(sum(right) / 24) and sum(right) > 12
    assert metrics["tiny_digits"]["n"] == 24
    told = {sample["doc_id"]: sample["filtered_resps"][0] for sample in samples["tiny_digits"]}
    assert [told[index] for index in range(24)] == own


def test_the_first_failure_ends_the_evaluation(tasks, checkpoint, monkeypatch):
    from efficientllava.evaluation.lmms import evaluate

    def broken(*arguments, **options):
        raise RuntimeError("a broken layer")

    monkeypatch.setattr(checkpoint.model, "generate", broken)
    with pytest.raises(RuntimeError, match="a broken layer"):
        evaluate(checkpoint.model, checkpoint.processor, _config(tasks, limit=2))


def test_an_unknown_task_is_found_before_anything_runs(tasks):
    from efficientllava.evaluation.lmms import prepare

    with pytest.raises(UserError, match=r"evaluate\.lmms_eval\.tasks: lmms-eval .* has no nonsense"):
        prepare(_config(tasks, "tiny_digits", "nonsense"))


def _adapter(checkpoint, documents, **options):
    from efficientllava.evaluation.lmms.adapter import EfficientLLaVA

    model = EfficientLLaVA(checkpoint.model, checkpoint.processor, 4, **options)
    model.task_dict = {"t": {"test": documents}}
    return model


def _request(text, number=0, **settings):
    from lmms_eval.api.instance import Instance

    arguments = (text, settings, lambda document: document, number, "t", "test")
    return Instance(
        request_type="generate_until",
        arguments=arguments,
        idx=0,
        metadata={"task": "t", "doc_id": number, "repeats": 1},
    )


def test_questions_about_several_images(checkpoint, digits):
    first, second = [record.image for record in digits if record.image][:2]
    model = _adapter(checkpoint, [[first, second], [first]])
    texts = ["What is in <image> and in <image>?", "Which digits?"]
    answers = model.generate_until([_request(texts[0], 0), _request(texts[1], 1), _request(texts[1], 0)])
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    batch = model._prompts([model._record(*_request(texts[0], 0).args)])
    shown = (batch["input_ids"][0] == checkpoint.processor.image_token_id).int()
    assert batch["image_tiles"] == [1, 1] and len(batch["pixel_values"]) == 2
    assert shown.sum() == 2 * len(model._prompts.prompts.expansion(first, 1, "r"))
    assert (shown.diff() == 1).sum() == 2, "the images stand where the text says"


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"num_beams": 4}])
def test_what_is_not_greedy_is_refused(checkpoint, settings):
    with pytest.raises(UserError, match="only greedy decoding"):
        _adapter(checkpoint, [[]]).generate_until([_request("?", **settings)])


def test_videos_are_refused(checkpoint):
    with pytest.raises(UserError, match="task t shows str; only images"):
        _adapter(checkpoint, [["video.mp4"]]).generate_until([_request("?")])


def test_answers_end_where_the_task_says(checkpoint, digits):
    record = next(record for record in digits if record.image is None)
    whole = _adapter(checkpoint, [[]], max_new_tokens=8).generate_until([_request(record.turns[0].question)])[0]
    end = whole[-1]
    for until in (end, [end, "\n\n"]):
        cut = _adapter(checkpoint, [[]], max_new_tokens=8).generate_until(
            [_request(record.turns[0].question, until=until)]
        )
        assert cut == [whole[: whole.index(end)].strip()]
    kept = _adapter(checkpoint, [[]]).generate_until([_request(record.turns[0].question, until=["\n\n"])])
    assert kept[0].startswith(whole)


@pytest.mark.parametrize("arguments", ["dtype=float32", "pretrained=builtin:tiny_llava,nonsense=1"])
def test_bad_arguments_on_lmms_eval_s_command_line(arguments):
    from efficientllava.evaluation.lmms.adapter import EfficientLLaVA

    with pytest.raises(SystemExit, match="--model_args: must be pretrained="):
        EfficientLLaVA.create_from_arg_string(arguments)


def test_a_failure_ends_lmms_eval_s_command(monkeypatch):
    """It reports any other exception, and exits with 0."""
    from efficientllava.evaluation.lmms.adapter import EfficientLLaVA

    options = {"batch_size": "2", "device": "cpu", "max_batch_size": None}
    model = EfficientLLaVA.create_from_arg_string("pretrained=builtin:tiny_llava,max_new_tokens=3", options)
    model.task_dict = {"t": {"test": [[]]}}
    assert model.batch_size == 2 and len(model.generate_until([_request("?")])) == 1

    def broken(*arguments, **options):
        raise RuntimeError("a broken layer")

    monkeypatch.setattr(model._model, "generate", broken)
    with pytest.raises(SystemExit, match="RuntimeError: a broken layer"):
        model.generate_until([_request("?")])


@pytest.fixture(scope="session")
def per_layer(tmp_path_factory):
    """A folder whose layers differ in shape: stock transformers cannot load it without this package."""
    import efficientllava as ev

    checkpoint = ev.load("builtin:tiny_llava")
    plan = ev.plan(checkpoint, ratio=0.3, selection="global", samples=8)
    folder = tmp_path_factory.mktemp("pruned") / "per_layer"
    ev.save(ev.prune(checkpoint, plan), str(folder))
    assert "per_layer" in (folder / "config.json").read_text()
    return folder


@pytest.mark.slow
# lmms-eval's wrapper fails on questions without an image, whatever the model.
@pytest.mark.parametrize(("model", "task"), [("efficientllava", "tiny_digits"), ("llava_hf", "tiny_shown")])
def test_lmms_eval_s_own_command_loads_our_folders(tasks, per_layer, tmp_path, model, task):
    arguments = f"pretrained={per_layer}"
    if model == "llava_hf":
        pytest.importorskip("decord")
        arguments += ",device_map=cpu"  # its default is a device that transformers 5 does not know
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", task, "--include_path", str(tasks), "--batch_size", "1", "--device", "cpu"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path), "--log_samples"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error" not in done.stdout, done.stdout[-2000:]
    (file,) = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())["results"][task]
    assert results["exact_match,none"] > 0.5
