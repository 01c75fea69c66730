from __future__ import annotations

import pytest
import torch

from efficientllava.search.recipes import BLOCK, Masks, lowest, sparsify

from ..conftest import make_model
from .tables import (
    components,
    gram_of_inputs,
    linears,
    make_table,
    steps,
)

DAMPING = 0.02


def problem(columns: int, rows: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def inverse_rows(gram: torch.Tensor) -> list[torch.Tensor]:
    """For each column, the first row of the inverse of what is left from this column on."""
    damped = gram + DAMPING * gram.diagonal().diag()
    return [torch.linalg.inv(damped[c:, c:])[0] for c in range(len(gram))]


def slow_obs(weight: torch.Tensor, rows: list[torch.Tensor], share: float | None) -> torch.Tensor:
    """OBS column by column."""
    weight, columns = weight.clone(), weight.shape[1]
    pivots = torch.stack([row[0] for row in rows])
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for c in range(columns):
        if share is not None and c % BLOCK == 0:
            stop = min(c + BLOCK, columns)
            count = round(share * len(weight) * stop) - int(gone.sum())
            costs = weight[:, c:stop] ** 2 / pivots[c:stop]
            order = costs.flatten().argsort()[:count]
            gone[order // (stop - c), c + order % (stop - c)] = True
        if share is None and c % 4 == 0 and c + 4 <= columns:
            for row in range(len(weight)):
                costs = weight[row, c : c + 4] ** 2 / pivots[c : c + 4]
                gone[row, c + costs.argsort()[:2]] = True
        removed = weight[:, c] * gone[:, c]
        weight[:, c:] -= removed[:, None] * rows[c] / pivots[c]
    return weight.masked_fill(gone, 0)


@pytest.mark.parametrize("columns", [2, 37, BLOCK, 2 * BLOCK + 21])
def test_masks_and_compensation_equal_a_slow_obs(columns):
    weight, gram = problem(columns)
    shares, rows = [0.3, 0.5, 0.9], inverse_rows(gram)
    pruned, kept = sparsify([weight[:4], weight[4:]], gram.clone(), shares, DAMPING)
    for level, share in enumerate(shares):
        expected = torch.cat([slow_obs(part, rows, share) for part in (weight[:4], weight[4:])])
        assert torch.allclose(pruned[:, level].T, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(kept[:, level].T, expected != 0)


@pytest.mark.parametrize("columns", [4, 37, BLOCK + 12])
def test_two_of_four_equals_a_slow_obs(columns):
    weight, gram = problem(columns)
    pruned, kept = sparsify([weight], gram.clone(), [0.5], DAMPING, two_of_four=True)
    assert torch.allclose(pruned[:, 0].T, slow_obs(weight, inverse_rows(gram), None), rtol=1e-6, atol=1e-7)
    assert torch.equal(kept, pruned != 0)


@pytest.mark.parametrize("count", [0, 1, 5, 9, 12])
def test_the_lowest_scores_are_as_many_as_asked_for_also_among_equals(count):
    scores = torch.tensor([[1.0, 0, 2, 0], [0, 1, 1, 1], [3, 0, 1, 2]])
    mask = lowest(scores, count)
    assert int(mask.sum()) == count
    assert count in (0, 12) or scores[mask].max() <= scores[~mask].min()


def test_inputs_that_are_always_zero_break_nothing():
    weight, gram = problem(40)
    gram[:, 7] = gram[7] = 0
    pruned, kept = sparsify([weight], gram, [0.5], DAMPING)
    assert pruned.isfinite().all()
    assert torch.equal(pruned[7, 0], weight[:, 7] * kept[7, 0])


def error(gram: torch.Tensor, change: torch.Tensor) -> float:
    """Mean square of the output's change."""
    return float(torch.trace(change.double() @ gram @ change.double().T))


@pytest.mark.parametrize("ratio", [0.5, None])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "phi", "phi3_gqa"])
def test_every_linear_has_its_zeros_and_loses_less_than_by_its_mask_alone(name, ratio, tmp_path):
    model = make_model(name, dtype=torch.float64)
    table = make_table(model, Masks(ratio, DAMPING), tmp_path)
    modules = [linear for component in components(model) for linear in linears(component)]
    grams = dict(zip(modules, gram_of_inputs(model, modules), strict=True))
    for gene, component in enumerate(components(model)):
        names = {id(module): name for name, module in component.module.named_modules()}
        for level, share in enumerate(table.genes[gene].amounts):
            zeros, norms = 0, table.norms(gene, level)
            for linear, norm in zip(linears(component), norms, strict=True):
                dense = linear.weight.detach()
                new = table.module(gene, level).get_submodule(names[id(linear)]).weight.detach()
                gone = new == 0
                assert int(gone.sum()) == round(share * new.numel())
                zeros += int(gone.sum())
                squares = [float(v.double().square().sum()) for v in (dense, dense * ~gone, new - dense)]
                assert [norm.dense, norm.masked, norm.change] == pytest.approx(squares, rel=1e-5)
                assert norm.weights == new.numel()
                if share:
                    gram = grams[linear]
                    assert 0 < error(gram, new - dense) < 0.98 * error(gram, dense * gone)
                    # Each linear by itself, from its own inputs: shared inputs and levels side by side change nothing.
                    single, _ = sparsify([dense], gram.clone(), [share], DAMPING, ratio is None)
                    assert torch.allclose(new, single[:, 0].T, rtol=1e-7, atol=1e-9)
            assert table.removed(gene, level) == zeros


def test_two_of_every_four_weights_are_zero(model, tmp_path):
    table = make_table(model, Masks(None), tmp_path)
    for gene, level in steps(table):
        if level:
            for module in table.module(gene, level).modules():
                if isinstance(module, torch.nn.Linear):
                    assert ((module.weight == 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("ratio", "amounts"),
    [
        (0.5, (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)),
        (0.1, (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)),
        (0.9, (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)),
        (None, (0.0, 0.5)),
    ],
)
def test_levels_lie_around_the_budget_and_within_what_is_possible(ratio, amounts, tmp_path):
    recipe = Masks(ratio)
    assert recipe.amounts(components(make_model())[0]) == amounts
    assert recipe.granularity == ("2:4" if ratio is None else "unstructured")


def test_only_kept_weights_are_stored(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    table = make_table(model, Masks(0.5), tmp_path)
    for gene, level in steps(table):
        stored = table.tensors(gene, level)
        count = sum(linear.weight.numel() for linear in linears(components(model)[gene]))
        kept = count - table.removed(gene, level)
        assert sum(t.numel() for name, t in stored.items() if name.endswith("values")) == kept
        assert sum(t.nbytes for t in stored.values()) <= 2 * kept + count / 8 + 4
        assert table.units(gene, level) == tuple(range(components(model)[gene].units))
