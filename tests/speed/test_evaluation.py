from efficientllava.checkpoint.folder import load
from experiments.speed.loops import generation_row


def test_an_evaluation_is_compared_with_a_loop_that_answers_the_same():
    row = generation_row(load("builtin:tiny_llava"), questions=6, size=3)
    assert row.measured > 0 and row.reference > 0 and row.wish == "< 1.15"
