"""Names under which this package's operators are registered with PyTorch."""

from __future__ import annotations

import torch


def operator_name(name: str) -> str:
    """`srf_retrofit::name`, with a number behind it where another copy of this code has taken that.

    A checkpoint brings its own code, and the package may be there as well. Registering a name twice destroys the first
    operator while its module still calls it: now and then a call then reads freed memory.
    """
    taken, free, count = torch.ops.srf_retrofit, name, 1
    while hasattr(taken, free):
        count += 1
        free = f"{name}_{count}"
    return f"srf_retrofit::{free}"
