"""`srf_retrofit.Attention`: the seed's interface, and what it lacked."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from srf_retrofit import Attention
from srf_retrofit.modeling.feature_map import FeatureMap
from srf_retrofit.testing import assert_close, quadratic_attention


def inputs(length: int, d: int = 16, *, heads: int = 4, kv_heads: int = 2, rows: int = 2, grad: bool = False) -> Any:
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(rows, n, length, d, generator=generator).requires_grad_(grad) for n in (heads, kv_heads, kv_heads)
    )


def test_parameters_are_those_of_the_seed_in_its_order() -> None:
    assert list(inspect.signature(Attention).parameters)[:6] == [
        "d",
        "causal",
        "n_features",
        "scale",
        "normalize",
        "device",
    ]
    call = inspect.signature(Attention.forward).parameters
    assert list(call)[1:7] == ["q", "k", "v", "mode", "attn_fn", "chunk_size"]


@pytest.mark.parametrize(("d", "m"), [(16, None), (16, 5), (16, 40), (80, 80), (7, 3)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_agrees_with_the_quadratic_oracle(d: int, m: int | None, heads: int, kv_heads: int, causal: bool) -> None:
    attn = Attention(d, causal, m, seed=3)
    q, k, v = inputs(37, d, heads=heads, kv_heads=kv_heads)
    o = attn(q, k, v, mode="train", attn_fn="torch", chunk_size=1024)
    assert attn.projection_matrix.shape == (kv_heads, m or d, d)
    maps = FeatureMap(attn.projection_matrix)
    assert_close(o, quadratic_attention(q, k, v, maps, attn.config, causal=causal)[0], 1e-5)


def test_exact_keys_on_request() -> None:
    attn = Attention(16, True, 8, window=4, sinks=2, retained=3, seed=0)
    q, k, v = inputs(41)
    o = attn(q, k, v)
    assert_close(o, quadratic_attention(q, k, v, FeatureMap(attn.projection_matrix), attn.config)[0], 1e-5)
    assert "retained=3" in repr(attn)


def test_gradients_in_float64() -> None:
    attn = Attention(4, True, 6, seed=0, num_heads=2)
    q, k, v = (x.double().requires_grad_() for x in inputs(19, 4, rows=1))
    assert torch.autograd.gradcheck(attn, (q, k, v))


def test_chunk_size_changes_nothing_but_the_cost() -> None:
    attn = Attention(16, True, seed=0)
    q, k, v = inputs(100)
    for chunk in (1, 32, 64, 4096):
        assert_close(attn(q, k, v, chunk_size=chunk), attn(q, k, v).double(), 1e-5, f"chunk_size={chunk}")


@pytest.mark.parametrize("exact", [{}, {"window": 8, "sinks": 2, "retained": 4}], ids=["pure", "exact keys"])
@pytest.mark.parametrize("prompt", [1, 16, 37])
def test_inference_continues_what_training_computes(exact: dict[str, int], prompt: int) -> None:
    attn = Attention(16, True, 24, seed=0, **exact)
    q, k, v = inputs(61)
    whole = attn(q, k, v)
    o, state = attn(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], mode="inference")
    parts, sizes = [o], {state.nbytes()}
    bounds = [prompt, prompt + 11, *range(prompt + 12, 62)]
    for i, j in itertools.pairwise(bounds):  # one further chunk, then token by token
        before = [t.clone() for t in state]
        o, after = attn(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], mode="inference", state=state)
        assert all(torch.equal(x, y) for x, y in zip(before, state, strict=True)), "the state given was modified"
        parts.append(o)
        sizes.add(after.nbytes())
        state = after
    assert_close(torch.cat(parts, 2), whole.double(), 2e-5)
    assert len(sizes) == 1
    assert not o.requires_grad
    assert state.length.tolist() == [61, 61]


def test_cached_values_in_half_precision() -> None:
    attn = Attention(16, True, 64, seed=0, state_dtype="float16")
    q, k, v = inputs(80)
    whole = attn(q, k, v)
    _, state = attn(q[:, :, :40], k[:, :, :40], v[:, :, :40], mode="inference")
    assert state.kv_mean.dtype == torch.float16
    assert state.k_sum.dtype == state.k_max.dtype == torch.float32
    for i in range(40, 80):
        o, state = attn(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], mode="inference", state=state)
        assert_close(o, whole[:, :, i : i + 1].double(), 1e-2, f"token {i}")


def test_inference_takes_no_gradients() -> None:
    o, state = Attention(16, seed=0)(*inputs(9, grad=True), mode="inference")
    assert not any(t.requires_grad for t in (o, *state))


def test_padding_leaves_no_trace() -> None:
    attn = Attention(16, True, seed=0)
    q, k, v = inputs(12, rows=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]])
    o = attn(q, k, v, attention_mask=mask)
    real = mask[0].bool()
    assert_close(o[:, :, real], attn(q[:, :, real], k[:, :, real], v[:, :, real]).double(), 1e-5)
    assert not o[:, :, ~real].any()


def test_packed_documents_do_not_meet() -> None:
    attn = Attention(16, True, seed=0)
    q, k, v = inputs(30, rows=1)
    o = attn(q, k, v, cu_seqlens=torch.tensor([0, 13, 30]))
    parts = [attn(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j]) for i, j in ((0, 13), (13, 30))]
    assert_close(o, torch.cat(parts, 2).double(), 1e-5)


def test_redraw_walks_a_seeded_stream() -> None:
    one, other = (Attention(16, True, 8, seed=5, num_heads=2) for _ in range(2))
    seen = [one.projection_matrix]
    for _ in range(3):
        torch.rand(1)  # the global generator has no part in it
        one.redraw_()
        other.redraw_(torch.device("cpu"))
        assert torch.equal(one.projection_matrix, other.projection_matrix)
        assert not any(torch.equal(one.projection_matrix, x) for x in seen)
        seen.append(one.projection_matrix)


def test_layers_differ_and_manual_seed_fixes_them() -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(11)
        return [Attention(8).projection_matrix for _ in range(2)]

    first, second = draw()
    assert not torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip((first, second), draw(), strict=True))


def test_redraw_after_a_forward_leaves_its_gradients_alone() -> None:
    attn = Attention(16, True, seed=0)
    q, k, v = inputs(50, grad=True)
    expected = torch.autograd.grad(attn(q, k, v).sum(), (q, k, v))
    o = attn(q, k, v)
    attn.redraw_()
    for mine, right in zip(torch.autograd.grad(o.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("reentrant", [True, False])
def test_redraw_on_call_under_gradient_checkpointing(reentrant: bool) -> None:
    """Two calls of one module, each recomputed in backward, give the gradients of the draws of their forwards."""
    attn = Attention(16, True, 8, seed=0)
    attn.redraw_on_call_()
    x, k, v = inputs(40, grad=True)

    def gradients(wrap: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        o = x
        for _ in range(2):
            o = checkpoint(attn, o, k, v, use_reentrant=reentrant) if wrap else attn(o, k, v)
        leaves = [t.grad for t in (x, k, v)]
        assert leaves == [None, None, None]
        o.square().sum().backward()
        found = tuple(t.grad for t in (x, k, v))
        for t in (x, k, v):
            t.grad = None
        return found

    for mine, right in zip(gradients(True), gradients(False), strict=True):
        assert_close(mine, right.double(), 1e-6)
    first = attn(x, k, v)
    assert not torch.equal(first, attn(x, k, v))
    attn.redraw_on_call_(False)
    assert torch.equal(attn(x, k, v), attn(x, k, v))


def test_inference_never_redraws() -> None:
    attn = Attention(16, True, seed=0)
    attn.redraw_on_call_(True)
    before = attn.projection_matrix.clone()
    attn(*inputs(5, heads=1, kv_heads=1), mode="inference")
    assert torch.equal(attn.projection_matrix, before)


def test_heads_are_drawn_when_needed_and_stay() -> None:
    attn = Attention(16, True, 8, seed=2)
    attn.redraw_()
    few = attn(*inputs(20, heads=2, kv_heads=1))
    first = attn.projection_matrix.clone()
    attn(*inputs(20, heads=6, kv_heads=3))
    assert attn.projection_matrix.shape == (3, 8, 16)
    assert torch.equal(attn.projection_matrix[:1], first)
    assert torch.equal(attn(*inputs(20, heads=2, kv_heads=1)), few)
    known = Attention(16, True, 8, seed=2, num_heads=3)
    known.redraw_()
    assert torch.equal(known.projection_matrix, attn.projection_matrix)


@pytest.mark.parametrize("on_call", [False, True])
def test_saved_and_loaded_it_goes_on_where_it_was(on_call: bool) -> None:
    attn = Attention(16, True, 8, seed=7)
    attn.redraw_()
    attn.redraw_on_call_(on_call)
    qkv = inputs(20)
    attn(*qkv)
    attn.redraw_on_call_(False)
    fresh = Attention(16, True, 8)
    fresh.load_state_dict(copy.deepcopy(attn.state_dict()))
    assert torch.equal(fresh(*qkv), attn(*qkv))
    assert fresh.config == attn.config
    wide = inputs(20, heads=3, kv_heads=3)
    assert torch.equal(fresh(*wide), attn(*wide))
    for module in (fresh, attn):
        module.redraw_()
    assert torch.equal(fresh.projection_matrix, attn.projection_matrix)


def test_projection_of_another_size_is_refused_on_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for projection_matrix"):
        Attention(16, True, 8).load_state_dict(Attention(16, True, 9).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projection_keeps_its_precision(dtype: torch.dtype) -> None:
    attn = Attention(16, True, 24, seed=0, num_heads=2)
    exact = attn.projection_matrix.clone()
    attn.to(dtype)
    assert torch.equal(attn.projection_matrix, exact)
    q, k, v = (x.to(dtype) for x in inputs(33))
    o = attn(q, k, v)
    assert o.dtype == dtype
    assert_close(o.double(), quadratic_attention(q, k, v, FeatureMap(exact), attn.config)[0], 1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": True}, "scale=True .* biased"),
        ({"normalize": True}, "normalize=True .* biased"),
        ({"n_features": -1}, "num_features must be >= 0, got -1"),
        ({"n_features": 0}, "leaves nothing to attend to"),
        ({"d": 0, "n_features": 4}, "head_dim must be an integer >= 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer"),
        ({"causal": False, "window": 4, "retained": 4}, "retained=4 .* causal=True"),
        ({"retained": 4}, "retained=4 needs window"),
        ({"projection": "hadamard"}, "projection must be one of simplex"),
        ({"state_dtype": "int8"}, "state_dtype must be one of float32"),
    ],
)
def test_bad_settings_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**{"d": 16, **arguments})


def test_number_of_features_in_the_place_of_causal() -> None:
    with pytest.raises(TypeError, match="n_features="):
        Attention(64, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_fn": "flash"}, "attn_fn='torch' is O"),
        ({"attn_fn": "triton"}, "attn_fn must be 'torch', got 'triton'"),
        ({"mode": "decode"}, "mode must be 'train' or 'inference', got 'decode'"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
    ],
)
def test_bad_calls_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16)(*inputs(5), **arguments)


def test_a_state_where_none_can_be() -> None:
    attn = Attention(16, seed=0)
    _, state = attn(*inputs(5), mode="inference")
    with pytest.raises(ValueError, match="mode='inference' only"):
        attn(*inputs(5), state=state)
    with pytest.raises(ValueError, match="causal=True"):
        Attention(16, causal=False)(*inputs(5), mode="inference")
    with pytest.raises(ValueError, match=r"\(batch, heads, length, 16\)"):
        attn(*inputs(5, 8))
