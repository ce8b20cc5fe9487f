"""The pure form inside a block: a query meets the block's earlier keys, and itself, through features.

`sum_r e^{a_ir + b_jr}` for `j <= i` is a product of matrices once a reference is taken out of either factor, and no
later key may move that reference. What serves is the mass of all earlier keys or, per feature, the block's first key
where that is larger: every query of the block sees these. A later key may stand above the reference by as much as the
exponents of the operands hold, `SPREAD`. Where one stands higher, it begins a new part of the block, with the maximum
over all keys up to it as reference, and queries after it meet both parts; whoever comes before it is not concerned. So
a block takes one product, and more only where the features of its keys differ by `e^60`.

What underflows in a query's factor is negligible beside the keys that set the reference, all of which it sees.
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
    load_part,
    load_rows,
    load_rows_of_heads,
    load_vector,
    norm_gradient,
    program,
    project,
    store_rows,
)

# Natural logarithm of how far above its reference a key may be: half of what float32 and bfloat16 hold, and what is
# lost under it, e^{60 - 87} of the largest part, is lost to rounding anyway.
SPREAD = tl.constexpr(60.0)


@triton.jit
def first_key(is_key, WP: tl.constexpr):
    """The first place of a block (WP,) that holds a key; sinks before it are exact and would begin a part in vain."""
    return tl.min(tl.where(is_key, tl.arange(0, WP), WP), 0)


@triton.jit
def reference_from(b, past, first, WP: tl.constexpr):
    """The reference (M,) of the keys from `first` on, and the first key that it does not serve any more."""
    key = tl.arange(0, WP)
    reference = tl.maximum(past, tl.max(tl.where((key <= first)[:, None], b, LOG_ZERO), 0))
    excess = tl.max(b - reference[None, :], 1)
    return reference, tl.min(tl.where((key > first) & (excess > SPREAD), key, WP), 0)


@triton.jit
def factors(a, b, reference, first, after, WP: tl.constexpr, OPERAND: tl.constexpr):
    """Of `e^{a_ir + b_jr - top_i}` for the keys in [first, after): query (N, M), key (WP, M), and `top` (N,)."""
    key = tl.arange(0, WP)
    shifted = a + reference[None, :]
    top = tl.max(shifted, 1)
    inside = (key >= first) & (key < after)
    # Above `SPREAD` is only what is not inside, and padded features, whose query factor is zero.
    excess = tl.where(inside[:, None], tl.minimum(b - reference[None, :], SPREAD), float("-inf"))
    return tl.exp(shifted - top[:, None]).to(OPERAND), tl.exp(excess).to(OPERAND), top, inside


@triton.jit
def in_block_logits(a, b, past, first, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """`log sum_r e^{a_ir + b_jr}`, (N, WP), where key `j` is not after query `i`; anything elsewhere.

    a (N, M) and b (WP, M) are log-features of queries and of the block's own keys, `past` (M,) the log-masses of the
    features of all earlier keys, and `first` is the `first_key`.
    """
    logits = tl.zeros((a.shape[0], WP), tl.float32)
    while first < WP:
        reference, after = reference_from(b, past, first, WP)
        query, key, top, inside = factors(a, b, reference, first, after, WP, OPERAND)
        new = tl.log(tl.maximum(dot(query, tl.trans(key), PRECISION), 1e-37)) + top[:, None]
        logits = tl.where(inside[None, :], new, logits)
        first = after
    return logits


@triton.jit
def in_block_query_gradient(
    a, b, past, first, log_sum, d_weight, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Gradient of `a` (N, M) through the pairs inside a block.

    `d_weight` (N, WP) is `do . v - delta`, 0 for pairs that do not meet; `log_sum` the query's normaliser. No logarithm
    is taken: with `p_ij = e^{top_i - l_i} sum_r query_ir key_jr`, that of `a_ir` is `query_ir sum_j x_ij key_jr` for
    `x_ij = e^{top_i - l_i} d_weight_ij`.
    """
    da = tl.zeros((a.shape[0], a.shape[1]), tl.float32)
    while first < WP:
        reference, after = reference_from(b, past, first, WP)
        query, key, top, _inside = factors(a, b, reference, first, after, WP, OPERAND)
        # A query that sees keys of this part has a normaliser of at least `top`; others may have any.
        x = d_weight * tl.exp(tl.minimum(top - log_sum, 2.0))[:, None]
        da += query.to(tl.float32) * dot(x.to(OPERAND), key, PRECISION)
        first = after
    return da


@triton.jit
def in_block_key_gradient(
    a, b, past, first, log_sum, d_weight, visible,
    WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `b` (WP, M), as `in_block_query_gradient`, and the probabilities (N, WP) of the block's own keys."""
    db = tl.zeros((b.shape[0], b.shape[1]), tl.float32)
    probability = tl.zeros((a.shape[0], WP), tl.float32)
    while first < WP:
        reference, after = reference_from(b, past, first, WP)
        query, key, top, inside = factors(a, b, reference, first, after, WP, OPERAND)
        scale = tl.exp(tl.minimum(top - log_sum, 2.0))[:, None]
        here = inside[None, :] & visible
        probability = tl.where(here, dot(query, tl.trans(key), PRECISION) * scale, probability)
        x = tl.where(here, d_weight * scale, 0.0)
        db += key.to(tl.float32) * dot(tl.trans(x.to(OPERAND)), query, PRECISION)
        first = after
    return probability, db


@triton.jit
def in_block_key_kernel(
    q, k, v, do, dk, dv, block_row, query_token, key_token, key_position,
    weight, bias, key_weight, key_bias, key_norm, key_norm_bias, key_gram, key_gram_bias, root,
    key_half, log_mass, log_sum, half_norm, delta, d_key_weight, d_key_bias, d_key_norm, d_key_norm_bias, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch, pool,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr,
    PART: tl.constexpr, KEY_MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of a block's keys from the queries of the block."""
    block, g, _ = program(G, 1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    slot, line = tl.arange(0, WP), tl.arange(0, HEADS * WP)
    place = line % WP
    block_token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    key_at = tl.load(key_token + (entry + 1) * W + slot, mask=slot < W, other=-1)
    is_key = (key_at >= 0) & (tl.load(key_position + entry + 1) + slot >= SINKS)
    visible = is_key[None, :] & (slot[None, :] <= place[:, None])
    first = first_key(is_key, WP)
    keys = load_rows(k + batch * skb + g * skg, key_at, skl, D, DP, OPERAND)
    values = load_rows(v + batch * svb + g * svg, key_at, svl, D, DP, OPERAND)
    own_half = tl.load(key_half + (batch * G + g) * pool + key_at, mask=key_at >= 0, other=0.0)
    dx = tl.zeros((WP, DP), tl.float32)
    dy = tl.zeros((WP, DP), tl.float32)
    total = tl.zeros((WP,), tl.float32)
    FEATURES: tl.constexpr = min(PART, MP)
    for start in range(0, MP, FEATURES):
        past = load_vector(log_mass + (entry * G + g) * M, start, M, FEATURES, 0.0)
        b = project(keys, key_weight, g, start, M, FEATURES, D, DP, PRECISION) * root
        b += load_vector(key_bias + g * M, start, M, FEATURES, 0.0)[None, :] - own_half[:, None]
        b = tl.where(is_key[:, None], b, LOG_ZERO)
        db = tl.zeros((WP, FEATURES), tl.float32)
        for tile in range(TILES):
            head = tile * HEADS + line // WP
            token = tl.where(head < R, block_token, -1)
            head = (g * R + head).to(tl.int64)
            x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
            do_heads = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
            cell = head * (blocks * W) + block * W + place
            # Lines without a query get a normaliser that nothing reaches.
            ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
            dl = tl.load(delta + cell, mask=token >= 0, other=0.0)
            half = tl.load(half_norm + cell, mask=token >= 0, other=0.0)
            d_p = dot(do_heads, tl.trans(values), PRECISION) - dl[:, None]
            a = project(x, weight, g, start, M, FEATURES, D, DP, PRECISION) * root
            a += load_vector(bias + g * M, start, M, FEATURES, float("-inf"))[None, :] - half[:, None]
            p, more = in_block_key_gradient(a, b, past, first, ls, d_p, visible, WP, OPERAND, PRECISION)
            db += more
            dy += dot(tl.trans(p.to(OPERAND)), do_heads, PRECISION)
        w = load_part(key_weight + g * M * D, start, M, FEATURES, D, DP)
        dx += dot((db * root).to(w.dtype), w, PRECISION)
        total += tl.sum(db, 1)
        if MAP_GRADIENT:
            add_weight_gradient(db, keys, d_key_weight, d_key_bias, g, start, M, FEATURES, D, DP, PRECISION)
    dx = norm_gradient(
        dx, total, keys, key_norm, key_norm_bias, key_gram, key_gram_bias, root, g, d_key_norm, d_key_norm_bias, D, DP,
        min(PART, DP), KEY_MATRIX, MAP_GRADIENT, PRECISION,
    )  # fmt: skip
    store_rows(dk + batch * sgb + g * sgg, key_at, sgl, dx, D, DP)
    store_rows(dv + batch * sgb + g * sgg, key_at, sgl, dy, D, DP)
