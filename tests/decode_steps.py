"""The fused decode step beside the recurrent one, for tests of either."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from core_inputs import assert_states_close

from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.ops import fold
from srf_retrofit.modeling.recurrent import attend_token
from srf_retrofit.modeling.state import SRFState, slot_bounds
from srf_retrofit.modeling.triton_decode import decode_step_
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
