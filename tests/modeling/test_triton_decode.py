"""The fused decode step against the recurrent one: outputs and every field of the state, step after step."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from core_inputs import assert_states_close
from decode_steps import Layer

from srf_retrofit.modeling import triton_decode, triton_decode_fold, triton_decode_kernel
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.feature_map import FoldedMap, round_weights
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.modeling.triton_decode import decode_bytes, decode_step, decode_step_, refusal
from srf_retrofit.testing import assert_close

CASES = [
    ((4, 0, 0), {"group": 3, "dim": 20, "features": 24, "rows": 1}),
    ((4, 2, 0), {"geometry": "identity", "kv_heads": 2, "rows": 1}),
    ((4, 2, 5), {"group": 4, "retention_delay": 1}),
    ((8, 4, 3), {"group": 1, "dim": 20, "retention_delay": 2, "rows": 1}),
    ((1, 0, 2), {"group": 3, "geometry": "shift"}),
    ((0, 0, 0), {"group": 4, "dim": 20, "features": 24, "kv_heads": 2}),
    ((0, 2, 0), {"group": 1, "geometry": "shift"}),
    ((4, 2, (1, 5)), {"kv_heads": 2, "retention_delay": 1}),
    ((4, 0, (20, 0, 3)), {"kv_heads": 3, "retention_delay": 1, "group": 1}),
    ((4, 2, 5), {"retention_delay": 1, "dim": 48, "kv_dtype": "int8", "kv_heads": 2}),
    ((4, 0, 0), {"dim": 16, "kv_dtype": "int8", "rows": 1}),
    ((2, 1, (20, 3)), {"kv_heads": 2, "dim": 32, "kv_dtype": "int8", "retention_delay": 0, "group": 3}),
]


@pytest.mark.parametrize(("mode", "sizes"), CASES, ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "")
def test_every_step_equals_the_recurrent_one(mode, sizes) -> None:
    layer = Layer(mode, **sizes)
    for step in range(3 * mode[0] + 5):
        # Rows fall behind one another, so that they are at different positions and fold at different steps.
        active = torch.tensor([True, step % 5 != 1]) if step % 4 and layer.shape[0] == 2 else None
        layer.check(*layer.token(), active)


@pytest.mark.parametrize(("mode", "sizes"), [CASES[i] for i in (0, 3, 4, 5, 7, 9)], ids=str)
def test_many_rows_are_projected_together_and_served_in_order(mode, sizes, monkeypatch) -> None:
    monkeypatch.setattr(triton_decode, "LINES", 2)
    monkeypatch.setattr(triton_decode, "MANY", 2)
    monkeypatch.setattr(triton_decode, "GRID", 3)  # the last launch has one row
    monkeypatch.setattr(triton_decode_kernel, "ROWS", triton_decode_kernel.tl.constexpr(4))
    layer = Layer(mode, **(sizes | {"rows": 7}))
    for step in range(mode[0] + 2):
        layer.check(*layer.token(), torch.tensor([True, step % 3 != 1, True, True, step % 2 == 0, True, True]))


@pytest.mark.parametrize("masked", [False, True])
def test_rows_whose_block_ends_come_first(masked, monkeypatch) -> None:
    monkeypatch.setattr(triton_decode_kernel, "ROWS", triton_decode_kernel.tl.constexpr(4))
    length = torch.tensor([3, 4, 7, 6, 11, 3, 0, 15, 2, 7])
    active = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.uint8)
    order = torch.full((10,), -1, dtype=torch.int32)
    triton_decode_kernel.order_rows[(1,)](order, length, active, 10, 1, W=4, MASKED=masked)
    assert sorted(order.tolist()) == list(range(10))
    ends = {0, 4, 5, 7, 9} if masked else {0, 2, 4, 5, 7, 9}
    assert set(order[: len(ends)].tolist()) == ends


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "mode", "kv_dtype"),
    [
        (torch.bfloat16, "float32", (2, 1, 3), "model"),
        (torch.float16, "float32", (3, 1, 3), "model"),
        (torch.float16, "float16", (0, 0, 0), "model"),
        (torch.bfloat16, "bfloat16", (2, 0, 0), "model"),
        (torch.float32, "bfloat16", (0, 2, 0), "model"),
        (torch.bfloat16, "bfloat16", (2, 1, 3), "int8"),
        (torch.float16, "float32", (3, 1, 3), "int8"),
    ],
)
def test_half_precision_of_inputs_and_of_the_state(dtype, state_dtype, mode, kv_dtype) -> None:
    layer = Layer(mode, dtype=dtype, state_dtype=state_dtype, kv_dtype=kv_dtype, group=3, rows=1)
    # Sums agree far better than the inputs' precision, stored values to their roundings: the interpreter's, to
    # bfloat16, are towards zero.
    rounding = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 5e-2}[state_dtype]
    for _ in range(3 * mode[0] + 5):
        layer.check(*layer.token(), tolerance=max(1e-2, rounding), state_tolerance=rounding)


@pytest.mark.parametrize("mode", [(3, 1, 4), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["tiny", "large", "equal"])
def test_extreme_inputs(mode, kind) -> None:
    layer = Layer(mode, rows=1, dim=16)
    first = layer.token()
    for _ in range(3 * mode[0] + 5):
        q, k, v = layer.token({"tiny": 1e-6, "large": 30.0, "equal": 1.0}[kind])
        if kind == "equal":
            k = first[1]
        # Log-features of large inputs are differences of thousands, so their last digits are worth 1e-4.
        layer.check(q, k, v, tolerance=2e-3 if kind == "large" else 1e-5)


@pytest.mark.parametrize("mode", [(2, 1, 2), (0, 0, 0), (0, 1, 0)], ids=str)
def test_without_the_tail(mode) -> None:
    layer = Layer(mode, rows=1)
    for _ in range(3 * mode[0] + 3):
        layer.check(*layer.token(), use_tail=False)


def test_larger_pools_are_bisected(monkeypatch) -> None:
    monkeypatch.setattr(triton_decode_fold, "COUNTED", triton_decode_fold.tl.constexpr(0))
    for retained in (3, (0, 3)):
        layer = Layer((2, 1, retained), rows=1, kv_heads=2)
        for _ in range(11):
            layer.check(*layer.token())


def test_rounded_weights_need_no_split() -> None:
    """The same numbers, whether the kernel is told that they are bfloat16 ones or not."""
    layer, other = (Layer((2, 1, 2), dtype=torch.bfloat16, rows=1) for _ in range(2))
    layer.maps = round_weights(layer.maps, torch.bfloat16)
    assert layer.maps.rounded_to == torch.bfloat16
    other.maps = layer.maps._replace(rounded_to=None)
    for _ in range(7):
        token = layer.token()
        assert_close(layer.fused(*token), other.fused(*token), 1e-5, "o")
    assert_states_close(layer.mine, other.mine, 1e-5)


def test_more_than_one_tile() -> None:
    """Of retained slots, of features, of dimensions."""
    layer = Layer((2, 0, 20), rows=1, features=20, dim=20, group=1)
    for _ in range(10):
        layer.check(*layer.token())


def test_compiles_into_one_graph() -> None:
    layer = Layer((1, 1, 2))
    config, scaling = layer.config, layer.scaling

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, active, state, maps):
        return decode_step_(q, k, v, active, SRFState(*state), FoldedMap(*maps), config, scaling) * 2

    eager = Layer((1, 1, 2))
    for i in range(4):
        q, k, v = layer.token()
        active = torch.tensor([True, i != 2])
        o = step(q, k, v, active, tuple(layer.mine), tuple(layer.maps))
        assert torch.equal(o, 2 * eager.fused(q, k, v, active))
    assert_states_close(layer.mine, eager.mine, 0.0)


@pytest.mark.parametrize("geometry", ["proposal", "identity"])
def test_operator_is_registered_as_pytorch_asks(geometry) -> None:
    layer = Layer((2, 1, 2), geometry=geometry, rows=1)
    q, k, v = layer.token()
    active = torch.tensor([True])
    torch.library.opcheck(
        decode_step,
        (
            q,
            k,
            v,
            active,
            *layer.mine,
            *layer.maps.query,
            *layer.maps.key,
            layer.maps.foresight,
            None,
            2,
            1,
            layer.config.fade,
            layer.scaling,
            True,
            False,
        ),
    )


def test_a_second_copy_of_the_file_may_be_loaded() -> None:
    """As when a checkpoint brings its own: both then work, each under a name of its own."""
    spec = importlib.util.spec_from_file_location("srf_retrofit.modeling.triton_decode_copy", triton_decode.__file__)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    assert copy.decode_step._qualname != decode_step._qualname
    layer = Layer((2, 1, 2), rows=1)
    layer.check(*layer.token())
    q, k, v = layer.token()
    arguments = (
        *layer.maps.query,
        *layer.maps.key,
        layer.maps.foresight,
        None,
        2,
        1,
        layer.config.fade,
        layer.scaling,
        True,
        False,
    )
    states = [SRFState(*(t.clone() for t in layer.mine)) for _ in range(3)]
    expected = layer.fused(q, k, v)
    for op, state in zip((decode_step, copy.decode_step, torch.ops.srf_retrofit.decode_step), states, strict=True):
        assert torch.equal(op(q, k, v, None, *state, *arguments), expected)
        assert_states_close(state, layer.mine, 0.0)


def test_refusals_name_what_is_wrong() -> None:
    layer = Layer((2, 1, 2), rows=2)
    q, k, v = layer.token()

    def step(q=q, k=k, v=v, active=None, state=layer.mine, maps=layer.maps, config=layer.config):
        decode_step_(q, k, v, active, state, maps, config, 1.0)

    before = SRFState(*(t.clone() for t in layer.mine))
    with pytest.raises(ValueError, match="float64"):
        step(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="v must be torch.float32"):
        step(v=v.half())
    with pytest.raises(ValueError, match="B, G, 1, D"):
        step(q.expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match="active must be bool of shape"):
        step(active=torch.ones(2))
    with pytest.raises(ValueError, match=r"state\.kv_mean must be contiguous"):
        step(state=layer.mine._replace(kv_mean=layer.mine.kv_mean.mT.contiguous().mT))
    with pytest.raises(ValueError, match=r"state\.retained_key must be"):
        step(config=layer.config.replace(retained=3))
    with pytest.raises(ValueError, match=r"maps\.key\.bias must be float32"):
        step(maps=layer.maps._replace(key=layer.maps.key._replace(bias=layer.maps.key.bias.double())))
    with pytest.raises(ValueError, match="no gradients"):
        step(q.detach().requires_grad_())
    with pytest.raises(ValueError, match="windows up to 128"):
        step(config=layer.config.replace(window=129))
    assert_states_close(layer.mine, before, 0.0)
    cuda = torch.device("cuda")
    assert (
        refusal(layer.config, 512, torch.bfloat16, cuda) == "the decode kernel takes head dimensions up to 256, got 512"
    )
    assert "retained + window" in refusal(layer.config.replace(retained=4096), 64, torch.bfloat16, cuda)
    assert "takes 65536" in refusal(layer.config.replace(window=100), 128, torch.float32, cuda)
    assert refusal(layer.config, 64, torch.bfloat16, cuda) is None


def test_bytes_of_a_step() -> None:
    config = SRFConfig(num_features=64, window=32, sinks=4, retained=64)
    # By hand: exact keys and values, features, priorities; what is written; q, o, and the position read and written.
    read = 2 * 128 * (4 + 48 + 64) + 64 * 64 * 4 + 512 + 4 * (40 + 64) + 2 * 128
    assert decode_bytes(config, 3, 2, 8, 64, torch.bfloat16) == 3 * (2 * (read + 4 * 40 + 256) + 8 * 2 * 128 + 16)
    uneven = config.with_slots((32, 96))
    assert decode_bytes(uneven, 3, 2, 8, 64, torch.bfloat16) == decode_bytes(config, 3, 2, 8, 64, torch.bfloat16)
    eight = config.replace(kv_dtype="int8")
    less = 2 * (128 - 68)  # of a key and its value
    saved = 3 * 2 * (less * (4 + 48 + 64) + less)
    assert decode_bytes(config, 3, 2, 8, 64, torch.bfloat16) - decode_bytes(eight, 3, 2, 8, 64, torch.bfloat16) == saved
    pure = SRFConfig(num_features=16, window=0, sinks=0, retained=0, state_dtype="bfloat16")
    one = 2 * (16 * 64 * 2 + 2 * 16 * 4) + 2 * 128
    assert decode_bytes(pure, 1, 1, 1, 64, torch.bfloat16) == one + 2 * 128 + 16
