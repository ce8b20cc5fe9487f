"""The fused decode step on the device: real shapes, precision as it is used, graphs."""

from __future__ import annotations

import pytest
import torch
from core_inputs import assert_states_close
from decode_steps import Layer

from srf_retrofit.modeling import triton_decode
from srf_retrofit.modeling.state import SRFState

REAL = [
    ((32, 4, 64), 64, 64, 4),
    ((32, 4, 64), 64, 64, 3),
    ((32, 0, 0), 80, 16, 1),
    ((16, 4, 128), 96, 128, 8),
    ((64, 4, 64), 128, 128, 4),
    ((32, 4, 64), 128, 256, 8),
    ((128, 4, 256), 128, 32, 1),
    ((32, 4, (64, 200)), 64, 64, 3),
    ((32, 4, (1024, 30)), 64, 16, 3),
    ((0, 0, 0), 64, 64, 4),
    ((0, 4, 0), 128, 128, 8),
]


# Keys and values in eight bits.
EIGHT = [
    ((32, 4, 64), 64, 64, 3),
    ((64, 4, 64), 128, 128, 4),
    ((16, 4, 128), 96, 32, 8),
    ((32, 4, (1024, 30)), 64, 16, 3),
]

REAL_CASES = [(case, dtype) for dtype in (torch.bfloat16, torch.float16) for case in REAL]
REAL_CASES += [(case, torch.float32) for case in REAL if case[0][0] <= 64]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype", "kv_dtype"),
    [(*case, "model") for case in REAL_CASES]
    + [(case, dtype, "int8") for dtype in triton_decode.DTYPES for case in EIGHT],
    ids=str,
)
def test_real_shapes(case, dtype, kv_dtype) -> None:
    mode, dim, features, group = case
    layer = Layer(
        mode, rows=3, kv_heads=2, group=group, dim=dim, features=features, dtype=dtype, device="cuda", kv_dtype=kv_dtype
    )
    exact = dtype == torch.float32
    for step in range(2 * max(mode[0], 16) + 5):
        active = torch.tensor([True, step % 3 != 1, step % 7 != 2], device="cuda")
        layer.check(
            *layer.token(), active, tolerance=1e-4 if exact else 1e-2, state_tolerance=1e-4 if exact else 1e-3
        )  # fmt: skip


@pytest.mark.gpu
def test_more_rows_than_an_axis_of_the_grid_holds() -> None:
    sizes = {"rows": 70_000, "kv_heads": 1, "group": 2, "dtype": torch.bfloat16, "device": "cuda"}
    layer = Layer((2, 1, 2), **sizes)
    for _ in range(5):
        layer.check(*layer.token(), tolerance=1e-2, state_tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
def test_half_precision_state_on_the_device(state_dtype) -> None:
    layer = Layer(
        (32, 4, 64), rows=2, kv_heads=2, dim=64, features=64, dtype=torch.bfloat16, device="cuda",
        state_dtype=state_dtype,
    )  # fmt: skip
    for _ in range(101):
        layer.check(*layer.token(), tolerance=1e-2, state_tolerance=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [(8, 4, 16), (0, 0, 0)], ids=str)
def test_graph_replay_equals_eager_steps(mode) -> None:
    sizes = {"rows": 4, "kv_heads": 2, "dim": 64, "features": 64, "dtype": torch.bfloat16, "device": "cuda"}
    eager, graphed = Layer(mode, **sizes), Layer(mode, **sizes)
    q, k, v = graphed.token()
    active = torch.ones(4, dtype=torch.bool, device="cuda")
    graphed.fused(q, k, v, active)  # compiled before the capture
    graphed.mine.copy_(eager.mine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = graphed.fused(q, k, v, active)
    for step in range(35):
        for static, x in zip((q, k, v), eager.token(), strict=True):
            static.copy_(x)
        active.copy_(torch.tensor([True, step % 3 != 0, True, step % 5 != 1]))
        graph.replay()
        assert torch.equal(o, eager.fused(q, k, v, active))
    assert_states_close(graphed.mine, eager.mine, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_repeats_to_the_bit(kv_dtype) -> None:
    """A race between the threads of a program, or between programs, would show."""
    layer = Layer(
        (4, 2, 16), rows=64, kv_heads=4, group=4, dim=64, features=64, dtype=torch.bfloat16, device="cuda",
        kv_dtype=kv_dtype,
    )  # fmt: skip
    tokens = [layer.token() for _ in range(20)]
    start = SRFState(*(t.clone() for t in layer.mine))
    expected = [layer.fused(*token) for token in tokens]
    end = SRFState(*(t.clone() for t in layer.mine))
    for _ in range(50):
        layer.mine.copy_(start)
        assert all(torch.equal(layer.fused(*token), o) for token, o in zip(tokens, expected, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(layer.mine, end, strict=True))
