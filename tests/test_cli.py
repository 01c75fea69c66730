"""The command line: exit codes and one clear line per fault, never a traceback."""

import os
import runpy
import shlex
import subprocess
import sys

import pytest

from .runs import (
    ROOT,
    RUN,
    save_tiny,
    small,
)


@pytest.fixture
def cli(monkeypatch, tmp_path, capfd):
    """Run ``run.py`` in this process; returns the exit code and what went to stderr."""

    def call(*args):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("EFFICIENTLLAVA_TRACEBACKS", "0")
        monkeypatch.setattr(
            sys, "argv", ["run.py", *args, f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
        )
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        return int(stop.value.code or 0), capfd.readouterr().err

    return call


def errors(text):
    return [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]


def test_a_sweep_may_type_what_some_of_its_jobs_have_no_use_for(cli, tmp_path):
    code, text = cli(
        "-m", "recover=none,sft", "prune=none,layerwise", "prune.ratio=0.2", "data_frac=0.1", "dry_run=true"
    )
    assert (code, text) == (0, "")
    code, text = cli("-m", "recover=sft,kd_hidden", "recover.lora.r=4", "seed=0,1")
    assert code == 2
    assert errors(text) == ["recover.lora.r: has no effect here; set recover.train=lora, or leave it out"]
    assert not list((tmp_path / "sweep").glob("*/job.log"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["prune=foo"], ["prune/foo", "layerwise", "widthwise"]),
        (["nogroup=foo"], ["nogroup"]),
        (["prune.foo=3"], ["prune.foo", "Key 'foo' not in", "did you mean one of name, method, ratio"]),
        (["prune.ratoi=0.3"], ["prune.ratoi", "did you mean ratio?"]),
        (["recovery=sft"], ["'recovery'", "did you mean recover"]),
        (["+prune.foo=3"], ["prune.foo: unknown key; remove it"]),
        (["recover.method=sft"], ["recover.method", "it is now recover.name"]),
        (["+paths.root=x"], ["paths.root: unknown key; it is now paths.output_dir"]),
        (["prune.ratio=abc"], ["prune.ratio=abc: must be a number in [0, 1)"]),
        (["seed=1.5"], ["seed=1.5: must be a whole number in [0, "]),
        (["recover.lora=x"], ["recover.lora=x: must be set by keys below it"]),
        (["reuse=maybe"], ["reuse=maybe: must be true or false"]),
        (["prune.ratio=1.5"], ["prune.ratio=1.5: must be in [0, 1)"]),
        (["recover=none", "data_frac=0.5"], ["data_frac: has no effect", "choose a recovery"]),
        (["model=checkpoint"], ["model.path: not set"]),
        (["model=checkpoint", "model.path=/no/where", "data=digits_vqa"], ["model.path=/no/where", "no such folder"]),
        (["prune.ratio"], ["prune.ratio"]),
    ],
)
def test_a_fault_in_the_configuration_is_one_line_and_exit_2(cli, args, told):
    code, text = cli(*args)
    assert code == 2
    assert len(errors(text)) == 1
    for part in told:
        assert part in errors(text)[0]
    assert "Traceback" not in text
    assert "+prune.foo=3" not in errors(text)[0]


@pytest.mark.parametrize("path", ["/x/a=b", "/x/a[1]", "/x/a(b)", "~/x", "/x/ü", "/a{b}", '/x/a"b', "/x/a'b", "/x/#y"])
def test_a_path_that_needs_quotes_is_told_with_them(cli, path):
    code, text = cli("seed=1", f"model.path={path}", "dry_run=true")
    (line,) = errors(text)
    assert code == 2 and line.startswith(f"model.path={path}: cannot be read: ")
    (typed,) = shlex.split(line.rpartition("; type ")[2])  # as a shell takes it
    code, text = cli("seed=1", typed, "dry_run=true")
    told = f"model.path={path}: no such folder; give a Hugging Face folder or a hub id such as org/name"
    assert (code, errors(text)) == (2, [told])


@pytest.mark.parametrize("sweep", [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow)], ids=["run", "sweep"])
def test_a_tilde_in_the_paths_is_the_user_s_home(tmp_path, sweep):
    (home := tmp_path / "home").mkdir()
    typed = [*sweep, "dry_run=true", "paths.output_dir='~/my out'", "paths.cache_dir='~/my cache'"]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run([*RUN, *typed], env=environment, cwd=tmp_path, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((home / "my out").rglob("config.yaml"))) == (2 if sweep else 1)
    assert not list(tmp_path.rglob("~*"))


@pytest.mark.parametrize(
    "own",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow),
    ],
    ids=["locale", "encoding"],
)
def test_letters_that_the_terminal_does_not_know_cost_no_run(tmp_path, own):
    folder = save_tiny(tmp_path / "mödel ≥ ½")
    plain = [*small(folder, tmp_path / "öut", "prune=none", "recover=none", "evaluate=none"), "dry_run=true"]
    pairs = [override.partition("=") for override in plain]
    typed = [f'{key}="{value}"' if not value.isascii() else f"{key}={value}" for key, _, value in pairs]
    done = subprocess.run([*RUN, *typed], env={**os.environ, **own}, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"tiny" in done.stdout and b"Error" not in done.stderr


def test_all_problems_are_listed_at_once(cli):
    code, text = cli("prune.ratio=2", "data_frac=0", "recover.temperature=-1", "recover=kd_logit")
    assert code == 2
    assert sorted(line.partition("=")[0] for line in errors(text)) == [
        "data_frac",
        "prune.ratio",
        "recover.temperature",
    ]


def test_an_unexpected_failure_is_one_line_with_a_file_of_details(cli, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("efficientllava.pipeline.run", fail)
    code, text = cli()
    assert code == 1
    (line,) = errors(text)
    assert line.startswith("ZeroDivisionError: first; second (details: ")
    details = line.rpartition("details: ")[2].rstrip(")")
    with open(details) as file:
        assert "Traceback" in file.read()
    os.unlink(details)


def test_a_torchvision_of_another_torch_is_told_as_such(cli, monkeypatch):
    def fail(*_):
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'LlavaProcessor'") from error

    monkeypatch.setattr("efficientllava.pipeline.run", fail)
    code, text = cli()
    assert code == 2
    assert errors(text) == ["torchvision: is not built for this torch; install the one that is, or pip uninstall it"]


def test_a_full_disk_is_told_as_such(cli, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "/data/metrics.csv")

    monkeypatch.setattr("efficientllava.pipeline.run", fail)
    code, text = cli()
    assert code == 1
    assert errors(text) == ["/data/metrics.csv: the disk is full; free some space and run again"]


def test_a_bad_job_of_a_sweep_fails_alone(cli, monkeypatch):
    from efficientllava.runtime.errors import UserError

    done = []

    def body(config, *_):
        if config.seed == 1:
            raise UserError("seed=1: not today")
        if config.seed == 2:
            raise ZeroDivisionError("zero")
        done.append(config.seed)

    monkeypatch.setattr("efficientllava.pipeline.run", body)
    code, text = cli("-m", "seed=0,1,2,3")
    assert code == 1
    assert done == [0, 3]
    lines = errors(text)
    assert lines[0] == "job 1: seed=1: not today"
    assert lines[1].startswith("job 2: ZeroDivisionError: zero (details: ")
    assert lines[2:] == ["2 jobs of the sweep failed: [1, 2]"]
    os.unlink(lines[1].rpartition("details: ")[2].rstrip(")"))


def test_a_sweep_in_which_all_is_well_ends_with_0(cli, monkeypatch):
    monkeypatch.setattr("efficientllava.pipeline.run", lambda *_: 0.5)
    assert cli("-m", "seed=0,1")[0] == 0


@pytest.mark.parametrize("args", [["--cfg", "job", "--resolve"], ["--info", "defaults"], ["--cfg", "hydra"]])
def test_hydra_shows_its_configuration(args, capfd, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    assert not stop.value.code
    shown = capfd.readouterr().out
    assert {"--cfg": "tiny_llava", "--info": "conf"}[args[0]] in shown or args[1] == "hydra"


def test_help_is_grouped_and_takes_less_than_two_seconds():
    before = os.times()
    done = subprocess.run([*RUN, "--help"], capture_output=True, text=True, check=True)
    after = os.times()
    for part in (
        "== Use ==",
        "== Groups",
        "prune: 2ssp, auto, flap",
        "evaluate: ai2d, digits_and_prose, digits_vqa, docvqa",
        "vlmcompression_llava_w15",
        "# in (0, 1]: fraction of the",
        "recover: kd_both",
        "== Configuration ==",
    ):
        assert part in done.stdout
    # Time of the processor, so that a busy machine does not matter.
    used = after.children_user - before.children_user + after.children_system - before.children_system
    assert used < 2


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_pipe_that_closes_early_is_no_error(reader):
    done = subprocess.run(
        f"{sys.executable} {ROOT / 'run.py'} --help | {reader}; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("efficientllava" if reader != "true" else "")


def test_a_run_from_the_shell_ends_with_0_and_without_a_warning_of_a_library_and_a_bad_one_with_2(tmp_path):
    model, trained = save_tiny(tmp_path / "model"), ("prune=none", "recover=sft", "recover.train=lora")
    args = small(model, tmp_path / "out", *trained, "recover.steps=1", "evaluate=none", "evaluate.efficiency=false")
    args.append(f"hydra.run.dir={tmp_path}/run")
    done = subprocess.run([*RUN, *args], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / ".hydra" / "overrides.yaml").is_file()
    (model / "model.safetensors").write_bytes(b"no")
    done = subprocess.run([*RUN, *args], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert len(errors(done.stderr)) == 1
    assert "Traceback" not in done.stderr


def test_an_output_folder_that_cannot_be_made_is_one_line():
    done = subprocess.run([*RUN, "paths.output_dir=/proc/nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: paths.output_dir: /proc/nope" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
