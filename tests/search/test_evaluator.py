from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from efficientllava.models.anatomy import (
    decoder_of,
    describe_layer,
    layers_of,
    projector_of,
)
from efficientllava.models.forward import forward_hidden
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_ratio
from efficientllava.pruning.surgery import cut, cut_component
from efficientllava.runtime import processes
from efficientllava.runtime.errors import UserError
from efficientllava.search.change import assembled
from efficientllava.search.evaluator import Evaluator, without_unseen
from efficientllava.search.evolution import Risk
from efficientllava.search.recipes import Masks, Structured
from efficientllava.search.space import Gene, Policy

from ..conftest import (
    CHANNELS,
    IMAGE_TOKEN,
    LAYERS,
    make_batch,
    make_batches,
    make_model,
    make_packed,
    stream_of,
)
from .tables import make_table

GENES = 2 * LAYERS
WIDTHS = (CHANNELS, 48, 30, 9)


class CutTable:
    """Components cut by the surgery that cuts checkpoints; counts how often each gene runs."""

    def __init__(self, model: Any) -> None:
        self._layers, self._config = layers_of(model), decoder_of(model).config
        units = range(self._layers[0].attention.units, 0, -1)
        kept = {"attention": [range(n) for n in units], "mlp": [range(CHANNELS - n, CHANNELS) for n in WIDTHS]}
        self.kept = [kept[c.kind] for layer in self._layers for c in layer.components]
        self.genes = [
            Gene(i, c.kind, tuple(1 - len(k) / c.units for k in kept[c.kind]))
            for i, layer in enumerate(self._layers)
            for c in layer.components
        ]
        self.calls: Counter[int] = Counter()
        self._unhooked = copy.deepcopy([layer.module for layer in self._layers])
        self._made: dict[tuple[int, int], Any] = {}

    def module(self, gene: int, level: int) -> Any:
        if (gene, level) not in self._made:
            made = copy.deepcopy(self._unhooked[gene // 2]) if level else self._layers[gene // 2].module
            component = describe_layer(made, self._config).components[gene % 2]
            if level:
                cut_component(component, self.kept[gene][level])
            component.module.register_forward_pre_hook(lambda *_: self.calls.update([gene]))
            self._made[gene, level] = component.module
        return self._made[gene, level]

    def draw(self, count: int, seed: int = 0) -> list[Policy]:
        rng = random.Random(seed)
        return [tuple(rng.randrange(gene.levels) for gene in self.genes) for _ in range(count)]

    def cut_model(self, model: Any, policy: Policy) -> Any:
        kept = [tuple(self.kept[gene][level]) for gene, level in enumerate(policy)]
        layers = tuple(LayerPlan(i, kept[2 * i], kept[2 * i + 1]) for i in range(LAYERS))
        per_group = self._layers[0].heads_per_group
        plan = PruningPlan("widthwise", layers, LAYERS, per_group, None, plan_ratio(model, layers), ())
        return cut(copy.deepcopy(model), plan)


def packed_batches(count: int = 2) -> list[dict[str, Any]]:
    return [make_packed(seed=seed) for seed in range(count)]


def evaluator(model: Any, batches: Sequence[Any], **options: Any) -> tuple[Evaluator, CutTable]:
    table = CutTable(model)
    return Evaluator(model, table, stream_of(model, batches), **options), table


def test_what_the_model_has_written_has_its_share_of_the_risk():
    model, batches, policy = make_model(), make_batches(), (1,) * GENES

    def risk(chosen: Sequence[int], **known: Any) -> Risk:
        stream = stream_of(model, [batches[i] for i in chosen], **known)
        return Evaluator(model, CutTable(model), stream).evaluate([policy])[0]

    read, made, both = risk([0, 1]), risk([2]), risk([0, 1, 2], written=(2,), written_share=0.2)
    assert both.loss == pytest.approx(0.8 * read.loss + 0.2 * made.loss, rel=1e-5)
    assert both.kl == pytest.approx(0.8 * read.kl + 0.2 * made.kl, rel=1e-5)


@torch.no_grad()
def slow_risk(model: Any, dense: Any, batches: Sequence[Any]) -> tuple[float, float, float]:
    """Loss, divergence and error with a loop over tokens, by the models' own forward passes."""
    losses, divergences, answers = [], [], {}
    for number, batch in enumerate(batches):
        found, wanted = (m.lm_head(forward_hidden(m, batch)).log_softmax(-1) for m in (model, dense))
        kl, likely = (wanted.exp() * (wanted - found)).sum(-1).tolist(), found.argmax(-1).tolist()
        labels = batch["labels"].tolist()
        segments = batch.get("segment_ids", torch.zeros_like(batch["labels"])).tolist()
        for row, (tokens, parts) in enumerate(zip(labels, segments, strict=True)):
            start = 0
            for t in range(1, len(tokens)):
                if tokens[t] == -100:
                    continue
                if t == 1 or tokens[t - 1] == -100 or parts[t] != parts[t - 1]:
                    start = t
                losses.append(-float(found[row, t - 1, tokens[t]]))
                divergences.append(kl[row][t - 1])
                right = answers.get((number, row, start), True)
                answers[number, row, start] = right and likely[row][t - 1] == tokens[t]
    count = len(losses)
    return sum(losses) / count, sum(divergences) / count, 1 - sum(answers.values()) / len(answers)


@torch.no_grad()
def relabelled(model: Any, batches: Sequence[Any]) -> list[Any]:
    """The same batches with the model's own tokens as short answers, of which some are then made wrong."""
    result = []
    for batch in batches:
        likely = model.lm_head(forward_hidden(model, batch)).argmax(-1)
        labels = batch["labels"].clone()
        labels[:, 1:] = torch.where(labels[:, 1:] == -100, labels[:, 1:], likely[:, :-1])
        labels[0, 13] = (labels[0, 13] + 1) % model.config.text_config.vocab_size
        labels[:, 9::3] = -100
        result.append({**batch, "labels": labels})
    return result


@pytest.mark.parametrize("make", [make_batches, packed_batches])
def test_the_risk_is_that_of_the_cut_model(family, make):
    model = make_model(family)
    batches = relabelled(model, make())
    subject, table = evaluator(model, batches)
    mild = (0, 1, *[0] * (GENES - 2))
    policies = [*table.draw(2), mild]
    for policy, risk in zip(policies, subject.evaluate(policies), strict=True):
        expected = slow_risk(table.cut_model(model, policy), model, batches)
        assert astuple(risk) == pytest.approx(expected, abs=2e-5)
        assert risk.kl > 1e-3
    assert 0 < subject.dense.error < subject.evaluate([mild])[0].error < 1


def test_whole_components_are_the_dense_model(model):
    batches = [make_batch(), make_packed(seed=1)]
    subject, _ = evaluator(model, batches)
    (risk,) = subject.evaluate([(0,) * GENES])
    loss, _, error = slow_risk(model, model, batches)
    assert (risk.loss, risk.error) == pytest.approx((loss, error), abs=1e-5)
    assert risk.kl == pytest.approx(0, abs=1e-6)
    assert (subject.dense.loss, subject.dense.error) == pytest.approx((loss, error), abs=1e-5)


def test_only_positions_that_an_answer_sees_are_run():
    batch = make_packed(1)
    batch["labels"][:] = -100
    batch["labels"][0, [7, 13, 14, 18]] = batch["input_ids"][0, [7, 13, 14, 18]]
    # Prefix 0-4; questions 5-10 (its answer is predicted at 6), 11-15 (at 12 and 13), and 16-19 without image (at 17).
    kept = [0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 16, 17]
    short, columns = without_unseen(batch, IMAGE_TOKEN)
    assert columns.tolist() == [kept]
    assert short["input_ids"].tolist() == [batch["input_ids"][0, kept].tolist()]
    assert short["position_ids"].tolist() == [batch["position_ids"][0, kept].tolist()]
    plain = make_batch(2)
    plain["labels"][0, 12:] = -100
    plain["labels"][1] = -100
    short, columns = without_unseen(plain, IMAGE_TOKEN)
    assert columns[0].tolist() == list(range(11))
    assert short["attention_mask"].sum(1).tolist() == [11, 4]


def relatives(table: CutTable, count: int = 3, children: int = 5) -> tuple[list[Policy], list[Policy]]:
    """Policies, and for each some that differ from it in two genes."""
    rng = random.Random(1)
    parents, born = table.draw(count), []
    for parent in parents:
        for _ in range(children):
            child = list(parent)
            for gene in rng.sample(range(GENES), 2):
                child[gene] = (child[gene] + 1) % table.genes[gene].levels
            born.append(tuple(child))
    return parents, born


def close(left: Sequence[Risk], right: Sequence[Risk]) -> bool:
    values = [[number for risk in risks for number in astuple(risk)] for risks in (left, right)]
    return values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("family", ["llama_gqa", "phi", "phi3"])
def test_order_and_company_do_not_matter(family):
    model = make_model(family)
    batches = [make_batch(), make_packed(seed=1), make_batch(seed=2)]
    subject, table = evaluator(model, batches)
    parents, children = relatives(table)
    alone = [subject.evaluate([policy])[0] for policy in children]
    assert len({risk.loss for risk in alone}) == len(set(children))
    assert close(subject.evaluate(children), alone)
    mixed = random.Random(2).sample([*children, *parents, *children], 2 * len(children) + len(parents))
    shuffled = subject.evaluate(mixed)
    assert all(close([shuffled[mixed.index(policy)]], [risk]) for policy, risk in zip(children, alone, strict=True))
    subject.evaluate(parents, keep=parents)
    assert close(subject.evaluate(children, keep=parents), alone)


def test_a_part_of_the_batches():
    model = make_model()
    batches = make_batches()
    subject, table = evaluator(model, batches)
    policies = table.draw(3)
    subject.evaluate(policies, [2], keep=policies)
    some, _ = evaluator(model, [batches[0], batches[2]])
    assert close(subject.evaluate(policies, [0, 2], keep=policies), some.evaluate(policies))
    whole, _ = evaluator(model, batches)
    assert close(subject.evaluate(policies), whole.evaluate(policies))
    assert not close(whole.evaluate(policies), some.evaluate(policies))


def prefixes(policies: Sequence[Policy], ends: Sequence[int] = range(1, GENES + 1)) -> set[Policy]:
    return {policy[:end] for policy in policies for end in ends}


def by_gene(nodes: set[Policy], batches: int) -> dict[int, int]:
    return {gene: batches * count for gene, count in Counter(len(node) - 1 for node in nodes).items()}


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_every_node_of_the_prefix_tree_runs_once(family):
    subject, table = evaluator(make_model(family), make_batches())
    parents, children = relatives(table)
    subject.evaluate(children)
    assert table.calls == by_gene(prefixes(children), 3)
    assert sum(table.calls.values()) < 3 * GENES * len(children)
    subject.evaluate(parents, keep=parents)
    table.calls.clear()
    subject.evaluate(children, keep=parents)
    assert table.calls == by_gene(prefixes(children) - prefixes(parents, range(1, GENES)), 3)


def test_what_is_kept_needs_no_run_of_the_parents_themselves():
    subject, table = evaluator(make_model(), make_batches())
    parents, children = relatives(table)
    first, second = children[::2], children[1::2]
    subject.evaluate(first, keep=parents)
    kept = prefixes(first, range(1, GENES)) & prefixes(parents, range(1, GENES))
    table.calls.clear()
    subject.evaluate(second, keep=parents)
    assert table.calls == by_gene(prefixes(second) - kept, 3)
    assert kept & prefixes(second)
    subject.evaluate([], keep=[])
    table.calls.clear()
    subject.evaluate(second)
    assert table.calls == by_gene(prefixes(second), 3)


@pytest.mark.parametrize("spacing", [2, 4])
def test_kept_activations_stay_within_their_bound(spacing):
    model, batches = make_model(), make_batches()
    free, table = evaluator(model, batches)
    parents, children = relatives(table)
    size = sum(4 * 48 * batch["input_ids"][:, 1:].numel() for batch in batches)  # the last token predicts nothing
    room = len(prefixes(parents, range(spacing, GENES, spacing))) * size
    subject, table = evaluator(model, batches, keep_bytes=room)
    subject.evaluate(parents, keep=parents)
    table.calls.clear()
    found = subject.evaluate(children, keep=parents)
    counted = Counter(table.calls)
    assert close(found, free.evaluate(children))
    stored = prefixes(parents, range(0, GENES, spacing))
    begun = {child: max(end for end in range(GENES) if child[:end] in stored) for child in children}
    runs = {child[:end] for child, start in begun.items() for end in range(start + 1, GENES + 1)}
    assert counted == by_gene(runs, 3)
    assert len(runs) < len(prefixes(children))
    for less in (room - 1, 0):
        tight, table = evaluator(model, batches, keep_bytes=less)
        tight.evaluate(parents, keep=parents)
        table.calls.clear()
        tight.evaluate(children, keep=parents)
        assert Counter(table.calls).total() > counted.total()
    assert Counter(table.calls) == by_gene(prefixes(children), 3), "without room everything runs again"


def test_nothing_of_the_model_changes(family):
    model = make_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [(layer.module, dict(layer.module._modules), set(vars(layer.module))) for layer in layers_of(model)]
    modules = list(model.modules())
    subject, table = evaluator(model, make_batches())
    policies = table.draw(3)
    subject.evaluate(policies, keep=policies)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert all(dict(layer._modules) == own and set(vars(layer)) == names for layer, own, names in layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_new_projector_is_seen_after_a_restart():
    model, batches = make_model(), make_batches()
    subject, table = evaluator(model, batches)
    dense, policies = copy.deepcopy(model), table.draw(2)
    old = subject.evaluate(policies, keep=policies)
    with torch.no_grad():
        for parameter in projector_of(model).parameters():
            parameter.mul_(1.5)
    assert close(subject.evaluate(policies), old)
    subject.restart()
    for policy, risk in zip(policies, subject.evaluate(policies), strict=True):
        expected = slow_risk(table.cut_model(model, policy), dense, batches)
        assert astuple(risk) == pytest.approx(expected, abs=2e-5)
    assert not close(subject.evaluate(policies), old)


@pytest.mark.parametrize("recipe", [Structured(), Masks(0.5)], ids=["structured", "unstructured"])
def test_components_of_a_level_table(recipe, tmp_path):
    model, batches = make_model("phi"), [make_batch(), make_packed(seed=1)]
    table = make_table(model, recipe, tmp_path)
    subject = Evaluator(model, table, stream_of(model, batches))
    rng = random.Random(0)
    policies = [tuple(rng.randrange(gene.levels) for gene in table.genes) for _ in range(3)]
    dense = copy.deepcopy(model)
    for policy, risk in zip(policies, subject.evaluate(policies), strict=True):
        with assembled(model, table, policy):
            assert astuple(risk) == pytest.approx(slow_risk(model, dense, batches), abs=2e-5)


def test_processes_share_the_sorted_policies(monkeypatch):
    model, batches = make_model(), make_batches(1)
    subject, table = evaluator(model, batches)
    policies = table.draw(7)
    expected = subject.evaluate(policies)
    parts: list[dict[Policy, Any]] = []
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gather", lambda part: parts.append(part) or [part])
        with pytest.raises(KeyError):  # the parts of the others are missing
            subject.evaluate(policies)
    assert [policy for part in parts for policy in part] == sorted(policies)
    assert [len(part) for part in parts] == [2, 2, 3]
    monkeypatch.setattr(processes, "gather", lambda _: parts)
    assert close(subject.evaluate(policies), expected)


SCRIPT = """
import json, sys
from efficientllava.runtime import processes
from tests.search.test_evaluator import evaluator, make_batches, make_model, relatives

processes.connect({"accelerator": "cpu"})
subject, table = evaluator(make_model(), make_batches(2))
parents, children = relatives(table)
subject.evaluate(parents, keep=parents)
losses = [risk.loss for risk in subject.evaluate(children, keep=parents)]
with open(f"{sys.argv[1]}/{processes.rank()}", "w") as file:
    json.dump([losses, sum(table.calls.values())], file)
processes.finish()
"""


@pytest.mark.slow
def test_two_processes_return_what_one_does(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*launch, str(tmp_path / "script.py"), str(tmp_path)], env=environment, check=True)
    subject, table = evaluator(make_model(), make_batches(2))
    _, children = relatives(table)
    expected = [risk.loss for risk in subject.evaluate(children)]
    (first, calls), (second, others) = (json.loads((tmp_path / name).read_text()) for name in "01")
    assert first == second == pytest.approx(expected, abs=1e-6)
    assert calls > 0 < others


def test_samples_without_answers_are_refused():
    batch = make_batch()
    batch["labels"].fill_(-100)
    with pytest.raises(UserError, match="no answer"):
        evaluator(make_model(), [batch])
