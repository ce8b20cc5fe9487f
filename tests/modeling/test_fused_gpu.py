"""The fused kernels on a GPU, at the sizes of real models: outputs, states, every gradient, repeats, compiled graphs.

Each combination of sizes is compiled anew, which is what takes the time: `pytest -m gpu -n 12 --dist worksteal` splits
it over processes that share the device, each with little memory.
"""

from __future__ import annotations

import pytest
import torch
from core_inputs import assert_states_close
from fused_checks import DEVICE, compare_plain, compare_rows, config_of, doubles, tensors

from srf_retrofit.modeling.feature_map import FoldedMap, LinearFeatures
from srf_retrofit.modeling.ops import fold, srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, random_feature_map

pytestmark = pytest.mark.gpu

DIMS = (64, 80, 96, 128)
FEATURES = (16, 32, 64, 128, 256)
GROUPS = (1, 3, 4, 8)
MODES = ((64, 4, 64), (32, 4, 0), (0, 0, 0), (0, 4, 0))  # window, sinks, retained


def pairs() -> list[tuple[int, int, int, tuple[int, int, int]]]:
    """Twenty of the 320 combinations, so that any two values of two different sizes meet in one of them.

    Over the field of four elements `i + j` and `i + 2 j` are orthogonal Latin squares; the fifth number of features
    brings a row of its own.
    """
    double = (0, 2, 3, 1, 0)
    return [
        (DIMS[i], FEATURES[j], GROUPS[i ^ j % 4], MODES[i ^ (double[j] if j < 4 else 1)])
        for i in range(4)
        for j in range(5)
    ]


@pytest.mark.parametrize(("dim", "features", "group", "mode"), pairs(), ids=str)
def test_sizes_in_pairs(dim, features, group, mode):
    maps = random_feature_map(2, features, dim, geometry="preconditioner")
    config = config_of(*mode, features=features)
    compare_plain(config, 517, maps, dtype=torch.bfloat16, batch=2, heads=2 * group, kv_heads=2, dim=dim)


# (window, sinks, retained), features, head dimension, (heads, key/value heads), dtype, length
REAL = [
    ((64, 4, 64), 64, 64, (9, 3), torch.bfloat16, 1500),
    ((64, 4, 64), 128, 128, (8, 2), torch.bfloat16, 1500),
    ((32, 4, 64), 64, 64, (8, 1), torch.bfloat16, 777),
    ((100, 4, 100), 16, 96, (3, 1), torch.bfloat16, 700),
    ((32, 4, 64), 64, 64, (4, 2), torch.float16, 700),
    ((32, 4, 64), 64, 64, (4, 2), torch.float32, 700),
    ((64, 4, 0), 128, 128, (4, 1), torch.float32, 500),
    ((32, 4, (64, 16, 200)), 64, 64, (9, 3), torch.bfloat16, 1500),
    ((32, 4, (32, 150)), 64, 128, (4, 2), torch.float32, 700),
    ((32, 4, (512, 30)), 16, 64, (6, 2), torch.bfloat16, 1500),
    ((0, 4, 0), 64, 80, (3, 1), torch.float32, 500),
    ((0, 0, 0), 16, 64, (2, 2), torch.float32, 500),
]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_shapes(case):
    mode, features, dim, (heads, kv_heads), dtype, length = case
    maps = random_feature_map(kv_heads, features, dim, geometry="preconditioner")
    config = config_of(*mode, features=features)
    compare_plain(config, length, maps, dtype=dtype, heads=heads, kv_heads=kv_heads, dim=dim)


ROWS = [
    ((32, 4, 32), torch.float32),
    ((32, 4, (16, 48)), torch.float32),
    ((0, 4, 0), torch.float32),
    ((64, 4, 0), torch.bfloat16),
    ((0, 0, 0), torch.bfloat16),
]
SHAPE = {"heads": 6, "kv_heads": 2, "dim": 64}


@pytest.mark.parametrize(("mode", "dtype"), ROWS, ids=str)
def test_padding_and_rows_that_continue_in_mid_block(mode, dtype):
    config, maps = config_of(*mode, features=64), random_feature_map(2, 64, 64, geometry="preconditioner")
    mask = torch.rand(3, 300) > 0.3
    mask[1, :70], mask[2] = False, False
    state = compare_rows(config, tensors(300, batch=3, dtype=dtype, **SHAPE), maps, attention_mask=mask)
    later = torch.ones(3, 145, dtype=torch.bool)
    later[0, 90:] = False
    compare_rows(config, tensors(145, batch=3, dtype=dtype, **SHAPE), maps, state=state, attention_mask=later)


@pytest.mark.parametrize(("mode", "dtype"), ROWS, ids=str)
def test_packed_documents_with_and_without_states(mode, dtype):
    config, maps = config_of(*mode, features=64), random_feature_map(2, 64, 64, geometry="preconditioner")
    bounds = torch.tensor([0, 1, 130, 320, 400])
    state = compare_rows(config, tensors(400, dtype=dtype, **SHAPE), maps, cu_seqlens=bounds)
    bounds = torch.tensor([0, 7, 8, 120, 200])
    compare_rows(config, tensors(200, dtype=dtype, **SHAPE), maps, state=state, cu_seqlens=bounds)


@pytest.mark.parametrize("mode", [(32, 4, 32), (0, 0, 0)], ids=str)
def test_gradients_of_projection_and_geometry(mode):
    config, maps = config_of(*mode, features=64), random_feature_map(2, 64, 64, geometry="preconditioner")

    def leaves(folded, *args):
        sides = (
            LinearFeatures(*(None if t is None else t.detach().to(*args).requires_grad_() for t in side))
            for side in (folded.query, folded.key)
        )
        return FoldedMap(*sides)

    xs = tensors(300, **SHAPE)
    ys = doubles(xs)
    mine, theirs = leaves(fold(maps), DEVICE), leaves(fold(maps), torch.float64)
    o, _ = srf_attention(*xs, mine, config, backend="triton")
    expected, _ = srf_attention(*ys, theirs, config, backend="torch")
    weight = torch.randn(o.shape)
    parameters, others = ([t for side in (m.query, m.key) for t in side if t is not None] for m in (mine, theirs))
    grads = torch.autograd.grad((o * weight.to(o)).sum(), parameters)
    # In the pure form the norm of a query cancels, and the oracle leaves it out.
    rights = torch.autograd.grad((expected * weight.double()).sum(), others, allow_unused=True, materialize_grads=True)
    scale = rights[0].abs().max().item()
    for i, (a, b) in enumerate(zip(grads, rights, strict=True)):
        assert_close(a.cpu(), b, 1e-5, f"map {i}", least_scale=scale)


@pytest.mark.parametrize("mode", [(64, 4, 0), (64, 4, 64), (0, 0, 0)], ids=str)
def test_repeats_are_equal_to_the_bit(mode):
    """All but gradients of keys and values that slots keep, which are added in any order."""
    config = config_of(*mode, features=64)
    maps = random_feature_map(3, 64, 64).to(DEVICE)
    xs = tensors(2000, heads=9, kv_heads=3, dim=64, dtype=torch.bfloat16)
    first = None
    for _ in range(50):
        o, state = srf_attention(*xs, maps, config, output_final_state=True, backend="triton")
        grads = torch.autograd.grad(o.float().square().sum(), xs)
        now = [o.detach(), *(t.detach() for t in state), *(grads[:1] if config.retained else grads)]
        first = first or now
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))
        # Whatever the next outputs are written over is not zero.
        del o, state, grads, now
        torch.full((2**24,), float("nan"), device=DEVICE)


@pytest.mark.parametrize(
    ("mode", "kv_dtype"), [((64, 4, 64), "model"), ((64, 4, 64), "int8"), ((0, 0, 0), "model")], ids=str
)
def test_inductor_compiles_training_into_one_graph(mode, kv_dtype):
    config = config_of(*mode, features=64, kv_dtype=kv_dtype)
    maps = fold(random_feature_map(2, 64, 64).to(DEVICE), torch.bfloat16)
    x = torch.randn(2, 300, 256, device=DEVICE).bfloat16()
    start = [torch.randn(256, n * 64, device=DEVICE).div_(16).bfloat16() for n in (6, 2, 2)]

    def layer(x, *weights):
        q, k, v = ((x @ w).unflatten(-1, (-1, 64)).transpose(1, 2) for w in weights)
        return srf_attention(q * 0.5, k, v, maps, config, backend="triton")[0].transpose(1, 2).float().tanh()

    found = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        weights = [w.clone().requires_grad_() for w in start]
        o = run(x, *weights)
        found.append([o.detach(), *torch.autograd.grad(o.square().sum(), weights)])
    for name, mine, theirs in zip(("o", "query", "key", "value"), found[1], found[0], strict=True):
        assert_close(mine.cpu(), theirs.double().cpu(), 1e-2, name)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "kv_dtype"), [((32, 4, 64), "model"), ((32, 4, 64), "int8"), ((0, 0, 0), "model")], ids=str
)
def test_inductor_compiles_a_decoding_step_into_one_graph(mode, kv_dtype):
    config = config_of(*mode, features=64, kv_dtype=kv_dtype)
    maps = fold(random_feature_map(2, 64, 64).to(DEVICE), torch.bfloat16)
    shape = {**SHAPE, "batch": 3, "dtype": torch.bfloat16}
    _, state = srf_attention(*tensors(77, **shape), maps, config, output_final_state=True, backend="triton")
    states = [SRFState(*(t.clone() for t in state)) for _ in range(2)]

    def step(q, k, v, state):
        o, _ = srf_attention(
            q * 0.5, k, v, maps, config, initial_state=state, output_final_state=True, in_place=True, backend="triton"
        )
        return o * 2

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2 * max(mode[0], 4) + 3):  # through two folds
        token = tensors(1, **shape)
        o, expected = compiled(*token, states[0]), step(*token, states[1])
        assert_close(o.cpu(), expected.double().cpu(), 1e-2, "o")
    assert_states_close(*(SRFState(*(t.cpu() for t in s)) for s in states), 1e-2)
