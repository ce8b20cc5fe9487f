"""The core against its oracles: outputs, states and every gradient, at ragged lengths, in every mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from core_inputs import DIM, FEATURES, assert_states_close, config_of, decode, inputs

from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.feature_map import FeatureMap
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, quadratic_attention, random_feature_map, stepwise_attention

LENGTHS = (1, 2, 63, 64, 65, 127, 500, 1000)
MODES = [
    (window, sinks, retained)
    for window, sinks, retained in itertools.product((0, 1, 32, 64, 100), (0, 4), (0, 1, 16))
    if window or not retained
]
# Heads that retain other numbers of keys; one of them none.
UNEVEN = [(1, 0, (3, 1)), (32, 4, (0, 16)), (64, 4, (16, 5))]


@pytest.mark.parametrize("mode", MODES + UNEVEN, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_matches_the_quadratic_oracle_with_state_and_gradients(length, mode):
    config = config_of(mode)
    xs = [x.requires_grad_() for x in inputs(length)]
    maps = FeatureMap(*(t.requires_grad_() for t in random_feature_map(2, FEATURES, DIM)))
    ys = [x.detach().double().requires_grad_() for x in xs]
    oracle_maps = FeatureMap(*(t.detach().double().requires_grad_() for t in maps))

    o, state = srf_attention(*xs, maps, config, output_final_state=True, chunk_size=256)
    expected, expected_state = quadratic_attention(*ys, oracle_maps, config, output_final_state=True)
    assert_close(o, expected, 1e-5, "o")
    assert_states_close(state, expected_state, 1e-5)

    weight = torch.randn_like(o)

    # The sums of the state carry gradients too: that is what training across calls would use.
    def loss(o, state):
        return (o * weight).sum() + state.kv_mean.square().mean() + 0.1 * state.k_sum[state.k_sum > 0].log().sum()

    grads = torch.autograd.grad(loss(o, state), [*xs, *maps], allow_unused=True)
    weight = weight.double()
    right = torch.autograd.grad(loss(expected, expected_state), [*ys, *oracle_maps], allow_unused=True)
    # Geometry only moves the outputs through features that are in use; its gradients are then cancelling sums over
    # all tokens, so they are held to the scale of the projection's.
    scale = 0.0 if right[3] is None else right[3].abs().max().item()
    for name, mine, theirs in zip(("q", "k", "v", *FeatureMap._fields), grads, right, strict=True):
        if theirs is None:
            assert mine is None or not mine.any(), f"{name}: a gradient where there is none"
            continue
        mine = torch.zeros_like(theirs) if mine is None else mine
        error = (mine.double() - theirs).abs().max().item()
        assert error <= 1e-5 * max(theirs.abs().max().item(), scale, 1e-3), f"grad {name}: {error:.2e}"


@pytest.mark.parametrize("mode", MODES + UNEVEN, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_recurrent_and_stepwise_match_the_quadratic_oracle(length, mode):
    config = config_of(mode)
    heads = (2, 2 if mode in UNEVEN else 1) if length >= 500 else (4, 2)
    q, k, v = inputs(length, heads=heads[0], kv_heads=heads[1])
    maps = random_feature_map(heads[1], FEATURES, DIM)
    expected, expected_state = quadratic_attention(q, k, v, maps, config, output_final_state=True)
    assert_close(stepwise_attention(q, k, v, maps, config), expected, 1e-9, "stepwise")
    o, state = decode(q, k, v, maps, config)
    assert_close(o, expected, 1e-5, "o")
    assert_states_close(state, expected_state, 1e-5)


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (32, 4, 16), (32, 4, (16, 3))], ids=str)
@pytest.mark.parametrize("length", [65, 500])
def test_bfloat16_inputs_and_their_gradients(length, mode):
    config = config_of(mode)
    xs = [x.bfloat16().requires_grad_() for x in inputs(length)]
    maps = random_feature_map(2, FEATURES, DIM)
    ys = [x.detach().double().requires_grad_() for x in xs]
    o, _ = srf_attention(*xs, maps, config)
    expected, _ = quadratic_attention(*ys, maps, config, dtype=torch.bfloat16)
    assert o.dtype == torch.bfloat16
    assert_close(o, expected, 1e-2, "o")
    weight = torch.randn_like(o)
    grads = torch.autograd.grad((o * weight).sum(), xs)
    right = torch.autograd.grad((expected * weight.double()).sum(), ys)
    for name, mine, theirs in zip("qkv", grads, right, strict=True):
        assert_close(mine, theirs, 1e-2, f"grad {name}")


@pytest.mark.parametrize(("dim", "features"), [(80, 16), (96, 100), (112, 7), (64, 256)])
@torch.no_grad()
def test_any_head_dimension_and_number_of_features(dim, features):
    config = SRFConfig(num_features=features, window=16, sinks=2, retained=8)
    q, k, v = inputs(150, heads=3, kv_heads=1, dim=dim)
    maps = random_feature_map(1, features, dim)
    expected, _ = quadratic_attention(q, k, v, maps, config)
    assert_close(srf_attention(q, k, v, maps, config)[0], expected, 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@torch.no_grad()
def test_grouped_query_attention(kv_heads):
    config = config_of((16, 2, 8))
    q, k, v = inputs(100, batch=2, heads=8, kv_heads=kv_heads)
    maps = random_feature_map(kv_heads, FEATURES, DIM)
    expected, _ = quadratic_attention(q, k, v, maps, config)
    assert_close(srf_attention(q, k, v, maps, config)[0], expected, 1e-5)


@pytest.mark.parametrize(
    "mode", [(0, 0, 0), (0, 4, 0), (1, 0, 1), (32, 4, 0), (32, 4, 16), (100, 0, 16), (32, 4, (7, 16))], ids=str
)
@pytest.mark.parametrize("cuts", [(1, 2), (31, 33), (64, 128), (7, 180)])
@torch.no_grad()
def test_prefill_in_pieces_continues_the_state(cuts, mode):
    config = config_of(mode)
    q, k, v = inputs(200, batch=2)
    maps = random_feature_map(2, FEATURES, DIM)
    whole, end = srf_attention(q, k, v, maps, config, output_final_state=True)
    state, outputs = None, []
    for start, stop in zip((0, *cuts), (*cuts, 200), strict=True):
        piece = (x[:, :, start:stop] for x in (q, k, v))
        o, state = srf_attention(*piece, maps, config, initial_state=state, output_final_state=True, chunk_size=64)
        outputs.append(o)
    assert_close(torch.cat(outputs, 2), whole, 1e-5, "o")
    assert_states_close(state, end, 1e-5)


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (32, 0, 0), (32, 4, 16)], ids=str)
def test_gradients_flow_through_the_state_into_an_earlier_call(mode):
    config = config_of(mode)
    xs = [x.requires_grad_() for x in inputs(100)]
    maps = random_feature_map(2, FEATURES, DIM)
    whole, _ = srf_attention(*xs, maps, config)
    weight = torch.randn_like(whole)
    right = torch.autograd.grad((whole * weight).sum(), xs)
    first, state = srf_attention(*(x[:, :, :70] for x in xs), maps, config, output_final_state=True)
    second, _ = srf_attention(*(x[:, :, 70:] for x in xs), maps, config, initial_state=state)
    grads = torch.autograd.grad((torch.cat([first, second], 2) * weight).sum(), xs)
    for name, mine, theirs in zip("qkv", grads, right, strict=True):
        assert_close(mine, theirs, 1e-5, f"grad {name}")


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (1, 0, 0), (32, 4, 0)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 65, 300])
def test_bidirectional_matches_the_quadratic_oracle(length, mode):
    config = config_of(mode)
    xs = [x.requires_grad_() for x in inputs(length, batch=2)]
    ys = [x.detach().double().requires_grad_() for x in xs]
    maps = random_feature_map(2, FEATURES, DIM)
    mask = torch.stack([torch.arange(length) >= 0, torch.arange(length) >= length // 2])
    o, _ = srf_attention(*xs, maps, config, causal=False, attention_mask=mask)
    expected, _ = quadratic_attention(*ys, maps, config, causal=False, attention_mask=mask)
    assert_close(o, expected, 1e-5, "o")
    weight = torch.randn_like(o)
    grads = torch.autograd.grad((o * weight).sum(), xs)
    right = torch.autograd.grad((expected * weight.double()).sum(), ys)
    for name, mine, theirs in zip("qkv", grads, right, strict=True):
        assert_close(mine, theirs, 1e-5, f"grad {name}", least_scale=0.1)


@torch.no_grad()
def test_without_the_tail_the_pure_form_is_its_sinks():
    config = config_of((0, 4, 0))
    q, k, v = inputs(70)
    maps = random_feature_map(2, FEATURES, DIM)
    expected, _ = quadratic_attention(q, k, v, maps, config, ablation="no_tail")
    assert_close(srf_attention(q, k, v, maps, config, ablation="no_tail")[0], expected, 1e-5)


@pytest.mark.parametrize("ablation", ["no_tail", "tail_only", "no_retained"])
@torch.no_grad()
def test_ablations_match_the_oracle(ablation):
    config = config_of((16, 4, 8))
    q, k, v = inputs(130)
    maps = random_feature_map(2, FEATURES, DIM)
    expected, _ = quadratic_attention(q, k, v, maps, config, ablation=ablation)
    assert_close(srf_attention(q, k, v, maps, config, ablation=ablation)[0], expected, 1e-5)
    full, _ = srf_attention(q, k, v, maps, config)
    assert (full - expected).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (16, 4, 8)], ids=str)
@pytest.mark.parametrize(
    "extreme", ["tiny", "large", "huge", "early huge keys", "late huge keys", "identical keys", "zero"]
)
def test_extreme_inputs_stay_finite_and_right(extreme, mode):
    config = config_of(mode)
    q, k, v = inputs(100)
    tolerance = 1e-5
    if extreme == "tiny":
        q, k = 1e-6 * q, 1e-6 * k
    elif extreme == "large":
        q, k = 3 * q, 3 * k
    elif extreme == "huge":
        # Norms of 1e3: exponents near |k'|^2/2 = 1e5, so float32 resolves the features to some 1e-2 at best.
        q, k = (1e3 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        tolerance = 5e-2
    elif extreme == "early huge keys":
        k[:, :, :8] *= 30
    elif extreme == "late huge keys":
        k[:, :, -8:] *= 30
    elif extreme == "identical keys":
        k = k[:, :, :1].expand_as(k).contiguous()
    else:
        q, k = torch.zeros_like(q), torch.zeros_like(k)
    xs = [x.requires_grad_() for x in (q, k, v)]
    maps = random_feature_map(2, FEATURES, DIM)
    o, state = srf_attention(*xs, maps, config, output_final_state=True)
    expected, _ = quadratic_attention(*xs, maps, config)
    if "huge" in extreme:
        exponent = 0.5 * max(x.detach().norm(dim=-1).max().item() for x in (q, k)) ** 2 * DIM**-0.5
        tolerance = max(tolerance, 2 * exponent * torch.finfo(torch.float32).eps)
    assert_close(o, expected, tolerance, "o")
    for grad in torch.autograd.grad(o.sum(), xs):
        assert torch.isfinite(grad).all()
    for name, tensor in zip(SRFState._fields, state, strict=True):
        assert not torch.isnan(tensor).any(), name
    assert_close(decode(*(x.detach() for x in xs), maps, config)[0], expected, tolerance, "decoded")


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (16, 4, 8)], ids=str)
@torch.no_grad()
def test_the_future_does_not_reach_the_past(mode):
    config = config_of(mode)
    q, k, v = inputs(120)
    maps = random_feature_map(2, FEATURES, DIM)
    before, _ = srf_attention(q, k, v, maps, config)
    k[:, :, 70:] *= 50
    v[:, :, 70:] += 100
    after, _ = srf_attention(q, k, v, maps, config)
    assert torch.equal(before[:, :, :70], after[:, :, :70])


@pytest.mark.parametrize("state_dtype", ["float16", "bfloat16"])
@torch.no_grad()
def test_half_precision_state_is_close_and_smaller(state_dtype):
    config = config_of((16, 4, 8))
    half = config.replace(state_dtype=state_dtype)
    q, k, v = inputs(400)
    maps = random_feature_map(2, FEATURES, DIM)._replace(foresight=None)  # which depends on the scale of values
    expected, full = srf_attention(q, k, v, maps, config, output_final_state=True)
    o, state = decode(q, k, 1e3 * v, maps, half)
    assert state.kv_mean.dtype == getattr(torch, state_dtype)
    assert state.nbytes() < full.nbytes()
    assert_close(o, 1e3 * expected, 5e-3 if state_dtype == "float16" else 4e-2)


@torch.no_grad()
def test_a_million_tokens_stream_through_constant_memory():
    config = SRFConfig(num_features=8, window=16, sinks=4, retained=8)
    maps = random_feature_map(1, 8, 8)
    state = SRFState.empty(config, 1, 1, 8, dtype=torch.float32)
    size, piece, values = state.nbytes(), 50_000, []
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        q, k, v = (torch.randn(1, 1, piece, 8, generator=generator) for _ in range(3))
        o, state = srf_attention(q, k, v, maps, config, initial_state=state, output_final_state=True)
        values.append(o[..., -1, :])
        assert state.nbytes() == size
    assert state.length.tolist() == [1_000_000]
    assert all(torch.isfinite(x).all() for x in values)
    # All but the exact keys are folded: their number is known, and each had a positive weight.
    assert (state.k_sum > 1).all()
    # A mean of a million independent standard normal values.
    assert state.kv_mean.abs().max() < 1.0
    assert state.kv_mean.abs().median() < 0.05
