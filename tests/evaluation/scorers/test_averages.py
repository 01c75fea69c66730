"""AVG and AVG-% recomputed from rows of the study's table 2."""

import pytest

from efficientllava.evaluation.tasks.published import COLUMNS, average, study
from efficientllava.runtime.errors import UserError

# MMMU, SQA, MathV, AI2D, MME-C, MME-P, POPE, DocVQA, GQA as printed; then AVG and AVG-%.
DENSE = (35.10, 68.67, 26.70, 54.80, 363.21, 1511.33, 86.99, 28.10, 61.98), 53.70, 100.00
WIDTH_30 = (31.00, 54.29, 15.80, 37.80, 253.21, 1174.93, 86.29, 17.90, 52.59), 42.90, 79.88
LAYER_45 = (26.90, 3.82, 5.40, 10.50, 132.86, 616.63, 51.69, 6.10, 14.39), 18.47, 34.40


def _metrics(row):
    metrics = {}
    for (task, metric, factor), printed in zip(COLUMNS.values(), row, strict=True):
        metrics.setdefault(task, {})[metric] = printed / 100 if factor == 100 else printed
    return metrics


def _percent(metrics, base):
    return study(metrics, base)["vlmcompression"]["avg_percent"]


@pytest.mark.parametrize(("row", "avg", "percent"), [DENSE, WIDTH_30, LAYER_45])
def test_the_study_s_rows(row, avg, percent):
    assert average(_metrics(row)) == pytest.approx(avg, abs=0.02)
    assert _percent(_metrics(row), _metrics(DENSE[0])) == pytest.approx(percent, abs=0.05)


def test_percent_is_a_ratio_of_means():
    ratios = [pruned / dense for pruned, dense in zip(WIDTH_30[0], DENSE[0], strict=True)]
    mean_of_ratios = 100 * sum(ratios) / len(ratios)
    assert mean_of_ratios == pytest.approx(76.8, abs=0.06)
    assert _percent(_metrics(WIDTH_30[0]), _metrics(DENSE[0])) - mean_of_ratios > 3


def test_perfect_scores_average_to_100():
    perfect = (100, 100, 100, 100, 800, 2000, 100, 100, 100)
    assert average(_metrics(perfect)) == 100


def test_a_missing_column_is_named():
    metrics = _metrics(DENSE[0])
    del metrics["mme"]["cognition"], metrics["gqa"]
    with pytest.raises(UserError, match=r"AVG: there is no result for MME-C, GQA;"):
        average(metrics)
    with pytest.raises(UserError, match="AVG of 0"):
        study(_metrics(DENSE[0]), _metrics((0,) * 9))


def test_the_study_s_numbers_stand_beside_its_benchmarks():
    dense, width = _metrics(DENSE[0]), _metrics(WIDTH_30[0])
    found = study(width, dense)["vlmcompression"]
    assert found["avg"] == pytest.approx(42.90, abs=0.02) and found["avg_percent"] == pytest.approx(79.88, abs=0.05)
    assert study(dense, dense)["vlmcompression"]["avg_percent"] == 100
    assert study({"pope": dense["pope"]}, dense) == {}
    del width["mme"]["cognition"]
    with pytest.raises(UserError, match="MME-C"):
        study(width, dense)
