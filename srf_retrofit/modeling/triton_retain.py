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
)

# What a level is worth in `pool_order`: no pool has so many keys.
PLACES = tl.constexpr(65536)


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
    if SINKS > 0:
        sinks = tl.arange(0, SP)
        at = tl.load(sink_token + row * SINKS + sinks, mask=sinks < SINKS, other=-1)
        sink_keys = tl.trans(load_rows(k, at, skl, D, DP, OPERAND))
        seen = (at >= 0)[None, :] & (sinks[None, :] <= position + place[:, None])
    for tile in range((R + HEADS - 1) // HEADS):
        head = tile * HEADS + line // WP
        here = tl.where(head < R, token, -1)
        pointers = q + (g * R + head).to(tl.int64) * sqh
        x = load_rows_of_heads(pointers, here, sql, D, DP, OPERAND)
        logits = local_logits(x, keys, local, key_place, place, scaling, PRECISION)
        top = tl.maximum(tl.max(logits, 1), -1e30)
        if SINKS > 0:
            exact = dot(x, sink_keys, PRECISION) * scaling
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
def absent_slots(slot_bounds, g, H: tl.constexpr, UNEVEN: tl.constexpr):
    """How many of `H` slots, the first of them, head `g` has not got; see `state.slots_by_head`."""
    if UNEVEN:
        absent = H - (tl.load(slot_bounds + g + 1) - tl.load(slot_bounds + g))
    else:
        absent = 0
    return absent


@triton.jit
def pool_order(held, new, here, absent, HP: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr):
    """Integers without ties that sort a pool, `H` slots and the later keys that are `here`, by level and then by age.

    The first `absent` slots are none.

    Levels (HP,) and (KEYS,) are whole numbers; free slots and what may not compete, `-inf`, sort below all others, and
    what is not of the pool below these. Returns the order of both parts, of the least that a key could have that may
    compete, and of what is above all.
    """
    slot, key = tl.arange(0, HP), tl.arange(0, KEYS)
    competes, arrives = held > float("-inf"), new > float("-inf")
    level, new_level = tl.where(competes, held, 0.0).to(tl.int32), tl.where(arrives, new, 0.0).to(tl.int32)
    least = tl.min(tl.where(competes, level, 0x7FFFFFFF), 0)
    least = tl.minimum(least, tl.min(tl.where(arrives, new_level, 0x7FFFFFFF), 0))
    level, new_level = tl.where(competes, level, least - 1), tl.where(arrives, new_level, least - 1)
    most = tl.maximum(tl.max(level, 0), tl.max(new_level, 0))
    below = (least.to(tl.int64) - 2) * PLACES
    order = level.to(tl.int64) * PLACES + (PLACES - 1 - slot)
    new_order = new_level.to(tl.int64) * PLACES + (PLACES - 1 - H - key)
    return (
        tl.where((slot >= absent) & (slot < H), order, below),
        tl.where(here, new_order, below),
        least.to(tl.int64) * PLACES,
        (most.to(tl.int64) + 1) * PLACES,
    )


@triton.jit
def last_kept(order, new_order, least, high, kept):
    """The `kept`-th largest of a pool in `pool_order`, of which fewer than `kept` reach `high`: by bisection.

    `high` itself where none is kept.
    """
    low = tl.where(kept > 0, least - PLACES, high)
    middle = least  # whether free slots are left is found out first
    while high - low > 1:
        count = tl.sum((order >= middle).to(tl.int32), 0) + tl.sum((new_order >= middle).to(tl.int32), 0)
        low = tl.where(count >= kept, middle, low)
        high = tl.where(count > kept, high, middle + (count == kept).to(tl.int64))
        middle = low + ((high - low) >> 1)
    return low


@triton.jit
def turns(first, second):
    """How many marks (0 or 1, or two side by side) stand before each place of two parts, one behind the other."""
    return tl.cumsum(first, 0) - first, tl.sum(first, 0) + tl.cumsum(second, 0) - second


@triton.jit
def store_best(
    to_token, to_level, kept, held, token, rival, here, absent, H: tl.constexpr, HP: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Store token and level of the best of slots (HP,) and the later keys (KEYS,) `here`, in order of position.

    As many as there are slots without the `absent` ones, which have token -1 before and after.
    """
    order, new_order, least, high = pool_order(held, rival, here, absent, HP, KEYS, H)
    last = last_kept(order, new_order, least, high, H - absent)
    stays, enters = order >= last, new_order >= last
    turn, later_turn = turns(stays.to(tl.int32), enters.to(tl.int32))
    tl.store(to_token + absent + turn, kept, mask=stays)
    tl.store(to_level + absent + turn, held, mask=stays)
    tl.store(to_token + absent + later_turn, token, mask=enters)
    tl.store(to_level + absent + later_turn, rival, mask=enters)
    slot = tl.arange(0, HP)
    tl.store(to_token + slot, kept, mask=slot < absent)
    tl.store(to_level + slot, held, mask=slot < absent)


@triton.jit
def entry_priority(
    received, start_priority, entry, key, here, row, first, last, g,
    G: tl.constexpr, W: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Priorities of slots `key` of entries: from the queries of their own block, of the next, and of earlier calls."""
    block = entry - row  # the next one; the entry's own is the one before
    at = (block * G + g) * 2 * W + key
    top = tl.load(received + at, mask=here & (block < last), other=float("-inf"))
    at = ((block - 1) * G + g) * 2 * W + W + key
    top = tl.maximum(top, tl.load(received + at, mask=here & (block > first), other=float("-inf")))
    if START:
        at = (row * G + g) * 2 * W + (block - first) * W + key
        top = tl.maximum(top, tl.load(start_priority + at, mask=here & (block - first < 2), other=float("-inf")))
    return top


@triton.jit
def rank_run_kernel(
    run_table, block_row, row_block, key_token, key_position, block_full, received, start_priority,
    foresight, octaves, slot_bounds, one_batch, pool, blocks, priority, level, run_token, run_priority,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, KEYS: tl.constexpr,
    SINKS: tl.constexpr, D: tl.constexpr, FADE: tl.constexpr, FORESIGHT: tl.constexpr, START: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """Priorities and levels of all keys that leave the window in a run of blocks, and the slots if these were all.

    Writes `priority` (N + rows, G, w), `level` (G, N, w) of the keys that compete at the end of each block, and the
    run's slots (runs, G, h) in order of position, free ones first.
    """
    run, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = tl.load(run_table + 2 * run), tl.load(run_table + 2 * run + 1)
    row = tl.load(block_row + first).to(tl.int64)
    row_first, row_last = tl.load(row_block + row), tl.load(row_block + row + 1)
    place = tl.arange(0, KEYS)
    here = place < count * W
    block, key = first + place // W, place % W
    entry = block + row
    top = entry_priority(received, start_priority, entry, key, here, row, row_first, row_last, g, G, W, START)
    tl.store(priority + (entry * G + g) * W + key, top, mask=here)
    full = tl.load(block_full + block, mask=here, other=0) > 0
    position = tl.load(key_position + entry, mask=here, other=0)
    token = tl.load(key_token + entry * W + key, mask=here & (position + key >= SINKS), other=-1)
    if FORESIGHT:
        octaves += (tl.where(one_batch > 0, 0, row) * G + g) * pool
        seen = tl.load(octaves + token, mask=token >= 0, other=0.0)
        rival = foreseen_level(top, position // W, tl.load(foresight + g * (1 + 4 * D)), seen, FADE)
    else:
        rival = priority_level(top, position // W, FADE)
    rival = tl.where((token >= 0) & full, rival, float("-inf"))
    tl.store(level + (g.to(tl.int64) * blocks + first) * W + place, rival, mask=here)

    free = tl.full((HP,), float("-inf"), tl.float32)
    nobody = tl.full((HP,), -1, tl.int32)
    at = (run * G + g) * H
    absent = absent_slots(slot_bounds, g, H, UNEVEN)
    store_best(run_token + at, run_priority + at, nobody, free, token, rival, here, absent, H, HP, KEYS)
    if first + count == row_last:
        # The row's last block has had no competition yet.
        end = tl.arange(0, WP)
        inside = end < W
        after = row_last + row + end // W
        own = entry_priority(received, start_priority, after, end, inside, row, row_first, row_last, g, G, W, START)
        tl.store(priority + (after * G + g) * W + end, own, mask=inside)


@triton.jit
def rank_scan_kernel(
    row_run, row_block, start_token, start_slot_priority, start_priority, run_token, run_priority, slot_bounds,
    priority, slot_token, slot_priority,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, START: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """Turn the runs' slots, in place, into the slots before each run; one row and head.

    Threads share these slots, so there is a barrier wherever one writes what another reads.
    """
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, key = tl.arange(0, HP), tl.arange(0, WP)
    here = slot < H
    kept = tl.full((HP,), -1, tl.int32)
    held = tl.full((HP,), float("-inf"), tl.float32)
    if START:
        begun = (row * G + g) * H + slot
        kept = tl.load(start_token + begun, mask=here, other=-1)
        held = tl.load(start_slot_priority + begun, mask=here, other=float("-inf"))
    low, high = tl.load(row_run + row), tl.load(row_run + row + 1)
    entry = tl.load(row_block + row) + row
    tl.store(slot_token + (entry * G + g) * H + slot, kept, mask=here)
    tl.store(slot_priority + (entry * G + g) * H + slot, held, mask=here)
    if low == high:
        # A row without a block in this call keeps what it came with.
        top = tl.full((WP,), float("-inf"), tl.float32)
        if START:
            top = tl.load(start_priority + (row * G + g) * 2 * W + key, mask=key < W, other=float("-inf"))
        tl.store(priority + (entry * G + g) * W + key, top, mask=key < W)
    else:
        at = (low.to(tl.int64) * G + g) * H
        absent = absent_slots(slot_bounds, g, H, UNEVEN)
        token = tl.load(run_token + at + slot, mask=here, other=-1)
        rival = tl.load(run_priority + at + slot, mask=here, other=float("-inf"))
        tl.debug_barrier()
        tl.store(run_token + at + slot, kept, mask=here)
        tl.store(run_priority + at + slot, held, mask=here)
        for _ in range(low + 1, high):
            at += G * H
            next_token = tl.load(run_token + at + slot, mask=here, other=-1)
            next_rival = tl.load(run_priority + at + slot, mask=here, other=float("-inf"))
            tl.debug_barrier()
            store_best(run_token + at, run_priority + at, kept, held, token, rival, here, absent, H, HP, HP)
            tl.debug_barrier()
            kept = tl.load(run_token + at + slot, mask=here, other=-1)
            held = tl.load(run_priority + at + slot, mask=here, other=float("-inf"))
            token, rival = next_token, next_rival


@triton.jit
def rank_block_kernel(
    block_row, row_block, row_run, key_token, level, run_token, run_priority, slot_bounds, blocks,
    slot_token, slot_priority, fold_token,
    G: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, RUN: tl.constexpr, KEYS: tl.constexpr,
    UNEVEN: tl.constexpr,
):  # fmt: skip
    """The slots after a block, and the tokens that are folded at its end, both in order of position.

    The keys kept are the `H` best of all before, so no block waits for another: the pool are the slots before the
    block's run and all that competed since. `-1` is folded of free slots and of keys that could not compete.
    """
    block, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(block_row + block)
    index = (block - tl.load(row_block + row)).to(tl.int32)
    run = tl.load(row_run + row).to(tl.int64) + index // RUN
    before = index % RUN  # blocks of the run before this one
    first = block - before
    slot, place = tl.arange(0, HP), tl.arange(0, KEYS)
    here = place < (before + 1) * W
    at = (run * G + g) * H + slot
    kept = tl.load(run_token + at, mask=slot < H, other=-1)
    held = tl.load(run_priority + at, mask=slot < H, other=float("-inf"))
    token = tl.load(key_token + (first + row) * W + place, mask=here, other=-1)
    rival = tl.load(level + (g * blocks + first) * W + place, mask=here, other=float("-inf"))
    kept = tl.where(held > float("-inf"), kept, -1)
    token = tl.where(rival > float("-inf"), token, -1)

    absent = absent_slots(slot_bounds, g, H, UNEVEN)
    order, new_order, least, high = pool_order(held, rival, here, absent, HP, KEYS, H)
    last = last_kept(order, new_order, least, high, H - absent)
    own = place >= before * W
    # Before the run all slots stay, whatever is in them.
    low = least - PLACES
    old_order = tl.where(own, low - 1, new_order)
    old_last = last_kept(order, old_order, least, tl.where(before > 0, last + 1, low + 1), H - absent)
    stays, enters = order >= last, new_order >= last
    leaves = (order >= old_last) & (order < last)
    passes = ((old_order >= old_last) | (own & here)) & (new_order < last)
    # Counted together, in halves of a number.
    turn, later_turn = turns(
        stays.to(tl.int32) + (leaves.to(tl.int32) << 16), enters.to(tl.int32) + (passes.to(tl.int32) << 16)
    )
    out = ((block + 1 + row) * G + g) * H
    tl.store(slot_token + out + slot, -1, mask=slot < absent)
    out += absent
    tl.store(slot_token + out + (turn & 0xFFFF), kept, mask=stays)
    tl.store(slot_priority + out + (turn & 0xFFFF), held, mask=stays)
    tl.store(slot_token + out + (later_turn & 0xFFFF), token, mask=enters)
    tl.store(slot_priority + out + (later_turn & 0xFFFF), rival, mask=enters)
    out = fold_token + (block * G + g) * W
    tl.store(out + (turn >> 16), kept, mask=leaves)
    tl.store(out + (later_turn >> 16), token, mask=passes)
