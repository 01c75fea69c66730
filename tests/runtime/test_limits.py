"""A limit of any cgroup around the process counts; pages of files do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from efficientllava.runtime import limits

GIGA = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 100 GB left, and cgroups in a folder."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIGA))
    monkeypatch.setattr(limits.psutil, "swap_memory", lambda: SimpleNamespace(free=2 * GIGA))
    monkeypatch.setattr(limits, "GROUPS", tmp_path)
    monkeypatch.setattr(limits, "OWN", tmp_path / "own")
    return tmp_path


def group(folder, version, most, held, pages):
    folder.mkdir(parents=True, exist_ok=True)
    limit, used, names = limits.FILES[version]
    (folder / limit).write_text(f"{most}\n")
    (folder / used).write_text(f"{held}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {pages // 2}\n" for name in names) + "anon 5\n")


def test_without_groups_it_is_the_machines(machine):
    assert limits.free_memory() == 102 * GIGA


def test_the_tightest_group_counts_and_pages_of_files_are_left(machine):
    (machine / "own").write_text("0::/slurm/job_7/step_0\n")
    group(machine / "slurm/job_7/step_0", 2, "max", 9 * GIGA, 0)
    group(machine / "slurm/job_7", 2, 16 * GIGA, 9 * GIGA, 4 * GIGA)
    group(machine / "slurm", 2, 64 * GIGA, 20 * GIGA, 0)
    assert limits.free_memory() == (16 - 9 + 4 + 2) * GIGA


def test_a_container_that_sees_its_own_group_as_the_root(machine):
    (machine / "own").write_text("12:cpu:/\n11:memory,blkio:/docker/abc\n")
    group(machine / "memory", 1, 8 * GIGA, 1 * GIGA, 0)
    assert limits.free_memory() == (8 - 1 + 2) * GIGA
