"""Compile the kernels for an H100 where there is none: a program of its own, `compile_for_gpu.py MODE DTYPE KV_DTYPE`.

Triton's interpreter takes more than its compiler does (a name that is a block on one branch and a number on the other).
Here calls run on CPU tensors with a driver that names a target and launches nothing; what a call would launch is
compiled down to a cubin. The last line printed is JSON: kernels compiled, and what could not be.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from srf_retrofit import SRFConfig
from srf_retrofit.modeling import fused_attention, ops, triton_decode
from srf_retrofit.modeling.ops import fold, srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import random_feature_map


class Target:
    """The part of a driver that compiling asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Nothing:
    """In place of a compiled kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def main(mode: tuple[int, ...], dtype: torch.dtype, kv_dtype: str) -> None:
    compiled: list[str] = []
    failed: dict[str, str] = {}
    run = JITFunction.run

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Nothing:
        try:
            run(self, *args, grid=grid, warmup=True, **kwargs)
            compiled.append(self.__name__)
        except Exception as error:
            failed.setdefault(self.__name__, f"{type(error).__name__}: {str(error)[-300:]}")
        return Nothing()

    triton.runtime.driver.set_active(Target())  # type: ignore[arg-type]
    JITFunction.run = compile_one  # type: ignore[method-assign]
    # Not interpreted, but on the CPU: only who asks whether it can run is told so.
    fused_attention.interpreted = lambda: True
    ops.refusal = triton_decode.refusal = lambda *args: None
    d = m = 64
    config = SRFConfig(num_features=m, window=mode[0], sinks=mode[1], retained=0, kv_dtype=kv_dtype)
    config = config.with_slots(mode[2] if len(mode) == 3 else mode[2:])
    maps = fold(random_feature_map(2, m, d, geometry="preconditioner"), dtype)
    q, k, v = (torch.zeros(2, heads, 80, d, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    state = SRFState.empty(config, 2, 2, d, dtype=dtype, device="cpu")
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, -9:] = False
    for given in ({}, {"initial_state": state, "attention_mask": mask}):
        o, end = srf_attention(q, k, v, maps, config, backend="triton", output_final_state=True, **given)
        torch.autograd.grad(o.float().sum() + end.k_sum.sum(), (q, k, v))
    with torch.no_grad():
        srf_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], maps, config, backend="triton", initial_state=state)
    print(json.dumps({"compiled": compiled, "failed": failed}))


if __name__ == "__main__":
    main(tuple(int(x) for x in sys.argv[1].split(",")), getattr(torch, sys.argv[2]), sys.argv[3])
