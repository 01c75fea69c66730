from __future__ import annotations

import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.scores import layer_statistics
from efficientllava.pruning.statistics import CalibrationStream

from ..conftest import make_batches, make_model


@torch.no_grad()
def test_statistics_of_any_linear_are_those_of_its_inputs_on_the_dense_prefix(family):
    model = make_model(family, dtype=torch.float64)
    stream = CalibrationStream(model, make_batches(dtype=torch.float64))
    layers, hidden, expected = layers_of(model), stream.start(), stream.start()
    seen: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for index, layer in enumerate(layers[:2]):
        linears = [layer.mlp.readers[0].linear, layer.attention.writer]
        grams = layer_statistics(stream, layer, index, hidden, linears=linears)
        rows: list[list[torch.Tensor]] = [[], [], []]
        for batch, counted in enumerate(stream.counted):
            before = expected[batch]
            hooks = [
                m.register_forward_hook(lambda m, args, output: seen.update({m: (args[0], output)})) for m in linears
            ]
            expected[batch] = stream.call(layer.module, index, batch, before)
            for hook in hooks:
                hook.remove()
            middle = before + seen[layer.attention.writer][1]
            for values, value in zip(
                rows, (*(seen[m][0] for m in linears), torch.stack([expected[batch], middle], -1)), strict=True
            ):
                values.append(value[counted])
        from_reader, from_writer, residuals = (torch.cat(values) for values in rows)
        # An error counts relative to the residual stream that it is added to.
        weights = 1 / residuals.square().mean(1)
        for gram, x, weight in zip(grams, (from_reader, from_writer), weights.unbind(1), strict=True):
            expectation = (x * weight[:, None]).T @ x / weight.sum()
            assert torch.allclose(gram, expectation, rtol=1e-5, atol=1e-7 * float(expectation.abs().max()))
        assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))
