from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from numpy.random import PCG64, Generator

from efficientllava.data.embedded.digits import (
    KINDS,
    NOTHING,
    TEXT_KINDS,
    ask,
    vocabulary,
)
from efficientllava.data.embedded.scenes import (
    COLOURS,
    PLACES,
    WORDS,
    Glyph,
    Scene,
    compose,
)

SCENE: Scene = (Glyph(7, "red", 0, 0), Glyph(3, "blue", 1, 0), Glyph(9, "red", 3, 0))


def solve(question: str, scene: Scene) -> str:
    """An independent reader of the questions: answers from the text and the scene's truth."""
    words = question.replace("?", "").replace(",", "").split()
    at = {PLACES[glyph.place]: glyph for glyph in scene}
    named = {WORDS[glyph.digit]: glyph for glyph in scene}
    if words[0] == "repeat":
        return " ".join(words[1:])
    if words[0] == "what":
        first, second = int(words[2]), int(words[4])
        return str(first + second if words[3] == "plus" else first - second)
    if words[:2] == ["which", "is"]:
        pair = sorted([WORDS.index(words[3]), WORDS.index(words[5])])
        return WORDS[pair[words[2] == "larger"]]
    if question == "which digit is the largest?":
        return WORDS[max(glyph.digit for glyph in scene)]
    if words[:3] == ["which", "digit", "is"]:
        return WORDS[at[words[3]].digit] if words[3] in at else NOTHING
    if words[:2] == ["which", "colour"]:
        return (at | named)[words[4]].colour
    if words[:2] == ["how", "many"]:
        return str(sum(glyph.colour == words[2] for glyph in scene) if words[2] in COLOURS else len(scene))
    if words[0] == "where":
        return PLACES[named[words[3]].place]
    if words[:2] == ["is", "there"]:
        glyph = named.get(words[-1])
        return "yes" if glyph and (len(words) == 4 or glyph.colour == words[3]) else "no"
    return "yes" if at[words[2]].digit > at[words[7]].digit else "no"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind: str) -> None:
    rng = Generator(PCG64(0))
    for _ in range(300):
        scene = compose(rng, "train")
        if kind == "comparison" and len(scene) < 2:
            continue
        turn = ask(rng, scene, kind)
        assert turn.answer == solve(turn.question, scene), (turn, scene)
        assert turn.kind == kind
        assert turn.sees_image == (kind not in TEXT_KINDS)


def test_solver_can_say_no() -> None:
    assert solve("which digit is top-left?", SCENE) == "seven"
    assert solve("is there a blue seven?", SCENE) == "no"
    assert solve("how many red digits are there?", SCENE) == "2"
    assert solve("is the top-right digit larger than the bottom-right digit?", SCENE) == "no"


def test_answers_are_balanced() -> None:
    rng = Generator(PCG64(1))
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(1500):
        scene = compose(rng, "train")
        for kind in KINDS:
            if kind != "comparison" or len(scene) > 1:
                answers[kind][ask(rng, scene, kind).answer] += 1
    share = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    assert all(share[kind] < 0.55 for kind in ("existence", "existence_by_colour", "comparison"))
    assert all(value < 0.45 for kind, value in share.items() if set(answers[kind]) != {"yes", "no"})
    # Knowing the most frequent answer of each type is worth about a third.
    assert 0.2 < sum(share.values()) / len(share) < 0.36


def test_vocabulary_holds_every_word() -> None:
    rng, words = Generator(PCG64(2)), set(vocabulary())
    for _ in range(200):
        scene = compose(rng, "train")
        for kind in KINDS:
            if kind != "comparison" or len(scene) > 1:
                turn = ask(rng, scene, kind)
                assert set(f"{turn.question} {turn.answer}".replace("?", "").replace(",", "").split()) <= words
