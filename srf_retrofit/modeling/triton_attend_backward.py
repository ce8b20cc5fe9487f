"""Gradients of the attention of a block: of its queries, of the states they saw, of the exact keys they saw.

Three passes recompute the probabilities `p = e^{logit - log_sum}` from what the forward pass kept (one number a query
each of `log_sum` and `half_norm`):

- `query_kernel`: gradient of the queries, of the sinks, and in the pure form of the block's own keys;
- `state_kernel`: gradient of the feature sums at the block's start, and of retained keys;
- `key_kernel`: gradient of a block's keys from the queries of that block and the next.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_attend import sink_logits
from .triton_common import (
    add_map_gradients,
    dot,
    load_matrix,
    load_rows,
    load_rows_of_heads,
    load_vector,
    log_features,
    log_features_backward,
    project,
    store_rows,
    store_rows_of_heads,
)
from .triton_pure import in_block_gradient
from .triton_retain import local_logits


@triton.jit
def exact_gradient(logits, do, delta, log_sum, keys, values, scaling, PRECISION: tl.constexpr):
    """Probabilities of exact keys, gradient of their logits before scaling, and what it adds to the queries'."""
    p = tl.exp(logits - log_sum[:, None])
    d_logits = p * (dot(do, tl.trans(values), PRECISION) - delta[:, None]) * scaling
    return p, d_logits, dot(d_logits.to(keys.dtype), keys, PRECISION)


@triton.jit
def query_kernel(
    q, k, v, o, do, dq, dk, dv, block_row, query_token, key_token, key_position, sink_token, slot_token,
    weight, weight_low, bias, norm, norm_low, norm_bias, root,
    key_weight, key_weight_low, key_bias, key_norm, key_norm_low, key_norm_bias,
    mean, log_mass, log_sum, half_norm, delta, d_sink_key, d_sink_value,
    d_weight, d_bias, d_norm, d_norm_bias, d_key_weight, d_key_bias, d_key_norm, d_key_norm_bias,
    scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sob, soh, sol, sdb, sdh, sdl, seb, seh, sel, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr,
    SP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, HB: tl.constexpr, PURE: tl.constexpr, TAIL: tl.constexpr,
    MATRIX: tl.constexpr, KEY_MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dq` and `delta = do . o` of a block; partial sums of the sinks' gradients; `dk`, `dv` in the pure form."""
    block, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    k += batch * skb + g * skg
    v += batch * svb + g * svg
    position = tl.load(key_position + entry + 1)
    line = tl.arange(0, HEADS * WP)
    place = line % WP
    block_token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    sinks = tl.arange(0, SP)
    if SINKS > 0:
        sink_at = tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)
        dsk = tl.zeros((SP, DP), tl.float32)
        dsv = tl.zeros((SP, DP), tl.float32)
    if PURE:
        slot = tl.arange(0, WP)
        all_own_at = tl.load(key_token + (entry + 1) * W + slot, mask=slot < W, other=-1)
        own_at = tl.where(position + slot >= SINKS, all_own_at, -1)
        db = tl.zeros((WP, MP), tl.float32)
        dv_own = tl.zeros((WP, DP), tl.float32)
    for tile in range(TILES):
        head = tile * HEADS + line // WP
        token = tl.where(head < R, block_token, -1)
        head = (g * R + head).to(tl.int64)
        x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
        dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
        y = load_rows_of_heads(o + batch * sob + head * soh, token, sol, D, DP, tl.float32)
        dl = tl.sum(dy.to(tl.float32) * y, 1)
        cell = head * (blocks * W) + block * W + place
        tl.store(delta + cell, dl, mask=token >= 0)
        # Lines without a query get a normaliser that nothing reaches.
        ls = tl.load(log_sum + cell, mask=token >= 0, other=1e30)
        dx = tl.zeros((HEADS * WP, DP), tl.float32)

        if SINKS > 0:
            keys = load_rows(k, sink_at, skl, D, DP, OPERAND)
            values = load_rows(v, sink_at, svl, D, DP, OPERAND)
            logits = sink_logits(
                x, k, row, position, place, sink_token, scaling, skl, SINKS, SP, D, DP, OPERAND, PRECISION
            )
            p, d_logits, more = exact_gradient(logits, dy, dl, ls, keys, values, scaling, PRECISION)
            dx += more
            dsk += dot(tl.trans(d_logits.to(OPERAND)), x, PRECISION)
            dsv += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
        if H > 0:
            for start in tl.static_range(0, HP, HB):
                slots = start + tl.arange(0, HB)
                at = tl.load(slot_token + (entry * G + g) * H + slots, mask=slots < H, other=-1)
                keys = load_rows(k, at, skl, D, DP, OPERAND)
                values = load_rows(v, at, svl, D, DP, OPERAND)
                logits = dot(x, tl.trans(keys), PRECISION) * scaling
                logits = tl.where((at >= 0)[None, :], logits, float("-inf"))
                p, d_logits, more = exact_gradient(logits, dy, dl, ls, keys, values, scaling, PRECISION)
                dx += more
        if not PURE:
            column = tl.arange(0, 2 * WP)
            at = tl.load(key_token + (entry + column // WP) * W + column % WP, mask=column % WP < W, other=-1)
            keys = load_rows(k, at, skl, D, DP, OPERAND)
            values = load_rows(v, at, svl, D, DP, OPERAND)
            logits = local_logits(
                x, k, entry, key_token, position, scaling, skl, W, WP, HEADS, D, DP, SINKS, OPERAND, PRECISION
            )
            p, d_logits, more = exact_gradient(logits, dy, dl, ls, keys, values, scaling, PRECISION)
            dx += more
        if TAIL or PURE:
            half = tl.load(half_norm + cell, mask=token >= 0, other=0.0)
            a = project(x, weight, weight_low, g, M, MP, D, DP, SPLIT, PRECISION) - half[:, None]
            a += load_vector(bias + g * M, M, MP, float("-inf"))[None, :]
            if TAIL:
                p = tl.exp(a + load_vector(log_mass + (entry * G + g) * M, M, MP, 0.0)[None, :] - ls[:, None])
                values = load_matrix(mean + (block * G + g) * M * D, M, MP, D, DP).to(OPERAND)
                da = p * (dot(dy, tl.trans(values), PRECISION) - dl[:, None])
            else:
                da = tl.zeros((HEADS * WP, MP), tl.float32)
            if PURE:
                keys = load_rows(k, own_at, skl, D, DP, OPERAND)
                values = load_rows(v, own_at, svl, D, DP, OPERAND)
                b = log_features(
                    keys, key_weight, key_weight_low, key_bias, key_norm, key_norm_low, key_norm_bias, root, g, 0.0,
                    M, MP, D, DP, KEY_MATRIX, SPLIT, PRECISION,
                )  # fmt: skip
                b = tl.where((own_at >= 0)[:, None], b, float("-inf"))
                d_p = dot(dy, tl.trans(values), PRECISION) - dl[:, None]
                p, da_own, db_own = in_block_gradient(a, b, ls, d_p, WP, MP, OPERAND, PRECISION)
                da += da_own
                db += db_own
                dv_own += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
            dx += log_features_backward(
                da, x, weight, norm, norm_low, norm_bias, root, g, M, MP, D, DP, MATRIX, PRECISION
            )
            if MAP_GRADIENT:
                add_map_gradients(
                    da, x, norm, norm_low, norm_bias, root, g, d_weight, d_bias, d_norm, d_norm_bias,
                    M, MP, D, DP, MATRIX, PRECISION,
                )  # fmt: skip
        store_rows_of_heads(dq + batch * seb + head * seh, token, sel, dx, D, DP)
    if SINKS > 0:
        dim = tl.arange(0, DP)
        here = ((block * G + g) * SINKS + sinks)[:, None] * D + dim[None, :]
        inside = (sinks < SINKS)[:, None] & (dim < D)[None, :]
        tl.store(d_sink_key + here, dsk, mask=inside)
        tl.store(d_sink_value + here, dsv, mask=inside)
    if PURE:
        keys = load_rows(k, own_at, skl, D, DP, OPERAND)
        dk_own = log_features_backward(
            db, keys, key_weight, key_norm, key_norm_low, key_norm_bias, root, g, M, MP, D, DP, KEY_MATRIX, PRECISION
        )
        if MAP_GRADIENT:
            add_map_gradients(
                db, keys, key_norm, key_norm_low, key_norm_bias, root, g,
                d_key_weight, d_key_bias, d_key_norm, d_key_norm_bias, M, MP, D, DP, KEY_MATRIX, PRECISION,
            )  # fmt: skip
        store_rows(dk + batch * sgb + g * sgg, all_own_at, sgl, dk_own, D, DP)
        store_rows(dv + batch * sgb + g * sgg, all_own_at, sgl, dv_own, D, DP)


@triton.jit
def state_kernel(
    q, k, v, do, block_row, query_token, slot_token, weight, weight_low, bias,
    log_mass, reference, log_sum, half_norm, delta, d_sum, d_mass, d_slot_key, d_slot_value, scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, H: tl.constexpr, HB: tl.constexpr,
    TAIL: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program 0 of the last grid axis: gradient of the sums a block starts from; the others: of `HB` slots each."""
    block, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    line = tl.arange(0, HEADS * WP)
    place = line % WP
    block_token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    dim = tl.arange(0, DP)
    if part < TAIL:
        f = tl.arange(0, MP)
        mass = load_vector(log_mass + (entry * G + g) * M, M, MP, 0.0)
        high = load_vector(bias + g * M, M, MP, float("-inf")) + mass
        d_mean = tl.zeros((MP, DP), tl.float32)
        d_total = tl.zeros((MP,), tl.float32)
        for tile in range(TILES):
            head = tile * HEADS + line // WP
            token = tl.where(head < R, block_token, -1)
            head = (g * R + head).to(tl.int64)
            at = head * (blocks * W) + block * W + place
            x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
            dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
            shift = tl.load(log_sum + at, mask=token >= 0, other=1e30)
            shift += tl.load(half_norm + at, mask=token >= 0, other=0.0)
            dl = tl.load(delta + at, mask=token >= 0, other=0.0)
            a = project(x, weight, weight_low, g, M, MP, D, DP, SPLIT, PRECISION)
            p = tl.exp(a + high[None, :] - shift[:, None])
            d_mean += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
            d_total -= tl.sum(p * dl[:, None], 0)
        # From mean values and log-masses to sums and masses, both over the mass.
        top = load_vector(reference + (entry * G + g) * M, M, MP, 0.0)
        scale = tl.exp(top - mass)
        here = (block * G + g) * M
        inside = (f < M)[:, None] & (dim < D)[None, :]
        out = d_sum + here * D + f[:, None] * D + dim[None, :]
        tl.store(out, (d_mean * scale[:, None]).to(d_sum.dtype.element_ty), mask=inside)
        tl.store(d_mass + here + f, d_total * scale, mask=f < M)
    else:
        if H > 0:
            slot = (part - TAIL) * HB + tl.arange(0, HB)
            slot_at = tl.load(slot_token + (entry * G + g) * H + slot, mask=slot < H, other=-1)
            if tl.max(slot_at) >= 0:
                keys = load_rows(k + batch * skb + g * skg, slot_at, skl, D, DP, OPERAND)
                values = load_rows(v + batch * svb + g * svg, slot_at, svl, D, DP, OPERAND)
                dk = tl.zeros((HB, DP), tl.float32)
                dv = tl.zeros((HB, DP), tl.float32)
                for tile in range(TILES):
                    head = tile * HEADS + line // WP
                    token = tl.where(head < R, block_token, -1)
                    head = (g * R + head).to(tl.int64)
                    at = head * (blocks * W) + block * W + place
                    x = load_rows_of_heads(q + batch * sqb + head * sqh, token, sql, D, DP, OPERAND)
                    dy = load_rows_of_heads(do + batch * sdb + head * sdh, token, sdl, D, DP, OPERAND)
                    ls = tl.load(log_sum + at, mask=token >= 0, other=1e30)
                    dl = tl.load(delta + at, mask=token >= 0, other=0.0)
                    logits = dot(x, tl.trans(keys), PRECISION) * scaling
                    p = tl.exp(tl.where((slot_at >= 0)[None, :], logits, float("-inf")) - ls[:, None])
                    d_logits = p * (dot(dy, tl.trans(values), PRECISION) - dl[:, None]) * scaling
                    dk += dot(tl.trans(d_logits.to(OPERAND)), x, PRECISION)
                    dv += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
                # A key may sit in the slots of many blocks.
                here = batch * sgb + g * sgg + slot_at.to(tl.int64)[:, None] * sgl + dim[None, :]
                inside = (slot_at >= 0)[:, None] & (dim < D)[None, :]
                tl.atomic_add(d_slot_key + here, dk, mask=inside)
                tl.atomic_add(d_slot_value + here, dv, mask=inside)


@triton.jit
def key_kernel(
    q, k, v, do, dk, dv, d_slot_key, d_slot_value, entry_table, query_token, key_token, key_position,
    log_sum, delta, scaling, blocks,
    sqb, sqh, sql, skb, skg, skl, svb, svg, svl, sdb, sdh, sdl, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    HEADS: tl.constexpr, TILES: tl.constexpr, SINKS: tl.constexpr, H: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dk` and `dv` of an entry's keys from the queries of its own block and the next; `entry_table` names both."""
    entry, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(entry_table + 3 * entry)
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    slot, line = tl.arange(0, WP), tl.arange(0, HEADS * WP)
    place = line % WP
    key_at = tl.load(key_token + entry * W + slot, mask=slot < W, other=-1)
    position = tl.load(key_position + entry)
    is_key = (key_at >= 0) & (position + slot >= SINKS)
    keys = load_rows(k + batch * skb + g * skg, key_at, skl, D, DP, OPERAND)
    values = load_rows(v + batch * svb + g * svg, key_at, svl, D, DP, OPERAND)
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
        visible = is_key[None, :] & (slot[None, :] <= place[:, None] + later * WP)
        logits = dot(x, tl.trans(keys), PRECISION) * scaling
        p = tl.exp(tl.where(visible, logits, float("-inf")) - ls[:, None])
        d_logits = p * (dot(dy, tl.trans(values), PRECISION) - dl[:, None]) * scaling
        new_dk += dot(tl.trans(d_logits.to(OPERAND)), x, PRECISION)
        new_dv += dot(tl.trans(p.to(OPERAND)), dy, PRECISION)
    if H > 0:
        new_dk += load_rows(d_slot_key + batch * sgb + g * sgg, key_at, sgl, D, DP, tl.float32)
        new_dv += load_rows(d_slot_value + batch * sgb + g * sgg, key_at, sgl, D, DP, tl.float32)
    store_rows(dk + batch * sgb + g * sgg, key_at, sgl, new_dk, D, DP)
    store_rows(dv + batch * sgb + g * sgg, key_at, sgl, new_dv, D, DP)
