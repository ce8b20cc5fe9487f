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
def key_factor(b, reference, first, after, WP: tl.constexpr, OPERAND: tl.constexpr):
    """`e^{b_jr - reference_r}` (WP, M) of the keys in [first, after); zero for all others."""
    key = tl.arange(0, WP)
    inside = (key >= first) & (key < after)
    # Above `SPREAD` is only what is not inside, and padded features, whose query factor is zero.
    excess = tl.where(inside[:, None], tl.minimum(b - reference[None, :], SPREAD), float("-inf"))
    return tl.exp(excess).to(OPERAND)


@triton.jit
def query_factor(a, reference, log_sum, place, first):
    """`e^{a_ir + reference_r - log_sum_i}` (N, M); zero for queries before the key `first`, which do not see it.

    Of features, those before a block's first key see none at all: they are sinks, and the state before them is empty.
    """
    log_sum = tl.where(place >= first, log_sum, 1e30)
    return tl.exp(a + reference[None, :] - log_sum[:, None])


@triton.jit
def in_block_logits(a, b, past, first, WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """`log sum_r e^{a_ir + b_jr}`, (N, WP), where key `j` is not after query `i`; anything elsewhere.

    a (N, M) and b (WP, M) are log-features of queries and of the block's own keys, `past` (M,) the log-masses of the
    features of all earlier keys, and `first` is the `first_key`.
    """
    logits = tl.zeros((a.shape[0], WP), tl.float32)
    place = tl.arange(0, WP)
    while first < WP:
        reference, after = reference_from(b, past, first, WP)
        shifted = a + reference[None, :]
        top = tl.max(shifted, 1)
        query = tl.exp(shifted - top[:, None]).to(OPERAND)
        key = key_factor(b, reference, first, after, WP, OPERAND)
        new = tl.log(tl.maximum(dot(query, tl.trans(key), PRECISION), 1e-37)) + top[:, None]
        logits = tl.where(((place >= first) & (place < after))[None, :], new, logits)
        first = after
    return logits


@triton.jit
def query_gradient(
    a, b, past, first, place, log_sum, d_mean, d_weight,
    WP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `a` (N, M) through the features of earlier keys and through the pairs inside a block.

    `d_mean` (N, M) is `do . mean - delta` and `d_weight` (N, WP) `do . v - delta`, 0 for pairs that do not meet;
    `log_sum` the query's normaliser. With `p_ij = sum_r query_ir key_jr` the gradient of `a_ir` through the pairs is
    `query_ir sum_j d_weight_ij key_jr`. No query that sees a part's first key has a normaliser below the reference.
    """
    reference, after = reference_from(b, past, first, WP)
    query = query_factor(a, reference, log_sum, place, first)
    key = key_factor(b, reference, first, after, WP, OPERAND)
    da = query * (d_mean * tl.exp(past - reference)[None, :] + dot(d_weight, key, PRECISION))
    while after < WP:
        first = after
        reference, after = reference_from(b, past, first, WP)
        query = query_factor(a, reference, log_sum, place, first)
        key = key_factor(b, reference, first, after, WP, OPERAND)
        da += query * dot(d_weight, key, PRECISION)
    return da


@triton.jit
def in_block_key_kernel(
    q, k, v, do, dk, dv, block_row, query_token, key_token, key_position,
    weight, bias, key_weight, key_bias, key_norm, key_norm_bias, key_gram, key_gram_bias, root,
    key_half, log_mass, log_sum, half_norm, delta, d_key_weight, d_key_bias, d_key_norm, d_key_norm_bias, d_half,
    blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch, pool,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr,
    PART: tl.constexpr, KEY_MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr, GIVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of a block's keys from the queries of the block; `d_half` of what was `GIVEN` beside half-norms."""
    block, g, _ = program(G, 1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    slot, line = tl.arange(0, WP), tl.arange(0, HEADS * WP)
    place = line % WP
    block_token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    key_at = tl.load(key_token + (entry + 1) * W + slot, mask=slot < W, other=-1)
    is_key = (key_at >= 0) & (tl.load(key_position + entry + 1) + slot >= SINKS)
    visible = is_key[:, None] & (slot[:, None] <= place[None, :])
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
        first = first_key(is_key, WP)
        # Usually one turn; a block without keys takes none.
        while first < WP:
            reference, after = reference_from(b, past, first, WP)
            key = key_factor(b, reference, first, after, WP, OPERAND)
            by_query = tl.zeros((WP, FEATURES), tl.float32)
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
                a = project(x, weight, g, start, M, FEATURES, D, DP, PRECISION) * root
                a += load_vector(bias + g * M, start, M, FEATURES, float("-inf"))[None, :] - half[:, None]
                query = query_factor(a, reference, ls, place, first).to(OPERAND)
                # Keys in lines: the next products have their operands in registers.
                p = tl.where(visible, dot(key, tl.trans(query), PRECISION), 0.0)
                d_p = tl.where(visible, dot(values, tl.trans(do_heads), PRECISION) - dl[None, :], 0.0)
                dy += dot(p.to(OPERAND), do_heads, PRECISION)
                by_query += dot(d_p.to(OPERAND), query, PRECISION)
            db += key.to(tl.float32) * by_query
            first = after
        w = load_part(key_weight + g * M * D, start, M, FEATURES, D, DP)
        dx += dot((db * root).to(w.dtype), w, PRECISION)
        total += tl.sum(db, 1)
        if MAP_GRADIENT:
            add_weight_gradient(db, keys, d_key_weight, d_key_bias, g, start, M, FEATURES, D, DP, PRECISION)
    if GIVEN:
        tl.store(d_half + (batch * G + g) * pool + key_at, -total, mask=key_at >= 0)
    dx = norm_gradient(
        dx, total, keys, key_norm, key_norm_bias, key_gram, key_gram_bias, root, g, d_key_norm, d_key_norm_bias, D, DP,
        min(PART, DP), KEY_MATRIX, MAP_GRADIENT, PRECISION,
    )  # fmt: skip
    store_rows(dk + batch * sgb + g * sgg, key_at, sgl, dx, D, DP)
    store_rows(dv + batch * sgb + g * sgg, key_at, sgl, dy, D, DP)
