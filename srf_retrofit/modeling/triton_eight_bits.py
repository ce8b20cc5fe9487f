"""Keys and values in eight bits inside the decode kernel: `eight_bits` on rows of a state, and on a token's own.

A stored row has `WIDE` elements: `D` where it holds numbers of the model's type, and more where it is packed.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_decode_fold
    raise

from .eight_bits import GROUP as NUMBERS_OF_A_GROUP
from .eight_bits import LEAST_EXPONENT, MOST_EXPONENT

GROUP = tl.constexpr(NUMBERS_OF_A_GROUP)
LEAST = tl.constexpr(LEAST_EXPONENT)
MOST = tl.constexpr(MOST_EXPONENT)
# Below, everything is rounded to nothing.
NOTHING = tl.constexpr(2.0 ** (LEAST_EXPONENT - 1))


@triton.jit
def power_of_two(exponent):
    """`2^exponent` of int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def whole_numbers(x):
    """Int8 as float32, by its bits in the mantissa of `2^23 + 128`: there are few units that convert integers."""
    bits = ((x.to(tl.int32) & 0xFF) ^ 0x80) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def fetch_rows(base, row, here, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr):
    """Rows `row` (N,) of stored vectors where `here`, zeros elsewhere: (N, DP), and exponents if they are packed.

    What this program alone reads: first to leave the caches, so that the feature maps stay. Loads are all that this
    does, so that they can be under way while something else is computed; `numbers` makes of them what they mean.
    """
    d = tl.arange(0, DP)
    at = base + row[:, None] * WIDE
    x = tl.load(at + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0, eviction_policy="evict_first")
    if WIDE > D:
        group = tl.arange(0, DP // GROUP)
        mask = here[:, None] & (group < D // GROUP)[None, :]
        exponent = tl.load(at + D + group[None, :], mask=mask, other=0, eviction_policy="evict_first")
    else:
        exponent = x
    return x, exponent


@triton.jit
def numbers(x, exponent, D: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr):
    """The vectors (N, DP) that `fetch_rows` has brought; packed ones as `OPERAND`, which holds them exactly."""
    if WIDE > D:
        groups = tl.reshape(whole_numbers(x), (x.shape[0], exponent.shape[1], GROUP))
        groups = groups * power_of_two(exponent.to(tl.int32))[:, :, None]
        x = tl.reshape(groups, (x.shape[0], x.shape[1])).to(OPERAND)
    return x


@triton.jit
def load_numbers(base, row, here, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr):
    """Both at once."""
    x, exponent = fetch_rows(base, row, here, D, DP, WIDE)
    return numbers(x, exponent, D, WIDE, OPERAND)


@triton.jit
def round_vector(x, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr):
    """A token's own vector (DP,) as it will be stored: its numbers, its mantissas and exponents if rows are packed."""
    mantissa = x
    exponent = x
    if WIDE > D:
        groups = tl.reshape(x.to(tl.float32), (DP // GROUP, GROUP))
        largest = tl.max(tl.abs(groups), 1)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 133
        exponent = tl.minimum(tl.maximum(exponent, LEAST), MOST)
        exponent = tl.where(largest < NOTHING, 0, exponent)
        groups = tl.floor(groups * power_of_two(-exponent)[:, None] + 0.5)
        groups = tl.minimum(tl.maximum(groups, -127.0), 127.0)
        mantissa = tl.reshape(groups, (DP,)).to(tl.int8)
        x = tl.reshape(groups * power_of_two(exponent)[:, None], (DP,)).to(x.dtype)
        exponent = exponent.to(tl.int8)
    return x, mantissa, exponent


@triton.jit
def store_vector(base, row, columns, mantissa, exponent, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr):
    """What `round_vector` returned, to row `row`; nothing of it where `columns` is 0 and not `D`."""
    d = tl.arange(0, DP)
    tl.store(base + row * WIDE + d, mantissa, mask=d < columns)
    if WIDE > D:
        group = tl.arange(0, DP // GROUP)
        tl.store(base + row * WIDE + D + group, exponent, mask=group < columns // GROUP)
