"""The pure form inside a block: a query meets the block's earlier keys, and itself, through features.

`sum_r e^{a_ir + b_jr}` for `j <= i` needs references that no later key moves. Halve the block: its second half sees
all keys of its first half, so their maxima serve, and the rest is a product; both halves are blocks of their own. All
groups of one level go through one product of the whole block, of which the pairs of that level are kept.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_common import LOG_ZERO, dot


@triton.jit
def level_reference(b, SPAN: tl.constexpr, WP: tl.constexpr, MP: tl.constexpr):
    """Per group of `2 SPAN` lines, the maxima of `b` (WP, MP) over its first half; one for all its lines."""
    groups = tl.reshape(b, (WP // (2 * SPAN), 2 * SPAN, MP))
    first = (tl.arange(0, 2 * SPAN) < SPAN)[None, :, None]
    top = tl.max(tl.where(first, groups, LOG_ZERO), 1)
    top = tl.broadcast_to(top[:, None, :], (WP // (2 * SPAN), 2 * SPAN, MP))
    return tl.reshape(top, (WP, MP))


@triton.jit
def level_factors(a, b, SPAN: tl.constexpr, WP: tl.constexpr, MP: tl.constexpr):
    """Factors of `e^{a_ir + b_jr - top_i}` for the pairs of one level, and `top`: (WP, MP), (WP, MP), (WP,)."""
    reference = level_reference(b, SPAN, WP, MP)
    shifted = a + reference
    top = tl.max(shifted, 1)
    later = (tl.arange(0, WP) // SPAN) % 2 == 1
    query = tl.exp(shifted - top[:, None])
    key = tl.where(later[:, None], 0.0, tl.exp(tl.where(later[:, None], LOG_ZERO, b) - reference))
    return query, key, top


@triton.jit
def level_pairs(SPAN: tl.constexpr, WP: tl.constexpr):
    """Which pairs (query, key) meet at a level: query in the second half of a group, key in its first."""
    i, j = tl.arange(0, WP)[:, None], tl.arange(0, WP)[None, :]
    return (i // (2 * SPAN) == j // (2 * SPAN)) & ((i // SPAN) % 2 == 1) & ((j // SPAN) % 2 == 0)


@triton.jit
def in_block_logits(a, b, WP: tl.constexpr, MP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """`log sum_r e^{a_ir + b_jr}`, (WP, WP), for the block's own keys; `-inf` above the diagonal."""
    i = tl.arange(0, WP)
    both = a + b
    top = tl.maximum(tl.max(both, 1), LOG_ZERO)
    own = top + tl.log(tl.sum(tl.exp(both - top[:, None]), 1))
    logits = tl.where(i[:, None] == i[None, :], own[:, None], float("-inf"))
    for level in tl.static_range(0, 8):
        if (1 << level) < WP:
            query, key, top = level_factors(a, b, 1 << level, WP, MP)
            product = dot(query.to(OPERAND), tl.trans(key.to(OPERAND)), PRECISION)
            new = tl.log(tl.maximum(product, 1e-37)) + top[:, None]
            logits = tl.where(level_pairs(1 << level, WP), new, logits)
    return logits


@triton.jit
def in_block_gradient(
    a, b, log_sum, d_weight, WP: tl.constexpr, MP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Probabilities (WP, WP) of the block's own keys, and the gradients of `a` and `b` (WP, MP) through them.

    `d_weight` (WP, WP) is `do . v - delta`, `log_sum` the query's normaliser. No logarithm is taken: with
    `p_ij = e^{top_i - l_i} sum_r query_ir key_jr`, the gradient of `a_ir` is `query_ir sum_j x_ij key_jr` for
    `x_ij = e^{top_i - l_i} d_weight_ij`.
    """
    i = tl.arange(0, WP)
    diagonal = i[:, None] == i[None, :]
    both = tl.exp(a + b - log_sum[:, None])
    own = tl.sum(tl.where(diagonal, d_weight, 0.0), 1)
    da = both * own[:, None]
    db = da
    probability = tl.where(diagonal, tl.sum(both, 1)[:, None], 0.0)
    for level in tl.static_range(0, 8):
        if (1 << level) < WP:
            query, key, top = level_factors(a, b, 1 << level, WP, MP)
            pairs = level_pairs(1 << level, WP)
            scale = tl.exp(tl.minimum(top - log_sum, 0.0))[:, None]
            product = dot(query.to(OPERAND), tl.trans(key.to(OPERAND)), PRECISION)
            probability = tl.where(pairs, product * scale, probability)
            x = tl.where(pairs, d_weight * scale, 0.0).to(OPERAND)
            da += query * dot(x, key.to(OPERAND), PRECISION)
            db += key * dot(tl.trans(x), query.to(OPERAND), PRECISION)
    return probability, da, db
