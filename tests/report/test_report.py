import csv
import json
import re
import xml.etree.ElementTree
from base64 import b64decode
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from efficientllava.errors import UserError
from efficientllava.report.__main__ import report
from efficientllava.report.advisor import advise
from efficientllava.report.plots import draw, pareto
from efficientllava.report.runs import arms_of, load_runs
from efficientllava.results import build, write

METRIC = "digits_vqa/accuracy"


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
    config = {"seed": seed, "data_frac": frac, "prune": {"name": "widthwise", "ratio": ratio}}
    config |= {
        "recover": {"name": recover, "lr": 1e-3 if recover == "sft" else 1e-4},
        "paths": {"output_dir": str(seed)},
    }
    OmegaConf.save(OmegaConf.create(config), folder / ".hydra" / "config.yaml")
    layers = [{"index": i, "groups": [0, 1 + i % 2], "channels": [0, 3, 7]} for i in (0, 2)]
    (folder / "plan.json").write_text(json.dumps({"layers": layers, "source_layers": 3}))
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
        ("ratio 0.3, none", 2),
        ("ratio 0.3, sft", 2),
        ("ratio 0.6, none", 2),
        ("ratio 0.6, sft", 2),
    ]
    mean, spread = arms[1].mean("retained", METRIC, last=True)
    assert mean == pytest.approx(0.9395) and spread == pytest.approx(0.001 / 2**0.5)
    assert arms[0].mean("stages", "recovered", "parameters") is None


def test_every_plot_that_has_data_is_drawn_and_no_other(sweep):
    names = [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]
    assert names == ["retained", "latency", "bytes", "matrix", "kept", "training"]
    save_run(sweep / "99", 0.3, "sft", 0, frac=0.05)
    assert "data_fraction" in [plot.name for plot in draw(arms_of(load_runs(sweep)), METRIC)]


def test_the_front_holds_what_nothing_beats():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.9), (1.0, 0.6), (4.0, 0.8)]
    assert pareto(points) == [(1.0, 0.6), (2.0, 0.9)]
    for cost, value in points:
        assert any(c <= cost and v >= value for c, v in pareto(points))


def test_the_advisor_names_the_winner_of_each_budget_from_the_runs(sweep):
    lines = advise(arms_of(load_runs(sweep)), METRIC)
    assert len(lines) == 2
    assert lines[0].startswith("30 % of the parameters may go: <b>ratio 0.3, sft</b> retains 94.0 ± 0.1 %")
    assert "next ratio 0.3, none with 88.9 ± 0.1 %; quickest: ratio 0.3, none in 10 instead of 40 s" in lines[0]


def test_the_page_stands_alone_and_shows_every_run(sweep):
    text = report(sweep)
    assert text == (sweep / "results.md").read_text()
    page = (sweep / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "@import" not in page
    assert "<b>=1" not in page and page.count("&lt;b&gt;=1") >= 8  # what users type is text, not markup
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 6
    for image in images:
        assert xml.etree.ElementTree.fromstring(b64decode(image)).tag.endswith("svg")
    assert "94.0 ± 0.1" in page and page.count("<details>") == 8
    assert {path.stem for path in (sweep / "plots").glob("*.png")} >= {"retained", "matrix"}
    with (sweep / "results.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 8


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no results\.json below this folder"):
        report(tmp_path)
