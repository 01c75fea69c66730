"""What a cluster is told, without one."""

from __future__ import annotations

import os

import pytest

from efficientllava.launch import on_ray, slurm
from efficientllava.runtime import keeping, processes
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import quoted

from ..runs import composed

OPTIONS = {"cluster": "slurm", "nodes": None, "tasks_per_node": None, "gpus_per_node": None}


def resources(*trainers, **options):
    found = slurm.resources({**OPTIONS, **options}, trainers)
    return [found[key] for key in ("nodes", "tasks_per_node", "gpus_per_node", "processes")]


def test_a_job_asks_slurm_for_what_its_trainer_asks_for():
    assert resources({}) == [1, 1, None, 1]
    assert resources({"accelerator": "gpu", "devices": 8}) == [1, 1, 8, 8]
    assert resources({"accelerator": "gpu", "devices": 8, "num_nodes": 4}) == [4, 8, 8, 1]
    assert resources({"devices": "auto", "accelerator": "gpu"}, gpus_per_node=4) == [1, 1, 4, 4]
    with pytest.raises(UserError, match=r"hydra\.launcher\.nodes=2: jobs of one sweep share their size"):
        resources({"num_nodes": 2}, {})


def test_a_job_asks_ray_for_what_its_trainer_asks_for():
    assert on_ray.resources([{}]) == {"num_cpus": 1, "num_gpus": 0}
    assert on_ray.resources([{"accelerator": "gpu", "devices": 2}]) == {"num_cpus": 2, "num_gpus": 2}
    with pytest.raises(UserError, match="on one machine"):
        on_ray.resources([{"num_nodes": 2}])


def test_what_ray_decides_wins_over_what_was_sent():
    given = {"PATH": "/mine", "CUDA_VISIBLE_DEVICES": "0,1,2", "OMP_NUM_THREADS": "8"}
    here = {"PATH": "/theirs", "CUDA_VISIBLE_DEVICES": "1", "RAY_JOB_ID": "01"}
    assert on_ray.merged(given, here) == {"PATH": "/mine", "CUDA_VISIBLE_DEVICES": "1", "RAY_JOB_ID": "01"}


@pytest.mark.parametrize(
    ("options", "refused"),
    [("rw,vers=4.2", False), ("rw,nolock", True), ("rw,local_lock=all", True), ("rw,local_lock=none", False)],
)
def test_a_folder_whose_locks_other_machines_do_not_see_is_refused(tmp_path, monkeypatch, options, refused):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mounts").write_text(f"/dev/x / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 {options} 0 0\n")
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path))
    if not refused:
        keeping.require_shared_locks(tmp_path / "outputs")
        return
    with pytest.raises(UserError, match="do not see each other's locks"):
        keeping.require_shared_locks(tmp_path / "outputs")


def test_srun_is_torchrun_by_another_name(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    told = {"STEP_NUM_TASKS": 4, "STEP_NUM_NODES": 2, "PROCID": 3, "LOCALID": 1, "NODEID": 1, "JOB_ID": 7, "STEP_ID": 0}
    for name, value in {**told, "STEP_NODELIST": "gpu[03-04]", "NTASKS": 4, "JOB_NAME": "run"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    processes.adopt_srun()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["4", "3", "1", "1", "2", "gpu03", "20112"]
    assert "SLURM_NTASKS" not in os.environ, "Lightning looks for it"
    assert processes.nodes({}) == 2
    processes.require_nodes({"num_nodes": 2})
    with pytest.raises(UserError, match=r"trainer\.num_nodes=3: this run was started on 2"):
        processes.require_nodes({"num_nodes": 3})


def test_a_single_task_of_slurm_is_a_run_of_its_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"STEP_NUM_TASKS": "1", "NTASKS": "1", "PROCID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes.adopt_srun()
    assert not processes.launched() and "SLURM_NTASKS" not in os.environ


@pytest.mark.parametrize("text", ["/a/plain-1.2", "/with space", "/ünï/c=d", "it's"])
def test_any_folder_can_be_typed(text):
    assert composed(f"paths.output_dir={quoted(text)}").paths.output_dir == text
