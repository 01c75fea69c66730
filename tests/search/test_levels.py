from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from efficientllava.models.anatomy import layers_of
from efficientllava.pruning.plan import LayerPlan, whole_layers
from efficientllava.pruning.solution import Target, solve
from efficientllava.pruning.stream import Calibration
from efficientllava.pruning.surgery import cut_component, rebuild
from efficientllava.runtime.errors import UserError
from efficientllava.search.levels import GAPS, LevelTable, gap_of, open_table
from efficientllava.search.recipes import LinearNorms, Masks, Structured
from experiments.speed.rows import peak_memory

from ..conftest import (
    CHANNELS,
    LAYERS,
    logits_of,
    make_batches,
    make_model,
    make_packed,
)
from .tables import (
    IDENTITY,
    components,
    gram_of_inputs,
    linears,
    make_table,
    steps,
)

RECIPES = [Structured(), Masks(0.5), Masks(None)]
DAMPING = 0.02
SOME = ["phi", "phi3_gqa"]  # biases and grouped heads, fused projections


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.granularity)
def recipe(request: pytest.FixtureRequest) -> Any:
    return request.param


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def hooks_of(model: Any) -> list[Any]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]


def install(model: Any, table: Any, policy: Any) -> None:
    for gene, level in enumerate(policy):
        layer = model.get_decoder().layers[gene // 2]
        setattr(layer, ("self_attn", "mlp")[gene % 2], table.module(gene, level))


def test_columns_at_every_level_are_the_closed_form_refit_on_the_dense_prefix(model, tmp_path):
    model = model.double()
    table = make_table(model, Structured(DAMPING), tmp_path)
    found = components(model)
    grams = gram_of_inputs(model, [component.writer for component in found], structured=True)
    checked = 0
    for gene, level in steps(table):
        if not level:
            continue
        weight, gram = found[gene].writer.weight.detach(), grams[gene]
        kept = found[gene].columns(table.units(gene, level))
        target = Target(weight @ gram[:, kept], float(torch.trace(weight @ gram @ weight.T)))
        expected, _, _ = solve(weight, kept, gram[kept][:, kept], target, DAMPING)
        assert torch.allclose(table.tensors(gene, level)["columns"], expected, rtol=1e-6, atol=1e-8)
        checked += 1
    assert checked == sum(gene.levels - 1 for gene in table.genes) >= LAYERS * (3 + 19)


def test_a_module_equals_surgery_of_the_real_model(model, tmp_path):
    model = model.double()
    table = make_table(model, Structured(DAMPING), tmp_path)
    batches = make_batches(dtype=torch.float64)
    whole = list(whole_layers(model))
    for gene, level in ((0, 1), (1, 7), (4, 2), (5, 19)):
        index = gene // 2
        units = table.units(gene, level)
        cut = (units, whole[index].channels) if gene % 2 == 0 else (whole[index].groups, units)
        plans = [*whole[:index], LayerPlan(index, *cut), *whole[index + 1 :]]
        real = copy.deepcopy(model)
        component = layers_of(real)[index].components[gene % 2]
        cut_component(component, units, table.tensors(gene, level)["columns"])
        real = rebuild(real, range(LAYERS))
        policy = [0] * len(table.genes)
        policy[gene] = level
        assert table.plan(tuple(policy)) == tuple(plans)
        install(model, table, policy)
        for batch in batches:
            assert torch.allclose(logits_of(model, batch), logits_of(real, batch), rtol=1e-7, atol=1e-8)
        install(model, table, [0] * len(table.genes))


@pytest.mark.parametrize("name", SOME)
def test_whole_levels_are_the_model_itself_and_others_are_not(name, recipe, tmp_path):
    model = make_model(name)
    batch = make_batches(1)[0]
    dense = logits_of(model, batch)
    table = make_table(model, recipe, tmp_path)
    whole = [gene.amounts[0] == 0 for gene in table.genes]
    own = [component.module for component in components(model)]
    assert [table.module(gene, 0) is own[gene] for gene in range(len(own))] == whole
    if all(whole):
        install(model, table, [0] * len(table.genes))
        assert torch.equal(logits_of(model, batch), dense)
    install(model, table, [gene.levels - 1 for gene in table.genes])
    assert not torch.allclose(logits_of(model, batch), dense, atol=0.01)


@pytest.mark.parametrize("name", SOME)
def test_nothing_of_the_model_is_changed(name, recipe, tmp_path):
    model = make_model(name)
    logits_of(model, make_batches(1)[0])  # transformers puts hooks of its own in place at the first call
    before, flags, hooks = state(model), [p.requires_grad for p in model.parameters()], hooks_of(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    config = copy.deepcopy(model.config.to_dict())
    table = make_table(model, recipe, tmp_path)
    modules = [table.module(*step) for step in steps(table) if table.removed(*step)]
    assert len(modules) > 2 * LAYERS - 1
    assert same(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.config.to_dict() == config
    assert hooks_of(model) == hooks
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_a_module_shares_with_the_model_what_is_equal(recipe, tmp_path):
    model = make_model("phi")
    table = make_table(model, recipe, tmp_path)
    module: Any = table.module(1, 1)
    assert module.fc2.bias.data_ptr() == model.get_decoder().layers[0].mlp.fc2.bias.data_ptr()


def test_a_module_is_not_the_replay_that_a_caller_has_put_in_place(recipe, tmp_path):
    model = make_model()
    table = make_table(model, recipe, tmp_path)
    mlp = model.get_decoder().layers[0].mlp
    mlp.forward = mlp.down_proj.forward = lambda *_: None
    hidden = torch.ones(1, 2, model.config.get_text_config().hidden_size)
    assert table.module(1, 1)(hidden).shape == hidden.shape


def test_gradients_pass_through_a_module_and_stop_at_its_weights(recipe, tmp_path):
    model = make_model()
    module = make_table(model, recipe, tmp_path).module(1, 1)
    hidden = torch.ones(1, 2, model.config.get_text_config().hidden_size, requires_grad=True)
    module(hidden).square().sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert all(p.grad is None for p in (*module.parameters(), *model.parameters()))


def test_removed_counts_the_parameters_that_a_module_lacks(model, tmp_path):
    table = make_table(model, Structured(), tmp_path)
    for gene, level in steps(table):
        whole, module = (sum(p.numel() for p in table.module(gene, at).parameters()) for at in (0, level))
        assert table.removed(gene, level) == whole - module
        assert bool(level) == bool(table.removed(gene, level))


def test_norms_are_those_of_the_weights_with_zeros_in_place_of_what_is_gone(model, tmp_path):
    table = make_table(model, Structured(), tmp_path)
    for gene, component in enumerate(components(model)):
        level = table.genes[gene].levels // 2
        kept = component.columns(table.units(gene, level))
        norms = table.norms(gene, level)
        assert len(norms) == len(linears(component)) == len(table.norms(gene, 0))
        weight = component.writer.weight.detach()
        masked, new = torch.zeros_like(weight), torch.zeros_like(weight)
        masked[:, kept] = weight[:, kept]
        new[:, kept] = table.tensors(gene, level)["columns"]
        expected = [v.square().sum().item() for v in (weight, masked, new - weight)]
        assert [norms[-1].dense, norms[-1].masked, norms[-1].change] == pytest.approx(expected, rel=1e-5)
        for linear, cut, norm in zip(linears(component), linears_of(table, gene, level), norms, strict=True):
            assert norm.weights == linear.weight.numel()
            assert norm.dense == pytest.approx(linear.weight.square().sum().item(), rel=1e-5)
            if linear is not component.writer:
                assert norm.masked == pytest.approx(cut.weight.square().sum().item(), rel=1e-5)
                assert norm.change == pytest.approx(norm.dense - norm.masked)
        for norm in table.norms(gene, 0):
            assert (norm.masked, norm.change) == (norm.dense, 0)


def linears_of(table: Any, gene: int, level: int) -> list[Any]:
    """The linear layers of a module, in the order of the norms."""
    twin = copy.deepcopy(table._components[gene])
    names = {id(module): name for name, module in twin.module.named_modules()}
    return [table.module(gene, level).get_submodule(names[id(linear)]) for linear in linears(twin)]


def test_levels_are_all_group_counts_and_twentieths_of_the_channels_down_to_none(tmp_path):
    table = make_table(make_model("llama_gqa"), Structured(), tmp_path)
    assert table.genes[0].amounts == (0, 0.25, 0.5, 0.75, 1)
    kept = [CHANNELS * (1 - amount) for amount in table.genes[1].amounts]
    assert kept == pytest.approx([round(CHANNELS * (1 - i / 20)) for i in range(21)])
    assert [(gene.layer, gene.kind) for gene in table.genes[2:4]] == [(1, "attention"), (1, "mlp")]
    for gene, entry in enumerate(table.genes):
        sets = [set(table.units(gene, level)) for level in range(entry.levels)]
        assert all(low < high for high, low in itertools.pairwise(sets))


def test_kept_channels_are_multiples_but_for_the_whole():
    mlp = components(make_model(intermediate_size=50))[1]
    assert Structured(round_to=8).counts(mlp) == (50, 48, 40, 32, 24, 16, 8, 0)
    assert Structured(round_to=64).counts(mlp) == (50, 0)
    assert Structured().counts(components(make_model(intermediate_size=3))[1]) == (3, 2, 1, 0)
    assert Structured(channels=(16,)).counts(mlp) == (50, 16)


def test_levels_far_apart_are_reached_in_rounds_of_a_twentieth(tmp_path):
    model = make_model()
    far = make_table(model, Structured(channels=(16,)), tmp_path)
    near = make_table(model, Structured(channels=tuple(range(60, 15, -4))), tmp_path / "near")
    assert far.genes[1].amounts == (0, 0.75)
    assert [far.units(gene, 1) for gene in (1, 3)] == [near.units(gene, 12) for gene in (1, 3)]
    assert torch.equal(far.tensors(1, 1)["columns"], near.tensors(1, 12)["columns"])


@pytest.mark.parametrize("name", SOME)
def test_an_opened_table_equals_the_one_that_was_made(name, recipe, tmp_path):
    model = make_model(name)
    made = make_table(model, recipe, tmp_path)
    opened = LevelTable(model, recipe, tmp_path / "table")
    assert opened.genes == made.genes
    for step in steps(made):
        assert opened.removed(*step) == made.removed(*step)
        assert opened.norms(*step) == made.norms(*step)
        assert same(opened.module(*step).state_dict(), made.module(*step).state_dict())


def test_a_table_is_made_once_for_what_it_depends_on(recipe, tmp_path):
    model, done = make_model(), []
    calibration = Calibration(make_batches(), tick=lambda *tick: done.append(tick))
    for identity in (IDENTITY, IDENTITY, {**IDENTITY, "model": "other"}):
        open_table(model, recipe, calibration, tmp_path / "tables", identity)
    made = [tick for tick in done if tick[0] == "level table"]
    assert made == [("level table", i + 1, LAYERS) for i in range(LAYERS)] * 2


@pytest.mark.parametrize("name", ["table.json", "layer_001.safetensors"])
def test_a_damaged_table_is_made_again(tmp_path, caplog, name):
    model, calibration = make_model(), Calibration(make_batches())
    made = open_table(model, Structured(), calibration, tmp_path / "tables", IDENTITY)
    expected = made.tensors(3, 2)
    file = made.folder / name
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    again = open_table(model, Structured(), calibration, tmp_path / "tables", IDENTITY)
    assert same(again.tensors(3, 2), expected)
    assert [record.getMessage().endswith("set aside and computed again") for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {**IDENTITY, "calibration": "other"}},
        {"recipe": Structured(damping=0.5)},
        {"recipe": Structured(round_to=4)},
        {"recipe": Masks(None, damping=0.3)},
        {"model": make_model(dtype=torch.float64)},
    ],
)
def test_a_table_of_something_else_is_another_entry(change, tmp_path):
    options = {"model": make_model(), "recipe": Structured(), "identity": IDENTITY}
    made = []
    for asked in (options, {**options, **change}):
        calibration = Calibration(make_batches(dtype=next(asked["model"].parameters()).dtype))
        made.append(open_table(root=tmp_path / "tables", calibration=calibration, **asked).folder)
    assert made[0] != made[1]


def test_modules_beyond_the_limit_are_made_anew(recipe, tmp_path):
    model = make_model()
    free = make_table(model, recipe, tmp_path)
    first = free.module(1, 1)
    assert free.module(1, 1) is first
    size = sum(p.nbytes for p in first.parameters())
    tight = LevelTable(model, recipe, tmp_path / "table", limit_bytes=2 * size)
    second = tight.module(1, 1)
    third = tight.module(3, 1)
    assert tight.module(1, 1) is second
    tight.module(5, 1)
    assert tight.module(1, 1) is second, "the one that was asked for longest ago has gone"
    assert tight.module(3, 1) is not third
    tight.module(7, 1)
    assert tight.module(1, 1) is not second
    assert same(tight.module(1, 1).state_dict(), second.state_dict())


@pytest.mark.parametrize("recipe", [Structured(), Masks(None)], ids=["structured", "masks"])
def test_memory_does_not_grow_with_the_depth(recipe, tmp_path):
    def peak(depth: int) -> int:
        calibration = Calibration(make_batches(1))
        return peak_memory(
            lambda: make_model(num_hidden_layers=depth, intermediate_size=128),
            lambda model: make_table(model, recipe, tmp_path / str(depth), calibration),
        )

    assert peak(4) < 1.02 * peak(2)


def test_packed_batches_and_chosen_tokens_are_counted(tmp_path):
    model = make_model("llama_gqa")
    packed = make_table(model, Structured(), tmp_path / "packed", Calibration([make_packed()]))
    answers = make_table(model, Structured(DAMPING, tokens="answer"), tmp_path)
    assert packed.genes == answers.genes
    component = layers_of(model)[1].mlp
    gram = gram_of_inputs(model, [component.writer], "answer", structured=True)[0]
    weight, kept = component.writer.weight.detach().double(), component.columns(answers.units(3, 4))
    target = Target(weight @ gram[:, kept], 0.0)
    expected, _, _ = solve(weight, kept, gram[kept][:, kept], target, DAMPING)
    assert torch.allclose(answers.tensors(3, 4)["columns"].double(), expected, rtol=1e-3, atol=1e-4)


DENSE = [LinearNorms(100, 4.0, 4.0, 0.0), LinearNorms(300, 9.0, 9.0, 0.0)]

HALF = [LinearNorms(100, 4.0, 1.0, 3.5), LinearNorms(300, 9.0, 4.0, 6.0)]

UNIFORM = [LinearNorms(100, 4.0, 2.0, 1.0), LinearNorms(300, 9.0, 6.0, 4.5)]


def test_values_by_hand() -> None:
    assert GAPS["fro"](HALF, UNIFORM, 64) == pytest.approx((0.25 * 1 / 2 + 0.75 * 2 / 3) / 8)
    assert GAPS["fro_logprod"](HALF, UNIFORM, 64) == pytest.approx(math.sqrt(1 / 2 * 2 / 3) / 8)
    # s^2 = 2 / 2 * median(1/4, 1/2) = 3/8, D^2 = 3.5/4 + 6/9
    inner = (3.5 / 4 + 6 / 9) / (2 * 3 / 8) + math.log(2 * 8 / 0.05)
    assert GAPS["dist"](HALF, UNIFORM, 64) == pytest.approx(math.sqrt(inner / 128))


def test_dense_model_has_the_largest_norm_and_no_distance() -> None:
    assert GAPS["fro"](DENSE, UNIFORM, 64) == pytest.approx(1 / 8)
    assert GAPS["fro_logprod"](DENSE, UNIFORM, 64) == pytest.approx(1 / 8)
    assert GAPS["dist"](DENSE, UNIFORM, 64) == pytest.approx(math.sqrt(math.log(2 * 8 / 0.05) / 128))


@pytest.mark.parametrize("kind", ["fro", "fro_logprod", "dist"])
def test_norm_and_distance_pull_in_opposite_directions_and_shrink_with_samples(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 48)
    values = []
    for kept in (48, 40, 30, 20, 10):
        masked = float(weight[:, :kept].square().sum())
        dense = float(weight.square().sum())
        values.append(GAPS[kind]([LinearNorms(weight.numel(), dense, masked, dense - masked)], UNIFORM, 64))
    assert values == sorted(values, reverse=kind != "dist")
    assert len(set(values)) == 5
    sizes = [GAPS[kind](HALF, UNIFORM, samples) for samples in (16, 32, 64, 128)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[2] == pytest.approx(2, rel=0.05)


def test_extremes_stay_finite() -> None:
    nothing = [LinearNorms(10, 0.0, 0.0, 0.0), LinearNorms(10, 5.0, 0.0, 5.0)]
    assert all(math.isfinite(gap(nothing, DENSE, 1)) for gap in GAPS.values())


def test_gap_of_reads_the_levels_of_a_policy() -> None:
    def norms(gene: int, level: int) -> list[LinearNorms]:
        return [LinearNorms(10 * (gene + 1), 4.0, 4.0 / (1 + level), 1.0)]

    gap = gap_of("fro", norms, (0, 0), 25)
    assert gap((0, 3)) == pytest.approx((1 / 3 * 1 + 2 / 3 * 1 / 2) / 5)
    assert gap((0, 0)) > gap((0, 1)) > gap((1, 1))
    with pytest.raises(UserError, match=r"search\.gap=norm: unknown; choose one of fro, fro_logprod, dist"):
        gap_of("norm", norms, (0, 0), 25)
