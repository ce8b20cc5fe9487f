"""Learned softmax features (Hedgehog) through the fused kernels, against the PyTorch core in float64."""

from __future__ import annotations

import pytest
import torch
from core_inputs import assert_states_close

from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.learned_maps import LearnedMaps
from srf_retrofit.modeling.ops import choose_backend, srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close

pytestmark = pytest.mark.usefixtures("small_parts")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config_of(window: int, sinks: int, retained: int, features: int = 24) -> SRFConfig:
    return SRFConfig(
        num_features=features, window=window, sinks=sinks, retained=retained, feature_map="hedgehog"
    )  # fmt: skip


def learned(config: SRFConfig, heads: int, kv_heads: int, dim: int) -> LearnedMaps:
    maps = LearnedMaps(config, kv_heads, dim, num_heads=heads)
    with torch.no_grad():
        for p in maps.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return maps.to(DEVICE)


def wide(maps: LearnedMaps, config: SRFConfig, heads: int, kv_heads: int, dim: int) -> LearnedMaps:
    """The same in float64, on the CPU."""
    copy = LearnedMaps(config, kv_heads, dim, num_heads=heads).double()
    copy.load_state_dict(maps.state_dict())
    return copy


def compare(mode, length, *, batch=1, heads=3, dim=20, state=None, dtype=torch.float32, tolerance=1e-5, **rows):
    """Outputs, states and the gradients of queries, keys, values and of every parameter of the map."""
    config = config_of(*mode)
    torch.manual_seed(1)
    maps = learned(config, heads, 1, dim)
    truth = wide(maps, config, heads, 1, dim)
    xs = [torch.randn(batch, length, n, dim).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for n in (heads, 1, 1)]
    ys = [x.detach().double().cpu().requires_grad_() for x in xs]
    theirs = None
    if state is not None:
        theirs = SRFState(*(t.cpu() if t.dtype == torch.int64 else t.double().cpu() for t in state))
    on_device = {n: x.to(DEVICE) for n, x in rows.items()}
    o, final = srf_attention(
        *xs, maps.folded(dtype), config, initial_state=state, output_final_state=True, backend="triton", **on_device
    )
    # In float64 nothing is rounded, so what bfloat16 rounds has been rounded before.
    folded = truth.folded(dtype)
    expected, right = srf_attention(
        *ys, folded, config, initial_state=theirs, output_final_state=True, backend="torch", **rows
    )
    assert_close(o.cpu(), expected, tolerance, "o")
    if dtype == torch.float32:
        assert_states_close(SRFState(*(t.cpu() for t in final)), right, 1e-5)
    weight = torch.randn(o.shape).to(dtype)

    def loss(o, s):
        return (o * weight.to(o)).sum() + s.kv_mean.square().sum() + s.k_sum.clamp_min(1).log().sum()

    mine, wanted = dict(maps.named_parameters()), dict(truth.named_parameters())
    grads = torch.autograd.grad(loss(o, final), [*xs, *mine.values()])
    rights = torch.autograd.grad(loss(expected, right), [*ys, *wanted.values()])
    for name, a, b in zip(["q", "k", "v", *mine], grads, rights, strict=True):
        assert_close(a.cpu(), b, tolerance, f"grad {name}", least_scale=0.1)
    return SRFState(*(t.detach() for t in final))


@pytest.mark.parametrize("mode", [(8, 2, 3), (8, 0, 0), (5, 4, 0)], ids=str)
def test_matches_the_core(mode):
    compare(mode, 45)


def test_padding_and_rows_that_continue():
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)) > 0.3
    state = compare((8, 2, 3), 37, batch=2, attention_mask=mask)
    compare((8, 2, 3), 21, batch=2, state=state)


def test_packed_documents():
    compare((8, 2, 3), 40, cu_seqlens=torch.tensor([0, 1, 22, 40]))


def test_bfloat16():
    compare((8, 2, 3), 40, dtype=torch.bfloat16, tolerance=1e-2 if DEVICE == "cuda" else 2.5e-2)


def test_a_compiled_graph_gives_the_same_gradients():
    config = config_of(8, 2, 3)
    maps = learned(config, 2, 1, 16)
    xs = [torch.randn(1, n, 20, 16, device=DEVICE, requires_grad=True) for n in (2, 1, 1)]

    def run(q, k, v):
        return srf_attention(q, k, v, maps.folded(), config, backend="triton")[0]

    leaves = [*xs, *maps.parameters()]
    o, plain = torch.compile(run, fullgraph=True, backend="aot_eager")(*xs), run(*xs)
    assert_close(o.cpu(), plain.detach().double().cpu(), 1e-6)
    for mine, right in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (o, plain)), strict=True):
        assert_close(mine.cpu(), right.double().cpu(), 1e-5)


def test_what_stays_on_pytorch_says_why():
    config = config_of(8, 2, 3)
    q = torch.randn(1, 2, 8, 16)
    assert choose_backend(q, config, backend="triton") == ("triton", "asked for")
    with pytest.raises(ValueError, match="no decode kernel for feature_map='hedgehog'"):
        choose_backend(q[:, :, :1], config, step=True, backend="triton")
    with pytest.raises(ValueError, match="no kernel without a window for feature_map='hedgehog'"):
        choose_backend(q, config.replace(window=0, retained=0), backend="triton")
    with pytest.raises(ValueError, match="no kernel for feature_map='relu'"):
        choose_backend(q, config.replace(feature_map="relu"), backend="triton")
