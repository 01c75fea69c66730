from __future__ import annotations

import pytest
import torch

from efficientllava.models.anatomy import decoder_of
from efficientllava.models.forward import forward_hidden
from efficientllava.recovery.teacher import FINAL, Match, hidden_states, match_layers
from efficientllava.runtime.errors import UserError

from .conftest import make_batch, make_model

KEPT = [0, 1, 4, 6]  # of 8: 2, 3, 5 and 7 were dropped


def test_a_kept_layer_stands_for_the_dropped_ones_after_it():
    expected = (Match(0, 0), Match(1, 3), Match(2, 5), Match(FINAL, FINAL))
    assert match_layers("all", KEPT, 8) == expected
    assert match_layers("last", KEPT, 8) == expected[-1:]


@pytest.mark.parametrize(
    ("which", "students"),
    [([0], [0]), ([2], [1]), ([3, 1], [1]), ([-1], [FINAL]), ([-4, 5], [2]), ([7, 0], [0, FINAL])],
)
def test_chosen_layers_are_original_indices(which, students):
    assert [match.student for match in match_layers(which, KEPT, 8)] == students


@pytest.mark.parametrize(("which", "kept"), [([8], KEPT), ([-9], KEPT), ([0], [1, 2])])
def test_impossible_choices_are_refused(which, kept):
    with pytest.raises(UserError, match=r"recover\.hidden_layers"):
        match_layers(which, kept, 8)


def test_captured_states_are_raw_block_outputs_and_hooks_go():
    model = make_model()
    decoder, batch = decoder_of(model), make_batch(4)
    mask = batch["labels"] != -100
    with torch.no_grad():
        states, final = hidden_states(model, batch, None, [1, 3, FINAL], mask), forward_hidden(model, batch)[mask]
    assert sorted(states) == [FINAL, 1, 3] and torch.equal(states[FINAL], final)
    torch.testing.assert_close(decoder.norm(states[3]), final)
    assert not torch.allclose(states[3], final)
    assert not any(block._forward_hooks for block in decoder.layers)
