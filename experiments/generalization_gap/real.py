"""Which number on a few records predicts the loss of a policy on other text? On the real decoder.

    python -m experiments.generalization_gap.real <rows.csv> --work <folder> --draws <draw0.json> <draw1.json>
    python -m experiments.generalization_gap.real <rows.csv> --table <picture.png>

Policies of one budget: random ones, and such as ``search=quick`` looks at, whose few prices are drawn. All their levels
are fitted to draw 0. A row per policy, written at once; what has one is not made again.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import efficientllava as ev
from efficientllava.data.collator import Collator
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.embedded.prose import FOLDER, TEXTS, of_text
from efficientllava.data.table import read_conversations
from efficientllava.models.anatomy import language_parameters
from efficientllava.pruning.module import chunked
from efficientllava.pruning.obs import DAMPING
from efficientllava.pruning.stream import Calibration, CalibrationStream
from efficientllava.report.study import table as markdown
from efficientllava.runtime import source_digest
from efficientllava.search.budget import removed_costs
from efficientllava.search.evaluator import Evaluator
from efficientllava.search.knapsack import Prices
from efficientllava.search.levels import GAPS, LevelTable, gap_of, open_table
from efficientllava.search.recipes import Structured
from efficientllava.search.space import Budget, Policy, SearchSpace
from efficientllava.stages.request import composed
from experiments.rows import add, read

from .run import spearman

RATIO, POLICIES, TOGETHER, ROWS = 0.2, 20, 5, 8  # policies of each kind; of a call; records of a batch
NEAR, FAR = [*TEXTS][:2], [*TEXTS][2:]
PIECES, QUESTIONS = 20, 100  # of every text; images about which two questions are asked
RISKS = ("fitted", "held_out", "other_draw")
TRUTHS = ("near", "far", "digits")
TERMS = [name for name in GAPS if name != "none"]
FIELDS = (
    "kind",
    "number",
    "policy",
    *(f"{name}_{unit}" for name in (*RISKS, *TRUTHS) for unit in ("loss", "kl")),
    *TERMS,
)
WEIGHTS = (0.1, 0.3, 1.0)
SHOWN = {"near": "near text", "far": "a novel", "digits": "digits"}


def drawn(space: SearchSpace, errors: Sequence[Sequence[float]]) -> Iterator[tuple[str, int, Policy]]:
    """The policies: kind, number, levels."""
    rng = random.Random(0)
    for number in range(POLICIES):
        yield "random", number, space.random(rng)
    for number in range(POLICIES):
        prices = Prices(rng.gauss(0, 0.7), rng.gauss(0, 0.7), rng.uniform(0, 0.4), math.exp(rng.gauss(0, 0.4)))
        yield "priced", number, space.solve(prices.costs(space.genes, errors))


def measure(rows: Path, work: Path, draws: Sequence[Path]) -> None:
    """Make the missing rows."""
    settings = composed("model=smol_llava", "prune=auto", "search=quick", f"prune.ratio={RATIO}")
    checkpoint = ev.load("builtin:smol_llava")
    model, collate = checkpoint.model, Collator(checkpoint.processor)
    recipe = Structured(settings.prune.damping or DAMPING, settings.prune.tokens, settings.prune.round_to)

    def batches(records: Any) -> list[Any]:
        return [*DataLoader(records, ROWS, collate_fn=collate)]

    tables = [read_conversations(draw) for draw in draws]
    seen, other = map(list, tables)
    chunks, folds = chunked(seen, ROWS)
    made = [collate(chunk) for chunk in chunks]

    def levels(*of: int) -> LevelTable:
        chosen = Calibration([batch for batch, fold in zip(made, folds, strict=True) if fold in of])
        known = {"model": checkpoint.digest, "source": source_digest("search.levels"), "records": tables[0].key}
        identity = {**known, "folds": str(of)}
        return open_table(model, recipe, chosen, work / "levels", identity)

    whole, part = levels(0, 1, 2), levels(0)
    stream = CalibrationStream(model, Calibration(made), settings.prune.tokens)
    texts: dict[str, Any] = {
        kind: [record for name in names for record in of_text(FOLDER / f"{name}.txt")[:PIECES]]
        for kind, names in (("near", NEAR), ("far", FAR))
    }
    texts["digits"] = [*Digits("minival", QUESTIONS, questions=2)]
    judged = [batch for batch, fold in zip(made, folds, strict=True) if fold == 1]
    evaluators = {
        "fitted": Evaluator(model, whole, stream),
        "held_out": Evaluator(model, part, stream.over(judged)),
        "other_draw": Evaluator(model, whole, stream.over(batches(other))),
        **{name: Evaluator(model, whole, stream.over(batches(records))) for name, records in texts.items()},
    }
    space = SearchSpace(whole.genes, Budget("params", RATIO, removed_costs(whole, language_parameters(model))))
    gaps = {name: gap_of(name, whole.norms, space.uniform(), len(seen)) for name in TERMS}
    done = {(row["kind"], int(row["number"])) for row in read(rows)}
    dense = {f"{name}_loss": each.dense.loss for name, each in evaluators.items()}
    if not done:
        add(rows, [{"kind": "dense", "number": 0, **dense}], FIELDS)
    errors = whole.errors()
    assert errors is not None
    todo = [("uniform", 0, space.uniform()), *drawn(space, errors)]
    todo = [each for each in todo if each[:2] not in done]
    for start in range(0, len(todo), TOGETHER):
        group = todo[start : start + TOGETHER]
        policies = [policy for *_, policy in group]
        found = {name: each.evaluate(policies) for name, each in evaluators.items()}
        for index, (kind, number, policy) in enumerate(group):
            risks = {name: risks[index] for name, risks in found.items()}
            row: dict[str, Any] = {"kind": kind, "number": number, "policy": " ".join(map(str, policy))}
            row |= {
                f"{name}_{unit}": f"{getattr(risk, unit):.5f}"
                for name, risk in risks.items()
                for unit in ("loss", "kl")
            }
            row |= {name: f"{gap(policy):.6f}" for name, gap in gaps.items()}
            add(rows, [row], FIELDS)
        print(f"{start + len(group)} of {len(todo)}", flush=True)


def scores(found: Any) -> dict[str, Any]:
    """What might predict, by name: risks, and the fitted one with each gap term at every weight."""

    def z(name: str) -> Any:
        return (found[name] - found[name].mean()) / found[name].std()

    plain = {f"{risk}, {unit}": found[f"{risk}_{unit}"] for risk in RISKS for unit in ("loss", "kl")}
    with_gap = {f"fitted, kl + {w:g} {term}": z("fitted_kl") + w * z(term) for term in TERMS for w in WEIGHTS}
    return {**plain, **with_gap, **{f"{term} alone": found[term] for term in TERMS}}


def judged(found: Any) -> list[list[Any]]:
    """A row per score: rank correlation and regret, in nats, for each truth."""
    rows = []
    for name, score in scores(found).items():
        cells: list[Any] = [name]
        for truth in TRUTHS:
            loss = found[f"{truth}_loss"]
            cells += [f"{spearman([*score], [*loss]):.2f}", f"{loss[score.idxmin()] - loss.min():.3f}"]
        rows.append(cells)
    return rows


def tell(rows: Path, picture: Path) -> None:
    """Print a table per kind of policies, and draw the fitted risk and the held-out one against near and far text."""
    every: Any = pd.read_csv(rows)
    head = ["score", *(f"{SHOWN[t]}: {what}" for t in TRUTHS for what in ("rank", "regret"))]
    for kind in ("random", "priced"):
        print(f"\n{kind}\n\n{markdown(head, judged(every[every.kind == kind].reset_index(drop=True)), 1)}")
    axes = (figure := Figure((11, 5), layout="constrained")).subplots(1, 2)
    for panel, truth in zip(axes, ("near", "far"), strict=True):
        for risk, mark in (("fitted", "o"), ("held_out", "x")):
            for kind, colour in (("random", "C1"), ("priced", "C0")):
                part = every[every.kind == kind]
                panel.plot(part[f"{risk}_kl"], part[f"{truth}_loss"], mark, color=colour, label=f"{risk}, {kind}")
        panel.set(xlabel="KL to the dense model on calibration records, nats", ylabel=f"loss on {SHOWN[truth]}, nats")
        panel.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Make rows, or tell what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--work", type=Path, help="keeps the level tables")
    parser.add_argument("--draws", type=Path, nargs=2)
    parser.add_argument("--table", type=Path, help="picture that is drawn")
    given = parser.parse_args()
    if given.table:
        tell(given.rows, given.table)
        return
    torch.set_num_threads(1)
    measure(given.rows.resolve(), given.work.resolve(), [draw.resolve() for draw in given.draws])


if __name__ == "__main__":
    main()
