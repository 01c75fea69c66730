"""The study of what predicts the loss of a policy."""

from __future__ import annotations

import pandas as pd

from experiments.generalization_gap.real import RISKS, TERMS, TRUTHS, judged, tell


def rows(kind="random"):
    """Policies whose fitted KL tells the order on near text, and the opposite one on far text."""
    count = 5
    table = {"kind": [kind] * count, "number": range(count)}
    table |= {f"{risk}_{unit}": [0.1 * n for n in range(count)] for risk in RISKS for unit in ("loss", "kl")}
    table |= {f"{truth}_loss": [1 + 0.5 * n for n in range(count)] for truth in TRUTHS}
    table["far_loss"] = table["far_loss"][::-1]
    return pd.DataFrame(table | {term: [1.0, 5.0, 2.0, 4.0, 3.0] for term in TERMS})


def test_a_score_is_judged_by_rank_and_by_the_cost_of_its_choice():
    near_rank, near_regret, far_rank, far_regret = {r[0]: r[1:5] for r in judged(rows())}["fitted, kl"]
    assert (near_rank, near_regret) == ("1.00", "0.000")
    assert (far_rank, far_regret) == ("-1.00", "2.000")


def test_the_table_has_both_kinds(tmp_path, capsys):
    pd.concat([rows(), rows("priced")]).to_csv(tmp_path / "rows.csv", index=False)
    tell(tmp_path / "rows.csv", tmp_path / "plot.png")
    told = capsys.readouterr().out
    assert told.count("| fitted, kl |") == 2 and (tmp_path / "plot.png").stat().st_size > 0
