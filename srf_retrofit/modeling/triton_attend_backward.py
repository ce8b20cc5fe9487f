"""Gradients of the attention of a block: of its queries, of the states they saw, of the exact keys they saw.

Three passes recompute the probabilities `p = e^{logit - log_sum}` from what the forward pass kept (two numbers a
query, `log_sum` and `half_norm`):

- `query_kernel`: gradient of the queries and of the sinks;
- `state_kernel`: gradient of the feature sums at the block's start, and of retained keys;
- `key_kernel`: gradient of a block's keys from the queries of that block and the next.

In the pure form the pairs inside a block go through features, and `triton_pure.in_block_key_kernel` takes the place of
`key_kernel`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_attend import load_sinks, sink_logits
from .triton_common import (
    LOG_ZERO,
    add_weight_gradient,
    dot,
    less_half,
    less_half_across,
    load_part,
    load_rows,
    load_rows_of_heads,
    load_vector,
    norm_gradient,
    of_second_half,
    program,
    project,
    store_part,
    store_rows,
    store_rows_of_heads,
    store_sum_gradient,
)
from .triton_pure import first_key, query_gradient
from .triton_retain import absent_slots, local_keys, local_logits


@triton.jit
def exact_gradient(logits, do, delta, log_sum, values, scaling, PRECISION: tl.constexpr):
    """Probabilities of exact keys, and the gradient of their logits before scaling."""
    p = tl.exp(logits - log_sum[:, None])
    return p, p * (dot(do, tl.trans(values), PRECISION) - delta[:, None]) * scaling


@triton.jit
def through_top(d_logits, at, top_at, d_top, scaling):
    """The gradient of exact logits with that of a query's largest one, on whose scale its learned features are."""
    return d_logits + tl.where(at[None, :] == top_at[:, None], (d_top * scaling)[:, None], 0.0)


@triton.jit
def retained_at(
    token, entry, slot_token, g,
    G: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Those of the tokens (WP,) that are in slots at an entry; -1 in place of the others."""
    SLOTS: tl.constexpr = min(PART, HP)
    found = tl.zeros((WP,), tl.int32)
    for start in range(0, HP, SLOTS):
        slots = load_vector(slot_token + (entry * G + g) * H, start, H, SLOTS, -1)
        found += tl.sum((token[:, None] == slots[None, :]).to(tl.int32), 1)
    return tl.where(found > 0, token, -1)


@triton.jit
def clear_kernel(
    d_slot_key, d_slot_value, block_row, key_token, slot_token, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Zeros where `state_kernel` will add: for the keys that a block's queries are the first to see in slots.

    They have just left the window, so they are keys of the entry before. Before a row's first block no slot is taken.
    """
    block, g, _ = program(G, 1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    slot = tl.arange(0, WP)
    token = tl.load(key_token + (entry - 1) * W + slot, mask=slot < tl.where(entry > 0, W, 0), other=-1)
    token = retained_at(token, entry, slot_token, g, G, WP, H, HP, PART)
    nothing = tl.zeros((WP, DP), tl.float32)
    store_rows(d_slot_key + batch * sgb + g * sgg, token, sgl, nothing, D, DP)
    store_rows(d_slot_value + batch * sgb + g * sgg, token, sgl, nothing, D, DP)


@triton.jit
def query_kernel(
    q, k, v, o, do, dq, block_row, query_token, key_token, key_position, sink_token, slot_token, top_token,
    weight, bias, norm, norm_bias, gram, gram_bias, root,
    key_weight, key_bias, key_half, mean, log_mass, log_sum, half_norm, delta,
    d_sink_key, d_sink_value, d_weight, d_bias, d_norm, d_norm_bias, d_given, d_top,
    slot_bounds, scaling, blocks, length, one_half,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sob, soh, sol, sdb, sdh, sdl, seb, seh, sel, one_batch, pool,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr,
    SP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PART: tl.constexpr, PURE: tl.constexpr, TAIL: tl.constexpr,
    MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr, LEARNED: tl.constexpr, GIVEN: tl.constexpr,
    UNEVEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq` and `delta = do . o` of a tile; its part of the sinks' gradients, (N, G, TILES, SINKS, D).

    With learned features also the gradients of what was `given` (2, B, H, L) and of the largest exact logit (H, N W).
    Of other features, with `GIVEN`, the gradient of a summand of all log-features of a query, (B, H, L).
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
    dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
    y = load_rows_of_heads(o + batch * sob + head * soh, token, sol, D, DP, tl.float32)
    x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
    dl = tl.sum(dy.to(tl.float32) * y, 1)
    cell = head * (blocks * W) + block * W + place
    tl.store(delta + cell, dl, mask=token >= 0)
    # Lines without a query get a normaliser that nothing reaches.
    ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
    dx = tl.zeros((HEADS * WP, DP), tl.float32)

    for turn in tl.static_range(2):
        # Learned features first: the largest exact logit has their gradient. Others last: that takes fewer registers.
        if (turn == 0) == LEARNED:
            if PURE and TAIL:
                own_at, own_place = local_keys(key_token, entry, position, WP, W, WP, WP, SINKS)
                own_keys = load_rows(k, own_at, skl, D, DP, OPERAND)
                own_half = tl.load(key_half + (batch * G + g) * pool + own_at, mask=own_at >= 0, other=0.0)
                d_own = dot(dy, tl.trans(load_rows(v, own_at, svl, D, DP, OPERAND)), PRECISION) - dl[:, None]
                meet = (own_at >= 0)[None, :] & (own_place[None, :] <= place[:, None])
                d_own = tl.where(meet, d_own, 0.0).to(OPERAND)
                first = first_key(own_at >= 0, WP)
            if TAIL:
                FEATURES: tl.constexpr = min(PART, MP)
                total = tl.zeros((HEADS * WP,), tl.float32)
                second = tl.zeros((HEADS * WP,), tl.float32)
                half = tl.load(half_norm + cell, mask=token >= 0, other=0.0)
                other = half
                if LEARNED:
                    other = tl.load(half_norm + (G * R) * (blocks * W) + cell, mask=token >= 0, other=0.0)
                for start in range(0, MP, FEATURES):
                    past = load_vector(log_mass + (entry * G + g) * M, start, M, FEATURES, 0.0)
                    w = load_part(weight + g * M * D, start, M, FEATURES, D, DP)
                    values = load_part(mean + (block * G + g) * M * D, start, M, FEATURES, D, DP).to(OPERAND)
                    a = dot(x, tl.trans(w), PRECISION) * root
                    a += load_vector(bias + g * M, start, M, FEATURES, float("-inf"))[None, :]
                    a = less_half(a, half, other, start, M, FEATURES, LEARNED)
                    if PURE:
                        d_mean = dot(dy, tl.trans(values), PRECISION) - dl[:, None]
                        b = project(own_keys, key_weight, g, start, M, FEATURES, D, DP, PRECISION) * root
                        b += load_vector(key_bias + g * M, start, M, FEATURES, 0.0)[None, :] - own_half[:, None]
                        b = tl.where((own_at >= 0)[:, None], b, LOG_ZERO)
                        da = query_gradient(a, b, past, first, place, ls, d_mean, d_own, WP, OPERAND, PRECISION)
                    else:
                        _, da = exact_gradient(a + past[None, :], dy, dl, ls, values, 1.0, PRECISION)
                    dx += dot((da * root).to(w.dtype), w, PRECISION)
                    total += tl.sum(da, 1)
                    if LEARNED:
                        second += of_second_half(da, start, M, FEATURES)
                    if MAP_GRADIENT:
                        add_weight_gradient(da, x, d_weight, d_bias, g, start, M, FEATURES, D, DP, PRECISION)
                if LEARNED:
                    place_given = d_given + (batch * (G * R) + head) * length + token
                    tl.store(place_given, second - total, mask=token >= 0)
                    tl.store(place_given + one_half, -second, mask=token >= 0)
                else:
                    if GIVEN:
                        tl.store(d_given + (batch * (G * R) + head) * length + token, total, mask=token >= 0)
                    dx = norm_gradient(
                        dx, total, x, norm, norm_bias, gram, gram_bias, root, g, d_norm, d_norm_bias, D, DP,
                        min(PART, DP), MATRIX, MAP_GRADIENT, PRECISION,
                    )  # fmt: skip
            if LEARNED:
                if not TAIL:
                    total = tl.zeros((HEADS * WP,), tl.float32)
                tl.store(d_top + cell, total, mask=token >= 0)
                top_at = tl.load(top_token + cell, mask=token >= 0, other=-2)
        else:
            if SINKS > 0:
                sink_at = load_sinks(sink_token, row, SINKS, SP)
                sink_keys = load_rows(k, sink_at, skl, D, DP, OPERAND)
                sink_values = load_rows(v, sink_at, svl, D, DP, OPERAND)
                exact = sink_logits(x, sink_keys, sink_at, position, place, scaling, SP, PRECISION)
                sink_p, sink_d_logits = exact_gradient(exact, dy, dl, ls, sink_values, scaling, PRECISION)
                if LEARNED:
                    sink_d_logits = through_top(sink_d_logits, sink_at, top_at, total, scaling)
                dx += dot(sink_d_logits.to(OPERAND), sink_keys, PRECISION)
                here = ((block * G + g) * TILES + tile) * SINKS * D
                store_part(
                    d_sink_key + here, 0, dot(tl.trans(sink_d_logits.to(OPERAND)), x, PRECISION), SINKS, SP, D, DP
                )
                store_part(d_sink_value + here, 0, dot(tl.trans(sink_p.to(OPERAND)), dy, PRECISION), SINKS, SP, D, DP)
            if H > 0:
                SLOTS: tl.constexpr = min(PART, HP)
                for start in range(absent_slots(slot_bounds, g, H, UNEVEN) // SLOTS * SLOTS, HP, SLOTS):
                    slot_at = load_vector(slot_token + (entry * G + g) * H, start, H, SLOTS, -1)
                    slot_keys = load_rows(k, slot_at, skl, D, DP, OPERAND)
                    slot_values = load_rows(v, slot_at, svl, D, DP, OPERAND)
                    slot_logits = dot(x, tl.trans(slot_keys), PRECISION) * scaling
                    slot_logits = tl.where((slot_at >= 0)[None, :], slot_logits, float("-inf"))
                    _slot_p, slot_d_logits = exact_gradient(slot_logits, dy, dl, ls, slot_values, scaling, PRECISION)
                    if LEARNED:
                        slot_d_logits = through_top(slot_d_logits, slot_at, top_at, total, scaling)
                    dx += dot(slot_d_logits.to(OPERAND), slot_keys, PRECISION)
            if not PURE:
                LOCAL: tl.constexpr = min(PART, 2 * WP)
                for start in range(0, 2 * WP, LOCAL):
                    near_at, near_place = local_keys(key_token, entry, position, start, W, WP, LOCAL, SINKS)
                    near_keys = load_rows(k, near_at, skl, D, DP, OPERAND)
                    near_values = load_rows(v, near_at, svl, D, DP, OPERAND)
                    near_logits = local_logits(x, near_keys, near_at, near_place, place, scaling, PRECISION)
                    _near_p, near_d_logits = exact_gradient(near_logits, dy, dl, ls, near_values, scaling, PRECISION)
                    if LEARNED:
                        near_d_logits = through_top(near_d_logits, near_at, top_at, total, scaling)
                    dx += dot(near_d_logits.to(OPERAND), near_keys, PRECISION)
    store_rows_of_heads(dq + batch * seb + head * seh, token, sel, dx, D, DP)


@triton.jit
def state_kernel(
    q, k, v, do, block_row, query_token, slot_token, top_token, weight, bias, root,
    mean, log_mass, reference, log_sum, half_norm, delta, d_top, d_sum, d_mass, d_slot_key, d_slot_value,
    scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PART: tl.constexpr, PARTS: tl.constexpr, OF_SLOTS: tl.constexpr, LEARNED: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a part of the feature sums before the block, or (`OF_SLOTS`) of a part of the slots."""
    block, g, part = program(G, PARTS)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    line = tl.arange(0, HEADS * WP)
    place = line % WP
    block_token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    if not OF_SLOTS:
        FEATURES: tl.constexpr = min(PART, MP)
        start = part * FEATURES
        mass = load_vector(log_mass + (entry * G + g) * M, start, M, FEATURES, 0.0)
        shift = load_vector(bias + g * M, start, M, FEATURES, float("-inf")) + mass
        w = load_part(weight + g * M * D, start, M, FEATURES, D, DP)
        d_mean = tl.zeros((FEATURES, DP), tl.float32)
        d_total = tl.zeros((FEATURES,), tl.float32)
        for tile in range(TILES):
            head = tile * HEADS + line // WP
            token = tl.where(head < R, block_token, -1)
            head = (g * R + head).to(tl.int64)
            cell = head * (blocks * W) + block * W + place
            x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
            dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
            ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
            other = ls
            if LEARNED:
                other += tl.load(half_norm + (G * R) * (blocks * W) + cell, mask=token >= 0, other=0.0)
            ls += tl.load(half_norm + cell, mask=token >= 0, other=0.0)
            dl = tl.load(delta + cell, mask=token >= 0, other=0.0)
            # Features in lines: the next product has its operand in registers.
            logits = dot(w, tl.trans(x), PRECISION) * root + shift[:, None]
            p = tl.exp(less_half_across(logits, ls, other, start, M, FEATURES, LEARNED))
            # Rounded in both, since the two cancel for a key that makes up most of a feature.
            p = p.to(OPERAND)
            d_mean += dot(p, dy, PRECISION)
            d_total -= tl.sum(p.to(tl.float32) * dl[None, :], 1)
        # From mean values and log-masses to sums and masses, both over the mass.
        scale = tl.exp(load_vector(reference + (entry * G + g) * M, start, M, FEATURES, 0.0) - mass)
        here = (block * G + g) * M
        values = load_part(mean + here * D, start, M, FEATURES, D, DP)
        store_sum_gradient(
            d_sum, d_mass, here, start, d_mean * scale[:, None], d_total * scale, values, M, FEATURES, D, DP
        )
    else:
        SLOTS: tl.constexpr = min(PART, HP)
        at = load_vector(slot_token + (entry * G + g) * H, part * SLOTS, H, SLOTS, -1)
        if tl.max(at, 0) >= 0:
            keys = load_rows(k + batch * skb + g * skg, at, skl, D, DP, OPERAND)
            values = load_rows(v + batch * svb + g * svg, at, svl, D, DP, OPERAND)
            dk = tl.zeros((SLOTS, DP), tl.float32)
            dv = tl.zeros((SLOTS, DP), tl.float32)
            for tile in range(TILES):
                head = tile * HEADS + line // WP
                token = tl.where(head < R, block_token, -1)
                head = (g * R + head).to(tl.int64)
                cell = head * (blocks * W) + block * W + place
                x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
                dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
                ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
                dl = tl.load(delta + cell, mask=token >= 0, other=0.0)
                logits = dot(x, tl.trans(keys), PRECISION) * scaling
                logits = tl.where((at >= 0)[None, :], logits, float("-inf"))
                p, d_logits = exact_gradient(logits, dy, dl, ls, values, scaling, PRECISION)
                if LEARNED:
                    top_at = tl.load(top_token + cell, mask=token >= 0, other=-2)
                    of_top = tl.load(d_top + cell, mask=token >= 0, other=0.0)
                    d_logits = through_top(d_logits, at, top_at, of_top, scaling)
                dk += dot(tl.trans(d_logits.to(OPERAND)), x, PRECISION)
                dv += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
            # A key may sit in the slots of many blocks.
            dim = tl.arange(0, DP)
            here = batch * sgb + g * sgg + at.to(tl.int64)[:, None] * sgl + dim[None, :]
            inside = (at >= 0)[:, None] & (dim < D)[None, :]
            tl.atomic_add(d_slot_key + here, dk, mask=inside, sem="relaxed")
            tl.atomic_add(d_slot_value + here, dv, mask=inside, sem="relaxed")


@triton.jit
def key_kernel(
    q, k, v, do, dk, dv, d_slot_key, d_slot_value, entry_table, query_token, key_token, key_position, slot_token,
    top_token, log_sum, delta, d_top, scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PART: tl.constexpr, LEARNED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of an entry's keys from the queries of its own block and the next; `entry_table` names both."""
    entry, g, _ = program(G, 1)
    row = tl.load(entry_table + 3 * entry)
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    slot, line = tl.arange(0, WP), tl.arange(0, HEADS * WP)
    place = line % WP
    key_at = tl.load(key_token + entry * W + slot, mask=slot < W, other=-1)
    position = tl.load(key_position + entry)
    is_key = (key_at >= 0) & (position + slot >= SINKS)
    keys = load_rows(k + batch * skb + g * skg, key_at, skl, D, DP, OPERAND)
    values = load_rows(v + batch * svb + g * svg, key_at, svl, D, DP, OPERAND)
    if H > 0:
        # Nothing was written for other keys: they enter at the next entry, if ever, and a block has to see it.
        after = entry + tl.where(tl.load(entry_table + 3 * entry + 2) >= 0, 1, 0)
        seen = (after > entry) & (tl.load(entry_table + 3 * after + 2) >= 0)
        retained = retained_at(tl.where(seen, key_at, -1), after, slot_token, g, G, WP, H, HP, PART)
        new_dk = load_rows(d_slot_key + batch * sgb + g * sgg, retained, sgl, D, DP, tl.float32)
        new_dv = load_rows(d_slot_value + batch * sgb + g * sgg, retained, sgl, D, DP, tl.float32)
    else:
        new_dk = tl.zeros((WP, DP), tl.float32)
        new_dv = tl.zeros((WP, DP), tl.float32)
    for step in range(2 * TILES):
        later = step // TILES
        named = tl.load(entry_table + 3 * entry + 1 + later).to(tl.int64)
        block = tl.maximum(named, 0)
        head = (step % TILES) * HEADS + line // WP
        token = tl.load(query_token + block * W + place, mask=(place < W) & (head < R), other=-1)
        token = tl.where(named >= 0, token, -1)
        head = (g * R + head).to(tl.int64)
        at = head * (blocks * W) + block * W + place
        x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
        dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
        ls = tl.load(log_sum + at, mask=token >= 0, other=1e30)
        dl = tl.load(delta + at, mask=token >= 0, other=0.0)
        # Keys in lines: the next products have their operands in registers.
        visible = is_key[:, None] & (slot[:, None] <= place[None, :] + later * WP)
        logits = dot(keys, tl.trans(x), PRECISION) * scaling
        p = tl.exp(tl.where(visible, logits, float("-inf")) - ls[None, :])
        d_logits = p * (dot(values, tl.trans(dy), PRECISION) - dl[None, :]) * scaling
        if LEARNED:
            top_at = tl.load(top_token + at, mask=token >= 0, other=-2)
            of_top = tl.load(d_top + at, mask=token >= 0, other=0.0)
            exact_at = tl.where(is_key, key_at, -1)
            d_logits += tl.where(exact_at[:, None] == top_at[None, :], (of_top * scaling)[None, :], 0.0)
        new_dv += dot(p.to(OPERAND), dy, PRECISION)
        new_dk += dot(d_logits.to(OPERAND), x, PRECISION)
    store_rows(dk + batch * sgb + g * sgg, key_at, sgl, new_dk, D, DP)
    store_rows(dv + batch * sgb + g * sgg, key_at, sgl, new_dv, D, DP)
