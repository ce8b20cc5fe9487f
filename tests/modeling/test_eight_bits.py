"""Keys and values in eight bits: the rounding itself, and every form of attention that computes with it."""

from __future__ import annotations

import pytest
import torch
from core_inputs import FEATURES, assert_states_close, config_of, decode, inputs

from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.eight_bits import GROUP, pack, round_to_eight_bits, row_width, unpack
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import EXACT, SRFState
from srf_retrofit.testing import (
    assert_close,
    oracle_eight_bits,
    quadratic_attention,
    random_feature_map,
    stepwise_attention,
)

DIM = 32
MODES = [(1, 0, 3), (32, 4, 0), (32, 4, 16), (100, 4, 1), (32, 0, (0, 16))]


@pytest.fixture
def vectors() -> torch.Tensor:
    """Of sizes from what is rounded to nothing to the most that float16 holds."""
    sizes = torch.tensor([0.0, 1e-9, 2.0**-20, 1e-3, 1.0, 100.0, 1e4]).view(-1, 1, 1)
    return (sizes * torch.randn(7, 50, 64)).clamp(-60000, 60000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_near_done_once_and_kept_by_rows(vectors, dtype):
    x = vectors.to(dtype)
    kept = round_to_eight_bits(x)
    assert kept.dtype == dtype
    largest = x.abs().unflatten(-1, (-1, GROUP)).amax(-1, keepdim=True).double()
    error = (kept.double() - x.double()).abs().unflatten(-1, (-1, GROUP))
    # Half a step, of which the largest number has 64 at least; a whole one where it would have had 128.
    assert bool((error <= torch.maximum(largest / 128, torch.tensor(2.0**-25))).all())
    assert torch.equal(round_to_eight_bits(kept), kept)
    rows = pack(x)
    assert rows.dtype == torch.int8
    assert rows.shape[-1] == row_width(64) == 68
    assert torch.equal(rows, pack(kept))
    for wide in (dtype, torch.float32, torch.float64):
        assert torch.equal(unpack(rows, wide), kept.to(wide))
    assert torch.equal(oracle_eight_bits(x.double()), kept.double())


def test_gradients_pass_straight_through(vectors):
    x = vectors.requires_grad_()
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((round_to_eight_bits(x) * weight).sum(), x)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("length", [1, 33, 64, 500])
def test_chunked_matches_the_quadratic_oracle_with_state_and_gradients(length, mode):
    config = config_of(mode, kv_dtype="int8")
    xs = [x.requires_grad_() for x in inputs(length, dim=DIM)]
    ys = [x.detach().double().requires_grad_() for x in xs]
    maps = random_feature_map(2, FEATURES, DIM)
    o, state = srf_attention(*xs, maps, config, output_final_state=True, chunk_size=128)
    expected, expected_state = quadratic_attention(*ys, maps, config, output_final_state=True)
    assert_close(o, expected, 1e-5, "o")
    assert_states_close(state, expected_state, 1e-5)
    weight = torch.randn_like(o)
    grads = torch.autograd.grad((o * weight).sum(), xs)
    right = torch.autograd.grad((expected * weight.double()).sum(), ys)
    for name, mine, theirs in zip("qkv", grads, right, strict=True):
        assert_close(mine, theirs, 1e-5, f"grad {name}", least_scale=1e-3)
    other, _ = srf_attention(*xs, maps, config.replace(kv_dtype="model"))
    assert (o - other).abs().max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_decoding_reads_what_prefill_stored(mode):
    config = config_of(mode, kv_dtype="int8")
    q, k, v = inputs(230, batch=2, dim=DIM)
    maps = random_feature_map(2, FEATURES, DIM)
    expected, whole = srf_attention(q, k, v, maps, config, output_final_state=True)
    o, state = decode(q, k, v, maps, config)
    assert_close(o, expected, 1e-5, "o")
    assert_close(o, stepwise_attention(q, k, v, maps, config), 1e-5, "o of the list of keys")
    assert_states_close(state, whole, 1e-5)
    for name in EXACT:
        assert getattr(state, name).dtype == torch.int8
        assert torch.equal(getattr(state, name), getattr(whole, name)), name
    # In pieces: what is stored is taken up as it was.
    _, first = srf_attention(*(x[:, :, :77] for x in (q, k, v)), maps, config, output_final_state=True)
    rest, last = srf_attention(
        *(x[:, :, 77:] for x in (q, k, v)), maps, config, initial_state=first, output_final_state=True
    )
    assert_close(rest, expected[:, :, 77:], 1e-5, "the rest")
    for name in EXACT:
        assert torch.equal(getattr(last, name), getattr(whole, name)), name


@pytest.mark.parametrize("retained", [6, (0, 6)], ids=str)
def test_the_fused_kernels_compute_with_what_is_stored(retained):
    config = config_of((8, 2, retained), kv_dtype="int8")
    maps = random_feature_map(2, FEATURES, DIM)
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        xs = [x.requires_grad_() for x in inputs(50, dim=DIM)]
        first, rest = ([x[:, :, i] for x in xs] for i in (slice(29), slice(29, 50)))
        o, state = srf_attention(*first, maps, config, output_final_state=True, backend=backend)
        state = SRFState(*(x.detach() for x in state))
        last, state = srf_attention(
            *rest, maps, config, initial_state=state, output_final_state=True, backend=backend
        )  # fmt: skip
        o = torch.cat([o, last], 2)
        found.append((o, state, torch.autograd.grad(o.square().sum(), xs)))
    (mine, my_state, my_grads), (theirs, state, grads) = found
    assert_close(mine, theirs, 1e-5, "o")
    assert_states_close(my_state, state, 1e-5)
    for name, x, y in zip("qkv", my_grads, grads, strict=True):
        assert_close(x, y, 1e-5, f"grad {name}")


def test_half_the_bytes():
    config = SRFConfig(num_features=16, window=32, sinks=4, retained=120)
    model = SRFState.empty(config, 1, 3, 64, dtype=torch.bfloat16, device="meta")
    eight = SRFState.empty(config.replace(kv_dtype="int8"), 1, 3, 64, dtype=torch.bfloat16, device="meta")
    exact = sum(getattr(model, name).numel() * 2 for name in EXACT)
    assert model.nbytes() - eight.nbytes() == exact - exact // 2 * 68 // 64


def test_refusals():
    with pytest.raises(ValueError, match="kv_dtype must be one of model, int8, got 'int4'"):
        SRFConfig(kv_dtype="int4")
    with pytest.raises(ValueError, match=r"kv_dtype='int8' stores the exact keys of a window .* set window"):
        SRFConfig(window=0, sinks=0, retained=0, kv_dtype="int8")
    config = config_of((32, 4, 8), kv_dtype="int8")
    with pytest.raises(ValueError, match="numbers in groups of 16, but heads have 24"):
        srf_attention(*inputs(40, dim=24), random_feature_map(2, FEATURES, 24), config)
    maps = random_feature_map(2, FEATURES, DIM)
    _, state = srf_attention(*inputs(40, dim=DIM), maps, config, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state\.window_key must be torch\.float32"):
        srf_attention(*inputs(1, dim=DIM), maps, config.replace(kv_dtype="model"), initial_state=state)


def test_what_was_saved_before_is_as_the_model_computes():
    old = {"num_features": 16, "version": 4}
    assert SRFConfig.from_dict(old) == SRFConfig(num_features=16)
