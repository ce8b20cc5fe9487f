"""Keys and values in eight bits: what a state holds of them takes little more than half the bytes.

Every `GROUP` numbers of a vector share a power of two, `2^e`, and keep `m 2^e` with whole `m` from -127 to 127, the
largest of them 64 or more. Such numbers are exact in float16 and bfloat16, and rounding them again changes nothing: so
keys and values are rounded once, when they come, the chunked form computes with what decoding will read, and no
kernel need know of it but the one that decodes.

A stored vector of `D` numbers is a row of int8, its `D` mantissas and then its `D / GROUP` exponents: rows are moved,
gathered and reordered as any others.
"""

from __future__ import annotations

from typing import Any

import torch

GROUP = 16
# Exponents: below, numbers are coarser than their group asks for; multiples of 2^-24 are what float16 can hold.
LEAST_EXPONENT = -24
MOST_EXPONENT = 120


def row_width(head_dim: int) -> int:
    """Bytes of a stored vector of `head_dim` numbers."""
    return head_dim + head_dim // GROUP


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """`2^exponent` of int32 from -126 to 127, from its bits: library functions are off by one on some devices."""
    return ((exponent + 127) << 23).view(torch.float32)


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mantissas (..., D / GROUP, GROUP), whole numbers, and exponents (..., D / GROUP, 1) int32 of x (..., D)."""
    groups = x.unflatten(-1, (-1, GROUP)).to(torch.promote_types(x.dtype, torch.float32))
    largest = groups.abs().amax(-1, keepdim=True).float()
    exponent = ((largest.view(torch.int32) >> 23) - (127 + 6)).clamp(LEAST_EXPONENT, MOST_EXPONENT)
    # What is rounded to nothing is stored like an empty slot.
    exponent = exponent.masked_fill(largest < 2.0 ** (LEAST_EXPONENT - 1), 0)
    # A half is rounded up, as the decode kernel does.
    return (groups * _power_of_two(-exponent)).add_(0.5).floor_().clamp_(-127, 127), exponent


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = _split(x)
        return (mantissa * _power_of_two(exponent)).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def round_to_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers (..., D) that eight bits hold, in the dtype of x; gradients pass as if nothing had happened.

    The straight-through estimator (1308.3432).
    """
    return _Round.apply(x)  # type: ignore[no-any-return]


def pack(x: torch.Tensor) -> torch.Tensor:
    """Rows (..., `row_width(D)`) int8 of x (..., D), which need not have been rounded; no gradient."""
    with torch.no_grad():
        mantissa, exponent = _split(x)
        return torch.cat([mantissa.flatten(-2).to(torch.int8), exponent.squeeze(-1).to(torch.int8)], -1)


def unpack(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers (..., D) of rows (..., `row_width(D)`), exact in any floating dtype."""
    d = rows.shape[-1] // (GROUP + 1) * GROUP
    mantissa = rows[..., :d].unflatten(-1, (-1, GROUP)).float()
    return (mantissa * _power_of_two(rows[..., d:].unsqueeze(-1).int())).flatten(-2).to(dtype)


def as_numbers(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a state holds of keys or values, packed or not, in `dtype`."""
    return unpack(x, dtype) if x.dtype == torch.int8 else x.to(dtype)
