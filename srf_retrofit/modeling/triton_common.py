"""What the Triton kernels share: rows fetched by index, log-features, and how a sequence is cut into blocks.

The kernels see rows of tokens as blocks of `w` slots (a fixed length in the pure form). Three tables say where they
lie, see `fused.BlockTables`:

- block `n` of the batch belongs to row `block_row[n]` and holds the queries at `query_token[n, :]`;
- every row has one more *entry* than blocks, entry `n + block_row[n]` being the block before block `n`:
  `key_token[entry, :]` are its keys, so block `n` sees the keys of entries `e` and `e + 1`, and the feature sums and
  retained slots at entry `e` are those that its queries see;
- `-1` marks a slot without a token.

Accuracy: exponents, maxima, sums and the softmax are float32. Half-precision queries and keys are exact operands, so
the only rounding in a product with a projection is that of the projection, and this is split into a sum of two
bfloat16 matrices (16 bits of mantissa); other operand types run as three TF32 products (`tf32x3`).
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
def load_matrix(base, rows: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """A contiguous (rows, D) matrix, padded with zeros to (RP, DP)."""
    row, col = tl.arange(0, RP), tl.arange(0, DP)
    pointers = base + row[:, None] * D + col[None, :]
    if (rows == RP) and (D == DP):
        return tl.load(pointers)
    return tl.load(pointers, mask=(row < rows)[:, None] & (col < D)[None, :], other=0.0)


@triton.jit
def load_vector(base, size: tl.constexpr, SP: tl.constexpr, other: tl.constexpr):
    """A contiguous vector, padded with `other`."""
    i = tl.arange(0, SP)
    return tl.load(base + i, mask=i < size, other=other)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def project(
    x, weight, weight_low, g, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x @ weight[g].T` for x (N, DP), with the low half of the split weight; (N, MP) float32."""
    high = load_matrix(weight + g * M * D, M, MP, D, DP)
    out = dot(x, tl.trans(high), PRECISION)
    if SPLIT:
        low = load_matrix(weight_low + g * M * D, M, MP, D, DP)
        out += dot(x, tl.trans(low), PRECISION)
    return out


@triton.jit
def moved(
    x, norm, norm_low, norm_bias, root, g, D: tl.constexpr, DP: tl.constexpr,
    MATRIX: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`norm[g] x~ + norm_bias[g]`, whose squared length every log-feature subtracts half of; (N, DP) float32."""
    if MATRIX:
        y = project(x, norm, norm_low, g, D, DP, D, DP, SPLIT, PRECISION)
    else:
        y = x.to(tl.float32) * root
    return y + load_vector(norm_bias + g * D, D, DP, 0.0)[None, :]


@triton.jit
def log_features(
    x, weight, weight_low, bias, norm, norm_low, norm_bias, root, g, pad_bias: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    MATRIX: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-features (N, MP) of x (N, DP), as `feature_map.log_features`; columns beyond M get bias `pad_bias`."""
    y = moved(x, norm, norm_low, norm_bias, root, g, D, DP, MATRIX, SPLIT, PRECISION)
    out = project(x, weight, weight_low, g, M, MP, D, DP, SPLIT, PRECISION)
    out += load_vector(bias + g * M, M, MP, pad_bias)[None, :]
    return out - 0.5 * tl.sum(y * y, 1)[:, None]


@triton.jit
def log_features_backward(
    d_out, x, weight, norm, norm_low, norm_bias, root, g,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    MATRIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient (N, DP) of x from that of its log-features (N, MP); the leading half of a split weight is enough."""
    high = load_matrix(weight + g * M * D, M, MP, D, DP)
    dx = dot(d_out.to(high.dtype), high, PRECISION)
    y = moved(x, norm, norm_low, norm_bias, root, g, D, DP, MATRIX, False, PRECISION)
    total = tl.sum(d_out, 1)[:, None]
    if MATRIX:
        n = load_matrix(norm + g * D * D, D, DP, D, DP)
        return dx - total * dot(y.to(n.dtype), n, PRECISION)
    return dx - total * y * root


@triton.jit
def add_map_gradients(
    d_out, x, norm, norm_low, norm_bias, root, g, d_weight, d_bias, d_norm, d_norm_bias,
    M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    MATRIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a folded map those of log-features (N, MP) of x, atomically."""
    row, col, dim = tl.arange(0, MP), tl.arange(0, DP), tl.arange(0, DP)
    here = (row < M)[:, None] & (col < D)[None, :]
    grad = dot(tl.trans(d_out.to(x.dtype)), x, PRECISION)
    tl.atomic_add(d_weight + g * M * D + row[:, None] * D + col[None, :], grad, mask=here)
    tl.atomic_add(d_bias + g * M + row, tl.sum(d_out, 0), mask=row < M)
    y = moved(x, norm, norm_low, norm_bias, root, g, D, DP, MATRIX, False, PRECISION)
    y = -tl.sum(d_out, 1)[:, None] * y
    tl.atomic_add(d_norm_bias + g * D + dim, tl.sum(y, 0), mask=dim < D)
    if MATRIX:
        grad = dot(tl.trans(y.to(x.dtype)), x, PRECISION)
        tl.atomic_add(
            d_norm + g * D * D + dim[:, None] * D + col[None, :], grad, mask=(dim < D)[:, None] & (col < D)[None, :]
        )
