from __future__ import annotations

import pytest
import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.models.forward import forward_hidden, supervised_positions
from efficientllava.pruning.scores import silent
from efficientllava.pruning.sensitivity import sensitivity
from efficientllava.pruning.statistics import CalibrationStream, no_reduce

from ..conftest import make_batches, make_model


def test_gradients_are_those_of_sampled_answers_by_what_writers_write(family):
    """The same draws, one graph of the whole model."""
    model = make_model(family, dtype=torch.float64)
    batches = make_batches(1, dtype=torch.float64)
    stream = CalibrationStream(model, batches)
    felt = sensitivity(stream, 3, no_reduce, silent)
    written: list[torch.Tensor] = []

    def note(_module, _args, output):
        output.requires_grad_()
        written.append(output)

    components = [component for layer in layers_of(model) for component in layer.components]
    handles = [component.writer.register_forward_hook(note) for component in components]
    hidden = forward_hidden(model, batches[0])
    for handle in handles:
        handle.remove()
    mask, _ = supervised_positions(batches[0]["labels"])
    logits = model.lm_head(hidden[mask]).float()
    cdf = logits.detach().softmax(-1).cumsum(-1)
    draws = torch.rand(len(cdf), 1, generator=torch.Generator().manual_seed(3)) * cdf[:, -1:]
    sampled = torch.searchsorted(cdf, draws).squeeze(1)
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, sampled, reduction="sum"), written)
    counted = stream.counted[0]
    for place, gradient in enumerate(gradients):
        squares = gradient[counted].square()
        layer, component = divmod(place, 2)
        scale = float(squares.sum(1).max())
        assert torch.allclose(
            felt.positions[layer][component][0].double(), squares.sum(1), rtol=1e-3, atol=1e-6 * scale
        )
        assert felt.outputs[layer][component].tolist() == pytest.approx(squares.mean(0).tolist(), rel=1e-3, abs=1e-9)


def test_the_same_seed_feels_the_same():
    one, two, other = (
        sensitivity(CalibrationStream(make_model(), make_batches()), seed, no_reduce, silent) for seed in (0, 0, 1)
    )
    assert torch.equal(one.outputs[0][0], two.outputs[0][0])
    assert not torch.equal(one.outputs[0][0], other.outputs[0][0])
