from __future__ import annotations

import copy
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from efficientllava.models import forward
from efficientllava.recovery import caching
from efficientllava.recovery.caching import CachedTeacher, Row, Wanted
from efficientllava.recovery.recover import RecoveryStats, recover
from efficientllava.recovery.teacher import FINAL, TargetCache, Teacher, hidden_states
from efficientllava.runtime.content import Memo
from efficientllava.runtime.errors import UserError

from .conftest import (
    VOCAB,
    Data,
    drop_layers,
    make_cfg,
    make_factory,
    make_model,
    perturb,
)

ALL = {"sft": 0.2, "logit": 0.3, "hidden": 0.5, "hidden_layers": "all"}


class Asked:
    """A cache that counts how often the teacher is loaded and for which records it runs."""

    def __init__(self, teacher: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads, self.records = 0, []
        self.cache = TargetCache(folder, teacher.config, torch.float32, lambda: self.load(teacher), Memo())
        monkeypatch.setattr(
            "efficientllava.recovery.teacher.hidden_states",
            lambda *args: self.records.extend(args[1]["ids"]) or hidden_states(*args),
        )

    def load(self, teacher: Any) -> Any:
        self.loads += 1
        return copy.deepcopy(teacher)


def shards(asked: Asked) -> list[Path]:
    return list(asked.cache.folder.glob("*.safetensors"))


@pytest.fixture
def teacher() -> Any:
    return make_model()


@pytest.fixture
def asked(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(teacher, tmp_path / "targets", monkeypatch)


def train(student: Any, teacher: Any, workdir: Path, data: Data | None = None, top_k: int = VOCAB, **changes: Any):
    """Recover a copy of a student; returns it with the stats."""
    data, student = data or Data(), copy.deepcopy(student)
    original = changes.pop("original_layers", None)
    cfg = make_cfg(**{"sft": 0.5, "hidden": 0.5, **changes})
    cfg.teacher.top_k = top_k
    stats = recover(
        student, data, cfg, make_factory(), workdir, batch_size=data.batch_size, teacher=teacher,
        original_layers=original,
    )  # fmt: skip
    return student, stats


def same(one: Any, other: Any, tolerance: float) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"logit": 1.0, "sft": 0.0, "hidden": 0.0},
        {"logit": 1.0, "kl": "reverse", "temperature": 1.5},
        {**ALL, "hidden_metric": "cosine"},
    ],
)
def test_cached_answers_train_as_the_live_teacher_does(teacher, asked, tmp_path, weights):
    student = perturb(teacher)
    live, expected = train(student, teacher, tmp_path / "live", lr=1e-3, **weights)
    cached, stats = train(student, asked.cache, tmp_path / "cached", lr=1e-3, **weights)
    assert stats.final_losses == pytest.approx(expected.final_losses, rel=1e-5, abs=1e-6)
    same(cached, live, 1e-5)
    assert asked.loads == 1 and expected.targets is None
    assert stats.targets.records == stats.targets.computed == 24


def test_dropped_layers_are_matched_as_with_the_live_teacher(teacher, asked, tmp_path):
    student = drop_layers(teacher, {1})
    options = {"original_layers": [0, 2, 3], "hidden_layers": "all", "sft": 0.0, "hidden": 1.0, "lr": 1e-3}
    live, _ = train(student, teacher, tmp_path / "live", **options)
    cached, _ = train(student, asked.cache, tmp_path / "cached", **options)
    same(cached, live, 1e-5)
    assert sorted({p.name.partition("-")[0] for p in shards(asked)}) == ["final", "layer_1", "layer_2"]


def test_fewer_tokens_give_another_loss(teacher, asked, tmp_path):
    student = perturb(teacher)
    weights = {"sft": 0.0, "hidden": 0.0, "logit": 1.0, "steps": 1}
    exact, few = (train(student, asked.cache, tmp_path / str(k), top_k=k, **weights)[1] for k in (VOCAB, 3))
    assert 0 < few.final_losses["logit"] < exact.final_losses["logit"]


def test_a_sweep_asks_once(teacher, asked, tmp_path):
    """Other losses, seeds, rates and more epochs read what is there; a new part is the only thing that is added."""
    student = perturb(teacher)
    _, first = train(student, asked.cache, tmp_path / "a")
    for name, changes in {"b": {"lr": 1e-4}, "c": {"train": "projector"}, "d": {"steps": None, "epochs": 2.5}}.items():
        _, stats = train(student, asked.cache, tmp_path / name, **changes)
        assert stats.targets.computed == 0 and stats.targets.bytes == first.targets.bytes
    assert stats.steps == 15 and stats.samples == 60
    assert asked.loads == 1 and sorted(asked.records) == sorted(map(str, range(24)))
    before = {path: path.stat().st_mtime_ns for path in shards(asked)}
    _, stats = train(student, asked.cache, tmp_path / "e", logit=0.5)
    assert asked.loads == 2 and stats.targets.computed == 24
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {p.name.partition("-")[0] for p in shards(asked)} == {"final", f"top_{VOCAB}_at_2"}


def test_only_records_that_are_used_and_new_are_asked_about(teacher, asked, tmp_path):
    student = perturb(teacher)
    _, stats = train(student, asked.cache, tmp_path / "a", steps=2)
    assert stats.targets.records == len(set(asked.records)) == 8
    _, stats = train(student, asked.cache, tmp_path / "b", steps=6)
    assert (stats.targets.records, stats.targets.computed) == (24, 16)
    assert sorted(asked.records) == sorted(map(str, range(24)))


def test_a_killed_pass_goes_on_after_its_finished_shards(teacher, asked, tmp_path, monkeypatch):
    student, batches = perturb(teacher), []
    monkeypatch.setattr(caching, "SHARD_BYTES", 1)  # a shard per batch
    write = caching.save_file

    def killed(*shard: Any) -> None:
        batches.append(1)
        if len(batches) == 4:
            (asked.cache.folder / ".final-x.safetensors.part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(*shard)

    monkeypatch.setattr(caching, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        train(student, asked.cache, tmp_path / "killed")
    assert len(list(asked.cache.folder.glob("*.safetensors"))) == 3
    asked.records.clear()
    cached, stats = train(student, asked.cache, tmp_path / "again")
    assert len(asked.records) == 12 == stats.targets.computed
    assert not list(asked.cache.folder.glob(".*.part"))
    live, _ = train(student, teacher, tmp_path / "live")
    same(cached, live, 1e-5)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-8], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]])
def test_damaged_answers_are_asked_for_again(teacher, asked, tmp_path, monkeypatch, caplog, damage):
    student = perturb(teacher)
    monkeypatch.setattr(caching, "SHARD_BYTES", 1)  # a shard per batch
    expected, first = train(student, asked.cache, tmp_path / "a")
    shard = sorted(shards(asked))[0]
    shard.write_bytes(damage(shard.read_bytes()))
    asked.records.clear()
    again, stats = train(student, asked.cache, tmp_path / "b")
    assert 0 < stats.targets.computed == len(asked.records) < 24 == first.targets.computed
    same(again, expected, 0)
    assert f"{shard.name} is damaged" in caplog.text
    assert train(student, asked.cache, tmp_path / "c")[1].targets.computed == 0


def test_answers_about_another_image_of_the_same_name_do_not_count(teacher, asked, tmp_path, monkeypatch):
    student, stamps = perturb(teacher), [""] * 24
    monkeypatch.setattr(caching, "image_stamps", lambda _, indices: [stamps[index] for index in indices])
    train(student, asked.cache, tmp_path / "a")
    asked.records.clear()
    stamps[5] = "replaced"
    for computed in (1, 0):
        _, stats = train(student, asked.cache, tmp_path / str(computed))
        assert stats.targets.computed == computed
    assert asked.records == ["5"]


def test_the_teacher_is_gone_while_the_student_trains(teacher, asked, tmp_path, monkeypatch):
    train(perturb(teacher), asked.cache, tmp_path / "first")
    monkeypatch.setattr(Teacher, "__call__", lambda *_: pytest.fail("the teacher ran"))
    monkeypatch.setattr(asked, "load", lambda *_: pytest.fail("the teacher was loaded"))
    _, stats = train(perturb(teacher), asked.cache, tmp_path / "second")
    assert stats.steps == 6


def test_the_tower_runs_once_per_image_for_the_pass_and_the_training(teacher, asked, tmp_path, monkeypatch):
    seen, run = [], forward.vision_features
    monkeypatch.setattr(forward, "vision_features", lambda m, pixels: seen.append(len(pixels)) or run(m, pixels))
    train(perturb(teacher), asked.cache, tmp_path, steps=12)
    assert sum(seen) == 18  # of 24 records, every fourth has no image


@pytest.mark.parametrize("change", ["tokens", "labels"])
def test_other_tokens_than_the_teacher_saw_are_refused(teacher, asked, tmp_path, change):
    train(perturb(teacher), asked.cache, tmp_path / "first")
    data = Data()
    get = data.samples.__getitem__

    class Changed(type(data.samples)):
        def __getitem__(self, index: int) -> dict[str, Any]:
            row = get(index)
            if change == "tokens":
                row["ids"] = row["ids"].clone()
                row["ids"][-6] = 1 if row["ids"][-6] != 1 else 2
            else:
                row["labels"][row["length"] - 1] = -100
            return row

    data.samples = Changed()
    with pytest.raises(UserError, match=r"record '\d+'.*saw other ones.*delete that folder"):
        train(perturb(teacher), asked.cache, tmp_path / "second", data)


def test_a_full_disk_is_refused_before_the_teacher_is_loaded(teacher, asked, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 5000))
    with pytest.raises(UserError, match=r"needs about .* GB in .*targets, 5e-06 GB are free; free the disk") as error:
        train(perturb(teacher), asked.cache, tmp_path)
    assert "\n" not in str(error.value) and asked.loads == 0


def test_need_size_and_time_are_told(teacher, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(caching, "SAMPLED", 6)
    _, stats = train(perturb(teacher), asked.cache, tmp_path / "a", logit=0.5, top_k=3)
    told = capsys.readouterr().out
    assert "the teacher is asked about 24 records: about 0.0 MB for final, top_3_at_2" in told
    assert f"24 records, {stats.targets.tokens:,} tokens, {stats.targets.bytes:,} bytes, 24 asked in" in told
    train(perturb(teacher), asked.cache, tmp_path / "b", logit=0.5, top_k=3)
    assert "(from cache)" in capsys.readouterr().out
    files = list(asked.cache.folder.glob("*.safetensors"))
    assert stats.targets.bytes == sum(file.stat().st_size for file in files)
    per_token = Wanted((FINAL,), 3, 2.0).bytes_per_token(24, 4)
    assert sum(numbers(file) for file in files) == stats.targets.tokens * per_token


def numbers(file: Path) -> int:
    """Bytes of the tensors of a shard."""
    with safe_open(file, "pt") as shard:
        return sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118


def test_a_teacher_that_does_not_fit_is_refused_without_loading_it(teacher, asked, tmp_path):
    other = copy.deepcopy(teacher.config)
    other.text_config.hidden_size += 8
    cache = TargetCache(tmp_path / "targets", other, torch.float32, asked.cache.load, Memo())
    with pytest.raises(UserError, match=r"recover\.teacher\.path: the teacher's hidden width is 32"):
        train(perturb(teacher), cache, tmp_path)
    assert asked.loads == 0


def test_parity_is_refused(teacher, asked, tmp_path):
    cfg = make_cfg(sft=0.5, hidden=0.5, parity="vlmcompression")
    cfg.teacher.source = "cached"
    with pytest.raises(UserError, match=r"recover\.teacher\.source=cached, recover\.parity=vlmcompression"):
        recover(perturb(teacher), Data(), cfg, make_factory(), tmp_path, batch_size=4, teacher=asked.cache)


def test_questions_of_a_record_that_are_rows_of_their_own_are_told_apart(tmp_path):
    rows = [Row("a", "first", 2), Row("a", "second", 3), Row("b", "third", 1)]
    states, stamps = torch.randn(6, 4), dict.fromkeys("ab", "")
    shard = caching._Shard(tmp_path, "final", {"a", "b"}, stamps)
    shard.add(rows, {"states": states})
    shard.write()
    source = CachedTeacher(tmp_path, Wanted((FINAL,)), stamps)
    assert source.lacking() == {"final": []} and source.size()[0] == 6
    assert torch.equal(source.read("final", rows[1:])["states"], states[2:])


def test_an_empty_store_lacks_everything(tmp_path):
    nothing = CachedTeacher(tmp_path / "nothing", Wanted((FINAL,)), dict.fromkeys("ab", ""))
    assert nothing.lacking() == {"final": ["a", "b"]}
    with pytest.raises(UserError, match=r"record .a.*was not asked"):
        nothing.read("final", [Row("a", "0", 1)])


def test_stats_are_plain():
    stats = RecoveryStats("1 x CE", "full", 1, 1, 1, 1, 0.0, {})
    assert stats.targets is None
