"""Our numbers beside the published ones, on made-up runs."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from efficientllava.record import build, read, write
from efficientllava.report import study
from efficientllava.report.page import report
from efficientllava.report.runs import Run, load_runs

METRIC = "digits_vqa/accuracy"
SPECS = OmegaConf.to_container(OmegaConf.load(study.PUBLISHED))


def made_up(folder, experiment, name, kept, seed=0, model="tiny_llava", achieved=None, **config):
    """A run that keeps a share of the accuracy, half as much loss on text-only questions."""
    base = {"accuracy": 0.8, "accuracy_image": 0.8, "accuracy_text": 0.8, "n": 10}
    scores = {"accuracy": 0.8 * kept, "accuracy_image": 0.8 * kept, "accuracy_text": 0.4 + 0.4 * kept}
    ratio = config.get("prune", {}).get("ratio", 0.6)
    results = build(
        {"base": {"metrics": {"digits_vqa": base}}, "pruned": {"metrics": {"digits_vqa": scores}}},
        ratio={"requested": ratio, "achieved": ratio if achieved is None else achieved},
        samples={"calibration": 64, "recovery": 0},
        seconds={"prune": 1.0, "recover": 0.0, "evaluate": 1.0},
        seed=seed,
        config_digest="0",
        overrides=[f"experiment={experiment}", f"name={name}", f"seed={seed}"],
    )
    (folder / ".hydra").mkdir(parents=True)
    write(results, folder / "results.json")
    told = {"name": name, "model": {"name": model}, "prune": {"ratio": 0.6}, "data_frac": 1.0, **config}
    OmegaConf.save(OmegaConf.create(told), folder / ".hydra" / "config.yaml")


def panels(folder):
    return study.panels_of(load_runs(folder), METRIC)


def rows_of(text):
    """Cells by the first one of their line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_seeds_are_averaged_beside_what_the_paper_prints_for_the_family(tmp_path):
    for seed, kept in enumerate((0.90, 0.94)):
        made_up(tmp_path / f"w{seed}", "paradigms", "widthwise", kept, seed, prune={"ratio": 0.3})
    made_up(tmp_path / "l", "paradigms", "layerwise", 0.5, prune={"ratio": 0.3}, achieved=0.246)
    made_up(tmp_path / "v", "paradigms", "widthwise", 0.01, model="mini_internvl_4b", prune={"ratio": 0.6})
    llava, internvl, *lost = panels(tmp_path)
    assert [(panel.experiment, panel.model) for panel in lost] == [
        ("modality", llava.model),
        ("modality", internvl.model),
    ]
    rows = rows_of(study.markdown([llava]))
    assert set(rows["prune.ratio"]) == {"layerwise", "widthwise", "*widthwise*", "*layerwise*"}
    cells = dict(zip(rows["prune.ratio"], rows["30 %"], strict=True))
    assert cells["widthwise"] == "92.0 ± 2.8" and cells["layerwise"] == "50.0 at 24.6 %"
    assert (cells["*widthwise*"], cells["*layerwise*"]) == ("79.9", "69.2")
    text = study.markdown([internvl])
    assert rows_of(text)["60 %"] == ["1.0", "7.0†", "4.8†"]
    assert text.count("† suspect: ") == 1 and "5.77 %" in text


def test_an_arm_is_a_row_and_what_follows_the_at_sign_a_column(tmp_path):
    for number, (name, kept) in enumerate({"sft": 0.9, "kl": 0.8, "kl@study": 0.7}.items()):
        made_up(tmp_path / str(number), "recovery", name, kept)
    [panel] = panels(tmp_path)
    rows = rows_of(study.markdown([panel]))
    head = ["normalised per token", "as the study released it", "*LLaVA*", "*Mini-InternVL*", "*Bunny*"]
    assert rows["arm"] == head
    assert rows["kl"] == ["80.0", "70.0", "59.6", "63.9†", "65.9"]
    assert rows["sft"] == ["90.0", "-", "75.5", "69.7†", "78.3"]


def test_data_fractions_are_relative_to_all_data(tmp_path):
    made_up(tmp_path / "a", "data_fraction", "epochs", 0.6, data_frac=0.05)
    made_up(tmp_path / "b", "data_fraction", "epochs", 0.8, data_frac=1.0)
    [panel] = panels(tmp_path)
    assert panel.ours["epochs"][0.05].mean == pytest.approx(75)
    rows = rows_of(study.markdown([panel]))
    assert rows["5 %"][:2] == ["75.0", "96.4"] and rows["100 %"][0] == "100.0"


def test_an_accuracy_stands_as_it_is_beside_what_is_suspect(tmp_path):
    made_up(tmp_path / "a", "efficientllava_scienceqa", "efficientllava_scienceqa", 0.9, prune={"ratio": 0.5})
    results = read(tmp_path / "a")
    for stage in results["stages"].values():
        stage["metrics"] = {"scienceqa": {"accuracy": 0.7, "accuracy/IMG": 0.6}}
    write(results, tmp_path / "a" / "results.json")
    text = study.markdown(panels(tmp_path))
    assert rows_of(text)["50 %"] == ["70.0", "60.0", "83.0†", "66.8"] and ": accuracy, %, mean" in text


def test_what_is_lost_on_either_modality(tmp_path):
    made_up(tmp_path / "a", "modality", "widthwise", 0.9, prune={"ratio": 0.15})
    [panel] = panels(tmp_path)
    assert rows_of(study.markdown([panel]))["15 %"] == ["10.0", "5.0", "9.1", "1.1"]


def test_the_report_of_an_experiment_has_the_table_and_the_plot(tmp_path):
    made_up(tmp_path / "a", "calibration_size", "widthwise", 0.9, calibration={"samples": 5})
    made_up(tmp_path / "b", "calibration_size", "widthwise", 0.95, calibration={"samples": 10})
    text = report(tmp_path)
    assert rows_of(text)["5"] == ["90.0", "76.0†", "69.3†"]
    assert (tmp_path / "plots" / "calibration_size_tiny_llava.png").stat().st_size > 5000
    [plot] = study.draw(panels(tmp_path))
    labels = sorted(label.get_text() for label in plot.figure.axes[0].texts)
    # "widthwise" is a column of ours and one of theirs.
    assert labels == ["layerwise, published", "widthwise", "widthwise, published"]
    assert "accuracy_text" in (tmp_path / "results.csv").read_text().splitlines()[0]


def test_other_runs_have_no_published_values(tmp_path):
    made_up(tmp_path / "a", "main_job", "widthwise", 0.9)
    assert panels(tmp_path) == [] and list(study.draw([])) == []
    made_up(tmp_path / "b", "recovery", "sft", 0.9)
    made_up(tmp_path / "c", "paradigms", "widthwise", 0.9)
    assert panels(tmp_path) == []


@pytest.mark.parametrize("name", SPECS)
def test_every_series_has_a_number_or_a_gap_for_every_row(name):
    spec = SPECS[name]
    run = Run(None, {"overrides": [f"experiment={name}"]}, {"model.name": "none"})
    assert study.panels_of([], METRIC) == [] and run.config
    columns = {}
    for family in spec["published"]:
        columns |= study.published(family, {**spec, "families": [family]})
    assert len(columns) >= 2
    values = [value for column in columns.values() for value in column.values()]
    assert all(0 <= value.mean <= 101 for value in values) and len(values) >= 2 * len(spec["at"])
    assert spec["source"] and spec["value"] in ("retained", "lost", "accuracy")
