"""Does the generalization gap predict the loss on unseen samples? Writes a table beside itself.

    python experiments/generalization_gap/run.py [model] [policies] [held-out samples]

Random feasible policies at two budgets; for every number of search samples a level table of its own. Spearman
correlation of ``z(risk) + weight * z(gap)`` with the answer loss on held-out samples, over the policies.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import DataLoader

import efficientllava as ev
from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.splits import calibration_records
from efficientllava.models.anatomy import language_parameters
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.search.budget import removed_costs
from efficientllava.search.evaluator import Evaluator
from efficientllava.search.evolution import Objective
from efficientllava.search.levels import GAPS, gap_of, open_table
from efficientllava.search.recipes import Structured
from efficientllava.search.space import Budget, SearchSpace
from efficientllava.settings.schema import CalibrationConfig, DataConfig

RATIOS, SAMPLES, WEIGHTS, RISKS = (0.3, 0.5), (16, 32, 64, 128), (0.0, 0.1, 0.3, 1.0, 3.0), ("loss", "kl", "error")
QUESTIONS = 1  # per held-out image; search samples have 10
HERE = Path(__file__).parent


def spearman(left: list[float], right: list[float]) -> float:
    """Rank correlation."""
    return pd.Series(left).corr(pd.Series(right), method="spearman")


def rows(model: str, policies: int, unseen: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per budget, number of samples, risk, gap and weight."""
    checkpoint = ev.load(f"builtin:{model}")
    collate, result = Collator(checkpoint.processor), []
    unseen_records: Any = Digits("minival", unseen, questions=QUESTIONS)
    unseen_batches = [*DataLoader(unseen_records, 100, collate_fn=collate)]
    for count in SAMPLES:
        records: Any = calibration_records(CalibrationConfig(samples=count), DataConfig("digits_vqa"), 0)
        seen = Calibration([*DataLoader(records, 16, collate_fn=collate)])
        table = open_table(checkpoint.model, Structured(), seen, scratch, {"model": model, "samples": str(count)})
        stream = CalibrationStream(checkpoint.model, seen)
        risk_of, truth_of = (Evaluator(checkpoint.model, table, each) for each in (stream, stream.over(unseen_batches)))
        costs = removed_costs(table, language_parameters(checkpoint.model))
        for ratio in RATIOS:
            space, rng = SearchSpace(table.genes, Budget("params", ratio, costs)), random.Random(0)
            drawn = list({space.random(rng): None for _ in range(2 * policies)})[:policies]
            risks, truth = risk_of.evaluate(drawn), [risk.loss for risk in truth_of.evaluate(drawn)]
            print(f"{count} samples, ratio {ratio}: {len(drawn)} policies", flush=True)
            for kind in GAPS:
                gap = gap_of(kind, table.norms, space.uniform(), count)
                gaps = [gap(policy) for policy in drawn]
                for name in RISKS:
                    excess = [t - r.loss for t, r in zip(truth, risks, strict=True)]
                    own = spearman(gaps, excess) if kind != "none" else float("nan")
                    for weight in WEIGHTS if kind != "none" else (0.0,):
                        score = Objective.fitted(name, weight, risks, gaps)
                        values = [score.value(r, g) for r, g in zip(risks, gaps, strict=True)]
                        row = {"model": model, "ratio": ratio, "samples": count, "risk": name, "gap": kind}
                        row |= {"weight": weight, "policies": len(drawn), "unseen": unseen}
                        result.append(row | {"spearman": spearman(values, truth), "spearman_gap_excess": own})
    return result


def table(found: pd.DataFrame) -> str:
    """Markdown: a row per budget, number of samples, risk and gap; a column per weight."""
    heads = ["removed", "samples", "risk", "gap", *(f"weight {w:g}" for w in WEIGHTS), "gap with excess"]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---|" + "---:|" * (len(WEIGHTS) + 1)]
    groups: Any = found.groupby(["ratio", "samples", "risk", "gap"], sort=False)
    for (ratio, samples, risk, gap), group in groups:
        own = group["spearman_gap_excess"].iloc[0]
        values = [*group.set_index("weight")["spearman"].reindex(WEIGHTS), own]
        cells = [f"{ratio:.0%}", str(samples), risk, gap, *("-" if pd.isna(v) else f"{v:.3f}" for v in values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study for one model."""
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny_llava"
    policies, unseen = (int(value) for value in sys.argv[2:4]) if len(sys.argv) == 4 else (200, 2000)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = pd.DataFrame(rows(model, policies, unseen, Path(scratch)))
    found.to_csv(HERE / f"{model}.csv", index=False, na_rep="nan", lineterminator="\r\n")
    (HERE / f"{model}.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
