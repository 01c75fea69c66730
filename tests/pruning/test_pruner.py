from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from efficientllava.models.anatomy import decoder_of, language_parameters, layers_of
from efficientllava.models.forward import answer_loss, forward_hidden
from efficientllava.pruning.importance import rank_units
from efficientllava.pruning.plan import PruningPlan, plan_ratio, whole_layers
from efficientllava.pruning.pruner import Comparison, PruneReport, Verdict, apply_plan, make_plan, simplest
from efficientllava.pruning.selection import TOLERANCE
from efficientllava.pruning.stream import CHOSEN, Calibration
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import IMPORTANCES, PruneConfig

from ..conftest import (
    LAYERS,
    logits_of,
    make_batch,
    make_batches,
    make_model,
    make_packed,
    stream_of,
)


def widthwise(**options: Any) -> PruneConfig:
    return PruneConfig(**{"method": "widthwise", "ratio": 0.3, "refit": True, **options})


def layerwise(**options: Any) -> PruneConfig:
    return PruneConfig(**{"method": "layerwise", "ratio": 0.25, **options})


def calibration(count: int = 3, **options: Any) -> Calibration:
    return Calibration(make_batches(count), **options)


@pytest.mark.parametrize("ratio", [0.15, 0.5])
@pytest.mark.parametrize("selection", ["shape", "local", "global"])
def test_the_achieved_ratio_is_the_requested_one(family, selection, ratio):
    model = make_model(family)
    before = language_parameters(model)
    config = widthwise(selection=selection, ratio=ratio, protect_attention=[0] if selection == "global" else [])
    plan, _ = make_plan(model, calibration(), config)
    assert plan.achieved == pytest.approx(ratio, abs=TOLERANCE)
    assert plan.requested == ratio
    assert plan.uniform == (selection != "global")
    assert plan.calibration_ids == tuple(f"{b}/{r}" for b in range(3) for r in range(3))
    assert language_parameters(model) == before
    smaller, report = apply_plan(model, plan, calibration(), config)
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved, abs=1e-12)
    assert all(error.after <= error.before for error in report.errors)
    batches = make_batches()
    total = sum(float(answer_loss(smaller, b, reduction="sum").detach()) for b in batches)
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert report.loss_pruned == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("importance", ["obs", "flap"])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7])
def test_keys_and_values_that_go_with_the_last_query_heads_are_counted(importance, ratio):
    free = {"selection": "global", "refit": False, "heads": "query", "importance": importance}
    for biased in (False, importance == "flap"):
        plan, _ = make_plan(make_model("llama_gqa"), calibration(), widthwise(ratio=ratio, bias=biased, **free))
        assert any(not layer.groups for layer in plan.layers) or importance == "flap"
        assert plan.achieved == pytest.approx(ratio, abs=TOLERANCE)


@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
def test_scores_know_nothing_of_what_candidates_are_compared_on_nor_of_text_that_obs_alone_reads(importance):
    batches = make_batches(3)
    config = widthwise(importance=importance, selection="shape", refit=False)

    def ranked(last: int, **roles: Any) -> Any:
        known = [*batches, make_batch(seed=last, rows=2)]
        without = [*roles.get("compared", ()), *(roles.get("written", ()) if importance != "obs" else ())]
        return rank_units(stream_of(make_model("llama_gqa"), known, **roles), config, 0, without)[0]

    assert ranked(7, compared=[3]) == ranked(8, compared=[3])
    if importance != "obs":
        assert ranked(7, written=[3]) == ranked(8, written=[3])


def test_where_nothing_of_the_kind_that_counts_is_held_back_the_refit_goes_on_without():
    batches = make_batches(2)
    text = make_batch(seed=5, images=False)
    config = widthwise(tokens="image", selection="floor")
    plan, _ = make_plan(make_model("llama_gqa"), Calibration([*batches, text]), config)
    _, report = apply_plan(make_model("llama_gqa"), plan, Calibration([*batches, text], validated=[2]), config)
    assert all(error.after < error.before for error in report.errors)


def test_records_without_an_answer_choose_nothing():
    batches = make_batches(3)
    batches[2]["labels"] = torch.full_like(batches[2]["labels"], -100)
    known = Calibration(batches, compared=[2], held=[1])
    assert not known.compares and Calibration(batches, compared=[1]).compares
    _, report = make_plan(make_model("llama_gqa"), known, widthwise(selection="shape"))
    assert report.candidates == [] and report.loss_compared is None


def test_an_attention_that_writes_next_to_nothing_is_switched_off_and_stays_off(family):
    model, config = make_model(family), widthwise(selection="global", ratio=0.2)
    layers_of(model)[1].attention.writer.weight.data.mul_(1e-6)
    plan, _ = make_plan(model, calibration(), config)
    assert plan.layers[1].groups == ()
    smaller, report = apply_plan(model, plan, calibration(), config)
    assert (1, "attention") not in {(error.layer, error.component) for error in report.errors}
    for importance in IMPORTANCES:
        again, _ = make_plan(smaller, calibration(), replace(config, importance=importance))
        assert again.layers[1].groups == () and again.achieved == pytest.approx(0.2, abs=0.02), importance
    smallest, _ = apply_plan(smaller, again, calibration(), config)
    assert [layer.attention.units for layer in layers_of(smallest)][1] == 0


def test_a_shape_per_layer_is_chosen_mostly_on_the_records_whatever_share_the_refit_gives_to_written_text():
    batches, config = make_batches(4), widthwise(selection="global")
    plans, weights = [], []
    for share in (0.1, 0.9):
        model, known = make_model("llama_gqa"), Calibration(batches, written=[3], written_share=share)
        plan, _ = make_plan(model, known, config)
        plans.append(plan.layers)
        weights.append(apply_plan(model, plan, known, config)[0].state_dict())
    assert plans[0] == plans[1]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("config", [widthwise(ratio=0.0), layerwise(ratio=0.0), layerwise(ratio=0.0, refit=True)])
def test_ratio_zero_is_the_identity(family, config):
    model, batch = make_model(family), make_batch(seed=9)
    expected = logits_of(model, batch)
    plan, _ = make_plan(model, calibration(), config)
    same, report = apply_plan(model, plan, calibration(), config)
    assert plan.achieved == 0
    assert torch.equal(logits_of(same, batch), expected)
    assert report.errors == []


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_every_importance_is_deterministic_and_meets_the_ratio(importance):
    for selection in ("local", "global"):
        config = widthwise(importance=importance, selection=selection)
        plan, _ = make_plan(make_model("phi"), calibration(), config, seed=4)
        again, _ = make_plan(make_model("phi"), calibration(), config, seed=4)
        assert plan == again
        assert plan.achieved == pytest.approx(0.3, abs=TOLERANCE)
    other, _ = make_plan(make_model("phi"), calibration(), config, seed=5)
    if importance == "random":
        assert other.layers != plan.layers
    elif importance != "obs":  # whose global costs sample answers
        assert other.layers == plan.layers


def test_global_selection_takes_heads_and_channels_for_every_importance():
    """Raw scores would take channels only, unit means heads only: neither must happen."""
    for importance in IMPORTANCES:
        model = make_model("llama")
        plan, _ = make_plan(model, calibration(), widthwise(importance=importance, selection="global", ratio=0.4))
        groups, channels = (sum(layer.shape[kind] for layer in plan.layers) for kind in (0, 1))
        assert groups < sum(layer.attention.units for layer in layers_of(model)), importance
        assert channels < sum(layer.mlp.units for layer in layers_of(model)), importance


def test_raw_scores_would_remove_no_head():
    model = make_model("llama")
    scores, _ = rank_units(stream_of(model, make_batches()), widthwise(importance="param_first"))
    raw = sorted(
        (cost, kind)
        for layer in scores
        for kind, ranking in zip(("head", "channel"), layer, strict=True)
        for cost in ranking.costs
    )
    removed = [kind for _, kind in raw[: len(raw) // 3]]
    assert removed.count("head") == 0


def test_protected_layers_stay_whole():
    model = make_model("qwen2")
    config = widthwise(protect=[0], protect_attention=[-1], protect_mlp=[1], ratio=0.2)
    plan, _ = make_plan(model, calibration(), config)
    whole = whole_layers(model)
    assert plan.layers[0] == whole[0]
    assert plan.layers[3].groups == whole[3].groups
    assert plan.layers[1].channels == whole[1].channels
    assert len(plan.layers[2].channels) < len(whole[2].channels)
    assert plan.achieved == pytest.approx(0.2, abs=TOLERANCE)


def test_refit_beats_the_plain_cut():
    plan, _ = make_plan(make_model(), calibration(), widthwise(selection="local"))
    losses = {}
    for name, config in {
        "plain": widthwise(refit=False),
        "refit": widthwise(damping=0.01, refit_target="residual"),
    }.items():
        model = make_model()
        dense = [logits_of(model, b) for b in make_batches()]
        smaller, _ = apply_plan(model, plan, calibration(), config)
        gaps = [logits_of(smaller, b) - d for b, d in zip(make_batches(), dense, strict=True)]
        losses[name] = float(torch.cat(gaps).square().mean())
    assert losses["refit"] < 0.7 * losses["plain"]


def test_a_shape_is_chosen_on_batches_that_no_candidate_was_fitted_to(monkeypatch):
    monkeypatch.setattr("efficientllava.pruning.pruner.WORTH", 1e9)
    batches = calibration(compared=(2,), held=(1,), validated=(2,))
    plan, report = make_plan(make_model(), batches, widthwise(selection="shape", ratio=0.3))
    assert len(report.candidates) > 1
    best = min(report.candidates, key=lambda candidate: candidate["kl"])
    kept = next(c for c in report.candidates if (c["groups"], c["channels"]) == plan.layers[0].shape)
    assert kept["kl"] >= best["kl"]
    alone = Calibration([make_batches()[2]])
    assert report.loss_compared_dense == pytest.approx(make_plan(make_model(), alone, widthwise())[1].loss_dense)
    # What is compared on enters neither statistics nor fits: other answers there leave every candidate's weights alone.
    changed = [*make_batches()[:2], {**make_batches()[2], "input_ids": make_batches()[2]["input_ids"].flip(0)}]
    other, _ = make_plan(
        make_model(), Calibration(changed, compared=(2,), held=(1,)), widthwise(selection="shape", ratio=0.3)
    )
    assert {layer.shape for layer in other.layers} == {other.layers[0].shape}
    sets = (make_batches(), changed)
    ranked = [rank_units(stream_of(make_model(), found), widthwise(), without=(2,))[0] for found in sets]
    assert ranked[0] == ranked[1]


def test_the_dense_loss_is_reported():
    model, batches = make_model(), make_batches()
    total = sum(float(answer_loss(model, b, reduction="sum").detach()) for b in batches)
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for config in (widthwise(selection="local"), layerwise()):
        assert make_plan(model, calibration(), config)[1].loss_dense == pytest.approx(total / count, rel=1e-5)


def brute_influence(model: Any, kept: list[int]) -> list[float]:
    model = copy.deepcopy(model)
    decoder = decoder_of(model)
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in kept)
    inputs: list[list[torch.Tensor]] = [[] for _ in kept]
    outputs: list[list[torch.Tensor]] = [[] for _ in kept]
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(
            lambda _m, a, out, i=i: (inputs[i].append(a[0]), outputs[i].append(out))[:0] or None
        )
    for batch in make_batches():
        logits_of(model, batch)
    masks = [b["attention_mask"].bool() for b in make_batches()]
    scores = []
    for before, after in zip(inputs, outputs, strict=True):
        x = torch.cat([h[m] for h, m in zip(before, masks, strict=True)]).double()
        y = torch.cat([h[m] for h, m in zip(after, masks, strict=True)]).double()
        scores.append(float(1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()))
    return scores


@pytest.mark.parametrize("iterative", [False, True])
def test_layerwise_removes_the_least_influential_blocks(family, iterative):
    model = make_model(family)
    plan, report = make_plan(model, calibration(), layerwise(drop_layers=2, iterative=iterative))
    kept = list(range(LAYERS))
    scores = brute_influence(model, kept)
    assert report.block_influence == pytest.approx(scores, rel=1e-4)
    for _ in range(2):
        lowest = min(range(len(kept)), key=lambda i: scores[i])
        kept.pop(lowest)
        scores = brute_influence(model, kept) if iterative else scores[:lowest] + scores[lowest + 1 :]
    assert list(plan.kept_layers) == kept
    assert plan.requested is None


def test_layerwise_meets_the_ratio_by_whole_blocks():
    model = make_model()
    block = sum(p.numel() for p in decoder_of(model).layers[0].parameters()) / language_parameters(model)
    plan, _ = make_plan(model, calibration(), layerwise(ratio=2.3 * block))
    assert plan.achieved == pytest.approx(2 * block)
    assert plan_ratio(model, plan.layers) == plan.achieved


@pytest.mark.parametrize("tokens", ["image", "text", "answer"])
@pytest.mark.parametrize("make", [layerwise, widthwise])
def test_kinds_of_tokens_change_the_scores(tokens, make):
    reports = []
    for kind in ("all", tokens):
        model, config = make_model(), make(tokens=kind)
        plan, report = make_plan(model, calibration(), config)
        _, applied = apply_plan(model, plan, calibration(), config)
        reports.append((report.block_influence, applied.errors, report.loss_dense))
    assert reports[0][:2] != reports[1][:2]
    assert reports[0][2] == reports[1][2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (widthwise(ratio=0.97), r"prune\.ratio=0\.97: at most 0\.\d+ can be removed"),
        (widthwise(ratio=0.97, selection="global"), r"prune\.ratio=0\.97: at most 0\.\d+ can be removed"),
        (layerwise(ratio=0.97), r"prune\.ratio=0\.97.*whole blocks"),
        (layerwise(drop_layers=4), r"prune\.drop_layers=4.*0\.\.3"),
        (widthwise(protect=[9]), r"prune\.protect.*remove \[9\]"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_plan(make_model(), calibration(), config)


def test_tokens_that_never_occur_are_refused():
    batches = Calibration(make_batches(images=False))
    with pytest.raises(UserError, match=r"prune\.tokens=image"):
        make_plan(make_model(), batches, widthwise(tokens="image"))


def test_a_refit_without_data_is_refused():
    model = make_model()
    plan, _ = make_plan(model, calibration(), widthwise(selection="local"))
    with pytest.raises(UserError, match=r"prune\.refit=true needs calibration"):
        apply_plan(model, plan, None, widthwise())


def test_progress_never_passes_its_total():
    seen: list[tuple[str, int, int]] = []
    batches = calibration(tick=lambda *args: seen.append(args), compared=(2,), held=(1,), validated=(2,))
    model, config = make_model(), widthwise(importance="wanda")
    plan, _ = make_plan(model, batches, config)
    apply_plan(model, plan, batches, config)
    make_plan(make_model(), batches, layerwise())
    assert {what for what, _, _ in seen} == {
        "score units",
        "choose heads against channels",
        "refit and cut",
        "score blocks",
    }
    assert all(1 <= done <= total for _, done, total in seen)


class Sum:
    """Sums over two threads in lock step: what a process group does."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._parts: dict[int, torch.Tensor] = {}

    def __call__(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = tensor
            self._barrier.wait()
            total = self._parts[0] + self._parts[1]
            self._barrier.wait()
            return total

        return reduce


def in_two(config: PruneConfig, split: int) -> list[tuple[PruningPlan, Any, PruneReport]]:
    batches = [make_packed(seed=s) for s in range(4)]
    shares, reduce, results = (batches[:split], batches[split:]), Sum(), {}

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        mine = Calibration(shares[rank], reduce=reduce(rank))
        model = make_model_locked("llama_gqa")
        plan, _ = make_plan(model, mine, config)
        smaller, report = apply_plan(model, plan, mine, config)
        results[rank] = (plan, smaller, report)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], results[1]]


_LOCK = threading.Lock()


def make_model_locked(name: str) -> Any:
    with _LOCK:  # the global seed
        return make_model(name)


@pytest.mark.parametrize(
    "config",
    [
        widthwise(),
        widthwise(selection="global", importance="param_mix", refit_target="layer"),
        widthwise(selection="local", importance="vectorize", taylor_mean="batch"),
        layerwise(iterative=True, drop_layers=2, refit=True),
    ],
    ids=["shape", "taylor sample", "taylor batch", "layerwise"],
)
@pytest.mark.parametrize("split", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_two_processes_make_the_plan_and_the_weights_of_one(config, split):
    alone = Calibration([make_packed(seed=s) for s in range(4)])
    model = make_model("llama_gqa")
    plan, _ = make_plan(model, alone, config)
    smaller, report = apply_plan(model, plan, alone, config)
    for other_plan, other, other_report in in_two(config, split):
        assert other_plan.layers == plan.layers
        assert other_report.loss_pruned == pytest.approx(report.loss_pruned, rel=1e-6)
        for (name, one), two in zip(smaller.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-6), name


def test_packed_batches_prune_the_widest_family():
    model = make_model("phi3_gqa")
    batches = Calibration([make_packed(seed=s) for s in range(2)])
    plan, _ = make_plan(model, batches, widthwise())
    smaller, report = apply_plan(model, plan, batches, widthwise())
    assert report.loss_pruned == pytest.approx(
        sum(float(answer_loss(smaller, b).detach()) for b in batches.batches) / 2, rel=1e-5
    )


def test_losing_a_kv_group_of_few_everywhere_is_told(caplog):
    plan, _ = make_plan(make_model("llama_gqa"), calibration(), widthwise(selection="local", ratio=0.5))
    layer = layers_of(make_model("llama_gqa"))[0].attention
    assert len(plan.layers[0].groups) < layer.units <= 4
    assert any(f"of its {layer.units} KV groups" in record.getMessage() for record in caplog.records)
    caplog.clear()
    make_plan(make_model("llama_gqa"), calibration(), widthwise(selection="global", ratio=0.5))
    assert not any("KV groups" in record.getMessage() for record in caplog.records)


def verdict(*kl: float) -> Verdict:
    return Verdict(torch.tensor(kl, dtype=torch.float64), torch.ones(len(kl), dtype=torch.float64), 0.0)


@torch.no_grad()
def test_divergence_and_loss_are_those_of_the_answers_of_the_batches_that_are_compared_on():
    model, other, batches = make_model(seed=1), make_model(seed=2), make_batches()
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    other.get_decoder().norm.load_state_dict(model.get_decoder().norm.state_dict())
    comparison = Comparison(stream_of(model, batches, compared=[1, 2]), stream_of(model, batches).end())
    assert float(comparison(stream_of(model, batches).end()).kl.abs().max()) < 1e-6
    found = comparison(stream_of(other, batches).end())
    kl, tokens = [], []
    for batch in batches[1:]:
        states = (m.lm_head(forward_hidden(m, batch)) for m in (model, other))
        dense, pruned = (state.float().log_softmax(-1)[:, :-1] for state in states)
        mask = batch["labels"][:, 1:] != -100
        values = (dense.exp() * (dense - pruned)).sum(-1) * mask
        kl += (values.sum(1) / mask.sum(1)).tolist()
        tokens += mask.sum(1).tolist()
    assert found.tokens.tolist() == tokens
    assert found.kl.tolist() == pytest.approx(kl, rel=1e-4)
    losses = [float(answer_loss(other, batch, reduction="sum")) for batch in batches[1:]]
    assert found.loss == pytest.approx(sum(losses) / sum(tokens), rel=1e-4)
    assert comparison.dense.loss != pytest.approx(found.loss)


@torch.no_grad()
def test_what_the_model_has_written_has_its_share_of_a_comparison():
    model, other, batches = make_model(seed=1), make_model(seed=2), make_batches()
    dense, hidden = stream_of(model, batches).end(), stream_of(other, batches).end()
    read, made, both = (
        Comparison(stream_of(model, batches, compared=compared, written=(2,)), dense)(hidden)
        for compared in ([1], [2], [1, 2])
    )
    for found, one, two in ((both.mean, read.mean, made.mean), (both.loss, read.loss, made.loss)):
        assert found == pytest.approx((1 - CHOSEN) * one + CHOSEN * two, rel=1e-6)


def test_within_one_standard_error_the_simpler_candidate_wins():
    base = [1.0, 2.0, 3.0, 4.0]
    noisy, worse = [0.9, 2.3, 2.8, 4.1], [1.3, 2.3, 3.4, 4.3]
    assert simplest([verdict(*base), verdict(*noisy)], [1.0, 0.0]) == 1  # no record says clearly which is better
    assert simplest([verdict(*base), verdict(*worse)], [1.0, 0.0]) == 0  # every record does, though they differ a lot
    assert simplest([verdict(*base), verdict(*noisy)], [0.0, 1.0]) == 0
    assert simplest([verdict(1.0)], [5.0]) == 0
    mean, error = verdict(*worse).excess(verdict(*base))
    steps = torch.tensor(worse) - torch.tensor(base)
    assert mean == pytest.approx(float(steps.mean()))
    assert error == pytest.approx(float(steps.std() / 2), rel=1e-6)
