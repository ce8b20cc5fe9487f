"""Kernels that are found again: what decides on them, and that arguments arrive in order."""

from __future__ import annotations

import pytest
import torch

from srf_retrofit.modeling import triton_launch
from srf_retrofit.modeling.fused_call import sizes_of
from srf_retrofit.modeling.triton_launch import Launcher, integer_class, is_aligned


class Kernel:
    """Stands for a `triton.JITFunction`; notes every launch, through itself or through what it compiled."""

    arg_names = ("x", "n", "SIZE", "FLAG")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.asked.append((grid, args, options))
            return Compiled(self.launched)

        return run


class Compiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(triton_launch, "_KINDS", {})


def test_triton_is_asked_once_for_each_kind_and_name():
    kernel, constants = Kernel(), lambda: {"FLAG": True, "SIZE": 8, "num_warps": 4}
    for kind, name in [("a", "f"), ("a", "f"), ("b", "f"), ("a", "g"), ("b", "f")]:
        Launcher(kind)(name, kernel, (1, 2, 3), ("x", 5), constants)
    assert len(kernel.asked) == 3
    assert kernel.asked[0] == ((1, 2, 3), ("x", 5), constants())
    # Constants in the kernel's order, launch options left out.
    assert kernel.launched == [((1, 2, 3), ("x", 5, 8, True))] * 2


def test_without_a_kind_triton_is_asked_every_time():
    kernel = Kernel()
    for _ in range(2):
        Launcher(None)("f", kernel, (1, 1, 1), ("x", 5), lambda: {"FLAG": True, "SIZE": 8})
    assert len(kernel.asked) == 2
    assert not kernel.launched


def test_integers_are_told_apart_as_triton_does():
    groups = [(1,), (2, 15, 17), (16, 32), (2**31, 2**40), (2**31 + 1,)]
    classes = [{integer_class(n) for n in group} for group in groups]
    assert all(len(c) == 1 for c in classes)
    assert len(set.union(*classes)) == len(groups)


def test_alignment_of_views():
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert is_aligned([x, x[8:], None, x[:0]])
    assert not is_aligned([x, x[1:]])


def test_only_half_precision_is_loaded_three_times_ahead():
    """Tiles of 128 queries of 128 dimensions in float32 fill the shared memory of an H200 once, not three times."""
    ints = [64, 4, 0, 0, 1, 0, 0]
    for dtype, stages in ((torch.bfloat16, 3), (torch.float16, 1), (torch.float32, 1)):
        q, k = torch.empty(1, 4, 8, 128, dtype=dtype), torch.empty(1, 1, 8, 128, dtype=dtype)
        assert sizes_of(q, k, 128, ints).tiles["attend"].options["num_stages"] == stages
