"""Slots by layer and head: costs are what they say, the total is kept, and every path takes heads that differ."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from builders import CONFIG, PURE, build

from srf_retrofit import SRFConfig, plan_retrofit, retrofit, revert
from srf_retrofit.calibration.slots import (
    SHARES,
    _gradients,
    _levels,
    _weights_without_gradients,
    _what_heads_say,
    calibrate_slots,
    spread_slots,
)
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation.suite import state_cost
from srf_retrofit.modeling.attention import exact_attention, srf_attentions
from srf_retrofit.training.settling import settle_features

CONFIG = CONFIG.replace(retained=8)
UNEVEN = CONFIG.replace(layer_retained=(4, 12, 8))
HEADS = CONFIG.replace(layer_retained=((4, 2), 12, (7, 11)))


@pytest.fixture
def blocks() -> TokenBlocks:
    return TokenBlocks(torch.randint(3, 90, (3, 120), generator=torch.Generator().manual_seed(0)))


def retained(model) -> list[tuple[int, ...]]:
    return [layer.srf_config.slots(2) for layer in srf_attentions(model)]


def test_the_best_sum_is_found() -> None:
    generator = torch.Generator().manual_seed(1)
    cost = torch.tensor([[3.0, 2.0, 0.0]] * 2)
    assert spread_slots(cost, [1, 2, 8], 4) == [2, 2]  # for the dearest there is no room
    levels = _levels(8, (0.5, 0.75, 1.0, 1.5, 2.0))
    assert levels == [4, 6, 8, 12, 16]
    assert _levels(8, SHARES) == [2, 4, 8, 16, 32]
    assert _levels(1, SHARES) == [1, 2, 4]
    assert _levels(600, SHARES)[-1] == 1024  # what the kernels hold
    for _ in range(20):
        cost = torch.rand(4, 5, generator=generator, dtype=torch.float64)
        found = spread_slots(cost, levels, 33)
        sums = {
            counts: sum(float(cost[i, levels.index(h)]) for i, h in enumerate(counts))
            for counts in itertools.product(levels, repeat=4)
            if sum(counts) <= 33
        }
        assert sums[tuple(found)] == pytest.approx(min(sums.values()))


def test_a_cost_is_the_divergence_of_a_small_error() -> None:
    """Of an error at one token of one head, against the divergence of all predictions: as the mean of what is drawn."""
    softmax = build().double()
    model = retrofit(copy.deepcopy(softmax), CONFIG)
    layer = srf_attentions(model)[1]
    row = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(2))
    error = torch.zeros(1, 30, 64, dtype=torch.float64)
    error[0, 11, 16:32] = 1e-3 * torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def disturb(module, args):
        return (args[0] + error,)

    with torch.no_grad():
        right = softmax(row).logits.log_softmax(-1)
        handle = softmax.model.layers[1].self_attn.o_proj.register_forward_pre_hook(disturb)
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


def test_costs_of_heads_are_those_of_their_errors(blocks) -> None:
    """Each head's own, beside the other heads as they are."""
    model = retrofit(build(), CONFIG)
    layers, row = srf_attentions(model), blocks.blocks[:1]
    by_head = calibrate_slots(copy.deepcopy(model), [row])
    by_layer = calibrate_slots(copy.deepcopy(model), [row], by="layer")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), exact_attention(model), _weights_without_gradients(model):
        for layer, call, gradient in _gradients(model, layers, row, generator):
            layer.exact = False
            layer.set_retained(4)
            with _what_heads_say(layer) as said:
                layer.forward(*call.args, **call.kwargs)
            part = (gradient * (said[0] - call.heads)).double()  # two query heads of 16 for each key/value head
            per_head = (part[..., :32].sum(-1).square().sum(), part[..., 32:].sum(-1).square().sum())
            i = layer.layer_idx
            assert by_head.cost[i][4] == pytest.approx([float(x) / 2 / 120 for x in per_head], rel=1e-4)
            assert by_layer.cost[i][4] == pytest.approx([float(part.sum(-1).square().sum()) / 2 / 120], rel=1e-4)
            layer.exact = True


@pytest.mark.parametrize("by", ["head", "layer"])
def test_slots_go_where_they_gain(blocks, by) -> None:
    model = retrofit(build(), CONFIG)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = calibrate_slots(model, blocks.batches(2), by=by)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(layer.exact for layer in srf_attentions(model))
    heads = 2 if by == "head" else 1
    assert retained(model) == [slots * (2 // heads) for slots in report.retained.values()]
    assert model.config.srf_config.for_layer(1) == srf_attentions(model)[1].srf_config
    assert sum(map(sum, report.retained.values())) <= 24 * heads
    assert all(sorted(by_slots) == [2, 4, 8, 16, 32] for by_slots in report.cost.values())
    assert report.before == pytest.approx(sum(sum(by_slots[8]) for by_slots in report.cost.values()))
    after = (report.cost[i][h][n] for i, slots in report.retained.items() for n, h in enumerate(slots))
    assert report.after == pytest.approx(sum(after))
    assert report.after <= report.before
    assert f"spread over {3 * heads} {by}s by 360 tokens" in str(report)
    again = retrofit(build(), CONFIG)
    # Rows are looked at one by one.
    assert calibrate_slots(again, blocks.batches(1), by=by).retained == report.retained


@pytest.mark.parametrize("config", [UNEVEN, HEADS], ids=["layers", "heads"])
def test_layers_that_differ_generate_save_and_settle(tmp_path, blocks, config) -> None:
    model = build()
    before = copy.deepcopy(model)
    plan = plan_retrofit(model, config)
    assert f"{4 if config is UNEVEN else 2} to 12 (mean 8) retained" in str(plan)
    retrofit(model, config)
    slots = [(4, 4), (12, 12), (8, 8)] if config is UNEVEN else [(4, 2), (12, 12), (7, 11)]
    assert retained(model) == slots
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
    assert retained(again) == slots
    assert torch.equal(again(ids).logits, logits)
    settle_features(again)
    assert retained(again) == slots
    again.save_pretrained(tmp_path / "settled")
    assert retained(type(model).from_pretrained(tmp_path / "settled")) == slots
    assert torch.equal(revert(model)(ids).logits, before(ids).logits)


def test_some_layers_alone(blocks) -> None:
    model = retrofit(build(), CONFIG, layers=[0, 2])
    report = calibrate_slots(model, blocks.batches(3))
    assert list(report.retained) == [0, 2]
    srf = model.config.srf_config
    assert [srf.for_layer(i).slots(2) for i in (0, 2)] == retained(model)
    assert srf.layer_retained[1] == CONFIG.retained
    # A second time the total is the sum of what there is.
    assert sum(map(sum, calibrate_slots(model, blocks.batches(3)).retained.values())) <= 32
    assert sum(map(sum, calibrate_slots(model, blocks.batches(3), by="layer").retained.values())) <= 16


def test_refusals(blocks) -> None:
    with pytest.raises(ValueError, match=r"layer_retained must be non-negative integers, got \(4, -1\)"):
        CONFIG.replace(layer_retained=(4, -1))
    with pytest.raises(ValueError, match=r"needs window >= 1 and retained >= 1, got window=0, retained=0"):
        PURE.replace(layer_retained=(1, 2))
    assert SRFConfig.from_dict(UNEVEN.to_dict()) == UNEVEN
    assert SRFConfig.from_dict(HEADS.to_dict()) == HEADS
    with pytest.raises(ValueError, match=r"layer_retained must be non-negative integers, got \(4, \(\)\)"):
        CONFIG.replace(layer_retained=(4, ()))
    with pytest.raises(ValueError, match=r"retained must be the largest of head_retained=\(4, 9\), got 8"):
        CONFIG.replace(head_retained=(4, 9))
    with pytest.raises(ValueError, match="leave one of them out"):
        CONFIG.replace(head_retained=(4, 8), layer_retained=(4, 8))
    model = build()
    with pytest.raises(ValueError, match=r"head_retained=\(1, 2, 3\) has 3 entries, but there are 2 key/value heads"):
        retrofit(model, CONFIG.replace(layer_retained=(4, (1, 2, 3), 8)))
    with pytest.raises(ValueError, match="layer_retained for 2 layers, but the model has 3"):
        retrofit(model, CONFIG.replace(layer_retained=(4, 12)))
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="no layer retains keys"):
        calibrate_slots(retrofit(build(), PURE), blocks.batches(1))
    retrofit(model, CONFIG)
    with pytest.raises(ValueError, match="by must be one of head, layer, got 'token'"):
        calibrate_slots(model, blocks.batches(1), by="token")
    with pytest.raises(ValueError, match=r"one of them not above 1, got \(2.0,\)"):
        calibrate_slots(model, blocks.batches(1), shares=(2.0,))
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
    with pytest.raises(ValueError, match="has 3 entries, but there are 2 key/value heads"):
        srf_attentions(model)[0].set_retained((1, 2, 3))
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="predictions of the softmax model are not finite"):
        calibrate_slots(model, blocks.batches(1))
    assert retained(model) == [(8, 8)] * 3
    assert model.config.srf_config == CONFIG
    assert not any(layer.exact for layer in srf_attentions(model))
