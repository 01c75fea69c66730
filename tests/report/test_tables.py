import io
import re
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from efficientllava.record import build
from efficientllava.report import quantity, tabulate, tabulate_quantized
from efficientllava.report.page import METRIC, markdown
from efficientllava.report.runs import Run, arms_of

SETUP = {
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "batch_size": 1,
    "image_size": [32, 32],
    "prompt_tokens": 24,
    "repeats": 9,
}


def stage(parameters, language, accuracy):
    metrics = {
        "accuracy": accuracy,
        "accuracy_image": accuracy,
        "accuracy/colour_by_place": accuracy - 0.1,
        "accuracy_text": 0.875,
        "accuracy/text_copying": 0.5,
        "answer_loss": 0.1234,
    }
    counts = {"n": 2000, "n_image": 1600, "n_text": 400, "n/colour_by_place": 160, "n/text_copying": 130}
    return {
        "parameters": parameters,
        "language_parameters": language,
        "checkpoint_bytes": 2 * parameters,
        "flops": {"prefill": 49_742_976, "prefill_language": 40_710_144},
        "latency_ms": {"prefill": 5.358, "decode": 2.05},
        "metrics": {"digits_vqa": metrics | counts},
        "setup": SETUP,
    }


def make(recovered=0.95, seed=0, overrides=(), reused=(), stages=("base", "pruned", "recovered")):
    made = {
        "base": stage(1_076_160, 812_640, 0.975),
        "pruned": stage(669_840, 406_320, 0.8),
        "recovered": stage(669_840, 406_320, recovered),
    }
    return build(
        {name: made[name] for name in stages},
        ratio={"requested": 0.5, "achieved": 0.5},
        samples={},
        seconds={},
        seed=seed,
        config_digest="",
        overrides=overrides,
        reused=reused,
    )


def printed(results, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(tabulate(results))
    return file.getvalue()


def row(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_the_row_of_flops_says_what_was_counted():
    results = make()
    assert row(printed(results), "FLOPs per image-question") and "FLOPs: products of the prefill" in printed(results)
    for each in results["stages"].values():
        each["setup"] = {**SETUP, "image_size": []}
    text = printed(results)
    assert row(text, "FLOPs per text-only question")[0] == "49.7 M" and "image-question" not in text
    assert "image none" in " ".join(text.split())


def test_table_holds_every_number_of_the_main_job():
    text = printed(make())
    assert row(text, "parameters") == ["1.08 M", "670 k", "670 k"]
    assert row(text, "language-model parameters") == ["813 k", "406 k", "406 k"]
    assert row(text, "removed (50.0 % requested)") == ["-", "50.0 %", "50.0 %"]
    assert row(text, "checkpoint, MiB") == ["2.05", "1.28", "1.28"]
    assert row(text, "FLOPs per image-question")[0] == "49.7 M"
    assert row(text, "prefill latency, ms")[0] == "5.36"
    assert row(text, "per-token latency, ms")[0] == "2.05"
    assert row(text, "accuracy (2000)") == ["97.5 %", "80.0 %", "95.0 %"]
    assert row(text, "image questions (1600)") == ["97.5 %", "80.0 %", "95.0 %"]
    assert row(text, "colour by place (160)") == ["87.5 %", "70.0 %", "85.0 %"]
    assert row(text, "text-only questions (400)") == ["87.5 %"] * 3
    assert row(text, "copying (130)") == ["50.0 %"] * 3
    assert row(text, "answer loss, nats per token")[0] == "0.123"
    assert row(text, "retained accuracy") == ["-", "82.1 %", "97.4 %"]
    assert "prompt 24 tokens" in " ".join(text.split())


def test_table_fits_a_narrow_terminal_and_a_file():
    text = printed(make(reused=["evaluate/base"]))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "\x1b" not in text
    assert "from the cache: evaluate/base" in text


def test_a_score_is_shown_with_what_casts_doubt_on_it():
    results = make(stages=("base", "pruned"))
    results["benchmarks"] = {"mathvista": {"headline": ["accuracy"]}}
    for name, undecided in (("base", 0), ("pruned", 3)):
        metrics = {"accuracy": 0.5, "n": 12, "n_undecided": undecided}
        results["stages"][name]["metrics"] = {"mathvista": metrics}
    assert row(printed(results), "wrong until a judge reads them") == ["0", "3"]
    results["stages"]["pruned"]["metrics"]["mathvista"]["n_undecided"] = 0
    assert "until a judge" not in printed(results)


def test_table_of_a_run_that_stops_early():
    text = printed(make(stages=("base",)))
    assert "recovered" not in text and "removed" not in text and "retained" not in text
    assert row(text, "parameters") == ["1.08 M"]


def test_table_without_measurements_has_no_empty_rows():
    results = make()
    for entry in results["stages"].values():
        for key in ("flops", "latency_ms", "setup", "checkpoint_bytes"):
            del entry[key]
    text = printed(results)
    assert "latency" not in text and "FLOPs" not in text and "MiB" not in text
    assert row(text, "accuracy (2000)")[0] == "97.5 %"


def test_table_shows_other_metrics_as_they_are():
    results = make()
    for entry in results["stages"].values():
        entry["metrics"] = {"mme": {"perception": 1510.7, "n": 2374}}
    results["stages"]["pruned"]["retained"] = {"mme/perception": 0.5}
    results["benchmarks"] = {"mme": {"protocol": "lmms_eval", "headline": ["perception", "cognition"]}}
    text = printed(results)
    assert "prompts and parsing of lmms_eval" in text
    assert row(text, "perception")[0] == "1510.7"
    assert row(text, "retained perception") == ["-", "50.0 %", "-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1.00 k"),
        (9994, "9.99 k"),
        (12_345, "12.3 k"),
        (99_960, "100 k"),
        (812_640, "813 k"),
        (999_960, "1.00 M"),
        (7_062_902_784, "7.06 G"),
        (1.5e12, "1.50 T"),
    ],
)
def test_quantities_have_three_digits(value, text):
    assert quantity(value) == text


def arms(results):
    configs = [dict(override.split("=") for override in each["overrides"]) for each in results]
    return arms_of([Run(Path(), each, config) for each, config in zip(results, configs, strict=True)])


def test_markdown_has_a_row_per_configuration_and_a_spread_over_seeds():
    runs = [
        make(recovered, seed, ["prune=widthwise", f"seed={seed}"]) for seed, recovered in enumerate([0.93, 0.95, 0.97])
    ]
    runs.append(make(0.7, 0, ["prune=layerwise"]))
    head, rule, first, second = markdown(arms(runs), METRIC).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|")
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:2] == ["`prune widthwise`", "3"]
    assert cells[5] == "95.0 ± 2.0"
    ratios = [100 * value / 0.975 for value in (0.93, 0.95, 0.97)]
    assert cells[6] == f"{statistics.fmean(ratios):.1f} ± {statistics.stdev(ratios):.1f}"
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells == ["`prune layerwise`", "1", "50.0", "97.5", "80.0", "70.0", "71.8", "0.123"]


def test_markdown_names_rows_by_what_differs():
    runs = [make(overrides=["model=a", "prune.ratio=0.3"]), make(overrides=["model=a"])]
    lines = markdown(arms(runs), METRIC).splitlines()
    assert lines[2].startswith("| `ratio 0.3` |") and lines[3].startswith("| `default` |")


def test_quantized_copies_stand_below_their_stage_and_nowhere_else():
    results = make()
    assert list(tabulate_quantized(results)) == []
    for stage in results["stages"].values():
        stage["tokens_per_second"] = {"batch_1": 480.0, "batch_1_iqr": 9.0, "batch_8": 1920.0}
    whole = printed(results)
    for name in ("base", "pruned", "recovered"):
        results["stages"][f"{name}_int8"] = {**results["stages"][name], "memory_bytes": {"weights": 2**20}}
    assert printed(results) == whole
    for stage in results["stages"].values():
        stage["metrics"] |= {"vlmcompression": {"avg": 53.7, "avg_percent": 100.0, "n": 9}}
    lines = quantized(results)
    assert lines[2].split() == ["base", "int8", "pruned", "int8", "recovered", "int8"]
    rows = {cells[0]: cells[1:] for line in lines[4:] if (cells := re.split(" {2,}", line.strip()))}
    assert rows["weights, MiB"] == ["-", "1.00"] * 3 and rows["token, ms"] == ["2.05"] * 6
    assert rows["tokens/s, batch 1"] == ["480"] * 6 and rows["tokens/s, batch 8"] == ["1.92 k"] * 6
    assert rows["digits_vqa accuracy"][:2] == ["97.5 %"] * 2 and rows["vlmcompression avg"] == ["53.7"] * 6
    results["benchmarks"] = {"digits_vqa": {"headline": ["accuracy_text"]}}
    assert any("digits_vqa accuracy_text" in line for line in quantized(results))


def quantized(results):
    (table,) = tabulate_quantized(results)
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue().splitlines()
