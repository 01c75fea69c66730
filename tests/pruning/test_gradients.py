from __future__ import annotations

import weakref

import pytest
import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.models.forward import answer_loss, forward_hidden, supervised_positions
from efficientllava.pruning.gradients import sensitivity, taylor_scores
from efficientllava.pruning.stream import no_reduce
from efficientllava.runtime.content import digest
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import TAYLOR

from ..conftest import make_batches, make_model, stream_of


def taylor(model, batches, variant="param_first", mean="sample", reduce=no_reduce):
    return taylor_scores(stream_of(model, batches, reduce=reduce), variant, mean)


def gradients(model, batch):
    model.zero_grad()
    answer_loss(model, batch).backward()
    found = {p: p.grad.clone() for p in model.get_decoder().parameters() if p.grad is not None}
    model.zero_grad()
    return found


def elementwise(variant, weight, gradient, square):
    if variant == "param_second":
        return weight**2 * square
    if variant == "param_mix":
        return (weight * gradient - 0.5 * weight**2 * square).abs()
    return weight * gradient


def expected(model, batches, variant, mean):
    """Scores from whole gradients: every weight of a unit, row by row and column by column."""
    found = [gradients(model, batch) for batch in batches]
    tokens = [float((b["labels"][:, 1:] != -100).sum()) for b in batches]
    scores = []
    for layer in layers_of(model):
        pair = []
        for component in layer.components:
            total = torch.zeros(component.units, dtype=torch.float64)
            parts = [(r.linear.weight, r.offset, r.width, 0) for r in component.readers]
            for weight, offset, width, axis in [*parts, (component.writer.weight, 0, component.width, 1)]:
                w = weight.detach()
                if mean == "batch":
                    g = sum(f[weight] * n / sum(tokens) for f, n in zip(found, tokens, strict=True))
                    square = sum(f[weight] ** 2 for f in found) / len(found)
                    tables = [elementwise(variant, w, g, square)]
                else:
                    tables = [elementwise(variant, w, f[weight], f[weight] ** 2) / len(found) for f in found]
                for table in tables:
                    lines = table.sum(1 - axis).abs() if variant == "vectorize" else table.abs().sum(1 - axis)
                    for unit in range(component.units):
                        total[unit] += lines[offset + unit * width : offset + (unit + 1) * width].sum()
            pair.append(total)
        scores.append(pair)
    return scores


@pytest.mark.parametrize("mean", ["sample", "batch"])
@pytest.mark.parametrize("variant", TAYLOR)
def test_scores_equal_those_of_whole_gradients(family, variant, mean):
    model, batches = make_model(family), make_batches(2)
    found = taylor(model, batches, variant, mean)
    for layer, reference in zip(found, expected(model, batches, variant, mean), strict=True):
        for scores, right in zip(layer, reference, strict=True):
            assert scores.tolist() == pytest.approx(right.tolist(), rel=2e-4)


@pytest.mark.parametrize("mean", ["sample", "batch"])
def test_gradients_are_freed_and_flags_restored(mean):
    model = make_model("phi")
    model.lm_head.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    taylor(model, make_batches(2), "param_mix", mean)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("mean", ["sample", "batch"])
def test_never_more_than_the_gradients_of_one_layer_exist(mean):
    model, alive, most = make_model(), [], 0
    layers = model.get_decoder().layers

    def look(gradient):
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(reference() is not None for reference in alive))

    weights = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    for weight in weights:
        weight.register_hook(look)
    taylor(model, make_batches(2), "param_mix", mean)
    assert len(alive) == 2 * len(weights)
    assert most <= len(weights) // len(layers)


def test_a_failure_restores_the_model():
    model = make_model()
    model.requires_grad_(False)

    def fail(*_):
        if torch.is_grad_enabled():
            raise ZeroDivisionError

    model.get_decoder().layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        taylor(model, make_batches(2))
    assert not any(p.requires_grad for p in model.parameters())


def test_batches_without_an_answer_do_not_count():
    model, batches = make_model(), make_batches(2)
    silent = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    found = taylor(model, [batches[0], silent, batches[1]])
    for layer, right in zip(found, taylor(model, batches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, right, strict=True))
    with pytest.raises(UserError, match=r"prune\.importance=param_first.*no answer"):
        taylor(model, [silent])


@pytest.mark.parametrize("mean", ["sample", "batch"])
@pytest.mark.parametrize("variant", TAYLOR)
def test_a_process_without_batches_takes_part_in_every_reduction(variant, mean):
    model, shapes = make_model(), {}

    def counting(key):
        def reduce(tensor):
            shapes.setdefault(key, []).append(tuple(tensor.shape))
            # The other process of this pair has answers.
            return tensor + 1 if tensor.ndim == 1 and len(tensor) <= 2 else tensor

        return reduce

    taylor(model, make_batches(1), variant, mean, counting("some"))
    scores = taylor(model, [], variant, mean, counting("none"))
    assert shapes["some"] == shapes["none"]
    assert all(not s.any() for layer in scores for s in layer)


def test_gradients_are_those_of_sampled_answers_by_what_writers_write(family):
    """The same draws, one graph of the whole model."""
    model = make_model(family, dtype=torch.float64)
    batches = make_batches(1, dtype=torch.float64)
    stream = stream_of(model, batches)
    felt = sensitivity(stream, 3)
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
    seed = int(digest([3, *batches[0]["ids"]]), 16)
    draws = torch.rand(len(cdf), 1, generator=torch.Generator().manual_seed(seed)) * cdf[:, -1:]
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


def test_written_text_has_its_share_of_what_is_felt_and_draws_belong_to_records():
    model, batches = make_model(), make_batches(2)
    read, made = (sensitivity(stream_of(model, [batch]), 0).outputs[1][0] for batch in batches)
    both = sensitivity(stream_of(model, batches, written=(1,), written_share=0.2), 0).outputs[1][0]
    assert both.tolist() == pytest.approx((0.8 * read + 0.2 * made).tolist(), rel=1e-4)


def test_the_same_seed_feels_the_same():
    one, two, other = (sensitivity(stream_of(make_model(), make_batches()), seed) for seed in (0, 0, 1))
    assert torch.equal(one.outputs[0][0], two.outputs[0][0])
    assert not torch.equal(one.outputs[0][0], other.outputs[0][0])
