"""Slots by layer: costs are what they say, the total is kept, and every path takes layers that differ."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from builders import CONFIG, PURE, build

from srf_retrofit import SRFConfig, plan_retrofit, retrofit, revert
from srf_retrofit.calibration.slots import (
    _gradients,
    _levels,
    _weights_without_gradients,
    calibrate_slots,
    spread_slots,
)
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation.suite import state_cost
from srf_retrofit.modeling.attention import exact_attention, srf_attentions
from srf_retrofit.training.settling import settle_features

CONFIG = CONFIG.replace(retained=8)
UNEVEN = CONFIG.replace(layer_retained=(4, 12, 8))


@pytest.fixture
def blocks() -> TokenBlocks:
    return TokenBlocks(torch.randint(3, 90, (3, 120), generator=torch.Generator().manual_seed(0)))


def retained(model) -> list[int]:
    return [layer.srf_config.retained for layer in srf_attentions(model)]


def test_the_best_sum_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    levels = _levels(8)
    assert levels == [4, 6, 8, 12, 16]
    assert _levels(1) == [1, 2]
    assert _levels(600)[-1] == 1024  # what the kernels hold
    for _ in range(20):
        cost = dict(enumerate(torch.rand(4, 5, generator=generator, dtype=torch.float64).tolist()))
        found = spread_slots(cost, levels, 32)
        assert sum(found.values()) <= 32
        sums = {
            counts: sum(cost[i][levels.index(h)] for i, h in enumerate(counts))
            for counts in itertools.product(levels, repeat=4)
            if sum(counts) <= 32
        }
        assert sums[tuple(found.values())] == pytest.approx(min(sums.values()))


def test_a_cost_is_the_divergence_of_a_small_error() -> None:
    """Of an error at one token, against the divergence of all predictions, as the mean over what may be drawn."""
    softmax = build().double()
    model = retrofit(copy.deepcopy(softmax), CONFIG)
    layer = srf_attentions(model)[1]
    row = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(2))
    error = torch.zeros(1, 30, 64, dtype=torch.float64)
    error[0, 11] = 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def disturb(module, args, output):
        return (output[0] + error, *output[1:])

    with torch.no_grad():
        right = softmax(row).logits.log_softmax(-1)
        handle = softmax.model.layers[1].self_attn.register_forward_hook(disturb)
        wrong = softmax(row).logits.log_softmax(-1)
        handle.remove()
    expected = float((right.exp() * (right - wrong)).sum())
    generator, squares = torch.Generator().manual_seed(4), []
    with exact_attention(model), _weights_without_gradients(model):
        for _ in range(400):
            [(_, _, gradient)] = _gradients(model, [layer], row, generator)
            squares.append(float((gradient * error).sum()) ** 2)
    # The mean of as many squares is off by some 7%.
    assert sum(squares) / len(squares) / 2 == pytest.approx(expected, rel=0.25)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_slots_go_where_they_gain(blocks) -> None:
    model = retrofit(build(), CONFIG)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = calibrate_slots(model, blocks.batches(2))
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(layer.exact for layer in srf_attentions(model))
    assert retained(model) == list(report.retained.values())
    assert sum(report.retained.values()) <= 24
    assert all(sorted(by_slots) == [4, 6, 8, 12, 16] for by_slots in report.cost.values())
    assert report.before == pytest.approx(sum(by_slots[8] for by_slots in report.cost.values()))
    assert report.after == pytest.approx(sum(report.cost[i][h] for i, h in report.retained.items()))
    assert report.after <= report.before
    assert "slots spread over 3 layers by 360 tokens" in str(report)
    again = retrofit(build(), CONFIG)
    assert calibrate_slots(again, blocks.batches(1)).retained == report.retained  # rows are looked at one by one


def test_layers_that_differ_generate_save_and_settle(tmp_path, blocks) -> None:
    model = build()
    before = copy.deepcopy(model)
    plan = plan_retrofit(model, UNEVEN)
    assert "4 to 12 (mean 8) retained" in str(plan)
    retrofit(model, UNEVEN)
    assert retained(model) == [4, 12, 8]
    assert plan.state_bytes == state_cost(model)["state_bytes"]
    assert plan.state_bytes == plan_retrofit(before, CONFIG).state_bytes
    assert plan.buffer_bytes == sum(t.nbytes for n, t in model.state_dict().items() if ".attn_fn." in n)
    ids = blocks.blocks[:2]
    with torch.no_grad():
        logits = model(ids).logits
        out = model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        whole = model(out).logits
    assert torch.equal(whole[:, 119:-1].argmax(-1), out[:, 120:])

    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    assert retained(again) == [4, 12, 8]
    assert torch.equal(again(ids).logits, logits)
    settle_features(again)
    assert retained(again) == [4, 12, 8]
    again.save_pretrained(tmp_path / "settled")
    assert retained(type(model).from_pretrained(tmp_path / "settled")) == [4, 12, 8]
    assert torch.equal(revert(model)(ids).logits, before(ids).logits)


def test_some_layers_alone(blocks) -> None:
    model = retrofit(build(), CONFIG, layers=[0, 2])
    report = calibrate_slots(model, blocks.batches(3))
    assert list(report.retained) == [0, 2]
    srf = model.config.srf_config
    assert [srf.layer_retained[0], srf.layer_retained[2]] == retained(model)
    assert srf.layer_retained[1] == CONFIG.retained
    # A second time the total is the sum of what there is.
    assert sum(calibrate_slots(model, blocks.batches(3)).retained.values()) <= 16


def test_refusals(blocks) -> None:
    with pytest.raises(ValueError, match=r"layer_retained must be non-negative integers, got \(4, -1\)"):
        CONFIG.replace(layer_retained=(4, -1))
    with pytest.raises(ValueError, match=r"needs window >= 1 and retained >= 1, got window=0, retained=0"):
        PURE.replace(layer_retained=(1, 2))
    assert SRFConfig.from_dict(UNEVEN.to_dict()) == UNEVEN
    model = build()
    with pytest.raises(ValueError, match="layer_retained for 2 layers, but the model has 3"):
        retrofit(model, CONFIG.replace(layer_retained=(4, 12)))
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="no layer retains keys"):
        calibrate_slots(retrofit(build(), PURE), blocks.batches(1))
    retrofit(model, CONFIG)
    with pytest.raises(ValueError, match="no batch to measure"):
        calibrate_slots(model, [])
    with pytest.raises(ValueError, match="predicts no token"):
        calibrate_slots(model.model, blocks.batches(1))
    with pytest.raises(TypeError, match="got Sequential: give the model inside it"):
        calibrate_slots(torch.nn.Sequential(model), blocks.batches(1))
    mask = torch.ones(1, 120, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="rows must hold no padding"):
        calibrate_slots(model, [{"input_ids": blocks.blocks[:1], "attention_mask": mask}])
    with pytest.raises(ValueError, match="retained=8 cannot become 0"):
        srf_attentions(model)[0].set_retained(0)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="predictions of the softmax model are not finite"):
        calibrate_slots(model, blocks.batches(1))
    assert retained(model) == [8, 8, 8]
    assert model.config.srf_config == CONFIG
    assert not any(layer.exact for layer in srf_attentions(model))
