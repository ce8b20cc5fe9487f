"""Kernels compiled ahead: every one once, in some process, and none launched."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch

from srf_retrofit.bench import attention, warm
from srf_retrofit.modeling.triton_launch import Launcher

triton = pytest.importorskip("triton")


def _add(x, n, first, SIZE: triton.language.constexpr):  # never runs
    pass


_add.__module__ = __name__


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Triton is asked to compile, in place of compiling it."""
    found: list[dict[str, Any]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert warmup, "a kernel was launched"
        if kwargs.get("SIZE") == 64:
            raise RuntimeError("out of resource")
        found.append(dict(zip(self.arg_names, args, strict=False)) | kwargs)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return found


def kernels() -> tuple[Any, Any]:
    plain = triton.runtime.jit.JITFunction(_add)
    configs = [triton.Config({"SIZE": size}, num_warps=warps) for size in (16, 32, 64) for warps in (1, 2)]
    wrapped = triton.runtime.Autotuner(plain, plain.arg_names, configs, ["n"], None, None)
    return plain, triton.runtime.autotuner.Heuristics(wrapped, plain.arg_names, {"first": lambda args: args["n"] - 1})


def calls(plain: Any, tuned: Any) -> None:
    x = torch.zeros(64)
    for n in (32, 48, 33, 1):  # 32 and 48 are one kind
        plain[(1, 1, 1)](x, n, 0.5, SIZE=8, num_warps=4)
    plain[(1, 1, 1)](x[1:], 32, 0.5, SIZE=8, num_warps=4)  # not aligned
    plain[(1, 1, 1)](x.half(), 32, 0.25, SIZE=8, num_warps=4)
    launch = Launcher(("kind", object()))
    for _ in range(2):  # the second goes to what the first was given
        launch("f", plain, (1, 1, 1), (x, 32, 0.5), lambda: {"SIZE": 128, "num_warps": 4})
    tuned[lambda meta: (meta["SIZE"],)](x, n=32)


@pytest.mark.parametrize("shares", [1, 3])
def test_every_kernel_is_compiled_in_one_share_and_none_is_launched(shares: int, asked: list[dict[str, Any]]) -> None:
    names = []
    for share in range(shares):
        with warm.compile_only(share, shares) as compiled:
            calls(*kernels())
        names += compiled
        assert len(compiled) <= -(-11 // shares)
    # Five forms of the plain one, another constant, and four candidates that fit.
    assert len(names) == len(asked) == 5 + 1 + 4
    sizes = Counter((x["SIZE"], x["num_warps"]) for x in asked)
    assert sizes == {(8, 4): 5, (128, 4): 1, (16, 1): 1, (16, 2): 1, (32, 1): 1, (32, 2): 1}
    assert all(x["first"] == 31 for x in asked if x["SIZE"] in (16, 32))


def test_triton_is_left_as_it_was(asked: list[dict[str, Any]]) -> None:
    before = triton.runtime.jit.JITFunction.run, triton.runtime.Autotuner.run
    with pytest.raises(KeyError), warm.compile_only():
        raise KeyError
    assert (triton.runtime.jit.JITFunction.run, triton.runtime.Autotuner.run) == before


def fails() -> None:
    raise RuntimeError("no such shape\nmore lines")


def test_processes_and_failures_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm.compile_ahead([fails], "cpu") == {"processes": 0, "kernels": 0, "seconds": 0.0, "failed": []}
    monkeypatch.setattr(warm, "on_gpu", lambda _: True)
    assert warm.compile_ahead([fails], "cuda", 0)["processes"] == 0
    found = warm.compile_ahead([fails, partial(print, end="")], "cuda", 1)
    assert found["failed"] == ["RuntimeError: no such shape"]
    assert (found["processes"], found["kernels"]) == (1, 0)


def test_the_rehearsal_comes_to_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form and shape once; rivals that compile, once for each batch size."""
    shapes = [(2, 1, 16), (2, 2, 16)]
    run = attention.Run("cpu", torch.float32, "identity", "torch", 0.1, 0, float("inf"))
    configs = {shape: attention.variants_of(16) for shape in shapes}
    tasks = attention._rehearsals(run, configs, (512, 1024, 4096), 1024, ("cudnn", "fla"))
    assert len(tasks) == 2 * 3 + 2 * 2
    monkeypatch.setattr(attention, "GATE_LENGTH", 40)
    for task in tasks:
        task()  # flash-linear-attention is not there, which is no failure
