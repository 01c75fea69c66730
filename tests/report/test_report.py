import csv
import json
import re
import xml.etree.ElementTree
from base64 import b64decode
from collections import namedtuple
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pandas import DataFrame, Series

from efficientllava.record import (
    build,
    metric_keys,
    read,
    write,
)
from efficientllava.report import kept_shares
from efficientllava.report.page import _noise, advise, report
from efficientllava.report.plots import draw, pareto, smoothed, spread
from efficientllava.report.runs import arms_of, load_runs
from efficientllava.runtime.errors import UserError

METRIC = "digits_vqa/accuracy"
Row = namedtuple("Row", "retained retained_count retained_spread base questions")


def save_run(folder: Path, ratio: float, recover: str, seed: int, frac: float = 1.0) -> None:
    """A run as the pipeline leaves it: recovery wins by 5 points, every tenth removed costs 2."""
    final = 1 - 0.2 * ratio - (0.05 if recover == "none" else 0.0) - 0.001 * seed - 0.01 * (1 - frac)

    def stage(accuracy, size):
        return {
            "parameters": int(1000 * size),
            "language_parameters": int(800 * size),
            "checkpoint_bytes": int(2000 * size),
            "latency_ms": {"prefill": 5 * size, "decode": 2 * size},
            "metrics": {"digits_vqa": {"accuracy": accuracy, "answer_loss": 1 - accuracy, "n": 100}},
        }

    stages = {"base": stage(1.0, 1), "pruned": stage(final, 1 - ratio)}
    if recover != "none":
        stages["recovered"] = stage(final, 1 - ratio)
    overrides = [f"prune.ratio={ratio}", f"recover={recover}", f"seed={seed}", f"data_frac={frac}", "<b>=1"]
    results = build(
        stages,
        ratio={"requested": ratio, "achieved": ratio + 0.001},
        samples={"calibration": 64, "recovery": 200},
        seconds={"prune": 10.0, "recover": 0.0 if recover == "none" else 30.0, "evaluate": 1.0},
        seed=seed,
        config_digest="0",
        overrides=overrides,
        model="builtin:tiny_llava",
    )
    (folder / ".hydra").mkdir(parents=True)
    (folder / "logs").mkdir()
    write(results, folder / "results.json")
    config = {"seed": seed, "data_frac": frac, "prune": {"name": "widthwise", "method": "widthwise", "ratio": ratio}}
    config |= {
        "recover": {"name": recover, "lr": 1e-3 if recover == "sft" else 1e-4},
        "paths": {"output_dir": str(seed)},
    }
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    layers = [{"index": i, "groups": [0, 1 + i % 2], "channels": [0, 3, 7]} for i in (0, 2)]
    (folder / "plan.json").write_text(json.dumps({"layers": layers, "source_units": [(4, 8)] * 3}))
    (folder / "logs" / "metrics.csv").write_text("step,recover/loss\n0,1.0\n1,\n2,0.5\n")


@pytest.fixture
def sweep(tmp_path):
    number = 0
    for ratio in (0.3, 0.6):
        for recover in ("none", "sft"):
            for seed in (0, 1):
                save_run(tmp_path / str(number), ratio, recover, seed)
                number += 1
    return tmp_path


def test_arms_are_runs_that_differ_in_their_seed(sweep):
    arms = arms_of(load_runs(sweep))
    assert [(arm.label(), len(arm.runs)) for arm in arms] == [
        ("none, ratio 0.3", 2),
        ("sft, ratio 0.3", 2),
        ("none, ratio 0.6", 2),
        ("sft, ratio 0.6", 2),
    ]
    mean, spread = arms[1].mean(f"final/retained/{METRIC}")
    assert mean == pytest.approx(0.9395) and spread == pytest.approx(0.001 / 2**0.5)
    assert arms[0].mean("recovered/parameters") is None


def test_every_plot_that_has_data_is_drawn_and_no_other(sweep):
    names = [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]
    maps = ["matrix", "kept_groups", "kept_channels"]
    assert names == ["retained", "latency", "bytes", *maps, "training_none", "training_sft"]
    save_run(sweep / "99", 0.3, "sft", 0, frac=0.05)
    assert "data_fraction" in [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]
    (plot,) = (plot for plot in draw(arms_of(load_runs(sweep)), METRIC) if plot.name == "matrix")
    # What was not recovered knows no share of data: it stands beside every share.
    cells = [text.get_text() for text in plot.figure.axes[0].texts]
    assert cells == ["88.9", "94.0", "82.9", "87.9", "88.9", "93.0"]


def test_a_damaged_curve_is_told_and_left_out(sweep, caplog):
    for number in (2, 3, 6, 7):
        (sweep / str(number) / "logs" / "metrics.csv").write_bytes(b"step,recover/loss\n0,\xff\n")
    assert "training_sft" not in [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]
    assert "metrics.csv: is damaged" in caplog.text and "left out" in caplog.text


def test_files_for_llama_cpp_have_plots_and_columns(sweep):
    for number in range(8):
        results = read(sweep / str(number))
        for stage in results["stages"].values():
            size = stage["checkpoint_bytes"] / 2
            stage["gguf"] = {"q8_0": {"bytes": size, "decode_ms": size / 1000, "decode": 1e6 / size}}
        write(results, sweep / str(number) / "results.json")
    names = [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]
    assert [name for name in names if "gguf" in name] == ["gguf_q8_0_bytes", "gguf_q8_0_decode"]
    report(sweep, METRIC)
    page = (sweep / "report.html").read_text()
    assert "q8_0, ms of CPU per token" in page and "f16 file" not in page


def test_one_run_and_one_ratio_have_plots_of_their_own(tmp_path):
    save_run(tmp_path / "0", 0.3, "sft", 0)
    arms = arms_of(load_runs(tmp_path))
    assert [arm.label() for arm in arms] == ["widthwise, sft"]
    names = [plot.name for plot in draw(arms, METRIC)]
    assert names == ["retained", "latency", "bytes", "kept_groups", "kept_channels", "training_sft"]
    assert advise(arms, METRIC) == {}
    report(tmp_path)
    assert "1 run in 1 configuration, 1 seed" in (tmp_path / "report.html").read_text()


def edit(folder: Path, change) -> None:
    """Change what a run has recorded."""
    results = read(folder)
    change(results)
    write(results, folder / "results.json")


def test_what_only_a_preset_says_tells_arms_apart_and_a_seed_counts_once(sweep):
    for folder in sweep.iterdir():
        edit(folder, lambda results: results.update(overrides=["experiment=x"]))
    assert [(arm.label(), len(arm.runs)) for arm in arms_of(load_runs(sweep))] == [
        (f"{recover}, ratio {ratio}", 2) for ratio in (0.3, 0.6) for recover in ("none", "sft")
    ]
    save_run(sweep / "again", 0.3, "none", 1)
    assert [len(arm.runs) for arm in arms_of(load_runs(sweep))] == [2] * 4


def test_what_a_name_decides_is_no_part_of_a_label(sweep):
    for folder in sweep.iterdir():  # lr goes with the recovery here, damping with nothing
        edit(folder, lambda results: results["overrides"].extend(["recover.lr=1", "prune.damping=1"]))
    config = OmegaConf.load(sweep / "0" / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"prune": {"damping": 0.1}}), sweep / "0" / ".hydra" / "config.yaml")
    labels = [arm.label() for arm in arms_of(load_runs(sweep))]
    assert labels[:2] == ["none, ratio 0.3, damping 0.1", "none, ratio 0.3"] and "sft, ratio 0.6" in labels


def test_every_model_has_plots_and_advice_of_its_own(sweep):
    for folder in sorted(sweep.iterdir()):
        if int(folder.name) % 2:
            edit(folder, lambda results: results.update(model="builtin:tiny_bunny"))
            config = OmegaConf.load(folder / ".hydra" / "config.yaml")
            OmegaConf.save(OmegaConf.merge(config, {"model": {"name": "bunny"}}), folder / ".hydra" / "config.yaml")
    report(sweep)
    page = (sweep / "report.html").read_text()
    assert page.count("<h3>bunny</h3><ul>") == 1 and page.count("At least 60 %") == 2
    assert (sweep / "plots" / "retained_bunny.png").exists()


def test_a_score_that_is_not_finite_is_left_out_and_said(sweep):
    def lose(results):
        results["stages"]["recovered"]["retained"][METRIC] = float("nan")

    edit(sweep / "2", lose)
    assert "| 93.9 (n = 1) |" in report(sweep)
    assert ">93.9 (n = 1)</td>" in (sweep / "report.html").read_text()


def test_kept_units_are_shares_of_what_the_plan_says_there_was(sweep):
    assert kept_shares(sweep / "0", "groups") == [50.0, 0.0, 50.0]
    assert kept_shares(sweep / "0", "channels") == [37.5, 0.0, 37.5]
    plan = json.loads((sweep / "0" / "plan.json").read_text())
    genes = [
        {"layer": layer, "kind": kind, "amounts": [0.0, 0.25]} for layer in (0, 1) for kind in ("attention", "mlp")
    ]
    (sweep / "0" / "search.json").write_text(json.dumps({"genes": genes, "best": [0, 1, 1, 1]}))
    (sweep / "0" / "plan.json").write_text(json.dumps({**plan, "details": {"sparsity": 0.2}}))
    assert kept_shares(sweep / "0", "groups") == [100.0, 75.0] and kept_shares(sweep / "0", "channels") == [75.0, 75.0]
    (sweep / "0" / "plan.json").write_text(json.dumps({"layers": plan["layers"], "source_layers": 3}))
    assert kept_shares(sweep / "0", "groups") is None  # a plan of an earlier version


def test_masks_have_an_axis_of_their_own_and_no_advice(sweep):
    for folder in sweep.iterdir():
        ratio = OmegaConf.load(folder / ".hydra" / "config.yaml").prune.ratio
        edit(folder, lambda results, ratio=ratio: results.update(ratio={"achieved": 0.0, "sparsity": ratio}))
        (folder / "plan.json").unlink()
    arms = arms_of(load_runs(sweep))
    plot = next(plot for plot in draw(arms, METRIC) if plot.name == "retained_masks")
    assert "zero" in plot.figure.axes[0].get_xlabel() and advise(arms, METRIC) == {}


def test_labels_are_pushed_apart_and_no_further():
    assert spread([0.2, 0.5], [0.1, 0.1]) == [0.2, 0.5]
    assert spread([0.5, 0.5, 0.52], [0.1] * 3) == pytest.approx([0.5, 0.6, 0.7])
    assert spread([0.9, 1.0], [0.2, 0.2]) == pytest.approx([0.7, 0.9])
    assert smoothed(Series([1.0, 1.0, 1.0])).tolist() == pytest.approx([1.0] * 3)
    assert smoothed(Series([0.0, 1.0]))[1] == pytest.approx(1 / 1.9)


def test_the_front_holds_what_nothing_beats():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.9), (1.0, 0.6), (4.0, 0.8)]
    front = [tuple(point) for point in pareto(DataFrame(points, columns=["x", "y"])).to_numpy()]
    assert front == [(1.0, 0.6), (2.0, 0.9)]
    for cost, value in points:
        assert any(c <= cost and v >= value for c, v in front)


def test_the_advisor_names_the_winner_of_each_budget_from_the_runs(sweep):
    advice = advise(arms_of(load_runs(sweep)), METRIC)
    assert [*advice] == ["30 %", "60 %"]
    # What removes more meets the budget too.
    assert "Without training: <b>none, ratio 0.3</b> retains 88.9 ± 0.1 %." in advice["30 %"]
    winner = "<b>sft, ratio 0.6</b> retains 87.9 ± 0.1 %, next none, ratio 0.6 with 82.9 ± 0.1 %."
    assert f"With up to 100 % of the recovery data: {winner}" in advice["60 %"]


def test_the_noise_of_one_seed_is_that_of_its_score_over_the_base():
    one, other = (Row(retained, 1, 0.0, 0.5, 2000) for retained in (0.984, 0.97))
    shares = (0.492, 0.485)
    error = sum(share * (1 - share) / 2000 for share in shares) ** 0.5 / 0.5
    assert _noise(one, other) == pytest.approx(1.96 * error, rel=1e-3)
    several = [Row(0.9, 5, 0.01, 0.5, 2000)] * 2
    assert _noise(*several) == pytest.approx(2.306 * 0.01 * (2 / 5) ** 0.5, rel=1e-2)


def test_runs_without_training_have_no_share_of_data(tmp_path):
    for number, (recover, frac) in enumerate([("none", 0.05), ("none", 1.0), ("sft", 0.05), ("sft", 1.0)]):
        save_run(tmp_path / str(number), 0.3, recover, 0, frac)
    assert len(arms_of(load_runs(tmp_path))) == 3


def test_runs_of_which_half_is_left_are_left_out_and_told(sweep, caplog):
    (sweep / "0" / ".hydra" / "config.yaml").write_text("prune: {name: 'wid")
    (sweep / "1" / "results.json").write_text('{"stages": {')
    found = load_runs(sweep)
    assert [run.folder.name for run in found][:1] == ["2"] and caplog.text.count("is damaged and left out") == 2
    for folder in sweep.iterdir():
        (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match="damaged; do them again"):
        load_runs(sweep)


def test_the_advisor_says_what_is_within_the_noise_and_what_the_study_advises(tmp_path):
    for number, (recover, seed) in enumerate([("sft", 0), ("sft", 1), ("kd_hidden", 0), ("kd_hidden", 1)]):
        save_run(tmp_path / str(number), 0.6, recover, seed)
        results = read(tmp_path / str(number))
        results["stages"]["recovered"]["retained"][METRIC] += 0.001 * (recover == "sft")
        results["seconds"]["recover"] = 30 if recover == "sft" else 3
        write(results, tmp_path / str(number) / "results.json")
    (lines,) = advise(arms_of(load_runs(tmp_path)), METRIC).values()
    line = " ".join(lines)
    assert "<b>sft</b> retains 88.1 ± 0.1 %, next kd_hidden with 87.9 ± 0.1 %; the difference to it is within" in line
    assert "kd_hidden is as good as far as these runs can tell, and takes 13 s to prune and recover" in line
    assert "The study's choice with training, widthwise and kd_hidden: kd_hidden retains 87.9 ± 0.1 %." in line
    for number in (1, 3):
        (tmp_path / str(number) / "results.json").unlink()
    for points in (1, 2000):  # a share of 100 questions, and points as of MME: neither tells 0.1 points apart
        for number in (0, 2):
            results = read(tmp_path / str(number))
            for stage in results["stages"].values():
                task, name = METRIC.split("/")
                stage["metrics"][task][name] *= points
            write(results, tmp_path / str(number) / "results.json")
        (lines,) = advise(arms_of(load_runs(tmp_path)), METRIC).values()
        line = " ".join(lines)
        assert "88.1 % (one seed)" in line and "within the noise" in line
    for number in (0, 2):
        results = read(tmp_path / str(number))
        stage = results["stages"]["recovered"]
        stage["retained"]["prose/perplexity"], stage["metrics"]["prose"] = stage["retained"][METRIC], {"n": 100}
        write(results, tmp_path / str(number) / "results.json")
    (lines,) = advise(arms_of(load_runs(tmp_path)), "prose/perplexity").values()
    assert "within the noise" not in " ".join(lines)  # a perplexity is no share of questions


def test_the_page_stands_alone_and_shows_every_run(sweep):
    text = report(sweep)
    assert text == (sweep / "results.md").read_text()
    page = (sweep / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|fetch|XMLHttp|https?:""", page)
    assert "<b>=1" not in page and page.count("&lt;b&gt;=1") >= 8  # what users type is text, not markup
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == len(list(draw(arms_of(load_runs(sweep)), METRIC)))
    for image in images:
        assert xml.etree.ElementTree.fromstring(b64decode(image)).tag.endswith("svg")
    assert "94.0 ± 0.1" in page and page.count("<details>") == 8
    assert {path.stem for path in (sweep / "plots").glob("*.png")} >= {"retained", "matrix"}
    assert "python run.py prune.ratio=0.3 recover=none seed=0 data_frac=1.0 &#39;&lt;b&gt;=1&#39;" in page
    report(sweep)
    assert (sweep / "report.html").read_text() == page
    with (sweep / "results.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 8


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no results\.json below this folder; "):
        report(tmp_path)
    (tmp_path / "7" / ".hydra").mkdir(parents=True)
    OmegaConf.save(["seed=1"], tmp_path / "7" / ".hydra" / "overrides.yaml")
    (tmp_path / "7" / "job.log").write_text("error: out of memory")
    assert "| 7 | `seed=1` | failed: out of memory (" in report(tmp_path)
    assert "out of memory" in (tmp_path / "report.html").read_text()


def test_an_unknown_metric_is_refused_with_those_that_there_are(sweep):
    with pytest.raises(UserError, match=r"digits_vqa/acuracy: no run .* there are digits_vqa/accuracy$"):
        report(sweep, "digits_vqa/acuracy")


def test_points_are_no_percentages_and_a_run_without_a_score_still_has_a_page(tmp_path):
    save_run(tmp_path / "0", 0.3, "sft", 0)
    results = read(tmp_path / "0")
    for stage in results["stages"].values():
        stage["metrics"] = {"mme": {"n": 7, "perception": 1500.0}}
    write(results, tmp_path / "0" / "results.json")
    assert "| 1500.0 | 1500.0 | 1500.0 |" in report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "mme/perception" in page and "<th>base</th>" in page and ">1500.0<" in page
    for stage in results["stages"].values():
        stage["metrics"] = {"mmvet": {"n": 7}}
    write(results, tmp_path / "0" / "results.json")
    report(tmp_path)
    assert "<th>checkpoint, MiB</th>" in (tmp_path / "report.html").read_text()


def test_runs_that_asked_no_benchmark_are_compared_by_their_loss_on_unseen_records(sweep):
    for number in range(8):
        results = read(sweep / str(number))
        for position, stage in enumerate(results["stages"].values()):
            stage.update(metrics={}, report_loss=1.0 + position / 4)
        write(results, sweep / str(number) / "results.json")
    text = report(sweep)
    assert "pruned, loss on unseen records" in text and "1.250" in text and "retained" not in text
    assert "loss on unseen records" in (sweep / "report.html").read_text()
    rows = list(csv.DictReader((sweep / "results.csv").open()))
    assert {row["base_report_loss"] for row in rows} == {"1.0"}


def test_runs_without_results_are_told_with_their_last_error(sweep):
    (sweep / "3" / "results.json").unlink()
    OmegaConf.save(["recover=sft", "x=a b"], sweep / "3" / ".hydra" / "overrides.yaml")
    (sweep / "3" / "job.log").write_text("error: out of memory <0>\nend\n")
    report(sweep)
    page = (sweep / "report.html").read_text()
    assert "1 run without results" in page and page.count("<details>") == 7
    assert "python run.py recover=sft &#39;x=a b&#39;</code><br>3: failed: out of memory &lt;0&gt; (" in page


def test_the_command_of_a_sweep_can_be_typed_again(sweep):
    overrides = {"task": ["prune.ratio=0.3,0.6"], "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=gpu_pool"]}
    OmegaConf.save({"hydra": {"overrides": overrides}}, sweep / "multirun.yaml")
    report(sweep)
    page = (sweep / "report.html").read_text()
    assert "python run.py -m hydra/launcher=gpu_pool prune.ratio=0.3,0.6</pre>" in page


def test_where_a_metric_stands():
    assert metric_keys(METRIC) == ("metrics", "digits_vqa", "accuracy")
    assert metric_keys("digits_vqa/accuracy/text_copying") == ("metrics", "digits_vqa", "accuracy/text_copying")
    assert metric_keys("lmms_eval/mme/mme_score") == ("metrics", "lmms_eval/mme", "mme_score")
