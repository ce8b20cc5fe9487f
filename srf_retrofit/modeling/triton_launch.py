"""Launch kernels without asking Triton, every time, which of their compiled forms is meant.

Triton examines every argument of every launch: its type, whether it is 1 or a multiple of 16, whether a pointer is
aligned. With fifty arguments that takes the host longer than a short kernel runs. Within one kind of call the answers
are always the same: a call says once of what kind it is, and its kernels are found by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

# Bytes to which Triton likes pointers aligned, and the multiple that it likes integers to be.
ALIGNMENT = 16

_KINDS: dict[Hashable, dict[str, tuple[Any, tuple[Any, ...]]]] = {}


def integer_class(n: int) -> int:
    """What Triton compiles an integer argument for: 1, a multiple of 16 or not, 32 bits or more."""
    return 1 if n == 1 else 2 * (n % ALIGNMENT == 0) + 4 * (n > 2**31 - 1)


def is_aligned(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all pointers are, as those of fresh tensors always are."""
    return not any(x is not None and x.data_ptr() % ALIGNMENT for x in tensors)


class Launcher:
    """Launches the kernels of one call.

    Parameters
    ----------
    kind : hashable, optional
        All that decides what the kernels of the call are compiled for: device, types, constants, and the class
        (`integer_class`) of every integer among the arguments. With `None` Triton is asked at every launch.
    """

    __slots__ = ("_kept",)

    def __init__(self, kind: Hashable | None) -> None:
        self._kept = None if kind is None else _KINDS.setdefault(kind, {})

    def __call__(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, int, int],
        args: tuple[Any, ...],
        constants: Callable[[], dict[str, Any]],
    ) -> None:
        """Launch `kernel` on `grid`.

        Parameters
        ----------
        name : str
            One for each form of a kernel that a kind of call uses.
        kernel : triton.JITFunction
        grid : (int, int, int)
        args : tuple
            In the kernel's order, in front of all its constants.
        constants : callable
            Returns the constants and launch options by name; only called when the kernel is not known yet.
        """
        kept = self._kept
        if kept is not None and name in kept:
            compiled, last = kept[name]
            # Addresses in place of tensors: for those Triton asks nobody whose memory they are.
            compiled[grid](*[x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args], *last)
            return
        options = constants()
        compiled = kernel[grid](*args, **options)
        if kept is not None:
            kept[name] = compiled, tuple(options[n] for n in kernel.arg_names[len(args) :])
