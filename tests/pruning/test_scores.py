from __future__ import annotations

import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.scores import layer_statistics
from efficientllava.pruning.statistics import CalibrationStream
from tests.conftest import make_batches, make_model


@torch.no_grad()
def test_statistics_of_any_linear_are_those_of_its_inputs_on_the_dense_prefix(family):
    model = make_model(family, dtype=torch.float64)
    stream = CalibrationStream(model, make_batches(dtype=torch.float64))
    layers, hidden, expected = layers_of(model), stream.start(), stream.start()
    seen: dict[torch.nn.Module, torch.Tensor] = {}
    for index, layer in enumerate(layers[:2]):
        linears = [layer.mlp.readers[0].linear, layer.attention.writer]
        grams, power = layer_statistics(stream, layer, index, hidden, linears=linears)
        rows: list[list[torch.Tensor]] = [[], [], []]
        for batch, counted in enumerate(stream.counted):
            handles = [m.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for m in linears]
            expected[batch] = stream.call(layer.module, index, batch, expected[batch])
            for handle in handles:
                handle.remove()
            for values, value in zip(rows, (*(seen[m] for m in linears), expected[batch]), strict=True):
                values.append(value[counted])
        from_reader, from_writer, outputs = (torch.cat(values) for values in rows)
        for gram, x in zip(grams, (from_reader, from_writer), strict=True):
            assert torch.allclose(gram, x.T @ x / len(x))
        assert abs(power - float(outputs.square().sum(1).mean())) < 1e-9 * power
        assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))
