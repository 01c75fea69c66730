"""Loss, perplexity and divergence on running text."""

import json
import math
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from efficientllava.data.collator import Collator
from efficientllava.data.embedded.prose import CALIBRATES, FOLDER, GIVEN, TEXTS, calibrating, pieces
from efficientllava.evaluation import answers
from efficientllava.evaluation.answers import answer
from efficientllava.evaluation.divergence import FILE, TOP, Divergence, collect
from efficientllava.evaluation.score import as_record
from efficientllava.evaluation.tasks import prose
from efficientllava.runtime.errors import NotFiniteError, UserError
from efficientllava.settings.schema import DataConfig, EvaluateConfig, ProseConfig
from experiments.speed.rows import quiet_trainer
from tests.runs import run, save_tiny, small

CFG = EvaluateConfig(batch_size=4, limit=6)
TASK = prose.task(DataConfig(), EvaluateConfig())


def own(path):
    return prose.task(DataConfig(), EvaluateConfig(prose=ProseConfig(str(path))))


def test_the_shipped_texts_are_what_their_digests_say_and_share_nothing():
    digests = {name: sha256((FOLDER / f"{name}.txt").read_bytes()).hexdigest() for name in (*TEXTS, *CALIBRATES)}
    assert digests == {**TEXTS, **CALIBRATES}
    records = TASK.records()
    assert len(records) == TASK.questions == 120 == len({record.id for record in records})
    assert [record.turns[0].kind for record in records[:3]] == [*TEXTS], "a limit takes of all"
    answers = {record.turns[0].answer for record in (*records, *calibrating())}
    assert len(calibrating()) == 32 and len(answers) == 152


def test_a_text_is_cut_at_its_empty_lines():
    words = [f"w{number}" for number in range(1000)]
    short, whole, long = words[:30], words[30:130], words[130:465]
    text = "\n \n".join([" ".join(short), "\n".join(whole), " ".join(long), "far too short"])
    cut = pieces(text)
    assert cut == [[*short, *whole], long[:150], long[150:300]], "35 words and what follows are too few"


def test_losses_are_those_of_the_stock_forward_and_nothing_is_generated(tiny, monkeypatch):
    monkeypatch.setattr(answers, "generate", lambda *_: pytest.fail("nothing is to be generated"))
    model, processor = tiny
    lines = answer(model, processor, TASK, quiet_trainer(), replace(CFG, max_new_tokens=3))
    sums = []
    for record, line in zip(TASK.records(), lines, strict=False):
        batch = Collator(processor)([record])
        with torch.no_grad():
            mean = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        assert line["metadata"]["tokens"] == tokens and line["text"] == ""
        assert line["metadata"]["loss"] == pytest.approx(float(mean) * tokens, rel=1e-6)
        sums.append((float(mean) * tokens, tokens))
    metrics = TASK.score([as_record(line) for line in lines]).metrics
    loss = sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)
    assert metrics["answer_loss"] == pytest.approx(loss) and metrics["perplexity"] == pytest.approx(math.exp(loss))
    assert metrics["n"] == 6 and [metrics[f"n/{name}"] for name in TEXTS] == [2, 2, 2]


def moved(base, other, folder):
    """The divergence of tokens, a row each, from all their log-probabilities."""
    rows, counts = [f"row {row}" for row in range(len(base))], [1] * len(base)
    kept = Divergence(None, rows)
    kept(base)
    assert kept.done(counts, folder) is None
    collect(folder, folder)
    look = Divergence(safe_open(folder / FILE, "pt"), rows)
    look(other)
    return torch.tensor(look.done(counts, None), dtype=torch.double)


def test_the_divergence_is_that_of_the_likeliest_tokens_and_the_rest(tmp_path):
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, 50, dtype=torch.double).log_softmax(-1)
    top = p.topk(TOP).indices
    found = moved(p, q, tmp_path)
    for row in range(5):
        likely = {*top[row].tolist()}
        sides = [
            [*(math.exp(side[row, i]) for i in likely), sum(math.exp(side[row, i]) for i in {*range(50)} - likely)]
            for side in (p, q)
        ]
        assert float(found[row]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(*sides, strict=True)))
    whole = (p.exp() * (p - q)).sum(1)
    assert (found > 0).all() and (found <= whole).all()
    assert moved(p, p, tmp_path).abs().max() == 0


def test_the_divergence_from_itself_is_zero_and_outlives_an_interrupted_base(tiny, tmp_path):
    model, processor = tiny
    work, base = tmp_path / "work", tmp_path / "base"
    base.mkdir()
    part = answer(model, processor, TASK, quiet_trainer(limit_predict_batches=1), CFG, None, work)
    assert len(part) == 4
    assert len(answer(model, processor, TASK, quiet_trainer(), CFG, None, work)) == 6
    collect(work, base)
    kept = load_file(base / FILE)
    assert {name.rpartition("/")[0] for name in kept} == {record.id for record in TASK.records()[:6]}
    same = answer(model, processor, TASK, quiet_trainer(), replace(CFG, batch_size=2), base=base)
    assert all(abs(line["metadata"]["kl"]) < 1e-5 for line in same)
    with torch.no_grad():
        model.lm_head.weight[:9] *= 3
        moved = answer(model, processor, TASK, quiet_trainer(), CFG, base=base)
        model.lm_head.weight[:9] /= 3
    metrics = TASK.score([as_record(line) for line in moved]).metrics
    assert metrics["kl"] > 1e-3 and {f"kl/{name}" for name in TEXTS} <= {*metrics}


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(NotFiniteError, match=r"prose: .*not finite"):
        prose.score([{"id": "a", "kind": "", "loss": 1e6, "tokens": 2}])
    with pytest.raises(NotFiniteError, match=r"prose: .*not finite"):
        prose.score([{"id": "a", "kind": "", "loss": 1.0, "tokens": 2, "kl": math.inf}])


def test_a_users_own_text_and_json(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(" ".join(f"word{i}" for i in range(100)) for _ in range(3)), encoding="utf-8")
    records = own(text).records()
    assert [record.id for record in records] == ["mine/0", "mine/1", "mine/2"]
    assert records[0].turns[0].answer.split()[0] == f"word{GIVEN}"
    file = tmp_path / "mine.json"
    said = [{"from": who, "value": f"{who} says"} for who in ("human", "gpt") * 2]
    file.write_text(json.dumps([{"id": "one", "conversations": said}]))
    assert [len(record.turns) for record in own(file).records()] == [2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("short.txt", b"a few words", "holds no 40 words"),
        ("latin.txt", b"\xe9" * 90, "cannot be read"),
        ("broken.json", b"[", "broken.json"),
        (
            "pictures.json",
            b'[{"id": "7", "image": "a.png", "conversations": '
            b'[{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]}]',
            "1 of 1 records lack an image, .*'7'.*own folder",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        own(tmp_path / name).records()
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_record_that_the_context_would_cut_is_refused(tiny, tmp_path):
    _, processor = tiny
    short, long = ({"from": "gpt", "value": "word " * count} for count in (9, 900))
    asked = {"from": "human", "value": "what?"}
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps([{"id": name, "conversations": [asked, said]} for name, said in (("a", short), ("b", long))])
    )
    records = own(file).records()
    prose.require_whole(records[:1], processor)
    with pytest.raises(UserError, match=r"1 of 2 records are longer than the \d+ tokens .*'b' with 9\d\d; shorten"):
        prose.require_whole(records, processor)


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_run_compares_with_its_base_and_is_found_again(tmp_path):
    model = save_tiny(tmp_path / "model")
    typed = ("evaluate=prose", "evaluate.limit=6", "evaluate.batch_size=3", "prune=layerwise", "recover=none")
    typed = small(model, tmp_path / "out", *typed, "evaluate.efficiency=false", "evaluate.batch_size=3")
    typed = [each for each in typed if not each.startswith(("evaluate.repeats", "evaluate.new", "evaluate.speed"))]
    first = run(tmp_path / "first", typed)
    base, pruned = (first["stages"][name]["metrics"]["prose"] for name in ("base", "pruned"))
    assert "kl" not in base and pruned["kl"] > 0
    kept = first["stages"]["pruned"]["retained"]
    assert kept["prose/perplexity"] == pytest.approx(base["perplexity"] / pruned["perplexity"])
    assert not any("kl" in name for name in kept)
    again = run(tmp_path / "again", typed)
    assert {"evaluate/base/prose", "evaluate/pruned/prose"} <= {*again["reused"]}
    assert again["stages"]["pruned"]["metrics"] == first["stages"]["pruned"]["metrics"]
