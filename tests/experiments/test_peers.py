"""Draws of calibration records, and which rows are made."""

from __future__ import annotations

import json
import math

import pytest

from efficientllava.data.embedded.digits import Digits
from efficientllava.data.embedded.prose import TEXTS
from efficientllava.data.table import read_conversations
from experiments.peers.__main__ import DENSE, FIELDS, PEERS, missing, read_arms
from experiments.peers.draws import DRAWS, EACH, QUESTIONS, others, prose, questions, read
from experiments.peers.plot import draw, rises
from experiments.rows import add


def written(folder, documents, pieces):
    records = [
        {
            "id": f"book/{document}/{piece}",
            "conversations": [{"from": "human", "value": "Go on."}, {"from": "gpt", "value": f"{document} {piece}"}],
        }
        for document in range(documents)
        for piece in range(pieces)
    ]
    file = folder / "prose.json"
    file.write_text(json.dumps(records))
    return file


def test_no_document_is_in_two_draws(tmp_path):
    parts = prose(read([written(tmp_path, documents=12, pieces=9)]))
    seen = [{record["id"].rpartition("/")[0] for record in part} for part in parts]
    assert [len(part) for part in parts] == [EACH] * DRAWS
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_what_is_trained_on_has_no_document_of_the_first_draw(tmp_path):
    documents = read([written(tmp_path, documents=12, pieces=9)])
    first = prose(documents)[0]
    left = others(documents, first)
    seen, other = ({record["id"].rpartition("/")[0] for record in part} for part in (first, left))
    assert not seen & other and {*documents} == seen | other


def test_too_few_documents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give more documents"):
        prose(read([written(tmp_path, documents=2, pieces=60)]))


def test_questions_of_two_draws_show_other_images_and_are_read_as_records(tmp_path):
    shown = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(questions(Digits("calibration", EACH, 1 + number, questions=QUESTIONS), tmp_path)))
        records = read_conversations(str(file))
        assert len(records) == EACH and all(record.images for record in records)
        shown.append({record.images[0].read_bytes() for record in records})
    assert not shown[0] & shown[1]


def test_rows_that_are_there_are_not_made_again_and_a_draw_is_finished_before_the_next(tmp_path):
    draws, rows = [tmp_path / "draw0.json", tmp_path / "draw1.json"], tmp_path / "rows.csv"
    arms, ratios = read_arms(PEERS)
    every = missing(rows, draws, arms, ratios)
    assert len(every) == len(arms) * len(ratios) * 2
    assert [number for *_, number in every] == sorted(number for *_, number in every)
    rows.write_text(f"arm,ratio,draw\n{every[0][0]},{every[0][1]},draw0\n")
    assert missing(rows, draws, arms, ratios) == every[1:]


def test_arms_of_another_experiment():
    arms, ratios = read_arms("real_samples")
    assert arms["8"] == ["calibration.samples=8", "calibration.generate=0"] and ratios == ["0.2"]


def test_rises_are_logarithms_over_the_dense_model_and_means_over_draws(tmp_path):
    rows, number = tmp_path / "rows.csv", dict.fromkeys(FIELDS[3:], "0.5")
    made = [{"arm": DENSE, "ratio": "0", **number, **dict.fromkeys(TEXTS, "20")}]
    made += [
        {"arm": arm, "ratio": "0.2", "draw": f"draw{i}", **number, **dict.fromkeys(TEXTS, value)}
        for arm, values in (("flap", ("40", "80")), ("widthwise", ("20", "20")))
        for i, value in enumerate(values)
    ]
    add(rows, made, FIELDS)
    means = rises(rows).set_index("arm")
    assert list(means.draws) == [2, 2]
    assert means.loc["flap", list(TEXTS)].tolist() == pytest.approx([1.5 * math.log(2)] * len(TEXTS))
    assert means.loc["widthwise", list(TEXTS)].tolist() == [0.0] * len(TEXTS)
    draw(means.reset_index(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
