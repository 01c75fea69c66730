"""What stays on disk: in a run's folder, in the cache, and while others are at work."""

from __future__ import annotations

import shutil

import pytest

from efficientllava import pipeline
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.keeping import (
    at_work,
    drop,
    mark,
    require_space,
    tidy,
)

from ..runs import (
    composed,
    run,
    save_tiny,
    small,
)

BARE = ("recover=sft", "recover.steps=1", "evaluate=none", "evaluate.efficiency=false", "prune.selection=local")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def full(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))


def test_a_cache_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    told = pytest.raises(UserError, match=r"paths\.cache_dir=.*file: File exists; give a folder of yours")
    with told, at_work(tmp_path / "file", clean=False):
        pass


def test_too_little_space_is_one_line_with_the_fix(tmp_path, monkeypatch):
    full(monkeypatch, 5_000_000_000)
    assert require_space(tmp_path / "not" / "yet", 5_000_000_000, "prune") == 5_000_000_000
    with pytest.raises(UserError) as told:
        require_space(tmp_path / "not" / "yet", 13_500_000_000, "prune")
    assert str(told.value).startswith(f"prune: needs about 13.5 GB in {tmp_path}/not/yet, 5 GB are free; ")
    assert "keep=" in str(told.value) and "paths.output_dir" in str(told.value) and "\n" not in str(told.value)


def entry(cache, name):
    folder = cache / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_cache_is_cleaned_by_the_last_one_at_work(tmp_path):
    cache = tmp_path / "cache"
    names = ("prune/free", "prune/marked", "recover/linked", "targets/free", "levels/free", "evaluate/small")
    folders = {name: entry(cache, name) for name in names}
    mark(folders["prune/marked"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").hardlink_to(folders["recover/linked"] / "model.safetensors")
    with at_work(cache, clean=False), at_work(cache, clean=True):
        pass
    assert all(folder.is_dir() for folder in folders.values()), "somebody was still at work"
    with pytest.raises(ZeroDivisionError), at_work(cache, clean=True):
        1 / 0  # noqa: B018
    assert all(folder.is_dir() for folder in folders.values()), "what has failed will be run again"
    with at_work(cache, clean=True):
        pass
    assert {name for name, folder in folders.items() if folder.is_dir()} == {
        "prune/marked",
        "recover/linked",
        "evaluate/small",
    }


def test_what_somebody_waits_for_is_not_dropped(tmp_path):
    from filelock import FileLock

    folder = entry(tmp_path, "recover/key")
    with FileLock(f"{folder}.lock"):
        drop(folder)
        assert folder.is_dir()
    drop(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("keep", "left"), [("all", {"pruned", "recovered"}), ("recovered", {"recovered"}), ("none", {})]
)
def test_tidy(tmp_path, keep, left):
    for name in ("pruned", "recovered"):
        entry(tmp_path, name)
    (tmp_path / "plan.json").write_text("{}")
    for _ in range(2):
        tidy(tmp_path, keep)
        assert {path.name for path in tmp_path.iterdir()} == {"plan.json", *left}


def weights(folder):
    return sorted(str(file.parent.relative_to(folder)).split("/")[0] for file in folder.rglob("*.safetensors"))


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_run_keeps_what_it_is_told_and_stays_finished(model, tmp_path, monkeypatch):
    started = []
    execute = pipeline.execute
    monkeypatch.setattr(
        pipeline, "execute", lambda settings, *rest: started.append(settings.keep) or execute(settings, *rest)
    )
    place, out = tmp_path / "run", tmp_path / "out"

    def again(keep):
        return run(place, small(model, out, *BARE, f"keep={keep}"))

    first = again("recovered")
    assert weights(place) == ["recovered"]
    assert weights(out / "cache") == ["recover"], "a run's folder links to it, which costs nothing"
    assert again("none") == again("none") == first and started == ["recovered"]
    assert weights(place) == [] == weights(out / "cache")
    assert (place / "plan.json").is_file()
    made = again("all")
    assert started == ["recovered", "all"], "its checkpoints were gone"
    assert made["stages"] == first["stages"] or made["stages"]["recovered"]["metrics"] == {}
    assert weights(place) == ["pruned", "recovered"] and weights(out / "cache") == ["prune", "recover"]
    other = run(tmp_path / "other", small(model, out, *BARE, "keep=none"))
    assert sorted(other["reused"]) == ["prune", "recover"]
    assert weights(tmp_path / "other") == [] and weights(out / "cache") == ["prune", "recover"]
    shutil.rmtree(place)
    run(tmp_path / "other", small(model, out, *BARE, "keep=none", "reuse=true"))
    assert weights(out / "cache") == ["prune", "recover"], "a run that keeps all has used them"


@pytest.mark.usefixtures("without_fresh_processes")
@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_a_stage_without_room_is_refused_before_it_computes(model, tmp_path, monkeypatch, stage):
    typed = small(model, tmp_path / "out", *BARE)
    if stage == "recover":
        run(tmp_path / "first", small(model, tmp_path / "out", "recover=none", *BARE[2:]))
    for name in ("prune.PruningModule", "recover.train"):
        monkeypatch.setattr(f"efficientllava.stages.{name}", lambda *_, **__: pytest.fail("it computes"))
    full(monkeypatch, 1000)
    with pytest.raises(UserError, match=rf"^{stage}: needs about .* GB in .*cache/{stage}, 1e-06 GB are free") as told:
        pipeline.run(composed(*typed), str(tmp_path / "run"), typed)
    assert told.value.exit_code == 1
    assert not (tmp_path / "run" / "results.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))
