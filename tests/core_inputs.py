"""Inputs, configurations and comparisons that the tests of the core share."""

from __future__ import annotations

import torch

from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close

FEATURES = 16
DIM = 16


def inputs(length: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dim: int = DIM, scale: float = 1.0):
    return tuple(scale * torch.randn(batch, n, length, dim) for n in (heads, kv_heads, kv_heads))


def config_of(mode: tuple[int, int, int | tuple[int, ...]], **changes) -> SRFConfig:
    """Retained keys of all heads, or of each."""
    window, sinks, retained = mode
    return SRFConfig(num_features=FEATURES, window=window, sinks=sinks, retained=0, **changes).with_slots(retained)


def assert_states_close(actual: SRFState, expected: SRFState, tolerance: float) -> None:
    """As `assert_close`, field by field; minus infinity marks the same empty slots in both, however they store keys."""
    actual, expected = (x.unpacked(torch.float64) for x in (actual, expected))
    for name, mine, theirs in zip(SRFState._fields, actual, expected, strict=True):
        mine, theirs = mine.double(), theirs.double()
        empty = theirs == float("-inf")
        assert torch.equal(mine == float("-inf"), empty), f"{name}: other slots are empty"
        # Priorities are rounded to 12 bits; where the unrounded ones straddle a step, they differ by that step.
        close = max(tolerance, 2.0**-12) if "priority" in name else tolerance
        assert_close(mine.masked_fill(empty, 0), theirs.masked_fill(empty, 0), close, name)


def decode(q, k, v, maps, config, state=None):
    """Token by token through the recurrent step."""
    if state is None:
        state = SRFState.empty(config, q.shape[0], k.shape[1], q.shape[3], dtype=q.dtype)
    outputs = []
    for i in range(q.shape[2]):
        token = (x[:, :, i : i + 1] for x in (q, k, v))
        o, state = srf_attention(*token, maps, config, initial_state=state, output_final_state=True)
        outputs.append(o)
    return torch.cat(outputs, 2), state
