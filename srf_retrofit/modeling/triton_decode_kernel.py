"""The decode kernel: one token of one row and one key/value head, with all query heads that share it, per program.

What `recurrent.attend_token` computes, in one pass over the state: sinks, window, retained keys and features enter one
softmax tile by tile, each tile rescaling what came before (1805.02867). The tiles of queries are padded to 16 lines,
so that every product runs on tensor cores; the memory is what counts, and the padding costs none of it.

Accuracy: exponents, maxima, sums and the softmax are float32. Half-precision queries and keys are exact operands of
products; a projection or geometry is split into three matrices of their type, which hold all its bits. Weights of the
softmax and mean values are rounded to that type before they are multiplied, as flash attention does; what is folded
into the state is not (`triton_decode_fold.dot_value`). With float32 inputs every product is IEEE float32.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_decode_fold
    raise

from .triton_decode_fold import LOG_ZERO, dot_weight, finish_block, half_square, load_rows, store_rows
from .triton_eight_bits import fetch_rows, numbers, round_vector, store_vector

# Below every logit, LOG_ZERO included, and finite: differences of two are numbers.
LOWEST = tl.constexpr(-3e38)
# Rows that are put into order at a time.
ROWS = tl.constexpr(256)


@triton.jit
def load_stream(base, row, here, D: tl.constexpr, DP: tl.constexpr):
    """`load_rows` of what this program alone reads: first to leave the caches, so that the feature maps stay."""
    d = tl.arange(0, DP)
    at = base + row[:, None] * D + d[None, :]
    return tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def add_tile(top, total, out, logits, value, OPERAND: tl.constexpr):
    """Take further logits (RP, N) and their values (N, DP) into a running softmax: maximum, sum, weighted values."""
    highest = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp(top - highest)
    p = tl.exp(logits - highest[:, None])
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(OPERAND), value.to(OPERAND), out * shrink[:, None], input_precision="ieee")
    return highest, total, out


@triton.jit
def load_features(kv_mean, k_sum, k_max, start, M: tl.constexpr, MT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Mean values (MT, DP), masses and references (MT,) of the features from `start` on."""
    m = start + tl.arange(0, MT)
    mass = tl.load(k_sum + m, mask=m < M, other=0.0)
    mark = tl.load(k_max + m, mask=m < M, other=0.0)
    return load_stream(kv_mean, m, m < M, D, DP), mass, mark


@triton.jit
def project_query(
    x, weight, bias, half, root, start, M: tl.constexpr, MT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Log-features (RP, MT) of the queries from feature `start` on; `-inf` where there is none."""
    m = start + tl.arange(0, MT)
    logits = dot_weight(x, load_rows(weight, m, m < M, D, DP), ROUNDED) * root
    logits += tl.load(bias + m, mask=m < M, other=0.0)[None, :] - half[:, None]
    return tl.where((m < M)[None, :], logits, float("-inf"))


@triton.jit
def load_projected(base, start, R: tl.constexpr, RP: tl.constexpr, M: tl.constexpr, MT: tl.constexpr):
    """What `project_kernel` left for one row and head: as `project_query`."""
    r, m = tl.arange(0, RP), start + tl.arange(0, MT)
    logits = tl.load(base + r[:, None] * M + m[None, :], mask=(r < R)[:, None] & (m < M)[None, :], other=0.0)
    return tl.where((m < M)[None, :], logits, float("-inf"))


@triton.jit
def order_rows(order, length, active, rows, sab, W: tl.constexpr, MASKED: tl.constexpr):
    """The order in which rows are served: those whose block ends in this step from the front, the others behind."""
    served = 0
    for b0 in range(0, rows, ROWS):
        b = b0 + tl.arange(0, ROWS)
        here = b < rows
        ends = here & (tl.load(length + b, mask=here, other=0).to(tl.int32) % max(W, 1) == W - 1)
        if MASKED:
            ends = ends & (tl.load(active + b * sab, mask=here, other=0) != 0)
        count = served + tl.cumsum(ends.to(tl.int32), 0)  # rows whose block ends, up to and with each
        tl.store(order + tl.where(ends, count - 1, rows - 1 - b + count), b, mask=here)
        served += tl.sum(ends.to(tl.int32), 0)


@triton.jit
def project_lines(
    q, out, weight, bias, norm_weight, norm_bias, root, first, lines, g, sqb, sqh,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, MT: tl.constexpr,
    NT: tl.constexpr, LINES: tl.constexpr, MATRIX: tl.constexpr, SHIFT: tl.constexpr, OPERAND: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Log-features of the queries `first` to `first + LINES` of head `g`, of `lines` in all."""
    line, d = first + tl.arange(0, LINES), tl.arange(0, DP)
    here = line < lines
    b, r = (line // R).to(tl.int64), line % R
    at = q + b[:, None] * sqb + (g * R + r)[:, None] * sqh + d[None, :]
    x = tl.load(at, mask=here[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)
    half = half_square(
        x, norm_weight + g * (D * D) if MATRIX else norm_weight, norm_bias + g * D if SHIFT else norm_bias,
        root, LINES, D, DP, NT, MATRIX, SHIFT,
    )  # fmt: skip
    for m0 in range(0, M, MT):
        m = m0 + tl.arange(0, MT)
        logits = project_query(x, weight + g * (M * D), bias + g * M, half, root, m0, M, MT, D, DP, ROUNDED)
        to = out + ((b * G + g) * R + r)[:, None] * M + m[None, :]
        tl.store(to, logits, mask=here[:, None] & (m < M)[None, :])


@triton.jit
def project_kernel(
    q, active, length, logs, order, weight, bias, norm_weight, norm_bias, root, rows, sqb, sqh, sab,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, MT: tl.constexpr,
    NT: tl.constexpr, W: tl.constexpr, LINES: tl.constexpr, MATRIX: tl.constexpr, SHIFT: tl.constexpr,
    MASKED: tl.constexpr, OPERAND: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Log-features (B, G, R, M) of the queries of many rows, and the order (B,) in which they are served.

    Grid (n + 1, G): `LINES` queries of one key/value head share a program, and so the map, which every program of
    `decode_kernel` would fetch and split for itself; the last ones find the order, which is that of one of them.
    """
    first, g = tl.program_id(0) * LINES, tl.program_id(1).to(tl.int64)
    if first < rows * R:
        project_lines(
            q, logs, weight, bias, norm_weight, norm_bias, root, first, rows * R, g, sqb, sqh,
            G, R, D, DP, M, MT, NT, LINES, MATRIX, SHIFT, OPERAND, ROUNDED,
        )  # fmt: skip
    elif g == 0:
        order_rows(order, length, active, rows, sab, W, MASKED)


@triton.jit
def half_square_of_key(
    key, norm_weight, norm_bias, root, D: tl.constexpr, DP: tl.constexpr, NT: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """`half_square` of a single float32 key (DP,), a scalar."""
    d = tl.arange(0, DP)
    if HAS_NORM_WEIGHT:
        # Line by line first, so that there is one sum over threads.
        squares = tl.zeros((NT,), tl.float32)
        for n0 in range(0, D, NT):
            n = n0 + tl.arange(0, NT)
            moved = tl.sum(load_rows(norm_weight, n, n < D, D, DP) * key[None, :], 1) * root
            if HAS_NORM_BIAS:
                moved += tl.load(norm_bias + n, mask=n < D, other=0.0)
            squares += moved * moved
        half = 0.5 * tl.sum(squares, 0)
    else:
        moved = key * root
        if HAS_NORM_BIAS:
            moved += tl.load(norm_bias + d, mask=d < D, other=0.0)
        half = 0.5 * tl.sum(moved * moved, 0)
    return half


@triton.jit
def advance(length, position, is_active, G: tl.constexpr):
    """Count a row's token once all its `G` programs have read its position: by the last one, in no order.

    Each leaves a mark in the high half of the length, which nobody else reads; the last one takes them away.
    """
    tl.debug_barrier()  # every thread has read it
    marks = tl.atomic_add(length, 1 << 40, mask=is_active) >> 40
    tl.store(length, (position + 1).to(tl.int64), mask=is_active & (marks == G - 1))


@triton.jit
def decode_kernel(
    q, k, v, out, active, query_logs, order,
    kv_mean, k_sum, k_max, window_key, window_value, window_priority, sink_key, sink_value,
    retained_key, retained_value, retained_priority, length,
    query_weight, query_bias, query_norm_weight, query_norm_bias,
    key_weight, key_bias, key_norm_weight, key_norm_bias, foresight, slot_bounds,
    all_slots, scaling, root, sqb, sqh, skb, skg, svb, svg, sab,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, EP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr,
    H: tl.constexpr, HT: tl.constexpr, POOL: tl.constexpr, DELAY: tl.constexpr,
    WIDE: tl.constexpr, WIDEP: tl.constexpr,
    MT: tl.constexpr, NT: tl.constexpr, FT: tl.constexpr,
    TAIL: tl.constexpr, PROJECTED: tl.constexpr, MASKED: tl.constexpr,
    QUERY_MATRIX: tl.constexpr, QUERY_SHIFT: tl.constexpr, KEY_MATRIX: tl.constexpr, KEY_SHIFT: tl.constexpr,
    OPERAND: tl.constexpr, ROUNDED: tl.constexpr, FADE: tl.constexpr, FORESIGHT: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """Grid (B, G): rows of one head run side by side and share its feature map in the caches. Or, if `PROJECTED`,
    (G, B): rows in the given order, so that those at the end of a block, which take longest, start first.

    Rows of the state are never read after they were written, but for the end of a block; see `finish_block`.
    """
    if PROJECTED:
        b, g = tl.load(order + tl.program_id(1)).to(tl.int64), tl.program_id(0).to(tl.int64)
    else:
        b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = b * G + g
    kv_mean += at * (M * D)
    k_sum += at * M
    k_max += at * M
    window_key += at * (2 * W * WIDE)
    window_value += at * (2 * W * WIDE)
    window_priority += at * (2 * W)
    sink_key += at * (S * WIDE)
    sink_value += at * (S * WIDE)
    # Of `all_slots` of a row, this head's `h`; `H` are the most of any.
    if UNEVEN:
        first = tl.load(slot_bounds + g)
        h = tl.load(slot_bounds + g + 1) - first
    else:
        first = g * H
        h = H
    retained_key += (b * all_slots + first) * WIDE
    retained_value += (b * all_slots + first) * WIDE
    retained_priority += b * all_slots + first
    query_weight += g * (M * D)
    query_bias += g * M
    key_weight += g * (M * D)
    key_bias += g * M
    if QUERY_MATRIX:
        query_norm_weight += g * (D * D)
    if QUERY_SHIFT:
        query_norm_bias += g * D
    if KEY_MATRIX:
        key_norm_weight += g * (D * D)
    if KEY_SHIFT:
        key_norm_bias += g * D
    if FORESIGHT:
        foresight += g * (1 + 4 * D)

    position = tl.load(length + b).to(tl.int32)  # the low half; see `advance`
    if MASKED:
        is_active = tl.load(active + b * sab) != 0
    else:
        is_active = position >= 0
    columns = tl.where(is_active, D, 0)  # of rows to be written
    r, d = tl.arange(0, RP), tl.arange(0, DP)
    is_head = r < R
    heads = (is_head[:, None]) & (d < D)[None, :]
    x = tl.load(q + b * sqb + (g * R + r)[:, None] * sqh + d[None, :], mask=heads, other=0.0).to(OPERAND)
    new_key = tl.load(k + b * skb + g * skg + d, mask=d < D, other=0.0)
    new_value = tl.load(v + b * svb + g * svg + d, mask=d < D, other=0.0)
    new_key, key_row, key_exponent = round_vector(new_key, D, DP, WIDE)
    new_value, value_row, value_exponent = round_vector(new_value, D, DP, WIDE)

    # The loads of the exact keys first: they are under way while the queries' norms are computed.
    if S > 0:
        t = tl.arange(0, SP)
        new_sink = (t == position) & (t < S)
        sink_seen = (t <= position) & (t < S)
        sk, sk_exponent = fetch_rows(sink_key, t, sink_seen & (t != position), D, DP, WIDE)
        sv, sv_exponent = fetch_rows(sink_value, t, sink_seen & (t != position), D, DP, WIDE)
    if W > 0:
        phase = position % W
        slot = tl.arange(0, WP)
        in_window = position - phase - W + slot  # position of each slot; padding lies behind the token
        new_slot = slot == W + phase
        seen = (in_window >= S) & (in_window <= position)
        wk, wk_exponent = fetch_rows(window_key, slot, seen & (in_window < position), D, DP, WIDE)
        wv, wv_exponent = fetch_rows(window_value, slot, seen & (in_window < position), D, DP, WIDE)
    if H > 0:
        counts = seen & (in_window < tl.where(is_active, position - DELAY, S))
        priority = tl.load(window_priority + slot, mask=counts, other=float("-inf"))
        j = tl.arange(0, HT)
        rp = tl.load(retained_priority + j, mask=j < h, other=float("-inf"))
        rk, rk_exponent = fetch_rows(retained_key, j, j < h, D, DP, WIDE)
        rv, rv_exponent = fetch_rows(retained_value, j, j < h, D, DP, WIDE)

    advance(length + b, position, is_active, G)

    if TAIL:
        if PROJECTED:
            query_logs += at * (R * M)
            projected = load_projected(query_logs, 0, R, RP, M, MT)
        else:
            half = half_square(
                x, query_norm_weight, query_norm_bias, root, RP, D, DP, NT, QUERY_MATRIX, QUERY_SHIFT
            )  # fmt: skip
            if M <= MT:
                # All features in one tile: projected before any key is looked at, while the keys are on their way.
                projected = project_query(x, query_weight, query_bias, half, root, 0, M, MT, D, DP, ROUNDED)

    top = tl.full((RP,), LOWEST, tl.float32)
    total = tl.zeros((RP,), tl.float32)
    o = tl.zeros((RP, DP), tl.float32)
    if S > 0:
        sk = numbers(sk, sk_exponent, D, WIDE, OPERAND)
        sv = numbers(sv, sv_exponent, D, WIDE, OPERAND)
        sk = tl.where(new_sink[:, None], new_key[None, :], sk)
        sv = tl.where(new_sink[:, None], new_value[None, :], sv)
        logits = tl.dot(x, tl.trans(sk.to(OPERAND)), input_precision="ieee") * scaling
        logits = tl.where(sink_seen[None, :], logits, float("-inf"))
        top, total, o = add_tile(top, total, o, logits, sv, OPERAND)
        writes = tl.where(position < S, columns, 0)
        store_vector(sink_key, position, writes, key_row, key_exponent, D, DP, WIDE)
        store_vector(sink_value, position, writes, value_row, value_exponent, D, DP, WIDE)
    if W > 0:
        wk = numbers(wk, wk_exponent, D, WIDE, OPERAND)
        wv = numbers(wv, wv_exponent, D, WIDE, OPERAND)
        wk = tl.where(new_slot[:, None], new_key[None, :], wk)
        wv = tl.where(new_slot[:, None], new_value[None, :], wv)
        logits = tl.dot(x, tl.trans(wk.to(OPERAND)), input_precision="ieee") * scaling
        logits = tl.where(seen[None, :], logits, float("-inf"))
        top, total, o = add_tile(top, total, o, logits, wv, OPERAND)
        store_vector(window_key, W + phase, columns, key_row, key_exponent, D, DP, WIDE)
        store_vector(window_value, W + phase, columns, value_row, value_exponent, D, DP, WIDE)
    if TAIL or (W == 0):
        # On their way while the retained keys are taken.
        stored, mass, mark = load_features(kv_mean, k_sum, k_max, 0, M, MT, D, DP)
    if H > 0:
        # The largest probability, over the query heads, of each key among sinks and window; `retention.round_priority`.
        p = tl.exp(logits - (top + tl.log(total))[:, None])
        received = tl.max(tl.where(is_head[:, None], p, 0.0), 0)
        bits = (received.to(tl.int32, bitcast=True) + 0x400) & -0x800
        priority = tl.maximum(priority, bits.to(tl.float32, bitcast=True))
        tl.debug_barrier()
        tl.store(window_priority + slot, priority, mask=counts)
        for h0 in range(0, h, HT):
            if H > HT:
                n = h0 + HT + tl.arange(0, HT)
                next_rp = tl.load(retained_priority + n, mask=n < h, other=float("-inf"))
                next_rk, next_rk_exponent = fetch_rows(retained_key, n, n < h, D, DP, WIDE)
                next_rv, next_rv_exponent = fetch_rows(retained_value, n, n < h, D, DP, WIDE)
            kept_key = numbers(rk, rk_exponent, D, WIDE, OPERAND)
            kept_value = numbers(rv, rv_exponent, D, WIDE, OPERAND)
            logits_h = tl.dot(x, tl.trans(kept_key.to(OPERAND)), input_precision="ieee") * scaling
            logits_h = tl.where((rp > float("-inf"))[None, :], logits_h, float("-inf"))
            top, total, o = add_tile(top, total, o, logits_h, kept_value, OPERAND)
            if H > HT:
                rp, rk, rv = next_rp, next_rk, next_rv
                rk_exponent, rv_exponent = next_rk_exponent, next_rv_exponent

    if W == 0:
        # The pure form: the token's own key is a feature key before its query reads (unless it is a sink).
        folds = is_active & (position >= S)
        key = new_key.to(tl.float32)
        value = new_value.to(tl.float32)
        key_half = half_square_of_key(key, key_norm_weight, key_norm_bias, root, D, DP, NT, KEY_MATRIX, KEY_SHIFT)
    if TAIL or (W == 0):
        for m0 in range(0, M, MT):
            if M > MT:
                next_stored, next_mass, next_mark = load_features(kv_mean, k_sum, k_max, m0 + MT, M, MT, D, DP)
            mark = tl.maximum(mark, LOG_ZERO)
            if W == 0:
                m = m0 + tl.arange(0, MT)
                here = m < M
                log_key = tl.sum(load_rows(key_weight, m, here, D, DP) * key[None, :], 1) * root
                log_key += tl.load(key_bias + m, mask=here, other=0.0) - key_half
                log_key = tl.where(folds, log_key, float("-inf"))
                highest = tl.maximum(mark, log_key)
                feature = tl.exp(log_key - highest)
                kept = mass * tl.exp(mark - highest)
                mass = kept + feature
                mark = highest
                mean = stored.to(tl.float32) * kept[:, None] + feature[:, None] * value[None, :]
                stored = (mean / tl.maximum(mass, 0.5)[:, None]).to(stored.dtype)
                changes = m < tl.where(folds, M, 0)
                tl.debug_barrier()
                store_rows(kv_mean, m, changes, stored, D, DP)
                tl.store(k_sum + m, mass, mask=changes)
                tl.store(k_max + m, highest, mask=changes)
            if TAIL:
                if M <= MT:
                    logits_m = projected
                elif PROJECTED:
                    logits_m = load_projected(query_logs, m0, R, RP, M, MT)
                else:
                    logits_m = project_query(x, query_weight, query_bias, half, root, m0, M, MT, D, DP, ROUNDED)
                logits_m += (mark + tl.log(tl.maximum(mass, 0.5)))[None, :]
                top, total, o = add_tile(top, total, o, logits_m, stored, OPERAND)
            if M > MT:
                stored, mass, mark = next_stored, next_mass, next_mark
    if not TAIL:
        # As without kernels: a weightless key in the features' place.
        highest = tl.maximum(top, LOG_ZERO)
        o = o * tl.exp(top - highest)[:, None]
        total = total * tl.exp(top - highest) + tl.exp(-highest + LOG_ZERO)

    o = tl.where(is_active, o / total[:, None], 0.0)
    tl.store(out + (b * G + g) * (R * D) + r[:, None] * D + d[None, :], o.to(out.dtype.element_ty), mask=heads)

    if W > 0:  # noqa: SIM102 (decided when compiled, the other when run)
        if is_active & (phase == W - 1):
            finish_block(
                position, kv_mean, k_sum, k_max, window_key, window_value, window_priority,
                retained_key, retained_value, retained_priority,
                key_weight, key_bias, key_norm_weight, key_norm_bias, foresight, root, h,
                W, S, H, M, D, DP, WIDE, WIDEP, EP, POOL, HT, FT, FT, KEY_MATRIX, KEY_SHIFT, OPERAND, ROUNDED,
                FADE, FORESIGHT,
            )  # fmt: skip
