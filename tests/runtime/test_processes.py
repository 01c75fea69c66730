"""Several processes, one folder: the run of two equals the run of one."""

import ctypes
import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from efficientllava import pipeline
from efficientllava.launch import local
from efficientllava.runtime import processes
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import typed as to_settings
from efficientllava.stages import run as trainers

from ..evaluation.published import publish
from ..runs import (
    ROOT,
    RUN,
    composed,
    environment,
    save_tiny,
    small,
)

# What two processes may change: the order in which float32 gradients of a batch are summed.
LOSS_TOLERANCE = 2e-3
WEIGHT_TOLERANCE = 2e-2


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"devices": 2}, 2),
        ({"devices": "3"}, 3),
        ({"devices": "auto", "accelerator": "cpu", "strategy": "ddp"}, 1),
        ({"devices": -1, "accelerator": "cpu"}, 1),
    ],
)
def test_the_number_of_processes_that_a_trainer_asks_for(trainer, count):
    assert processes.wanted(trainer) == count


def test_threads_are_those_of_one_job_and_no_other():
    before = torch.get_num_threads()
    for count in (before + 1, None):
        with processes.threads(count):
            assert torch.get_num_threads() == (count or before)
    assert torch.get_num_threads() == before


def test_a_single_process_is_its_own_first(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.world_size(), processes.launched()) == (0, 1, False)
    assert processes.from_first("a") == "a"
    assert processes.gather("a") == ["a"]
    assert torch.equal(processes.sum_over(torch.ones(2)), torch.ones(2))
    processes.barrier()


def test_gpus_are_used_where_there_are_any_and_missed_where_they_are_asked_for(monkeypatch):
    for found in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert not processes.on_gpu({"accelerator": "cpu"})
        assert processes.on_gpu({"accelerator": "auto"}) is processes.on_gpu({}) is found
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: torch finds no GPU"):
        processes.on_gpu({"accelerator": "gpu"})


@pytest.mark.parametrize("option", [[], ["trainer.accelerator=cpu"], ["trainer.devices=2"]])
def test_sharding_needs_gpus(monkeypatch, tmp_path, option):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed = ["trainer=fsdp", f"paths.output_dir={tmp_path}", *option]
    with pytest.raises(
        UserError, match=r"^trainer=fsdp: shards the model over GPUs.*trainer=ddp or trainer=cpu$"
    ) as told:
        pipeline.run(composed(*typed), str(tmp_path / "run"), typed)
    assert told.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_only_training_is_sharded(tmp_path, monkeypatch):
    settings = to_settings(composed("trainer=fsdp", "callbacks=none"))
    built = []
    monkeypatch.setattr(trainers, "instantiate", lambda node, **options: built.append({**node, **options}))
    trainers.make_trainer(settings, tmp_path, logger=False)
    trainers.make_trainer(settings, tmp_path, logger=False, training=True)
    assert built[0]["strategy"] == "ddp"
    assert built[1]["strategy"]["_target_"] == "efficientllava.recovery.student.Sharding"


def start(monkeypatch, tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + body)
    monkeypatch.setattr(sys, "argv", [str(script)])
    return local.relaunch(2, ["a=1"], str(tmp_path / "run"))


def test_processes_get_their_place_and_the_folder(monkeypatch, tmp_path):
    body = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(sys.argv[1:]) + os.environ['WORLD_SIZE'])"
    assert start(monkeypatch, tmp_path, body) == 0
    told = f"a=1 hydra.mode=RUN hydra.run.dir={tmp_path}/run hydra.job.num=02"
    assert [(tmp_path / name).read_text() for name in "01"] == [told, told]


def test_the_same_error_of_all_is_told_once(monkeypatch, tmp_path, capfd):
    assert start(monkeypatch, tmp_path, "print('error: x=1: no', file=sys.stderr); sys.exit(2)") == 2
    assert capfd.readouterr().err == "error: x=1: no\n"


def test_when_one_fails_the_others_are_ended_and_it_is_told_who(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(local, "GRACE", 0.2)
    body = "rank or time.sleep(600)\nprint('error: broken', file=sys.stderr); sys.exit(1)"
    assert start(monkeypatch, tmp_path, body) == 1
    assert capfd.readouterr().err == "error: process 1: broken\n"
    assert threading.active_count() < 20


def test_a_process_that_does_not_hear_is_killed(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(local, "GRACE", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert (
        start(monkeypatch, tmp_path, f"if rank:\n    {deaf}\nprint('error: broken', file=sys.stderr); sys.exit(1)") == 1
    )


def shell(command, place):
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=place, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process."""
    place = tmp_path_factory.mktemp("processes")
    model = save_tiny(place / "model")
    typed = [o for o in small(model, place / "out", "prune.ratio=0.3") if o != "trainer=cpu"]
    typed = [o for o in typed if not o.startswith("data.")] + ["data.images=8", "data.test_questions=12"]
    typed = [*typed, "data=digits_vqa", "data.global_batch_size=4", "trainer.accelerator=cpu"]
    typed = [*typed, "calibration.batch_size=2"]
    done = shell([*RUN, *typed, "data.batch_size=4", f"hydra.run.dir={place}/one"], place)
    assert done.returncode == 0, done.stderr
    return place, typed


def compare(place, name):
    one, two = (json.loads((place / run / "results.json").read_text()) for run in ("one", name))
    plans = [json.loads((place / run / "plan.json").read_text()) for run in ("one", name)]
    assert plans[0] == plans[1]
    assert one["ratio"] == two["ratio"]
    for stage, tolerance in (("base", 1e-5), ("pruned", LOSS_TOLERANCE), ("recovered", LOSS_TOLERANCE)):
        left, right = (record["stages"][stage]["metrics"]["digits_vqa"] for record in (one, two))
        assert left["n"] == right["n"] == 12
        assert left["answer_loss"] == pytest.approx(right["answer_loss"], abs=tolerance), stage
    left, right = (load_file(place / run / "recovered" / "model.safetensors") for run in ("one", name))
    assert left.keys() == right.keys()
    assert max(float((left[n].float() - right[n].float()).abs().max()) for n in left) < WEIGHT_TOLERANCE
    assert {p.name for p in (place / name).iterdir()} >= {"plan.json", "pruned", "recovered", "results.json", ".hydra"}
    leftovers = [p for p in (place / "out").rglob("*") if p.suffix in (".partial", ".work")]
    assert leftovers == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_make_the_run_of_one(single):
    place, typed = single
    ddp = [*typed, "trainer=ddp", "trainer.devices=2", "data.batch_size=2", f"hydra.run.dir={place}/two"]
    done = shell([*RUN, *ddp], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything lies in") == 1
    compare(place, "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_score_a_benchmark_as_one_does(tmp_path):
    root = publish(tmp_path / "published", 10)
    typed = ["evaluate=pope", f"evaluate.root={root}", "prune=none", "recover=none", "evaluate.efficiency=false"]
    typed += ["evaluate.batch_size=2", "evaluate.max_new_tokens=4", "logger=none", f"paths.output_dir={tmp_path}/out"]
    found = {}
    for name, trainer in (("one", ["trainer=cpu"]), ("two", ["trainer=ddp", "trainer.devices=2"])):
        done = shell([*RUN, *typed, *trainer, "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/{name}"], tmp_path)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "predictions/base/pope.jsonl").read_text().splitlines()
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["reused"] == []
        assert results["benchmarks"]["pope"]["protocol"] == "llava"
        found[name] = [json.loads(line) for line in lines], results["stages"]["base"]["metrics"]
    assert found["one"] == found["two"]
    assert len(found["two"][0]) == found["two"][1]["pope"]["n"] == 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_the_same_run_also_when_a_process_has_no_calibration_batch(single):
    place, typed = single
    typed = [o for o in typed if not o.startswith("calibration.batch_size")]
    ddp = [
        *typed,
        "trainer=ddp",
        "trainer.devices=2",
        "data.batch_size=2",
        "reuse=false",
        f"hydra.run.dir={place}/torchrun",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "run.py")]
    done = shell([*launch, *ddp], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything lies in") == 1
    compare(place, "torchrun")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fault_before_the_first_stage_is_told_once_and_ends_with_2(single):
    place, typed = single
    bad = [o for o in typed if not o.startswith("model.path=")] + [f"model.path={place}/nowhere"]
    done = shell([*RUN, *bad, "trainer=ddp", "trainer.devices=2", f"hydra.run.dir={place}/bad"], place)
    assert done.returncode == 2
    assert done.stderr.count("no such folder") == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="an allocator of the GNU C library")
@pytest.mark.parametrize("asked", [True, False])
def test_large_blocks_go_back_when_they_are_freed(asked):
    """Every second one is freed, so that those that stay lie between them."""
    program = (
        "import re, sys, torch\n"
        "from efficientllava.runtime import processes\n"
        "def held():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3\n"
        "sys.argv[1] == 'True' and processes.return_large_blocks()\n"
        "first = torch.ones(31 << 20, dtype=torch.uint8)\n"
        "del first\n"  # by itself, the allocator takes this for the size of what it keeps from now on
        "blocks = [torch.ones(13 << 20, dtype=torch.uint8) for _ in range(20)]\n"
        "before = held()\n"
        "del blocks[::2]\n"
        "print(before - held())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(asked)], capture_output=True, text=True, check=True)
    freed = 10 * (13 << 20) / 1e6
    assert (float(done.stdout) > 0.95 * freed) == asked
