"""What the Triton kernels share: rows fetched by index, log-features, and how a sequence is cut into blocks.

The kernels see rows of tokens as blocks of `w` slots (a fixed length in the pure form). Three tables say where they
lie, see `fused.BlockTables`:

- block `n` of the batch belongs to row `block_row[n]` and holds the queries at `query_token[n, :]`;
- every row has one more *entry* than blocks, entry `n + block_row[n]` being the block before block `n`:
  `key_token[entry, :]` are its keys, so block `n` sees the keys of entries `e` and `e + 1`, and the feature sums and
  retained slots at entry `e` are those that its queries see;
- `-1` marks a slot without a token.

Accuracy: exponents, maxima, sums and the softmax are float32. Queries and keys in bfloat16 are exact operands, and so
are the weights of their features (`feature_map.round_weights`); the matrix of a norm is split into a sum of two
bfloat16 matrices (16 bits of mantissa). Other operand types run as three TF32 products (`tf32x3`).

Log-features are `root (x . weight_r) + bias_r - half`, where `half` is the same for all features of a token. It is half
the norm of random features; learned ones (`LEARNED`) bring theirs, one for either half of the features.
"""

from __future__ import annotations

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # passed on: `fused` reports it, and a loader that scans for imports sees an optional one
    raise

LOG_ZERO = tl.constexpr(-1e30)
# The interpreter multiplies bfloat16 operands as if their bits were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def program(G: tl.constexpr, PARTS: tl.constexpr):
    """The block (or run, or entry), head and part of a program, from a grid of all of them in one dimension.

    Parts are next to each other, then heads: what the programs of a block share is fetched once and then in the L2
    cache, and the heads of a token, which lie side by side in memory, are read at about the same time.
    """
    i = tl.program_id(0)
    return (i // (G * PARTS)).to(tl.int64), i // PARTS % G, i % PARTS


@triton.jit
def load_rows(base, token, stride, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr):
    """Rows `token` (N,) of a matrix with `D` columns as (N, DP); zeros where the token is negative."""
    col = tl.arange(0, DP)
    pointers = base + token.to(tl.int64)[:, None] * stride + col[None, :]
    if D == DP:
        x = tl.load(pointers, mask=(token >= 0)[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=(token >= 0)[:, None] & (col < D)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def store_rows(base, token, stride, x, D: tl.constexpr, DP: tl.constexpr):
    """The counterpart of `load_rows`; rows whose token is negative are not written."""
    col = tl.arange(0, DP)
    pointers = base + token.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(token >= 0)[:, None] & (col < D)[None, :])


@triton.jit
def load_rows_of_heads(pointers, token, stride, D: tl.constexpr, DP: tl.constexpr, OPERAND: tl.constexpr):
    """As `load_rows`, for a tile that spans heads: every line has its own base pointer."""
    col = tl.arange(0, DP)
    at = pointers[:, None] + token.to(tl.int64)[:, None] * stride + col[None, :]
    if D == DP:
        x = tl.load(at, mask=(token >= 0)[:, None], other=0.0)
    else:
        x = tl.load(at, mask=(token >= 0)[:, None] & (col < D)[None, :], other=0.0)
    return x.to(OPERAND)


@triton.jit
def store_rows_of_heads(pointers, token, stride, x, D: tl.constexpr, DP: tl.constexpr):
    """The counterpart of `load_rows_of_heads`."""
    col = tl.arange(0, DP)
    at = pointers[:, None] + token.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(at, x.to(pointers.dtype.element_ty), mask=(token >= 0)[:, None] & (col < D)[None, :])


@triton.jit
def load_part(base, start, count: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Rows `start` to `start + SIZE` of a contiguous (count, D) matrix, padded with zeros: (SIZE, DP)."""
    row, col = start + tl.arange(0, SIZE), tl.arange(0, DP)
    pointers = base + row[:, None] * D + col[None, :]
    return tl.load(pointers, mask=(row < count)[:, None] & (col < D)[None, :], other=0.0)


@triton.jit
def store_part(base, start, x, count: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The counterpart of `load_part`."""
    row, col = start + tl.arange(0, SIZE), tl.arange(0, DP)
    pointers = base + row[:, None] * D + col[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(row < count)[:, None] & (col < D)[None, :])


@triton.jit
def load_vector(base, start, count: tl.constexpr, SIZE: tl.constexpr, other: tl.constexpr):
    """Entries `start` to `start + SIZE` of a contiguous vector, padded with `other`."""
    i = start + tl.arange(0, SIZE)
    return tl.load(base + i, mask=i < count, other=other)


@triton.jit
def store_vector(base, start, x, count: tl.constexpr, SIZE: tl.constexpr):
    """The counterpart of `load_vector`."""
    i = start + tl.arange(0, SIZE)
    tl.store(base + i, x, mask=i < count)


@triton.jit
def store_sum_gradient(
    d_sum, d_mass, here, start, by_sum, by_mass, mean,
    M: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Store the gradients of feature sums (SIZE, DP) and masses (SIZE,), the former perhaps as bfloat16.

    A key's log-feature gets `v . d_sum + d_mass`, and the two cancel where the key makes up most of the feature: its
    value is then about the feature's `mean`. So what rounding takes from `d_sum` goes, for that value, to `d_mass`.
    """
    kept = by_sum.to(d_sum.dtype.element_ty)
    if d_sum.dtype.element_ty != tl.float32:
        by_mass += tl.sum((by_sum - kept.to(tl.float32)) * mean.to(tl.float32), 1)
    store_part(d_sum + here * D, start, kept, M, SIZE, D, DP)
    store_vector(d_mass + here, start, by_mass, M, SIZE)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def project(
    x, weight, g, start, M: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`x @ weight[g, start : start + SIZE].T` for x (N, DP); (N, SIZE) float32."""
    return dot(x, tl.trans(load_part(weight + g * M * D, start, M, SIZE, D, DP)), PRECISION)


@triton.jit
def less_half(logs, half, other, start, M: tl.constexpr, SIZE: tl.constexpr, LEARNED: tl.constexpr):
    """Features `start` to `start + SIZE` (N, SIZE) less `half` (N,); learned ones from `M / 2` on less `other`."""
    if LEARNED:
        second = start + tl.arange(0, SIZE) >= M // 2
        return logs - tl.where(second[None, :], other[:, None], half[:, None])
    return logs - half[:, None]


@triton.jit
def less_half_across(logs, half, other, start, M: tl.constexpr, SIZE: tl.constexpr, LEARNED: tl.constexpr):
    """As `less_half`, for a tile with a line for every feature: (SIZE, N)."""
    if LEARNED:
        second = start + tl.arange(0, SIZE) >= M // 2
        return logs - tl.where(second[:, None], other[None, :], half[None, :])
    return logs - half[None, :]


@triton.jit
def of_second_half(d_log, start, M: tl.constexpr, SIZE: tl.constexpr):
    """Sums (N,) of the gradients (N, SIZE) of features from `M / 2` on."""
    second = start + tl.arange(0, SIZE) >= M // 2
    return tl.sum(tl.where(second[None, :], d_log, 0.0), 1)


@triton.jit
def half_norm_of(
    x, norm, norm_low, norm_bias, root, g, D: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr,
    MATRIX: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`|norm[g] x~ + norm_bias[g]|^2 / 2` (N,), which every log-feature of x (N, DP) subtracts."""
    if MATRIX:
        total = tl.zeros((x.shape[0],), tl.float32)
        for start in range(0, DP, PART):
            y = project(x, norm, g, start, D, PART, D, DP, PRECISION)
            if SPLIT:
                y += project(x, norm_low, g, start, D, PART, D, DP, PRECISION)
            y += load_vector(norm_bias + g * D, start, D, PART, 0.0)[None, :]
            total += tl.sum(y * y, 1)
    else:
        y = x.to(tl.float32) * root + load_vector(norm_bias + g * D, 0, D, DP, 0.0)[None, :]
        total = tl.sum(y * y, 1)
    return 0.5 * total


@triton.jit
def norm_gradient(
    dx, d_total, x, norm, norm_bias, gram, gram_bias, root, g, d_norm, d_norm_bias, D: tl.constexpr, DP: tl.constexpr,
    PART: tl.constexpr, MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dx` (N, DP) and what `-half_norm_of` adds to it; `d_total` (N,) is the summed gradient of the log-features.

    With `MAP_GRADIENT`, also adds to those of the matrix and its bias, atomically. The leading half of a split matrix
    is enough here.
    """
    col = tl.arange(0, DP)
    if MATRIX:
        scaled = (-d_total[:, None] * x.to(tl.float32)).to(x.dtype)
        shift = load_vector(gram_bias + g * D, 0, D, DP, 0.0)
        dx -= d_total[:, None] * shift[None, :]
        dx += dot(scaled, load_part(gram + g * D * D, 0, D, DP, D, DP), PRECISION)
        if MAP_GRADIENT:
            for start in range(0, DP, PART):
                n = load_part(norm + g * D * D, start, D, PART, D, DP)
                y = dot(x, tl.trans(n), PRECISION) + load_vector(norm_bias + g * D, start, D, PART, 0.0)[None, :]
                y = -d_total[:, None] * y
                row = start + tl.arange(0, PART)
                grad = dot(tl.trans(y.to(x.dtype)), x, PRECISION)
                pointers = d_norm + g * D * D + row[:, None] * D + col[None, :]
                tl.atomic_add(pointers, grad, mask=(row < D)[:, None] & (col < D)[None, :])
                tl.atomic_add(d_norm_bias + g * D + row, tl.sum(y, 0), mask=row < D)
    else:
        y = x.to(tl.float32) * root + load_vector(norm_bias + g * D, 0, D, DP, 0.0)[None, :]
        y = -d_total[:, None] * y
        dx += y * root
        if MAP_GRADIENT:
            tl.atomic_add(d_norm_bias + g * D + col, tl.sum(y, 0), mask=col < D)
    return dx


@triton.jit
def add_weight_gradient(
    d_log, x, d_weight, d_bias, g, start, M: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of weight and bias those of log-features (N, SIZE) of x (N, DP), atomically."""
    row, col = start + tl.arange(0, SIZE), tl.arange(0, DP)
    grad = dot(tl.trans(d_log.to(x.dtype)), x, PRECISION)
    pointers = d_weight + g * M * D + row[:, None] * D + col[None, :]
    tl.atomic_add(pointers, grad, mask=(row < M)[:, None] & (col < D)[None, :])
    tl.atomic_add(d_bias + g * M + row, tl.sum(d_log, 0), mask=row < M)


@triton.jit
def priority_level(priority, block, FADE: tl.constexpr):
    """`retention.priority_level` of rounded priorities of keys of one block."""
    level = (priority.to(tl.int32, bitcast=True) >> 11) + (block * FADE).to(tl.int32)
    return tl.where(priority > float("-inf"), level.to(tl.float32), float("-inf"))


@triton.jit
def forecast_octaves(weight, key, value, d, D: tl.constexpr):
    """Sums (N,) over the coordinates `d` (P,) of `retention.forecast`, of keys and values (N, P) in float32."""
    here = d < D
    a = tl.load(weight + d, mask=here, other=0.0)[None, :]
    b = tl.load(weight + D + d, mask=here, other=0.0)[None, :]
    c = tl.load(weight + 2 * D + d, mask=here, other=0.0)[None, :]
    e = tl.load(weight + 3 * D + d, mask=here, other=0.0)[None, :]
    return tl.sum(key * (a + key * b) + value * (c + value * e), 1)


@triton.jit
def foreseen_level(priority, block, factor, octaves, FADE: tl.constexpr):
    """`retention.priority_level` with foresight, from the sums of `forecast_octaves`."""
    # 60 octaves at the most, rounded down to 16ths; 107 << 12 is the level of 2^-20.
    steps = tl.floor(tl.minimum(tl.maximum(octaves, -60.0), 60.0) * 16.0).to(tl.int32)
    level = tl.maximum(priority.to(tl.int32, bitcast=True) >> 11, 107 << 12).to(tl.float32)
    level = tl.floor(factor * level).to(tl.int32) + steps * 256 + (block * FADE).to(tl.int32)
    return tl.where(priority > float("-inf"), level.to(tl.float32), float("-inf"))


@triton.jit
def sort_keys(level, top, place):
    """Non-negative integers without ties that sort keys by level and then by place, the earlier one above.

    `top` is the largest level there is: counted from it, a level takes 20 bits, and levels that stand further behind
    than 2^20 (256 octaves) are one. Places take 11. What may not compete (`-inf`) sorts below all that may.
    """
    behind = (tl.maximum(top, 0.0) - tl.where(level > float("-inf"), level, 0.0)).to(tl.int32)
    field = 0xFFFFE - tl.minimum(behind, 0xFFFFD)
    return (tl.where(level > float("-inf"), field, 0) << 11) | (2047 - place)
