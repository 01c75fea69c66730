from __future__ import annotations

from typing import Any

import pytest
import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.models.forward import (
    FeatureCache,
    answer_loss,
    forward_hidden,
)
from efficientllava.pruning.statistics import BlockInfluence, Gram, layer_statistics
from efficientllava.pruning.stream import TOKENS, Beginning, CalibrationStream, counted_positions, recorded_calls
from efficientllava.runtime.errors import UserError

from ..conftest import (
    IMAGE_TOKEN,
    make_batch,
    make_batches,
    make_model,
    make_packed,
    stream_of,
)


@pytest.mark.parametrize("make", [make_batch, make_packed])
def test_the_stream_computes_what_the_model_computes(family, make):
    model, batches = make_model(family), [make(seed=s) for s in range(2)]
    stream = stream_of(model, batches)
    hidden = stream.start()
    for index, layer in enumerate(model.get_decoder().layers):
        stream.advance(layer, index, hidden)
    norm = getattr(model.get_decoder(), "norm", None) or model.get_decoder().final_layernorm
    with torch.no_grad():
        for batch, end in zip(batches, hidden, strict=True):
            real = batch["attention_mask"].bool()
            assert torch.equal(norm(end)[real], forward_hidden(model, batch)[real])
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        total = sum(float(answer_loss(model, b, reduction="sum")) for b in batches)
    assert stream.answer_loss(hidden) == pytest.approx(total / sum(counts), rel=1e-6)


def test_padding_moves_nothing_that_counts():
    model, batch = make_model(), make_batch()
    padded = {**batch}
    for key, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
        padded[key] = torch.cat([batch[key], torch.full((3, 5), fill)], 1)
    results = []
    for found in (batch, padded):
        stream = stream_of(model, [found])
        hidden, influence, gram = stream.start(), BlockInfluence(), Gram(48, torch.device("cpu"))
        for b, before, after in stream.run(model.get_decoder().layers[0], 0, hidden):
            influence.add(before, after, stream.counted[b])
            gram.add(after[stream.counted[b]], stream.weights(b, after))
        results.append((influence.value("mean"), influence.value("sum"), gram.mean(lambda t: t)))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-5)
    assert torch.allclose(results[0][2], results[1][2], rtol=1e-4, atol=1e-6)


def test_kinds_of_tokens_split_the_real_ones():
    batch = make_batch()
    masks = {kind: counted_positions(batch, kind, IMAGE_TOKEN) for kind in TOKENS}
    assert torch.equal(masks["all"], batch["attention_mask"].bool())
    assert torch.equal(masks["image"] | masks["text"], masks["all"])
    assert not (masks["image"] & masks["text"]).any()
    assert int(masks["image"].sum()) == int((batch["input_ids"] == IMAGE_TOKEN).sum()) > 0
    assert torch.equal(masks["answer"], batch["labels"] != -100)


def test_a_kind_of_token_that_never_occurs_is_refused():
    batches = make_batches(images=False)
    with pytest.raises(UserError, match=r"prune\.tokens=image"):
        stream_of(make_model(), batches, "image")
    stream_of(make_model(), batches, "image", reduce=lambda count: count + 1)  # another process has some


def test_recorded_calls_leave_the_model_as_it_was():
    model = make_model()
    layers, batch = model.get_decoder().layers, make_batch()
    with torch.no_grad():
        before = forward_hidden(model, batch)
        with pytest.raises(ZeroDivisionError), recorded_calls(layers) as calls:
            forward_hidden(model, batch)
            assert len(calls) == len(layers)
            assert all(torch.equal(hidden, calls[0][0]) for hidden, _ in calls)
            raise ZeroDivisionError
        assert torch.equal(forward_hidden(model, batch), before)
    assert not any("forward" in vars(layer) for layer in layers)


def test_storage_holds_the_hidden_states_between_layers():
    model = make_model()
    stream = stream_of(model, make_batches(), storage="cpu")
    hidden = stream.start()
    assert stream.store(hidden[0]) is hidden[0]
    assert stream.load(hidden[0]).device == stream.counted[0].device


def test_the_stream_uses_the_shared_vision_features():
    model, batches, calls = make_model(), make_batches(), []
    model.model.vision_tower.register_forward_pre_hook(lambda _module, args, kwargs: calls.append(1), with_kwargs=True)
    cache = FeatureCache(model)
    first, second = (stream_of(model, batches, features=cache) for _ in range(2))
    plain = stream_of(model, batches)
    starts = [stream.start() for stream in (first, second, first, plain)]
    assert len(calls) == 6, "three batches, once for both streams and once for the one that keeps its own"
    for a, b, c in zip(*starts[1:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gram_is_the_mean_outer_product(dtype):
    rows = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (3, 0, 8)]
    gram = Gram(5, torch.device("cpu"))
    for part in rows:
        gram.add(part, torch.arange(1.0, len(part) + 1))
    joined = torch.cat(rows).double()
    weights = torch.tensor([1.0, 2, 3, *range(1, 9)], dtype=torch.float64)
    expected = (joined * weights[:, None]).T @ joined / weights.sum()
    assert torch.allclose(gram.mean(lambda t: t), expected, rtol=1e-6)


def test_gram_of_a_wide_writer_is_kept_in_single_precision():
    gram = Gram(4097, torch.device("cpu"))
    rows = torch.randn(3, 4097)
    gram.add(rows, torch.ones(3))
    assert gram.matrix.dtype == torch.float32
    assert torch.allclose(gram.mean(lambda t: t), rows.T @ rows / 3, atol=1e-6)


def test_statistics_of_two_processes_add_up():
    rows = torch.randn(10, 4, dtype=torch.float64)
    whole, parts = Gram(4, torch.device("cpu")), [Gram(4, torch.device("cpu")) for _ in range(2)]
    whole.add(rows, torch.ones(10))
    for part, some in zip(parts, (rows[:3], rows[3:]), strict=True):
        part.add(some, torch.ones(len(some)))
    sums = {1: torch.tensor([10.0], dtype=torch.float64), 2: parts[0].matrix + parts[1].matrix}
    assert torch.allclose(parts[0].mean(lambda t: sums[t.ndim].clone()), whole.mean(lambda t: t))


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_block_influence_is_one_minus_the_mean_cosine(size):
    inputs = size * torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]], dtype=torch.float16)
    outputs = size * torch.tensor([[[0.0, 3.0], [-1.0, 0.0], [0.0, 1.0]]], dtype=torch.float16)
    influence = BlockInfluence()
    influence.add(inputs, outputs, torch.tensor([[True, False, True]]))
    assert influence.value("mean") == pytest.approx(0.5)
    assert influence.value("sum") == pytest.approx(1.0)


def positions(stream: CalibrationStream) -> list[Any]:
    return [mask.sum().item() for mask in stream.counted]


def test_counted_positions_reach_the_stream():
    model, batches = make_model(), make_batches()
    assert positions(stream_of(model, batches, "image")) == [8, 8, 8]
    assert positions(stream_of(model, batches)) == [54, 54, 54]


def test_what_all_records_begin_with_counts_once():
    batches = make_batches()
    image = IMAGE_TOKEN
    beginning = Beginning.of(batches, image)
    pairs = [pair for b in batches for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
    rows = [ids[mask.bool()].tolist() for ids, mask in pairs]
    shared = 0
    while all(row[shared] == rows[0][shared] != image for row in rows):
        shared += 1
    assert (len(beginning.ids), beginning.records) == (shared, len(rows))
    template = [{**b, "input_ids": torch.cat([torch.full((3, 2), 9), b["input_ids"][:, 2:]], 1)} for b in batches]
    beginning = Beginning.of(template, image)
    assert beginning.ids[:2] == (9, 9)
    stream = stream_of(make_model(), template, beginning=beginning)
    places = [int(mask.argmax()) for b in template for mask in b["attention_mask"]]
    shares = [torch.zeros(mask.shape, dtype=stream.shares(i).dtype) for i, mask in enumerate(stream.counted)]
    for i, mask in enumerate(stream.counted):
        shares[i][mask] = stream.shares(i)
    assert float(sum(shares[i // 3][i % 3, place] for i, place in enumerate(places))) == pytest.approx(1.0)
    other = {**template[0], "input_ids": template[0]["input_ids"] + 1}  # begins otherwise, such as written text
    assert stream_of(make_model(), [other], beginning=beginning).shares(0).eq(1).all()
    assert Beginning.of(template[:1], image).records == 3
    assert Beginning.of([{k: v[:1] for k, v in template[0].items() if isinstance(v, torch.Tensor)}], image).ids == ()


def test_a_position_weighs_as_the_next_norm_sees_an_error_there():
    stream = stream_of(make_model(), make_batches(1))
    residual = torch.randn(3, make_batches(1)[0]["input_ids"].shape[1], 48)
    weights = stream.weights(0, residual)
    assert torch.allclose(stream.weights(0, 10 * residual), weights / 100)
    loud = residual.clone()
    loud[0, 0] *= 1e3
    assert torch.equal(stream.weights(0, loud)[1:], weights[1:])


@torch.no_grad()
def test_statistics_of_any_linear_are_those_of_its_inputs_on_the_dense_prefix(family):
    model = make_model(family, dtype=torch.float64)
    stream = stream_of(model, make_batches(dtype=torch.float64))
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


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_written_text_has_its_share_of_what_counts(tokens):
    model, batches = make_model(), make_batches(3)
    beginning = Beginning.of(batches[:2], model.config.image_token_id)
    stream = stream_of(model, batches, tokens, beginning=beginning, written=[2], written_share=0.25)
    sums = [float(stream.shares(index).sum()) for index in range(3)]
    assert sums[2] / sum(sums) == pytest.approx(0.25)
