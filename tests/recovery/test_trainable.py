from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from efficientllava.models.forward import answer_loss, forward_hidden
from efficientllava.pruning.plan import plan_for, whole_layers
from efficientllava.pruning.surgery import cut
from efficientllava.recovery.student import parameter_groups, prepare, trainable

from .conftest import (
    LAYERS,
    make_batch,
    make_cfg,
    make_model,
)


def names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_projector_mode_trains_the_projector_only():
    model = make_model()
    prepare(model, make_cfg(sft=1, train="projector"))
    assert names(model) and all("multi_modal_projector" in name for name in names(model))


def test_full_mode_trains_everything_but_the_tower():
    model = make_model()
    prepare(model, make_cfg(sft=1, train="full"))
    frozen = {name for name, _ in model.named_parameters()} - names(model)
    assert frozen and all("vision_tower" in name for name in frozen)


def test_a_head_that_no_loss_reads_is_not_trained():
    model = make_model()
    prepare(model, make_cfg(hidden=1, train="full"))
    assert "lm_head.weight" not in names(model) and "model.language_model.norm.weight" in names(model)


def test_lora_adapts_every_linear_of_every_block_and_trains_the_projector():
    model = make_model()
    prepare(model, make_cfg(sft=1, train="lora"))
    adapters = {name for name in names(model) if "lora_" in name}
    assert len(adapters) == 2 * 7 * LAYERS  # A and B of q, k, v, o, gate, up, down
    assert all("multi_modal_projector" in name for name in names(model) - adapters)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_every_weight_that_trains_has_a_gradient_where_sub_blocks_are_off(train, recwarn):
    model = make_model()
    first, second, *rest = whole_layers(model)
    plan = [replace(first, groups=()), replace(second, channels=()), *rest]
    model = cut(model, plan_for(model, "widthwise", plan, None))
    finish = prepare(model, make_cfg(sft=1, train=train))
    answer_loss(model, make_batch(4)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    finish()
    assert "zero-element" not in str([each.message for each in recwarn])


def test_merged_adapters_compute_what_the_adapters_did():
    model, batch = make_model(), make_batch(4)
    keys = set(model.state_dict())
    finish = prepare(model, make_cfg(sft=1, train="lora"), seed=3)
    before = forward_hidden(model, batch).detach()
    with torch.no_grad():
        for p in trainable(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    adapted = forward_hidden(model, batch).detach()
    finish()
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(forward_hidden(model, batch), adapted, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == keys and not hasattr(model, "peft_config")


def test_adapters_start_from_their_seed_and_leave_the_random_state_alone():
    models = [make_model(), make_model(), make_model()]
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        prepare(model, make_cfg(sft=1, train="lora"), seed=seed)
    weights = [torch.cat([p.flatten() for p in trainable(model)]) for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["projector", "full", "lora"])
def test_half_precision_trains_in_fp32_and_keeps_its_storage_type(mode):
    model = make_model().to(torch.bfloat16)
    rope = copy.deepcopy(model.get_decoder().rotary_emb.inv_freq)
    finish = prepare(model, make_cfg(sft=1, train=mode))
    assert all(p.dtype == torch.float32 for p in trainable(model))
    finish()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(model.get_decoder().rotary_emb.inv_freq, rope)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_train_mode_computes_what_eval_mode_does():
    model, batch = make_model(attention_dropout=0.5), make_batch(4)
    expected = forward_hidden(model, batch).detach()
    prepare(model, make_cfg(sft=1))
    assert model.training
    torch.testing.assert_close(forward_hidden(model, batch), expected)


def test_norms_and_biases_do_not_decay_and_the_projector_has_its_own_rate():
    model = make_model()
    prepare(model, make_cfg(sft=1))
    groups = {group["name"]: group for group in parameter_groups(model, 1e-3, 1e-4, 0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "projector": (1e-4, 0.1),
        "projector_no_decay": (1e-4, 0.0),
        "decoder": (1e-3, 0.1),
        "decoder_no_decay": (1e-3, 0.0),
    }
    assert len(groups["decoder_no_decay"]["params"]) == 2 * LAYERS + 1
    assert sum(len(group["params"]) for group in groups.values()) == len(list(trainable(model)))
