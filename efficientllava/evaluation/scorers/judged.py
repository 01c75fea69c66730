"""Answers that a judge has graded: MM-Vet (arXiv 2308.02490) and LLaVA-Bench-in-the-Wild (arXiv 2304.08485).

Here are the reading of verdicts and the aggregation; asking a judge is another module's work. Only the judges of the
two protocols differ. Several evaluations are scored one by one; see `over_runs`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ...runtime.errors import UserError
from . import Outcome, Record, Scores, mean, per_record, value

FAILED = (-1.0, -1.0)


def _verdict(record: Record) -> str:
    text = value(record, "verdict")
    if not isinstance(text, str):
        raise UserError(f"record {record['id']!r}: 'verdict' is {text!r}; it must be the text of one evaluation")
    return text


def mmvet_grade(verdict: str) -> float | None:
    """The grade in [0, 1] that a verdict starts with; None if there is none and the judge has to be asked again."""
    try:
        grade = float(verdict.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def _capabilities(record: Record) -> list[str]:
    names = sorted(name.strip() for name in str(record.get("capability") or "").split(",") if name.strip())
    return [*names, f"={'+'.join(names)}"] if names else []


@per_record("score", _capabilities, unparsed="n_failed")
def mmvet(record: Record, protocol: str) -> tuple[float | None, float]:
    """Mean grade, by capability and by exact set of capabilities (``score/=ocr+rec``, names sorted).

    A verdict without a grade counts 0, as in the official script after its last attempt; ``n_failed`` counts these.
    Keys: ``verdict`` (the judge's text), ``capability`` (names with commas between them).
    """
    grade = mmvet_grade(_verdict(record))
    return grade, grade or 0.0


def llava_bench_pair(verdict: str) -> tuple[float, float]:
    """The scores of the reference and of the model, from the first line of a verdict; `FAILED` if they are not there.

    As in the official script a comma is a blank and the line must split into two at single blanks: "8, 9" fails.
    """
    parts = verdict.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(parts[0]), float(parts[1])) if len(parts) == 2 else FAILED
    except ValueError:
        return FAILED


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    """The model's mean over the reference's, with the official roundings (3 places each, then 1 of the percentage)."""
    reference, model = (round(mean(pair[side] for pair in pairs), 3) for side in (0, 1))
    return round(model / reference * 100, 1) / 100 if reference else 0.0


def llava_bench(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Score relative to the reference answers, by category; it may exceed 1.

    The official scripts keep a failed verdict in both means as -1, which pulls the score towards 1: ``score_parsed`` is
    the score without them and ``n_failed`` their number; it is left out if all have failed.
    Keys: ``verdict`` (the judge's text), ``category`` (conv, detail, complex; also after ``llava_bench_``).
    """
    groups: dict[str, list[tuple[float, float]]] = {"": []}
    outcomes = []
    for record in records:
        pair = llava_bench_pair(_verdict(record))
        outcomes.append(Outcome(record["id"], pair, pair[1] / pair[0] if pair[0] > 0 else 0.0))
        category = str(record.get("category") or "").removeprefix("llava_bench_")
        for group in ("", f"/{category}") if category else ("",):
            groups.setdefault(group, []).append(pair)
    metrics = {f"score{group}": _relative(groups[group]) for group in sorted(groups)}
    metrics |= {f"n{group}": len(groups[group]) for group in sorted(groups)}
    parsed = [pair for pair in groups[""] if pair != FAILED]
    metrics |= {"score_parsed": _relative(parsed)} if parsed else {}
    return Scores(metrics | {"n_failed": len(records) - len(parsed)}, outcomes)


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all runs have, and ``score_std`` or ``accuracy_std``, of the population of runs."""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    main = "score" if "score" in shared else "accuracy"
    spread = statistics.pstdev(run[main] for run in runs)
    return {name: mean(run[name] for run in runs) for name in shared} | {f"{main}_std": spread}
