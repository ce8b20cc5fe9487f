"""Which keys are retained: their priorities in one parallel pass, then the competition for the slots, block by block.

The rules are those of `retention.local_priorities` and `retention.rank_and_evict`, to the bit where sums agree to 12
bits.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise

from .triton_common import (
    dot,
    forecast_octaves,
    foreseen_level,
    load_rows,
    load_rows_of_heads,
    priority_level,
    sort_keys,
)


@triton.jit
def local_keys(key_token, entry, position, start, W: tl.constexpr, WP: tl.constexpr, SIZE: tl.constexpr,
    SINKS: tl.constexpr):  # fmt: skip
    """Keys `start` to `start + SIZE` of the block before and a block's own, padded to `WP` each.

    Returns their tokens, -1 for none and for sinks, and the place of each, counted from the block's first slot.
    """
    column = start + tl.arange(0, SIZE)
    own, slot = column // WP, column % WP
    token = tl.load(key_token + (entry + own) * W + slot, mask=slot < W, other=-1)
    place = slot + (own - 1) * W
    return tl.where(position + place >= SINKS, token, -1), place


@triton.jit
def local_logits(q, keys, token, key_place, place, scaling, PRECISION: tl.constexpr):
    """Logits of queries at places `place` of a block over `local_keys`, `-inf` where invisible."""
    logits = dot(q, tl.trans(keys), PRECISION) * scaling
    # Compared, not subtracted: `place - key_place >= 0` came out wrong on half of a tile's lines (Triton 3.6, sm_90).
    return tl.where((token >= 0)[None, :] & (key_place[None, :] <= place[:, None]), logits, float("-inf"))


@triton.jit
def priority_kernel(
    q, k, block_row, query_token, key_token, key_position, sink_token, received, scaling,
    sqb, sqh, sql, skb, skg, skl, one_batch, delay,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    HEADS: tl.constexpr, SINKS: tl.constexpr, SP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest probability that the keys of a block and of the one before receive from the block's queries.

    `received` is (N, G, 2, W): before and own, rounded as `retention.round_priority`, `-inf` where no query counts.
    """
    block, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    k += batch * skb + g * skg
    q += batch * sqb
    position = tl.load(key_position + entry + 1)
    line = tl.arange(0, HEADS * WP)
    place = line % WP
    token = tl.load(query_token + block * W + place, mask=place < W, other=-1)
    local, key_place = local_keys(key_token, entry, position, 0, W, WP, 2 * WP, SINKS)
    keys = load_rows(k, local, skl, D, DP, OPERAND)
    far = key_place[None, :] < (place - delay)[:, None]
    best = tl.full((2 * WP,), float("-inf"), tl.float32)
    sinks = tl.arange(0, SP)
    for tile in range((R + HEADS - 1) // HEADS):
        head = tile * HEADS + line // WP
        here = tl.where(head < R, token, -1)
        pointers = q + (g * R + head).to(tl.int64) * sqh
        x = load_rows_of_heads(pointers, here, sql, D, DP, OPERAND)
        logits = local_logits(x, keys, local, key_place, place, scaling, PRECISION)
        top = tl.maximum(tl.max(logits, 1), -1e30)
        if SINKS > 0:
            at = tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)
            exact = dot(x, tl.trans(load_rows(k, at, skl, D, DP, OPERAND)), PRECISION) * scaling
            seen = (at >= 0)[None, :] & (sinks[None, :] <= position + place[:, None])
            exact = tl.where(seen, exact, float("-inf"))
            top = tl.maximum(top, tl.max(exact, 1))
            total = tl.sum(tl.exp(logits - top[:, None]), 1) + tl.sum(tl.exp(exact - top[:, None]), 1)
        else:
            total = tl.sum(tl.exp(logits - top[:, None]), 1)
        total = tl.where(total > 0, total, 1.0)
        probability = tl.exp(logits - top[:, None]) / total[:, None]
        counts = far & (here >= 0)[:, None] & (logits > float("-inf"))
        best = tl.maximum(best, tl.max(tl.where(counts, probability, float("-inf")), 0))
    bits = (best.to(tl.int32, bitcast=True) + 0x400) & -0x800
    column = tl.arange(0, 2 * WP)
    own, slot = column // WP, column % WP
    out = received + ((block * G + g) * 2 + own) * W + slot
    tl.store(out, bits.to(tl.float32, bitcast=True), mask=slot < W)


@triton.jit
def forecast_kernel(
    k, v, foresight, octaves, skb, skg, skl, svb, svg, svl, pool,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What `retention.forecast` foresees of every key of the pool, before it is rounded: (B, G, E + L)."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, DP)
    here = (token < pool)[:, None] & (d < D)[None, :]
    key = tl.load(k + b * skb + g * skg + token[:, None] * skl + d[None, :], mask=here, other=0.0).to(tl.float32)
    value = tl.load(v + b * svb + g * svg + token[:, None] * svl + d[None, :], mask=here, other=0.0).to(tl.float32)
    out = forecast_octaves(foresight + g * (1 + 4 * D) + 1, key, value, d, D)
    tl.store(octaves + (b * G + g) * pool + token, out, mask=token < pool)


@triton.jit
def part_keys(priority, top, first: tl.constexpr, count: tl.constexpr, COUNT: tl.constexpr):
    """`triton_common.sort_keys` of a part of the pool, whose place `first + i` holds `priority[i]`; padding is last."""
    place = first + tl.arange(0, COUNT)
    return tl.where(place < first + count, sort_keys(priority, top, place), -100000 - place)


@triton.jit
def compete(
    kept, kept_priority, token, priority,
    H: tl.constexpr, HP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """The `H` highest levels of the `H` kept keys and `W` later ones, in order of position, free slots first.

    Returns the new slots, and which of both parts stay: (HP,), (HP,), (HP,), (WP,).
    """
    slot = tl.arange(0, HP)
    best = tl.maximum(tl.max(kept_priority, 0), tl.max(priority, 0))
    held = part_keys(kept_priority, best, 0, H, HP)
    new = part_keys(priority, best, H, W, WP)
    ahead = tl.sum((held[None, :] > held[:, None]).to(tl.int32), 1)
    ahead += tl.sum((new[None, :] > held[:, None]).to(tl.int32), 1)
    stays = ((ahead < H) & (slot < H)).to(tl.int32)
    ahead = tl.sum((held[None, :] > new[:, None]).to(tl.int32), 1)
    ahead += tl.sum((new[None, :] > new[:, None]).to(tl.int32), 1)
    enters = ((ahead < H) & (tl.arange(0, WP) < W)).to(tl.int32)
    # Those that stay, moved together: each slot picks the one whose turn it is, and exactly one is.
    turn = tl.where(stays > 0, tl.cumsum(stays, 0) - stays, -1)
    later_turn = tl.where(enters > 0, tl.sum(stays, 0) + tl.cumsum(enters, 0) - enters, -1)
    pick = turn[None, :] == slot[:, None]
    later_pick = later_turn[None, :] == slot[:, None]
    out = tl.sum(tl.where(pick, kept[None, :], 0), 1) + tl.sum(tl.where(later_pick, token[None, :], 0), 1)
    top = tl.max(tl.where(pick, kept_priority[None, :], float("-inf")), 1)
    top = tl.maximum(top, tl.max(tl.where(later_pick, priority[None, :], float("-inf")), 1))
    out = tl.where(top > float("-inf"), out, -1)
    return out, top, stays, enters


@triton.jit
def entry_priority(
    received, start_priority, entry, row, first, last, g,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Priorities (WP,) of an entry's keys: from the queries of their own block, of the next, and of earlier calls."""
    key = tl.arange(0, WP)
    block = entry - row  # the next one; the entry's own is the one before
    at = (block * G + g) * 2 * W + key
    top = tl.load(received + at, mask=key < tl.where(block < last, W, 0), other=float("-inf"))
    at = ((block - 1) * G + g) * 2 * W + W + key
    top = tl.maximum(top, tl.load(received + at, mask=key < tl.where(block > first, W, 0), other=float("-inf")))
    if START:
        at = (row * G + g) * 2 * W + (block - first) * W + key
        mask = key < tl.where(block - first < 2, W, 0)
        top = tl.maximum(top, tl.load(start_priority + at, mask=mask, other=float("-inf")))
    return top


@triton.jit
def rank_run_kernel(
    run_table, block_row, row_block, key_token, key_position, block_full, received, start_priority,
    foresight, octaves, one_batch, pool, run_token, run_priority, priority, slot_token, slot_priority, fold_token,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, FADE: tl.constexpr, FORESIGHT: tl.constexpr, WRITE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The competition of one head along a run of blocks; on indices only.

    The keys kept are the `H` best of all before, so runs can be ranked by themselves (`WRITE` false) and merged.
    With `WRITE`, from the slots before the run: writes priorities and slots at every entry, and for every block the
    tokens that are folded at its end, in order of position.
    """
    run, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = tl.load(run_table + 2 * run), tl.load(run_table + 2 * run + 1)
    row = tl.load(block_row + first)
    row_first, row_last = tl.load(row_block + row), tl.load(row_block + row + 1)
    slot, key = tl.arange(0, HP), tl.arange(0, WP)
    place = (run * G + g) * H
    if FORESIGHT:
        octaves += (tl.where(one_batch > 0, 0, row).to(tl.int64) * G + g) * pool
        factor = tl.load(foresight + g * (1 + 4 * D))
    if WRITE:
        kept = tl.load(run_token + place + slot, mask=slot < H, other=-1)
        kept_priority = tl.load(run_priority + place + slot, mask=slot < H, other=float("-inf"))
    else:
        kept = tl.full((HP,), -1, tl.int32)
        kept_priority = tl.full((HP,), float("-inf"), tl.float32)
    for i in range(count):
        block = (first + i).to(tl.int64)
        entry = block + row
        top = entry_priority(received, start_priority, entry, row, row_first, row_last, g, G, W, WP, START)
        full = tl.load(block_full + block) > 0
        token = tl.load(key_token + entry * W + key, mask=key < W, other=-1)
        token = tl.where(tl.load(key_position + entry) + key >= SINKS, token, -1)
        first_block = tl.load(key_position + entry) // W
        if FORESIGHT:
            seen = tl.load(octaves + token, mask=token >= 0, other=0.0)
            level = foreseen_level(top, first_block, factor, seen, FADE)
        else:
            level = priority_level(top, first_block, FADE)
        rival = tl.where((token >= 0) & full, level, float("-inf"))
        new, new_priority, stays, enters = compete(kept, kept_priority, token, rival, H, HP, W, WP)
        if WRITE:
            tl.store(priority + (entry * G + g) * W + key, top, mask=key < W)
            out = (entry * G + g) * H + slot
            tl.store(slot_token + out, kept, mask=slot < H)
            tl.store(slot_priority + out, kept_priority, mask=slot < H)
            # Nothing is folded of free slots and of keys that could not compete.
            leaving = (1 - stays) * (slot < H).to(tl.int32)
            passing = (1 - enters) * (key < W).to(tl.int32)
            out = fold_token + (block * G + g) * W
            to = tl.cumsum(leaving, 0) - leaving
            tl.store(out + to, tl.where(kept_priority > float("-inf"), kept, -1), mask=(leaving > 0) & (to < W))
            to = tl.sum(leaving, 0) + tl.cumsum(passing, 0) - passing
            tl.store(out + to, tl.where(rival > float("-inf"), token, -1), mask=(passing > 0) & (to < W))
        kept = new
        kept_priority = new_priority
    if not WRITE:
        tl.store(run_token + place + slot, kept, mask=slot < H)
        tl.store(run_priority + place + slot, kept_priority, mask=slot < H)
    elif first + count == row_last:
        entry = (row_last + row).to(tl.int64)
        top = entry_priority(received, start_priority, entry, row, row_first, row_last, g, G, W, WP, START)
        tl.store(priority + (entry * G + g) * W + key, top, mask=key < W)
        out = (entry * G + g) * H + slot
        tl.store(slot_token + out, kept, mask=slot < H)
        tl.store(slot_priority + out, kept_priority, mask=slot < H)


@triton.jit
def rank_scan_kernel(
    row_run, row_block, start_token, start_slot_priority, start_priority, run_token, run_priority,
    priority, slot_token, slot_priority,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Turn the runs' slots, in place, into the slots before each run; one row and head."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, key = tl.arange(0, HP), tl.arange(0, WP)
    place = (row * G + g) * H + slot
    kept = tl.full((HP,), -1, tl.int32)
    kept_priority = tl.full((HP,), float("-inf"), tl.float32)
    if START:
        kept = tl.load(start_token + place, mask=slot < H, other=-1)
        kept_priority = tl.load(start_slot_priority + place, mask=slot < H, other=float("-inf"))
    low, high = tl.load(row_run + row), tl.load(row_run + row + 1)
    for i in range(high - low):
        at = ((low + i).to(tl.int64) * G + g) * H + slot
        token = tl.load(run_token + at, mask=slot < H, other=-1)
        rival = tl.load(run_priority + at, mask=slot < H, other=float("-inf"))
        tl.store(run_token + at, kept, mask=slot < H)
        tl.store(run_priority + at, kept_priority, mask=slot < H)
        kept, kept_priority, _stays, _enters = compete(kept, kept_priority, token, rival, H, HP, H, HP)
    if low == high:
        # A row without a block in this call keeps what it came with.
        entry = tl.load(row_block + row) + row
        at = (entry * G + g) * H + slot
        tl.store(slot_token + at, kept, mask=slot < H)
        tl.store(slot_priority + at, kept_priority, mask=slot < H)
        top = tl.full((WP,), float("-inf"), tl.float32)
        if START:
            top = tl.load(start_priority + (row * G + g) * 2 * W + key, mask=key < W, other=float("-inf"))
        tl.store(priority + (entry * G + g) * W + key, top, mask=key < W)
