from __future__ import annotations

import pytest
import torch

from efficientllava.models.anatomy import decoder_of
from efficientllava.models.forward import answer_loss, forward_hidden
from efficientllava.pruning.comparison import Comparison, Verdict, simplest
from efficientllava.pruning.statistics import CalibrationStream

from ..conftest import make_batches, make_model


def verdict(*kl: float) -> Verdict:
    return Verdict(torch.tensor(kl, dtype=torch.float64), torch.ones(len(kl), dtype=torch.float64), 0.0)


def outputs(stream: CalibrationStream) -> list[torch.Tensor]:
    hidden = stream.start()
    for index, layer in enumerate(decoder_of(stream.model).layers):
        stream.advance(layer, index, hidden)
    return hidden


@torch.no_grad()
def test_divergence_and_loss_are_those_of_the_answers_of_the_batches_that_are_compared_on():
    model, other, batches = make_model(seed=1), make_model(seed=2), make_batches()
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    other.get_decoder().norm.load_state_dict(model.get_decoder().norm.state_dict())
    comparison = Comparison(CalibrationStream(model, batches), [1, 2], outputs(CalibrationStream(model, batches)))
    assert float(comparison(outputs(CalibrationStream(model, batches))).kl.abs().max()) < 1e-6
    found = comparison(outputs(CalibrationStream(other, batches)))
    kl, tokens = [], []
    for batch in batches[1:]:
        states = (m.lm_head(forward_hidden(m, batch)) for m in (model, other))
        dense, pruned = (state.float().log_softmax(-1)[:, :-1] for state in states)
        mask = batch["labels"][:, 1:] != -100
        values = (dense.exp() * (dense - pruned)).sum(-1) * mask
        kl += (values.sum(1) / mask.sum(1)).tolist()
        tokens += mask.sum(1).tolist()
    assert found.tokens.tolist() == tokens
    assert found.kl.tolist() == pytest.approx(kl, rel=1e-4)
    losses = [float(answer_loss(other, batch, reduction="sum")) for batch in batches[1:]]
    assert found.loss == pytest.approx(sum(losses) / sum(tokens), rel=1e-4)
    assert comparison.dense_loss != pytest.approx(found.loss)


def test_within_one_standard_error_the_simpler_candidate_wins():
    base = [1.0, 2.0, 3.0, 4.0]
    noisy, worse = [0.9, 2.3, 2.8, 4.1], [1.3, 2.3, 3.4, 4.3]
    assert simplest([verdict(*base), verdict(*noisy)], [1.0, 0.0]) == 1  # no record says clearly which is better
    assert simplest([verdict(*base), verdict(*worse)], [1.0, 0.0]) == 0  # every record does, though they differ a lot
    assert simplest([verdict(*base), verdict(*noisy)], [0.0, 1.0]) == 0
    assert simplest([verdict(1.0)], [5.0]) == 0
    mean, error = verdict(*worse).excess(verdict(*base))
    steps = torch.tensor(worse) - torch.tensor(base)
    assert mean == pytest.approx(float(steps.mean()))
    assert error == pytest.approx(float(steps.std() / 2), rel=1e-6)
