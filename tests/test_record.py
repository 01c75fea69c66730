import json
import math
import os
import re
import subprocess

import pytest

from efficientllava import record
from efficientllava.runtime.errors import UserError


def make(stages=None, **changes):
    stages = stages or {
        "base": {
            "parameters": 100,
            "metrics": {"t": {"accuracy": 0.8, "accuracy/count": 0.5, "answer_loss": 0.1, "n": 20}},
        },
        "pruned": {
            "parameters": 60,
            "metrics": {"t": {"accuracy": 0.6, "accuracy/count": 0.0, "answer_loss": 0.4, "n": 20}},
        },
        "recovered": {
            "parameters": 60,
            "metrics": {"t": {"accuracy": 0.8, "accuracy/count": 0.6, "answer_loss": 0.1, "n": 20}},
        },
    }
    values = {
        "ratio": {"requested": 0.5, "achieved": 0.49},
        "samples": {"calibration": 64, "recovery": 200},
        "seconds": {"prune": 1.0, "recover": 2.0, "evaluate": 3.0},
        "seed": 0,
        "config_digest": "abc",
        "overrides": ["prune=widthwise"],
    }
    return record.build(stages, **(values | changes))


def test_build_has_the_keys_of_the_contract():
    built = make(reused=["prune", "evaluate/base"])
    assert {*record.REQUIRED, "reused"} == set(built)
    assert built["reused"] == ["evaluate/base", "prune"]
    assert set(built["versions"]) == {"python", "torch", "transformers", "lightning", "peft", "efficientllava"}
    assert all(re.match(r"\d+\.\d+", version) for version in built["versions"].values())


def test_retained_is_the_share_of_the_base_score():
    built = make()
    assert "retained" not in built["stages"]["base"]
    assert built["stages"]["pruned"]["retained"] == pytest.approx({"t/accuracy": 0.75, "t/accuracy/count": 0})
    assert built["stages"]["recovered"]["retained"] == pytest.approx({"t/accuracy": 1, "t/accuracy/count": 1.2})


def test_of_a_score_of_which_less_is_better_the_share_is_upside_down():
    metrics = {"perplexity": 20.0, "perplexity/novel": 50.0, "kl": 0.1, "n_tokens": 9, "n": 1}
    base = {"perplexity": 10.0, "perplexity/novel": 60.0, "kl": 0.2, "n_tokens": 9, "n": 1}
    assert record.retained({"prose": metrics}, {"prose": base}) == {
        "prose/perplexity": 0.5,
        "prose/perplexity/novel": 1.2,
    }


def test_a_base_score_of_zero_has_no_retained_fraction():
    assert record.retained({"t": {"accuracy": 0.5, "f1": 0.2}}, {"t": {"accuracy": 0.0}}) == {}


def test_round_trip_of_file_and_folder(tmp_path):
    built = make()
    record.write(built, tmp_path / "results.json")
    assert record.read(tmp_path) == record.read(tmp_path / "results.json") == built
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_json_cannot_hold_is_null(tmp_path):
    record.write(make(extra=[math.nan, (math.inf, 1.0)]), tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["extra"] == [None, [None, 1.0]]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    record.write(make(seed=1), path)

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free the disk"):
        record.write(make(seed=2), path)
    assert record.read(path)["seed"] == 1 and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSON"), ("[]", "lacks ratio, stages"), ('{"ratio": {}}', "lacks stages"), (None, "cannot be read")],
)
def test_reading_something_else_is_a_user_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        record.read(tmp_path / "results.json")


def test_lookup_by_dotted_key():
    built = make()
    assert record.lookup(built, "stages.recovered.metrics.t.accuracy") == 0.8
    assert record.lookup(built, "stages.recovered.metrics.t.accuracy/count") == 0.6
    with pytest.raises(UserError, match=r"stages\.recovered has .*metrics"):
        record.lookup(built, "stages.recovered.score")
    with pytest.raises(UserError, match="not a number"):
        record.lookup(built, "stages.recovered")
    with pytest.raises(UserError, match="has nothing"):
        record.lookup(built, "seed.deeper")


@pytest.mark.skipif(not record.commit(), reason="not in a git checkout")
def test_commit_is_the_checkouts():
    folder = os.path.dirname(record.__file__)
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record.commit().removesuffix("+dirty") == head.stdout.strip()


def test_outside_a_checkout_the_commit_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "efficientllava" / "results.py"))
    assert record.commit() == ""
