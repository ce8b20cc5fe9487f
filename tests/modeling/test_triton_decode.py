"""The fused decode step against the recurrent one: outputs and every field of the state, step after step."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch
from core_inputs import assert_states_close

from srf_retrofit.modeling import triton_decode, triton_decode_fold, triton_decode_kernel
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.feature_map import FoldedMap, round_weights
from srf_retrofit.modeling.ops import fold
from srf_retrofit.modeling.recurrent import attend_token
from srf_retrofit.modeling.state import SRFState, slot_bounds
from srf_retrofit.modeling.triton_decode import decode_bytes, decode_step, decode_step_, refusal
from srf_retrofit.testing import assert_close, random_feature_map


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Layer:
    """One layer's features and two states: the fused step's and the recurrent one's."""

    def __init__(
        self, mode, *, rows=2, kv_heads=1, group=2, dim=16, features=16, dtype=torch.float32, device="cpu",
        geometry="proposal", **config,
    ):  # fmt: skip
        window, sinks, retained = mode
        even = SRFConfig(num_features=features, window=window, sinks=sinks, retained=0, **config)
        self.config = even.with_slots(retained)
        self.maps = fold(random_feature_map(kv_heads, features, dim, geometry=geometry).to(device))
        bounds = slot_bounds(self.config.slots(kv_heads), torch.device(device))
        self.maps = self.maps._replace(slot_bounds=bounds)
        self.shape, self.group, self.dtype, self.device = (rows, kv_heads, 1, dim), group, dtype, device
        self.scaling = dim**-0.5
        self.mine = SRFState.empty(self.config, rows, kv_heads, dim, dtype=dtype, device=device)
        self.theirs = SRFState(*(t.clone() for t in self.mine))

    def token(self, scale: float = 1.0):
        """q, k, v as a model gives them: heads behind tokens in memory."""
        rows, kv_heads, _, dim = self.shape
        sizes = (kv_heads * self.group, kv_heads, kv_heads)
        return [(scale * torch.randn(rows, 1, n, dim)).to(self.device, self.dtype).transpose(1, 2) for n in sizes]

    def fused(self, q, k, v, active=None, **options):
        with poisoned_memory():
            return decode_step_(q, k, v, active, self.mine, self.maps, self.config, self.scaling, **options)

    def check(self, q, k, v, active=None, tolerance=1e-5, state_tolerance=None, **options):
        """One step of both."""
        expected, self.theirs = attend_token(
            q, k, v, active, self.theirs, self.maps, self.config, self.scaling, **options
        )  # fmt: skip
        if active is not None:
            expected = expected.masked_fill(~active.view(-1, 1, 1, 1), 0.0)
        before = [t.data_ptr() for t in self.mine]
        untouched = None if active is None else SRFState(*(t[~active].clone() for t in self.mine))
        o = self.fused(q, k, v, active, **options)
        assert o.dtype == self.dtype
        assert_close(o, expected.cpu(), tolerance, "o", least_scale=1e-3)
        mine, theirs = (SRFState(*(t.cpu() for t in state)) for state in (self.mine, self.theirs))
        assert_states_close(mine, theirs, tolerance if state_tolerance is None else state_tolerance)
        assert [t.data_ptr() for t in self.mine] == before
        if untouched is not None:
            assert all(torch.equal(t[~active], kept) for t, kept in zip(self.mine, untouched, strict=True))


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


# On the device: real shapes, precision as it is used, graphs.

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
