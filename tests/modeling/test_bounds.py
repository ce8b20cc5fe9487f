"""Kernels touch no memory but their tensors', and use none that nobody wrote; in the interpreter, access by access."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from srf_retrofit.modeling import block_tables, fused_call, triton_launch
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.testing import random_feature_map

interpreter = pytest.importorskip("triton.runtime.interpreter")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter can be asked for addresses")


class Guard:
    """Stands between the kernels and memory; `ranges` (N, 2) are the addresses that the launch under way may use."""

    def __init__(self, monkeypatch):
        self.ranges, self.checked, self.name = np.zeros((0, 2), np.int64), 0, ""
        builder = interpreter.InterpreterBuilder
        launch = triton_launch.Launcher.__call__

        def guarded_launch(launcher, name, kernel, grid, args, constants):
            self.name = name
            self.ranges = np.array([extent(x) for x in args if isinstance(x, torch.Tensor)])
            launch(launcher, name, kernel, grid, args, constants)

        def load(handle, ptrs, mask, *rest):
            self.check(ptrs, mask)
            return loads(handle, ptrs, mask, *rest)

        def store(handle, ptrs, value, mask, *rest):
            self.check(ptrs, mask)
            return stores(handle, ptrs, value, mask, *rest)

        def add(handle, op, ptr, value, mask, *rest):
            self.check(ptr, mask)
            return adds(handle, op, ptr, value, mask, *rest)

        loads, stores, adds = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        monkeypatch.setattr(triton_launch.Launcher, "__call__", guarded_launch)
        monkeypatch.setattr(builder, "create_masked_load", load)
        monkeypatch.setattr(builder, "create_masked_store", store)
        monkeypatch.setattr(builder, "create_atomic_rmw", add)

    def check(self, pointers, mask):
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(np.int64)
        inside = (at[:, None] >= self.ranges[:, 0]) & (at[:, None] + size <= self.ranges[:, 1])
        assert inside.any(1).all(), f"{self.name}: {at[~inside.any(1)][:4]} is in none of the launch's tensors"
        self.checked += at.size


def extent(x: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one behind its last element."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setattr(block_tables, "RUN_TOKENS", 16)
    monkeypatch.setattr(fused_call, "PART", 16)
    block_tables._plain_tables.cache_clear()
    # Memory that is allocated and not written holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    yield Guard(monkeypatch)
    torch.use_deterministic_algorithms(False)
    block_tables._plain_tables.cache_clear()


@pytest.mark.parametrize("mode", [(8, 2, 3), (0, 2, 0), (5, 4, 0)], ids=str)
@pytest.mark.parametrize("rows", ["plain", "packed", "masked"])
def test_no_kernel_leaves_its_tensors(guard, mode, rows):
    w, s, h = mode
    config = SRFConfig(num_features=24, window=w, sinks=s, retained=h)
    q, k, v = (torch.randn(1, 37, n, 20).transpose(1, 2).requires_grad_() for n in (3, 1, 1))
    more = {
        "plain": {},
        "packed": {"cu_seqlens": torch.tensor([0, 1, 20, 37])},
        "masked": {"attention_mask": torch.rand(1, 37) > 0.3},
    }[rows]
    o, _ = srf_attention(q, k, v, random_feature_map(1, 24, 20), config, backend="triton", **more)
    forward = guard.checked
    assert forward > 0
    assert torch.isfinite(o).all()
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert guard.checked > forward
    assert all(torch.isfinite(x).all() for x in grads)


def test_the_guard_sees_a_pointer_that_leaves(guard):
    guard.ranges = np.array([extent(torch.zeros(4))])
    pointer = interpreter.TensorHandle(
        guard.ranges[0, :1] + np.array([0, 16]), interpreter.tl.pointer_type(interpreter.tl.float32)
    )
    guard.check(pointer, interpreter.TensorHandle(np.array([True, False]), interpreter.tl.int1))
    with pytest.raises(AssertionError, match="none of the launch's tensors"):
        guard.check(pointer, interpreter.TensorHandle(np.array([True, True]), interpreter.tl.int1))
