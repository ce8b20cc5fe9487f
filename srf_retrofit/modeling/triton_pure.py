"""The pure form inside a block: a query meets the block's earlier keys, and itself, through features.

`sum_r e^{a_ir + b_jr}` for `j <= i` needs references that no later key moves. Halve the block: its second half sees
all keys of its first half, so a maximum over them serves, and the rest is a product; both halves are blocks of their
own. All groups of one level go through one product of the whole block, of which the pairs of that level are kept.

The reference of a group is the maximum over all keys of the block up to the end of the group's first half: every
query that uses it sees them all. What underflows under it is negligible beside the key that set it.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_common import (
    LOG_ZERO,
    add_weight_gradient,
    dot,
    half_norm_of,
    load_part,
    load_rows,
    load_vector,
    norm_gradient,
    project,
    store_rows,
)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_maximum(b, OPERAND: tl.constexpr):
    """Maxima of b (N, M) over the lines up to each, as two operands whose sum is close: what is rounded cancels."""
    top = tl.maximum(tl.associative_scan(b, 0, larger), LOG_ZERO)
    high = top.to(OPERAND)
    return high, (top - high.to(tl.float32)).to(OPERAND)


@triton.jit
def level_factors(a, b, highest, rest, SPAN, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Factors of `e^{a_ir + b_jr - top_i}` for the pairs of the level of groups of `2 SPAN`, and `top` (WP,)."""
    i, j = tl.arange(0, WP)[:, None], tl.arange(0, WP)[None, :]
    # Each line picks the running maximum at the end of its group's first half: a product with a 0/1 matrix is exact.
    pick = tl.where(j == (i // (2 * SPAN)) * (2 * SPAN) + SPAN - 1, 1.0, 0.0).to(OPERAND)
    reference = dot(pick, highest, PRECISION) + dot(pick, rest, PRECISION)
    shifted = a + reference
    top = tl.max(shifted, 1)
    first = (i // SPAN) % 2 == 0
    key = tl.exp(tl.where(first, tl.minimum(b - reference, 2.0), float("-inf")))
    return tl.exp(shifted - top[:, None]).to(OPERAND), key.to(OPERAND), top


@triton.jit
def level_pairs(SPAN, WP: tl.constexpr):
    """Which pairs (query, key) meet at a level: query in the second half of a group, key in its first."""
    i, j = tl.arange(0, WP)[:, None], tl.arange(0, WP)[None, :]
    return (i // (2 * SPAN) == j // (2 * SPAN)) & ((i // SPAN) % 2 == 1) & ((j // SPAN) % 2 == 0)


@triton.jit
def in_block_logits(a, b, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """`log sum_r e^{a_ir + b_jr}`, (WP, WP), for the block's own keys; `-inf` above the diagonal."""
    i = tl.arange(0, WP)
    both = a + b
    top = tl.max(both, 1)
    own = top + tl.log(tl.sum(tl.exp(both - top[:, None]), 1))
    logits = tl.where(i[:, None] == i[None, :], own[:, None], float("-inf"))
    highest, rest = running_maximum(b, OPERAND)
    span = 1
    while span < WP:
        query, key, top = level_factors(a, b, highest, rest, span, WP, OPERAND, PRECISION)
        product = dot(query, tl.trans(key), PRECISION)
        new = tl.log(tl.maximum(product, 1e-37)) + top[:, None]
        logits = tl.where(level_pairs(span, WP), new, logits)
        span *= 2
    return logits


@triton.jit
def in_block_query_gradient(
    a, b, log_sum, d_weight, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradient of `a` (WP, M) through the pairs inside a block.

    `d_weight` (WP, WP) is `do . v - delta`, `log_sum` the query's normaliser. No logarithm is taken: with
    `p_ij = e^{top_i - l_i} sum_r query_ir key_jr`, the gradient of `a_ir` is `query_ir sum_j x_ij key_jr` for
    `x_ij = e^{top_i - l_i} d_weight_ij`.
    """
    i = tl.arange(0, WP)
    own = tl.sum(tl.where(i[:, None] == i[None, :], d_weight, 0.0), 1)
    da = tl.exp(a + b - log_sum[:, None]) * own[:, None]
    highest, rest = running_maximum(b, OPERAND)
    span = 1
    while span < WP:
        query, key, top = level_factors(a, b, highest, rest, span, WP, OPERAND, PRECISION)
        scale = tl.exp(tl.minimum(top - log_sum, 2.0))[:, None]
        x = tl.where(level_pairs(span, WP), d_weight * scale, 0.0).to(OPERAND)
        da += query.to(tl.float32) * dot(x, key, PRECISION)
        span *= 2
    return da


@triton.jit
def in_block_key_gradient(
    a, b, log_sum, d_weight, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradient of `b` (WP, M), as `in_block_query_gradient`, and the probabilities (WP, WP) of the block's own keys."""
    i = tl.arange(0, WP)
    diagonal = i[:, None] == i[None, :]
    both = tl.exp(a + b - log_sum[:, None])
    db = both * tl.sum(tl.where(diagonal, d_weight, 0.0), 1)[:, None]
    probability = tl.where(diagonal, tl.sum(both, 1)[:, None], 0.0)
    highest, rest = running_maximum(b, OPERAND)
    span = 1
    while span < WP:
        query, key, top = level_factors(a, b, highest, rest, span, WP, OPERAND, PRECISION)
        pairs = level_pairs(span, WP)
        scale = tl.exp(tl.minimum(top - log_sum, 2.0))[:, None]
        probability = tl.where(pairs, dot(query, tl.trans(key), PRECISION) * scale, probability)
        x = tl.where(pairs, d_weight * scale, 0.0).to(OPERAND)
        db += key.to(tl.float32) * dot(tl.trans(x), query, PRECISION)
        span *= 2
    return probability, db


@triton.jit
def in_block_key_kernel(
    q, k, v, do, dk, dv, block_row, query_token, key_token, key_position,
    weight, weight_low, bias, key_weight, key_weight_low, key_bias, key_norm, key_norm_low, key_norm_bias, root,
    log_sum, half_norm, delta, d_key_weight, d_key_bias, d_key_norm, d_key_norm_bias, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr, PART: tl.constexpr, KEY_MATRIX: tl.constexpr,
    MAP_GRADIENT: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of a block's keys from the queries of the block."""
    block, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    place = tl.arange(0, WP)
    token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    key_at = tl.load(key_token + (entry + 1) * W + place, mask=place < W, other=-1)
    is_key = (key_at >= 0) & (tl.load(key_position + entry + 1) + place >= SINKS)
    keys = load_rows(k + batch * skb + g * skg, key_at, skl, D, DP, OPERAND)
    values = load_rows(v + batch * svb + g * svg, key_at, svl, D, DP, OPERAND)
    key_half = half_norm_of(
        keys, key_norm, key_norm_low, key_norm_bias, root, g, D, DP, min(PART, DP), KEY_MATRIX, SPLIT, PRECISION
    )
    dx = tl.zeros((WP, DP), tl.float32)
    dy = tl.zeros((WP, DP), tl.float32)
    total = tl.zeros((WP,), tl.float32)
    FEATURES: tl.constexpr = min(PART, MP)
    for start in range(0, MP, FEATURES):
        b = project(keys, key_weight, key_weight_low, g, start, M, FEATURES, D, DP, SPLIT, PRECISION)
        b += load_vector(key_bias + g * M, start, M, FEATURES, 0.0)[None, :] - key_half[:, None]
        b = tl.where(is_key[:, None], b, LOG_ZERO)
        db = tl.zeros((WP, FEATURES), tl.float32)
        for r in range(R):
            head = (g * R + r).to(tl.int64)
            x = load_rows(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
            do_head = load_rows(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
            cell = head * (blocks * W) + block * W + place
            # Lines without a query get a normaliser that nothing reaches.
            ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
            dl = tl.load(delta + cell, mask=token >= 0, other=0.0)
            half = tl.load(half_norm + cell, mask=token >= 0, other=0.0)
            d_p = dot(do_head, tl.trans(values), PRECISION) - dl[:, None]
            a = project(x, weight, weight_low, g, start, M, FEATURES, D, DP, SPLIT, PRECISION)
            a += load_vector(bias + g * M, start, M, FEATURES, float("-inf"))[None, :] - half[:, None]
            p, more = in_block_key_gradient(a, b, ls, d_p, WP, OPERAND, PRECISION)
            db += more
            dy += dot(tl.trans(p.to(OPERAND)), do_head, PRECISION)
        w = load_part(key_weight + g * M * D, start, M, FEATURES, D, DP)
        dx += dot(db.to(w.dtype), w, PRECISION)
        total += tl.sum(db, 1)
        if MAP_GRADIENT:
            add_weight_gradient(db, keys, d_key_weight, d_key_bias, g, start, M, FEATURES, D, DP, PRECISION)
    dx += norm_gradient(
        total, keys, key_norm, key_norm_low, key_norm_bias, root, g, d_key_norm, d_key_norm_bias, D, DP,
        min(PART, DP), KEY_MATRIX, MAP_GRADIENT, PRECISION,
    )  # fmt: skip
    store_rows(dk + batch * sgb + g * sgg, key_at, sgl, dx, D, DP)
    store_rows(dv + batch * sgb + g * sgg, key_at, sgl, dy, D, DP)
