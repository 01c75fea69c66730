from __future__ import annotations

from dataclasses import replace

import pytest

from efficientllava.models.anatomy import language_parameters, layers_of
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_ratio, whole_layers
from efficientllava.pruning.pruner import COARSE, lowest, search_length
from efficientllava.pruning.selection import (
    TOLERANCE,
    Space,
    global_counts,
    layers_to_drop,
    local_shape,
    nominal_shape,
    require_feasible,
    scaled_protection,
    uniform_candidates,
)
from efficientllava.pruning.surgery import cut
from efficientllava.runtime.errors import UserError

from ..conftest import CHANNELS, LAYERS, make_model

RATIOS = (0.05, 0.2, 0.35, 0.5)


def big(round_to: int = 128, groups: int = 32, heads_per_group: int = 1) -> Space:
    """The sizes of a 7B Llama."""
    unit = 128 * 4096 * 2 * (heads_per_group + 1)
    return Space((groups,) * 32, (11008,) * 32, (unit,) * 32, (3 * 4096,) * 32, 6_738_415_616, round_to=round_to)


def test_shapes_that_are_one_are_listed_once():
    space = Space.of(make_model("llama_gqa"), protect_attention=range(LAYERS))
    (shape,) = uniform_candidates(space, 0.2)
    assert shape[0] == max(space.groups)


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_candidate_meets_the_ratio_and_is_the_nearest_for_its_groups(family, ratio):
    space = Space.of(make_model(family), round_to=2)
    shapes = uniform_candidates(space, ratio)
    assert [groups for groups, _ in shapes] == sorted({groups for groups, _ in shapes})
    for groups, channels in shapes:
        gap = abs(space.ratio(space.counts(groups, channels)) - ratio)
        assert gap <= TOLERANCE
        assert channels % 2 == 0
        others = [abs(space.ratio(space.counts(groups, c)) - ratio) for c in space.allowed_channels]
        assert gap == min(others)


@pytest.mark.parametrize("ratio", RATIOS)
def test_counted_ratio_is_that_of_the_cut_model(family, ratio):
    model = make_model(family)
    space = Space.of(model)
    groups, channels = local_shape(space, ratio)
    layers = tuple(LayerPlan(i, tuple(range(groups)), tuple(range(channels))) for i in range(LAYERS))
    assert plan_ratio(model, layers) == pytest.approx(space.ratio(space.counts(groups, channels)))
    before = sum(p.numel() for p in [*model.get_decoder().parameters(), *model.lm_head.parameters()])
    heads_per_group = layers_of(model)[0].heads_per_group
    smaller = cut(model, PruningPlan("widthwise", layers, LAYERS, heads_per_group, ratio, 0.0))
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan_ratio(make_model(family), layers), abs=1e-12)


def test_local_shape_removes_equal_shares():
    groups, channels = local_shape(big(), 0.3)
    assert abs(groups / 32 - channels / 11008) < 1 / 32


def test_channels_are_rounded_at_full_size():
    shapes = uniform_candidates(big(128), 0.3)
    assert len(shapes) > 12
    assert all(channels % 128 == 0 for _, channels in shapes)


def test_protected_layers_stay_whole_and_the_others_pay():
    model = make_model("llama_gqa")
    space = Space.of(model, protect_attention=[0, -1], protect_mlp=[1])
    counts = space.counts(*uniform_candidates(space, 0.25)[0])
    whole = [(layer.attention.units, layer.mlp.units) for layer in layers_of(model)]
    assert [counts[i][0] == whole[i][0] for i in range(LAYERS)] == [True, False, False, True]
    assert [counts[i][1] == whole[i][1] for i in range(LAYERS)] == [False, True, False, False]
    assert space.ratio(counts) == pytest.approx(0.25, abs=TOLERANCE)


def test_protecting_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"prune\.protect.*layers 0\.\.3"):
        Space.of(make_model(), protect_mlp=[4])


def test_published_protection_at_32_layers_and_scaled():
    assert scaled_protection(32) == ([0, 1, 2, 31], [0, 1, 2, 3, 30, 31])
    attention, mlp = scaled_protection(8)
    assert attention == [0, 7]
    assert mlp == [0, 7]


@pytest.mark.parametrize(
    ("share", "heads", "channels"), [(0.2, 26, 8806), (0.4, 20, 6604), (0.6, 13, 4403), (0.8, 7, 2201)]
)
def test_nominal_shares_give_the_published_7b_shapes(share, heads, channels):
    assert nominal_shape(big(), share, 128, 1) == (heads, channels)


def test_nominal_share_removes_whole_groups_and_leaves_one():
    assert nominal_shape(big(groups=8, heads_per_group=4), 0.4, 128, 4) == (5, 6604)
    assert nominal_shape(big(groups=2, heads_per_group=16), 0.9999, 128, 16) == (1, 1)


@pytest.mark.parametrize("selection", [uniform_candidates, lambda s, r: global_counts(s, r, costs_of(s))])
def test_an_infeasible_ratio_names_the_feasible_maximum(selection):
    space = Space.of(make_model("qwen2"))
    largest = space.ratio(space.smallest)
    require_feasible(space, largest)
    with pytest.raises(UserError, match=rf"at most {largest:.3f}"):
        selection(space, largest + 0.05)


def test_rounding_that_leaves_no_shape_names_the_nearest_ratio():
    space = Space((1,), (64,), (10,), (10,), 1000, round_to=32)
    with pytest.raises(UserError, match=r"nearest ratio .* is 0\.320"):
        uniform_candidates(space, 0.2)


def test_layers_of_unequal_size_are_solved_together():
    space = Space((4, 2, 4), (64, 20, 40), (100,) * 3, (10,) * 3, 2500)
    for ratio in (0.1, 0.3, 0.5):
        for groups, channels in uniform_candidates(space, ratio):
            assert space.ratio(space.counts(groups, channels)) == pytest.approx(ratio, abs=TOLERANCE)


def costs_of(space: Space, head: float = 1.0, channel: float = 1.0) -> list[tuple[list[float], list[float]]]:
    return [
        (
            [head * (1 + i + j) for i in range(space.groups[j])],
            [channel * (1 + 0.1 * i) for i in range(space.channels[j])],
        )
        for j in range(space.depth)
    ]


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("ratio", RATIOS)
def test_global_selection_meets_the_ratio(family, ratio, round_to):
    space = Space.of(make_model(family), protect_attention=[0], round_to=round_to)
    counts = global_counts(space, ratio, costs_of(space, head=50.0))
    assert space.ratio(counts) == pytest.approx(ratio, abs=TOLERANCE)
    assert counts[0][0] == space.groups[0]
    for groups, channels in counts:
        assert groups >= 1
        assert channels >= round_to
        assert channels % round_to == 0 or channels == CHANNELS


def test_global_selection_divides_by_the_parameters_of_a_unit():
    # Every head costs more than every channel, as raw scores always do, but less per parameter.
    space = Space((4, 4), (100, 100), (1000, 1000), (10, 10), 10_000)
    costs = [([40.0] * 4, [1.0] * 100)] * 2
    assert min(costs[0][0]) > max(costs[0][1])
    counts = global_counts(space, 0.3, costs)
    assert [groups for groups, _ in counts] == [1, 4]
    assert all(channels == 100 for _, channels in counts)


def test_global_selection_removes_the_cheaper_layer_first():
    space = Space((1, 1), (100, 100), (10, 10), (10, 10), 2020)
    counts = global_counts(space, 0.2, [([9.0], [2.0] * 100), ([9.0], [1.0] * 100)])
    assert counts[0] == (1, 100)
    assert counts[1] == (1, 60)


def test_a_layer_loses_its_last_heads_and_channels_only_where_it_may():
    space = Space((2, 2), (100, 100), (50, 50), (1, 1), 400, round_to=25)
    costs = [([0.0, 1.0], [5.0] * 100), ([900.0] * 2, [0.1] * 100)]
    assert global_counts(space, 0.5, costs) == [(1, 25), (2, 25)]
    assert global_counts(replace(space, off=True), 0.5, costs) == [(0, 100), (2, 0)]
    assert global_counts(replace(space, off=True, whole_mlp=frozenset({1})), 0.25, costs) == [(0, 100), (2, 100)]


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.05, 1), (0.149, 1), (0.151, 2), (0.5, 5)])
def test_layerwise_drops_the_nearest_number_of_blocks(ratio, count):
    assert layers_to_drop([10] * 8, 100, ratio) == count


@pytest.mark.parametrize("ratio", [0.01, 0.9])
def test_layerwise_ratio_between_no_blocks_is_refused(ratio):
    with pytest.raises(UserError, match=r"between 0\.050 and 0\.750"):
        layers_to_drop([10] * 8, 100, ratio)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 12, 13, 32, 64])
def test_lowest_finds_the_minimum_of_a_unimodal_objective(length):
    for bottom in range(length):
        tried: list[int] = []

        def loss(shape: tuple[int, int], bottom: int = bottom, tried: list[int] = tried) -> float:
            tried.append(shape[0])
            return (shape[0] - bottom) ** 2 + 0.1 * shape[0]

        assert lowest([(i, 0) for i in range(length)], loss) == (bottom, 0)
        assert len(tried) == len(set(tried)) <= search_length(length) <= max(COARSE, 2 * length.bit_length() + COARSE)


def test_whole_layers_remove_nothing(family):
    model = make_model(family)
    assert plan_ratio(model, whole_layers(model)) == 0.0
