"""The attention of a block's queries: exact keys and features in one softmax, forward.

A program holds a tile of queries (some query heads of one key/value head, one block of positions) and lets it absorb
the features, the sinks, the retained keys and the block's own neighbourhood in turn, with a running maximum as in
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
    load_matrix,
    load_rows,
    load_rows_of_heads,
    load_vector,
    log_features,
    moved,
    project,
    store_rows_of_heads,
)
from .triton_pure import in_block_logits
from .triton_retain import local_logits


@triton.jit
def absorb(logits, values, top, mass, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Further keys for a running softmax."""
    above = tl.maximum(top, tl.max(logits, 1))
    weight = tl.exp(logits - above[:, None])
    decay = tl.exp(top - above)
    total = total * decay[:, None] + dot(weight.to(OPERAND), values, PRECISION)
    return above, mass * decay + tl.sum(weight, 1), total


@triton.jit
def sink_logits(
    q, k, row, position, place, sink_token, scaling, skl, SINKS: tl.constexpr, SP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the row's sinks, (N, SP), `-inf` where there is none yet."""
    sinks = tl.arange(0, SP)
    token = tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)
    logits = dot(q, tl.trans(load_rows(k, token, skl, D, DP, OPERAND)), PRECISION) * scaling
    seen = (token >= 0)[None, :] & (sinks[None, :] <= (position + place)[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def attend_kernel(
    q, k, v, o, block_row, query_token, key_token, key_position, sink_token, slot_token,
    weight, weight_low, bias, norm, norm_low, norm_bias, root,
    key_weight, key_weight_low, key_bias, key_norm, key_norm_low, key_norm_bias,
    mean, log_mass, log_sum, half_norm, scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sob, soh, sol, one_batch,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, SINKS: tl.constexpr, SP: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, HB: tl.constexpr, PURE: tl.constexpr, TAIL: tl.constexpr,
    MATRIX: tl.constexpr, KEY_MATRIX: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of `HEADS` heads of a block; `log_sum` and `half_norm` (H, N W) are what the backward pass starts from.

    `half_norm` is the part `|q'|^2 / 2` of a query's log-features, which saves its backward a product.
    """
    block, g, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
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
    half = tl.zeros((HEADS * WP,), tl.float32)
    if TAIL or PURE:
        y = moved(x, norm, norm_low, norm_bias, root, g, D, DP, MATRIX, SPLIT, PRECISION)
        half = 0.5 * tl.sum(y * y, 1)
        a = project(x, weight, weight_low, g, M, MP, D, DP, SPLIT, PRECISION) - half[:, None]
        a += load_vector(bias + g * M, M, MP, float("-inf"))[None, :]
    if TAIL:
        logits = a + load_vector(log_mass + (entry * G + g) * M, M, MP, 0.0)[None, :]
        values = load_matrix(mean + (block * G + g) * M * D, M, MP, D, DP).to(OPERAND)
        top, mass, total = absorb(logits, values, top, mass, total, OPERAND, PRECISION)
    if SINKS > 0:
        logits = sink_logits(x, k, row, position, place, sink_token, scaling, skl, SINKS, SP, D, DP, OPERAND, PRECISION)
        sinks = tl.arange(0, SP)
        at = tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)
        top, mass, total = absorb(logits, load_rows(v, at, svl, D, DP, OPERAND), top, mass, total, OPERAND, PRECISION)
    if H > 0:
        for start in tl.static_range(0, HP, HB):
            slot = start + tl.arange(0, HB)
            at = tl.load(slot_token + (entry * G + g) * H + slot, mask=slot < H, other=-1)
            logits = dot(x, tl.trans(load_rows(k, at, skl, D, DP, OPERAND)), PRECISION) * scaling
            logits = tl.where((at >= 0)[None, :], logits, float("-inf"))
            top, mass, total = absorb(
                logits, load_rows(v, at, svl, D, DP, OPERAND), top, mass, total, OPERAND, PRECISION
            )
    if PURE:
        slot = tl.arange(0, WP)
        at = tl.load(key_token + (entry + 1) * W + slot, mask=slot < W, other=-1)
        at = tl.where(position + slot >= SINKS, at, -1)
        keys = load_rows(k, at, skl, D, DP, OPERAND)
        b = log_features(
            keys, key_weight, key_weight_low, key_bias, key_norm, key_norm_low, key_norm_bias, root, g, 0.0,
            M, MP, D, DP, KEY_MATRIX, SPLIT, PRECISION,
        )  # fmt: skip
        b = tl.where((at >= 0)[:, None], b, float("-inf"))
        logits = in_block_logits(a, b, WP, MP, OPERAND, PRECISION)
        logits = tl.where((at >= 0)[None, :], logits, float("-inf"))
        top, mass, total = absorb(logits, load_rows(v, at, svl, D, DP, OPERAND), top, mass, total, OPERAND, PRECISION)
    else:
        column = tl.arange(0, 2 * WP)
        slot = column % WP
        at = tl.load(key_token + (entry + column // WP) * W + slot, mask=slot < W, other=-1)
        logits = local_logits(
            x, k, entry, key_token, position, scaling, skl, W, WP, HEADS, D, DP, SINKS, OPERAND, PRECISION
        )
        top, mass, total = absorb(logits, load_rows(v, at, svl, D, DP, OPERAND), top, mass, total, OPERAND, PRECISION)

    store_rows_of_heads(o + batch * sob + head * soh, token, sol, total / mass[:, None], D, DP)
    at = head * (blocks * W) + block * W + place
    tl.store(log_sum + at, top + tl.log(mass), mask=token >= 0)
    if TAIL or PURE:
        tl.store(half_norm + at, half, mask=token >= 0)
