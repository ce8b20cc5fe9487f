"""What tests of the fused kernels compare them with: the quadratic oracle, and the PyTorch core in float64."""

from __future__ import annotations

import pytest
import torch
from core_inputs import assert_states_close

from srf_retrofit.modeling import block_tables, fused_call
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.ops import fold, srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, quadratic_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = ("kv_mean", "k_sum", "window_key", "window_value", "sink_key", "sink_value", "retained_key", "retained_value")
# What the interpreter does to bfloat16 is to cut it off, so that one step is worth twice what rounding would cost.
BFLOAT16 = 1e-2 if DEVICE == "cuda" else 2.5e-2


@pytest.fixture
def small_parts(monkeypatch):
    """Several runs a row, and several parts of keys and features, even at the interpreter's sizes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(block_tables, "RUN_TOKENS", 16)
        monkeypatch.setattr(fused_call, "PART", 16)
        block_tables._plain_tables.cache_clear()
    yield
    block_tables._plain_tables.cache_clear()


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: BFLOAT16}[dtype]


def config_of(window: int, sinks: int, retained: int | tuple[int, ...], features: int = 16, **changes) -> SRFConfig:
    config = SRFConfig(num_features=features, window=window, sinks=sinks, retained=0, **changes)
    return config.with_slots(retained)


def tensors(length, *, batch=1, heads=2, kv_heads=1, dim=16, dtype=torch.float32, scale=1.0):
    # Transposed views, as a model's projections give them.
    shapes = ((batch, length, n, dim) for n in (heads, kv_heads, kv_heads))
    return [(scale * torch.randn(s)).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for s in shapes]


def doubles(xs):
    return [x.detach().double().cpu().requires_grad_() for x in xs]


def compare_plain(config, length, maps, *, dtype=torch.float32, geometry="proposal", ablation=None, **shape):
    """Output, state and gradients of one plain call against the quadratic oracle."""
    xs = tensors(length, dtype=dtype, **shape)
    ys = doubles(xs)
    with_state = ablation is None
    o, state = srf_attention(
        *xs, maps.to(DEVICE), config, output_final_state=with_state, ablation=ablation, backend="triton"
    )
    expected, right_state = quadratic_attention(
        *ys, maps, config, output_final_state=with_state, ablation=ablation, dtype=dtype
    )
    assert o.dtype == dtype
    assert_close(o.cpu(), expected, tolerance(dtype), "o")
    # Keys of half precision meet in other orders, and two that are all but equal may then change places in the slots.
    if with_state and (dtype == torch.float32 or not config.retained):
        assert_states_close(SRFState(*(t.cpu() for t in state)), right_state, tolerance(dtype))
    weight = torch.randn(o.shape)
    grads = torch.autograd.grad((o * weight.to(DEVICE, dtype)).sum(), xs)
    right = torch.autograd.grad((expected * weight.to(dtype).double()).sum(), ys)
    for name, mine, theirs in zip("qkv", grads, right, strict=True):
        # A sole key has no gradient: what is left is rounding of terms of order one.
        assert_close(mine.cpu(), theirs, tolerance(dtype), f"grad {name}", least_scale=0.1)


def reference(xs, maps, config, dtype, **rows):
    """The PyTorch core in float64, on the CPU, of the attention that inputs of `dtype` get."""
    rows = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
    maps = fold(maps.to(torch.float64), dtype)
    return srf_attention(*xs, maps, config, backend="torch", output_final_state=True, **rows)


def compare_rows(config, xs, maps, state=None, **rows):
    """Output, final state, and the gradients of both and of the state that rows continue from."""
    ys = doubles(xs)
    starts, wanted = {}, {}
    if state is not None:
        starts = {n: getattr(state, n).detach().requires_grad_() for n in FIELDS if getattr(state, n).numel()}
        wide = SRFState(*(t.detach().cpu() if t.dtype == torch.int64 else t.detach().double().cpu() for t in state))
        wanted = {n: getattr(wide, n).requires_grad_() for n in starts}
        state, wide = state._replace(**starts), wide._replace(**wanted)
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
    o, final = srf_attention(
        *xs, maps.to(DEVICE), config, initial_state=state, output_final_state=True, backend="triton", **on_device
    )
    dtype = xs[0].dtype
    expected, right = reference(ys, maps, config, dtype, initial_state=None if state is None else wide, **rows)
    assert_close(o.cpu(), expected, tolerance(dtype), "o")
    if dtype == torch.float32 or not config.retained:
        assert_states_close(SRFState(*(t.cpu() for t in final)), right, tolerance(dtype))
    weight = torch.randn(o.shape)

    def loss(o, s):
        kept = s.window_key.sum() + s.sink_value.sum() + s.retained_key.sum()
        return (o * weight.to(o)).sum() + s.kv_mean.square().sum() + 0.1 * kept + s.k_sum.clamp_min(1).log().sum()

    grads = torch.autograd.grad(loss(o, final), [*xs, *starts.values()], allow_unused=True)
    rights = torch.autograd.grad(loss(expected, right), [*ys, *wanted.values()], allow_unused=True)
    for name, mine, theirs in zip(["q", "k", "v", *starts], grads, rights, strict=True):
        if theirs is not None:
            mine = torch.zeros_like(theirs) if mine is None else mine.cpu()
            if name in wanted:
                # Slots not in use are zero, and what happens to them is nobody's business.
                mine, theirs = (x.masked_fill(wanted[name] == 0, 0.0) for x in (mine, theirs))
            assert_close(mine, theirs, 2 * tolerance(dtype), f"grad {name}", least_scale=1e-3)
    return SRFState(*(t.detach() for t in final))
