"""The attention of a block's queries: exact keys and features in one softmax, forward.

A program holds a tile of queries (some query heads of one key/value head, one block of positions) and lets it absorb
the sinks, the retained keys, the block's own neighbourhood and the features in turn, with a running maximum as in
flash attention. The pure form has no exact keys; there a block's queries meet its own keys through features, see
`triton_pure`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_common import (
    LOG_ZERO,
    dot,
    half_norm_of,
    less_half,
    load_part,
    load_rows,
    load_rows_of_heads,
    load_vector,
    program,
    project,
    store_rows_of_heads,
)
from .triton_pure import first_key, in_block_logits
from .triton_retain import absent_slots, local_keys, local_logits


@triton.jit
def absorb(logits, values, top, mass, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Further keys for a running softmax."""
    above = tl.maximum(top, tl.max(logits, 1))
    weight = tl.exp(logits - above[:, None])
    decay = tl.exp(top - above)
    total = total * decay[:, None] + dot(weight.to(OPERAND), values, PRECISION)
    return above, mass * decay + tl.sum(weight, 1), total


@triton.jit
def key_at_top(logits, at, top, top_at):
    """The token of the key with the largest logit so far, given those (N, E) of further keys at `at` (E,)."""
    here = tl.max(logits, 1)
    best = tl.max(tl.where(logits == here[:, None], at[None, :], -2), 1)
    return tl.where(here > top, best, top_at)


@triton.jit
def sink_logits(q, keys, token, position, place, scaling, SP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits of a row's sinks, (N, SP), `-inf` where there is none yet."""
    logits = dot(q, tl.trans(keys), PRECISION) * scaling
    seen = (token >= 0)[None, :] & (tl.arange(0, SP)[None, :] <= (position + place)[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def load_sinks(sink_token, row, SINKS: tl.constexpr, SP: tl.constexpr):
    """Tokens of a row's sinks, -1 where there is none."""
    sinks = tl.arange(0, SP)
    return tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)


@triton.jit
def attend_kernel(
    q, k, v, o, block_row, query_token, key_token, key_position, sink_token, slot_token, top_token,
    weight, bias, norm, norm_low, norm_bias, root, given,
    key_weight, key_bias, key_half, mean, log_mass, log_sum, half_norm, slot_bounds, scaling, blocks, length, one_half,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sob, soh, sol, one_batch, pool,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr,
    SP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PART: tl.constexpr, PURE: tl.constexpr, TAIL: tl.constexpr,
    MATRIX: tl.constexpr, LEARNED: tl.constexpr, UNEVEN: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of `HEADS` heads of a block; `log_sum` and `half_norm` (H, N W) are what the backward pass starts from.

    All keys, features included, come in parts of at most `PART`. Learned features have `given` (2, B, H, L) in place of
    the half-norm; `half_norm` is (2, H, N W) then, and `top_token` (H, N W) the exact key with the largest logit.
    """
    block, g, tile = program(G, TILES)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    k += batch * skb + g * skg
    v += batch * svb + g * svg
    position = tl.load(key_position + entry + 1)
    line = tl.arange(0, HEADS * WP)
    place = line % WP
    head = tile * HEADS + line // WP
    token = tl.load(query_token + block * W + place, mask=(place < W) & (head < R), other=-1)
    head = (g * R + head).to(tl.int64)
    x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)

    top = tl.full((HEADS * WP,), LOG_ZERO, tl.float32)
    mass = tl.full((HEADS * WP,), 1.0, tl.float32)
    total = tl.zeros((HEADS * WP, DP), tl.float32)
    if LEARNED:
        top_at = tl.full((HEADS * WP,), -2, tl.int32)
    if SINKS > 0:
        sink_at = load_sinks(sink_token, row, SINKS, SP)
        sink_keys = load_rows(k, sink_at, skl, D, DP, OPERAND)
        sink_values = load_rows(v, sink_at, svl, D, DP, OPERAND)
        exact = sink_logits(x, sink_keys, sink_at, position, place, scaling, SP, PRECISION)
        if LEARNED:
            top_at = key_at_top(exact, sink_at, top, top_at)
        top, mass, total = absorb(exact, sink_values, top, mass, total, OPERAND, PRECISION)
    if H > 0:
        SLOTS: tl.constexpr = min(PART, HP)
        for start in range(absent_slots(slot_bounds, g, H, UNEVEN) // SLOTS * SLOTS, HP, SLOTS):
            slot_at = load_vector(slot_token + (entry * G + g) * H, start, H, SLOTS, -1)
            slot_keys = load_rows(k, slot_at, skl, D, DP, OPERAND)
            slot_values = load_rows(v, slot_at, svl, D, DP, OPERAND)
            slot_logits = dot(x, tl.trans(slot_keys), PRECISION) * scaling
            slot_logits = tl.where((slot_at >= 0)[None, :], slot_logits, float("-inf"))
            if LEARNED:
                top_at = key_at_top(slot_logits, slot_at, top, top_at)
            top, mass, total = absorb(slot_logits, slot_values, top, mass, total, OPERAND, PRECISION)
    if not PURE:
        LOCAL: tl.constexpr = min(PART, 2 * WP)
        for start in range(0, 2 * WP, LOCAL):
            near_at, near_place = local_keys(key_token, entry, position, start, W, WP, LOCAL, SINKS)
            near_keys = load_rows(k, near_at, skl, D, DP, OPERAND)
            near_values = load_rows(v, near_at, svl, D, DP, OPERAND)
            near_logits = local_logits(x, near_keys, near_at, near_place, place, scaling, PRECISION)
            if LEARNED:
                top_at = key_at_top(near_logits, near_at, top, top_at)
            top, mass, total = absorb(near_logits, near_values, top, mass, total, OPERAND, PRECISION)

    if LEARNED:
        # Learned features are relative to the largest exact logit, see `feature_map.beside_exact_keys`.
        place_given = given + (batch * (G * R) + head) * length + token
        half = tl.load(place_given, mask=token >= 0, other=0.0) - top
        other = tl.load(place_given + one_half, mask=token >= 0, other=0.0) - top
    else:
        half = half_norm_of(x, norm, norm_low, norm_bias, root, g, D, DP, min(PART, DP), MATRIX, SPLIT, PRECISION)
        other = half
    FEATURES: tl.constexpr = min(PART, MP)
    if PURE and TAIL:
        own_at, own_place = local_keys(key_token, entry, position, WP, W, WP, WP, SINKS)
        own_keys = load_rows(k, own_at, skl, D, DP, OPERAND)
        own_values = load_rows(v, own_at, svl, D, DP, OPERAND)
        own_half = tl.load(key_half + (batch * G + g) * pool + own_at, mask=own_at >= 0, other=0.0)
        visible = (own_at >= 0)[None, :] & (own_place[None, :] <= place[:, None])
        first = first_key(own_at >= 0, WP)
    if TAIL:
        for start in range(0, MP, FEATURES):
            # All loads of a part stand before its first product: none is moved ahead of one by the compiler.
            past = load_vector(log_mass + (entry * G + g) * M, start, M, FEATURES, 0.0)
            values = load_part(mean + (block * G + g) * M * D, start, M, FEATURES, D, DP).to(OPERAND)
            a = project(x, weight, g, start, M, FEATURES, D, DP, PRECISION) * root
            a += load_vector(bias + g * M, start, M, FEATURES, float("-inf"))[None, :]
            a = less_half(a, half, other, start, M, FEATURES, LEARNED)
            top, mass, total = absorb(a + past[None, :], values, top, mass, total, OPERAND, PRECISION)
            if PURE:
                # The parts of a key's weight that come from different features are further keys with the same value.
                b = project(own_keys, key_weight, g, start, M, FEATURES, D, DP, PRECISION) * root
                b += load_vector(key_bias + g * M, start, M, FEATURES, 0.0)[None, :] - own_half[:, None]
                b = tl.where((own_at >= 0)[:, None], b, LOG_ZERO)
                own_logits = in_block_logits(a, b, past, first, WP, OPERAND, PRECISION)
                own_logits = tl.where(visible, own_logits, float("-inf"))
                top, mass, total = absorb(own_logits, own_values, top, mass, total, OPERAND, PRECISION)

    store_rows_of_heads(o + batch * sob + head * soh, token, sol, total / mass[:, None], D, DP)
    at = head * (blocks * W) + block * W + place
    tl.store(log_sum + at, top + tl.log(mass), mask=token >= 0)
    tl.store(half_norm + at, half, mask=token >= 0)
    if LEARNED:
        tl.store(half_norm + (G * R) * (blocks * W) + at, other, mask=token >= 0)
        tl.store(top_token + at, top_at, mask=token >= 0)
