from __future__ import annotations

import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from efficientllava.evaluation.efficiency import prefill_flops
from efficientllava.models.anatomy import language_parameters, layers_of
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut
from efficientllava.search import budget as timing
from efficientllava.search.budget import (
    budget_of,
    first_prompt,
    flops_costs,
    latency_costs,
    mean_length,
)
from efficientllava.search.recipes import LinearNorms
from efficientllava.search.space import Gene, SearchSpace
from efficientllava.settings.schema import PruneConfig, SearchBudgetConfig, SearchConfig

from ..conftest import (
    IMAGE_TOKEN,
    LAYERS,
    make_batch,
    make_batches,
    make_model,
    make_packed,
    stream_of,
)


class Sized:
    """A table that knows sizes only: level ``n`` removes ``n`` KV groups, or ``16 n`` channels."""

    def __init__(self, model: Any, levels: int = 3) -> None:
        self.components = [component for layer in layers_of(model) for component in layer.components]
        self.steps = [1 if c.kind == "attention" else 16 for c in self.components]
        self.genes = tuple(
            Gene(i // 2, c.kind, tuple(step * level / c.units for level in range(levels)))
            for i, (c, step) in enumerate(zip(self.components, self.steps, strict=True))
        )

    def removed(self, gene: int, level: int) -> int:
        return level * self.steps[gene] * self.components[gene].unit_price()

    def norms(self, gene: int, level: int) -> list[LinearNorms]:
        readers = {id(reader.linear): reader.linear for reader in self.components[gene].readers}
        linears = [*readers.values(), self.components[gene].writer]
        return [LinearNorms(linear.weight.numel(), 1.0, 1.0, 0.0) for linear in linears]

    def module(self, gene: int, level: int) -> nn.Module:
        return self.components[gene].module

    def cut(self, model: Any, policy: tuple[int, ...]) -> Any:
        """The model at a policy, really cut."""
        kept = [range(c.units - level * s) for c, level, s in zip(self.components, policy, self.steps, strict=True)]
        plans = tuple(LayerPlan(i, tuple(kept[2 * i]), tuple(kept[2 * i + 1])) for i in range(LAYERS))
        return cut(model, PruningPlan("auto", plans, LAYERS, layers_of(model)[0].heads_per_group, None, 0.0))


def test_flops_are_those_of_the_counter(family: str) -> None:
    policy = (0, 2, 1, 0, 2, 1, 1, 2)
    model = make_model(family)
    table = Sized(model)
    prompt = first_prompt(model, make_batches(1))
    costs = flops_costs(model, table, prompt["input_ids"].shape[1])
    dense = prefill_flops(model, prompt)["prefill_language"]
    pruned = prefill_flops(table.cut(make_model(family), policy), prompt)["prefill_language"]
    predicted = sum(costs[gene][level] for gene, level in enumerate(policy))
    # Earlier versions of transformers have the angles of the rotary embedding in a matrix product, which stays.
    assert predicted == pytest.approx((dense - pruned) / dense, rel=1e-4)
    assert predicted > 0.1


@pytest.mark.parametrize("family", ["llama", "phi3_gqa"])
def test_parameter_budgets_count_the_language_model(family: str) -> None:
    model = make_model(family)
    table = Sized(model)
    stream = stream_of(model, make_batches(1))
    budget = budget_of(model, table, stream, PruneConfig(ratio=0.1), SearchConfig())
    space = SearchSpace(table.genes, budget)
    policy = (1, 2, 0, 1, 2, 0, 1, 1)
    left = language_parameters(table.cut(make_model(family), policy)) / language_parameters(model)
    assert space.removed(policy) == pytest.approx(1 - left)
    assert (budget.resource, budget.target, budget.asked) == ("params", 0.1, "prune.ratio=0.1")


def test_mask_budgets_count_decoder_weights() -> None:
    model = make_model("llama_gqa")
    table = Sized(model)
    stream = stream_of(model, make_batches(1))
    weights = sum(m.weight.numel() for m in model.get_decoder().layers.modules() if isinstance(m, nn.Linear))
    budget = budget_of(model, table, stream, PruneConfig(ratio=0.5), SearchConfig(granularity="unstructured"))
    assert budget.resource == "weights"
    assert budget.costs[0][2] == table.removed(0, 2) / weights


def test_targets_are_shares_or_speed_ups() -> None:
    model = make_model("llama")
    table = Sized(model)
    stream = stream_of(model, make_batches(1))

    def target(resource: str, value: float | None) -> Any:
        search = SearchConfig(budget=SearchBudgetConfig(resource, value))
        return budget_of(model, table, stream, PruneConfig(ratio=0.3), search)

    assert target("flops", 0.25).target == 0.25
    assert target("flops", None).target == 0.3
    fast = target("flops", 1.8)
    assert fast.target == pytest.approx(0.8 / 1.8) and fast.asked == "search.budget.target=1.8 (a share of 0.444)"


class Clocked(Sized):
    """Components that take known times: of a layer's attention 4 - n, of its MLP 9 - 2 n, at level n, plus drift."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.now, self.calls, self.seen = 0.0, 0, set()
        self.made = {
            (g, level): self._slow(g, level) for g, gene in enumerate(self.genes) for level in range(gene.levels)
        }

    def _slow(self, gene: int, level: int) -> nn.Module:
        own = self.components[gene].module
        stock, seconds = type(own).forward, 9.0 - 2 * level if gene % 2 else 4.0 - level
        twin = copy.copy(own) if level else own

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.seen.add((gene, level))
            # Now and then a neighbour takes the machine.
            self.now += seconds * (5.0 if self.calls % 701 == 0 else 1.0)
            return stock(own, *args, **kwargs)

        twin.forward = forward
        return twin

    def module(self, gene: int, level: int) -> nn.Module:
        return self.made[gene, level]


@pytest.mark.parametrize("family", ["llama_gqa", "phi", "phi3"])
def test_latency_is_measured_inside_forward_passes(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model(family)
    table = Clocked(model)
    monkeypatch.setattr(time, "perf_counter", lambda: table.now)
    monkeypatch.setattr(timing, "NEW_TOKENS", 4)
    prompt = first_prompt(model, make_batches(1))
    costs = latency_costs(model, table, prompt, tmp_path / "latency.json")
    layer = 4.0 + 9.0
    for gene, values in enumerate(costs):
        step = (2.0 if gene % 2 else 1.0) / (LAYERS * layer)
        assert values == pytest.approx([0.0, step, 2 * step])
    assert table.seen == set(table.made)
    assert [m.self_attn for m in model.get_decoder().layers] == [c.module for c in table.components[::2]]
    assert not any(module._forward_hooks for module in table.made.values())

    table.calls = 0
    assert latency_costs(model, table, prompt, tmp_path / "latency.json") == costs
    assert table.calls == 0 and json.loads((tmp_path / "latency.json").read_text())[0] == 4 * LAYERS * layer


def test_latency_elsewhere_is_that_of_levels_which_every_second_layer_has() -> None:
    model = make_model("llama")
    table, asked = Clocked(model), []
    known = {id(module): 9.0 - 2 * level if gene % 2 else 4.0 - level for (gene, level), module in table.made.items()}

    def clock(model: Any, layers: Any, tokens: tuple[int, int], variants: Any) -> list[float]:
        asked.append((list(layers), tokens))
        found = []
        for variant in variants:
            with variant:
                parts = [(layer.self_attn, layer.mlp) for layer in map(model.get_decoder().layers.__getitem__, layers)]
                found.append(5.0 + sum(known[id(part)] for pair in parts for part in pair))
        return found

    prompt = {"input_ids": torch.zeros(1, 20)}
    for gene, values in enumerate(latency_costs(model, table, prompt, None, clock)):
        step = (2.0 if gene % 2 else 1.0) / (5.0 + LAYERS * 13.0)
        assert values == pytest.approx([0.0, step, 2 * step])
    assert asked[-1] == ([*range(LAYERS)], (20, timing.NEW_TOKENS))


@pytest.mark.parametrize("levels", [2, 3, 4, 6])
def test_every_level_is_timed_often_enough(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rounds = make_model("llama"), list[list[int]]()

    class Asked(Sized):
        """Notes the policy of every round."""

        def module(self, gene: int, level: int) -> nn.Module:
            if not gene:
                rounds.append([])
            rounds[-1].append(level)
            return super().module(gene, level)

    table = Asked(model, levels)
    monkeypatch.setattr(timing, "NEW_TOKENS", 1)
    latency_costs(model, table, first_prompt(model, make_batches(1)))
    counted = rounds[2 * timing.WARM_UP :: 2]  # to put it together, and to time it
    seen = Counter((gene.kind, level) for policy in counted for gene, level in zip(table.genes, policy, strict=True))
    assert len(seen) == 2 * levels and min(seen.values()) >= timing.REPEATS - 1


def test_a_real_measurement_makes_a_budget() -> None:
    model = make_model("llama")
    stream = stream_of(model, make_batches(1))
    search = SearchConfig(budget=SearchBudgetConfig("latency", 1.2))
    budget = budget_of(model, Sized(model), stream, PruneConfig(), search)
    assert budget.resource == "latency" and budget.target == pytest.approx(1 / 6)
    for costs in budget.costs:
        assert costs[0] == 0.0 and list(costs) == sorted(costs) and costs[-1] < 0.5


def test_text_that_the_model_has_written_is_no_prompt() -> None:
    model, (record, text) = make_model("llama"), (make_batch(3), make_batch(1))
    search = SearchConfig(budget=SearchBudgetConfig("flops", 0.3))
    streams = (
        stream_of(model, [record]),
        stream_of(model, [record, text], written=[1]),
        stream_of(model, [record, text]),
    )
    alone, beside, mixed = (budget_of(model, Sized(model), each, PruneConfig(), search).costs for each in streams)
    assert alone == beside != mixed


def test_length_of_a_prompt() -> None:
    assert mean_length([make_batch(3)]) == pytest.approx((20 + 18 + 16) / 3)
    # 5 shared tokens, questions of 6 and 5, and 4 tokens that see themselves alone; the second row is cut short by 2.
    packed = make_packed(1)
    assert mean_length([packed]) == pytest.approx((11 + 10 + 4) / 3)


def test_the_first_prompt_has_one_image_and_one_question() -> None:
    model = make_model("llama")
    batch = make_batch(3)
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(0), batch["attention_mask"].flip(0)
    prompt = first_prompt(model, [batch])  # the first row has no image
    assert prompt["input_ids"].shape == (1, 18) and prompt["pixel_values"].shape == (1, 3, 16, 16)
    packed = first_prompt(model, [make_packed(1)])
    assert packed["input_ids"].shape == (1, 11) and (packed["input_ids"] == IMAGE_TOKEN).sum() == 4
    text = first_prompt(model, [make_batch(2, images=False)])
    assert set(text) == {"input_ids"} and text["input_ids"].shape == (1, 20)
    with torch.no_grad():
        assert model(**prompt).logits.isfinite().all()
