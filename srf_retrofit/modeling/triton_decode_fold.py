"""The once-a-block part of the decode kernel: which keys stay, what is folded, how the buffers move up.

Runs inside `triton_decode_kernel.decode_kernel`, for one row and one key/value head, on memory that no other program
touches. Threads of a program share it, so wherever something is overwritten that others may still have to read, or
read that others have just written, there is a barrier between.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # passed on: `triton_decode` reports it, and a loader that scans for imports sees an optional one
    raise

from .triton_common import forecast_octaves, foreseen_level, priority_level, sort_keys
from .triton_eight_bits import load_numbers

LOG_ZERO = tl.constexpr(-1e30)
# Places of a pool that are all compared with one another.
COUNTED = tl.constexpr(128)


@triton.jit
def load_rows(base, row, here, D: tl.constexpr, DP: tl.constexpr):
    """Rows `row` (N,) of a contiguous matrix with `D` columns where `here`, zeros elsewhere: (N, DP)."""
    d = tl.arange(0, DP)
    return tl.load(base + row[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, row, here, x, D: tl.constexpr, DP: tl.constexpr):
    """The counterpart of `load_rows`."""
    d = tl.arange(0, DP)
    x = x.to(base.dtype.element_ty)
    tl.store(base + row[:, None] * D + d[None, :], x, mask=here[:, None] & (d < D)[None, :])


@triton.jit
def dot_weight(x, weight, ROUNDED: tl.constexpr):
    """`x @ weight.T` of exact operands (N, DP) and a float32 matrix (K, DP): all its bits count.

    `ROUNDED`: its values are ones of the type of `x` (`feature_map.round_weights`), so that it need not be split.
    """
    if x.dtype == tl.float32:
        out = tl.dot(x, tl.trans(weight), input_precision="ieee")
    elif ROUNDED:
        out = tl.dot(x, tl.trans(weight.to(x.dtype)))
    else:
        leading = weight.to(x.dtype)
        rest = weight - leading.to(tl.float32)
        middle = rest.to(x.dtype)
        rest = rest - middle.to(tl.float32)
        out = tl.dot(x, tl.trans(rest.to(x.dtype)))
        out = tl.dot(x, tl.trans(middle), out)
        out = tl.dot(x, tl.trans(leading), out)
    return out


@triton.jit
def dot_value(p, value, out, OPERAND: tl.constexpr):
    """`out + p @ value` of float32 weights in 0..1 (N, K), to 16 bits or more of each, and exact values (K, DP)."""
    value = value.to(OPERAND)
    if OPERAND == tl.float32:  # noqa: SIM300
        out = tl.dot(p, value, out, input_precision="ieee")
    else:
        leading = p.to(OPERAND)
        out = tl.dot((p - leading.to(tl.float32)).to(OPERAND), value, out)
        out = tl.dot(leading, value, out)
    return out


@triton.jit
def half_square(
    x, norm_weight, norm_bias, root, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NT: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
):  # fmt: skip
    """`|norm_weight x~ + norm_bias|^2 / 2` of queries or keys (N, DP), as (N,)."""
    d = tl.arange(0, DP)
    half = tl.zeros((N,), tl.float32)
    if HAS_NORM_WEIGHT:
        for n0 in range(0, D, NT):
            n = n0 + tl.arange(0, NT)
            moved = dot_weight(x, load_rows(norm_weight, n, n < D, D, DP), False) * root
            if HAS_NORM_BIAS:
                moved += tl.load(norm_bias + n, mask=n < D, other=0.0)[None, :]
            half += 0.5 * tl.sum(moved * moved, 1)
    else:
        moved = x.to(tl.float32) * root
        if HAS_NORM_BIAS:
            moved += tl.load(norm_bias + d, mask=d < D, other=0.0)[None, :]
        half += 0.5 * tl.sum(moved * moved, 1)
    return half


@triton.jit
def fold_keys(
    key, value, leaves, kv_mean, k_sum, k_max, weight, bias, norm_weight, norm_bias, root,
    M: tl.constexpr, MT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NT: tl.constexpr, EP: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, OPERAND: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Add the keys and values (EP, DP) marked in `leaves` (EP,) to the feature sums, in tiles of `MT` features."""
    key = key.to(OPERAND)
    half = half_square(key, norm_weight, norm_bias, root, EP, D, DP, NT, HAS_NORM_WEIGHT, HAS_NORM_BIAS)
    for m0 in range(0, M, MT):
        m = m0 + tl.arange(0, MT)
        here = m < M
        # All loads first: products have barriers, which later ones could not overtake.
        mean = load_rows(kv_mean, m, here, D, DP).to(tl.float32)
        mass = tl.load(k_sum + m, mask=here, other=0.0)
        before = tl.maximum(tl.load(k_max + m, mask=here, other=0.0), LOG_ZERO)
        log_key = dot_weight(key, load_rows(weight, m, here, D, DP), ROUNDED) * root
        log_key += tl.load(bias + m, mask=here, other=0.0)[None, :] - half[:, None]
        log_key = tl.trans(tl.where(leaves[:, None], log_key, float("-inf")))  # (MT, EP)
        top = tl.maximum(before, tl.max(log_key, 1))
        feature = tl.exp(log_key - top[:, None])
        kept = mass * tl.exp(before - top)
        mass = kept + tl.sum(feature, 1)
        total = dot_value(feature, value, mean * kept[:, None], OPERAND)
        mean = total / tl.maximum(mass, 0.5)[:, None]
        tl.debug_barrier()
        store_rows(kv_mean, m, here, mean, D, DP)
        tl.store(k_sum + m, mass, mask=here)
        tl.store(k_max + m, tl.where(top > LOG_ZERO, top, float("-inf")), mask=here)


@triton.jit
def pool_numbers(
    retained, window, place, here, h, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr
):
    """Vectors `place` of `[h retained | window]`, as `load_numbers`."""
    old = load_numbers(retained, place, here & (place < h), D, DP, WIDE, OPERAND)
    new = load_numbers(window, place - h, here & (place >= h), D, DP, WIDE, OPERAND)
    return tl.where((place < h)[:, None], old, new)


@triton.jit
def load_pool(retained, window, place, here, h, D: tl.constexpr, DP: tl.constexpr):
    """Rows `place` of `[h retained | window]`, as they are stored."""
    old = load_rows(retained, place, here & (place < h), D, DP)
    new = load_rows(window, place - h, here & (place >= h), D, DP)
    return tl.where((place < h)[:, None], old, new)


@triton.jit
def move_kept(
    retained_key, retained_value, places, window_key, window_value, h,
    W: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MOVE: tl.constexpr,
):  # fmt: skip
    """Slot `j` takes the key at place `places[j] >= j` of the pool, in ascending tiles, so that none is lost."""
    for j0 in range(0, h, MOVE):
        j = j0 + tl.arange(0, MOVE)
        place = tl.load(places + j, mask=j < h, other=0.0)
        place = tl.minimum(tl.maximum(place, 0.0), h + (W - 1.0)).to(tl.int32)
        moves = (j < h) & (place != j)
        key = load_pool(retained_key, window_key, place, moves, h, D, DP)
        value = load_pool(retained_value, window_value, place, moves, h, D, DP)
        tl.debug_barrier()
        store_rows(retained_key, j, moves, key, D, DP)
        store_rows(retained_value, j, moves, value, D, DP)


@triton.jit
def finish_block(
    position, kv_mean, k_sum, k_max, window_key, window_value, window_priority,
    retained_key, retained_value, retained_priority, weight, bias, norm_weight, norm_bias, foresight, root, h,
    W: tl.constexpr, S: tl.constexpr, H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WIDE: tl.constexpr, WIDEP: tl.constexpr, EP: tl.constexpr, POOL: tl.constexpr, MOVE: tl.constexpr,
    MT: tl.constexpr, NT: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, OPERAND: tl.constexpr, ROUNDED: tl.constexpr,
    FADE: tl.constexpr, FORESIGHT: tl.constexpr,
):  # fmt: skip
    """After the last token of a block, at `position`: the block before leaves the window, this one takes its place.

    The `h` retained keys (`H` of the head that has most) and the `W` that leave are one pool, in order of position:
    `retention.rank_and_evict`. Their
    levels (`retention.priority_level`), with the place in the pool below, are integers without ties that sort by level
    and then by age (`triton_common.sort_keys`). In larger pools the `H`-th largest is found by bisection.
    Two lists of places, of those that stay and of those that go, are needed across threads: they are kept, as floats,
    where the priorities were, which are in registers by then and written anew at the end.
    """
    first = position + 1 - 2 * W
    e = tl.arange(0, EP)
    tl.debug_barrier()  # the step has just written to window and priorities
    if H > 0:
        if FORESIGHT:
            # Computed key by key, then read again as a part of the pool.
            key = load_numbers(window_key, e, e < W, D, DP, WIDE, OPERAND).to(tl.float32)
            value = load_numbers(window_value, e, e < W, D, DP, WIDE, OPERAND).to(tl.float32)
            octaves = forecast_octaves(foresight + 1, key, value, tl.arange(0, DP), D)
            level = tl.load(window_priority + e, mask=e < W, other=float("-inf"))
            level = foreseen_level(level, first // W, tl.load(foresight), octaves, FADE)
            tl.debug_barrier()
            tl.store(window_priority + e, level, mask=e < W)
            tl.debug_barrier()
        i = tl.arange(0, POOL)
        slot = i - h
        arrives = (slot >= 0) & (slot < W) & (first + slot >= S)
        priority = tl.load(retained_priority + i, mask=i < h, other=float("-inf"))
        arriving = tl.load(window_priority + slot, mask=arrives, other=float("-inf"))
        if not FORESIGHT:
            arriving = priority_level(arriving, first // W, FADE)
        priority = tl.where(i < h, priority, arriving)
        rank = sort_keys(priority, tl.max(priority, 0), i)
        rank = tl.where(i < h + W, rank, -0x7FFFFFFF)
        if POOL <= COUNTED:
            # Everyone against everyone: more comparisons than bisection takes, in one step where that takes 31. Summed
            # over the first axis, which lies within threads.
            stays = tl.sum((rank[:, None] > rank[None, :]).to(tl.int32), 0) < h
        else:
            # At least h places are >= low, fewer than h are >= high.
            low = 0
            high = 0x7FFFFFFF
            for _ in range(31):
                middle = low + ((high - low) >> 1)
                enough = tl.sum((rank >= middle).to(tl.int32), 0) >= h
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            stays = rank >= low
        stays = stays & (i < h + W)
        goes = ~stays & (i < h + W)
        count = tl.cumsum(stays.to(tl.int32), 0)  # places that stay, up to and with each
        tl.debug_barrier()
        tl.store(retained_priority + count - 1, i.to(tl.float32), mask=stays & (count <= h))
        folded = tl.where(priority > float("-inf"), i, -1)  # of an empty place nothing is folded
        tl.store(window_priority + i - count, folded.to(tl.float32), mask=goes & (i - count < W))
        tl.debug_barrier()
        source = tl.load(window_priority + e, mask=e < W, other=-1.0)
        # The bounds only matter for priorities that are not numbers, which must not lead out of the buffers.
        source = tl.minimum(tl.maximum(source, -1.0), h + (W - 1.0)).to(tl.int32)
        leaves = source >= 0
        key = pool_numbers(retained_key, window_key, source, leaves, h, D, DP, WIDE, OPERAND)
        value = pool_numbers(retained_value, window_value, source, leaves, h, D, DP, WIDE, OPERAND)
    else:
        leaves = (e < W) & (first + e >= S)
        key = load_numbers(window_key, e, leaves, D, DP, WIDE, OPERAND)
        value = load_numbers(window_value, e, leaves, D, DP, WIDE, OPERAND)
    fold_keys(
        key, value, leaves, kv_mean, k_sum, k_max, weight, bias, norm_weight, norm_bias, root,
        M, MT, D, DP, NT, EP, HAS_NORM_WEIGHT, HAS_NORM_BIAS, OPERAND, ROUNDED,
    )  # fmt: skip

    if H > 0:
        move_kept(retained_key, retained_value, retained_priority, window_key, window_value, h, W, WIDE, WIDEP, MOVE)
        tl.debug_barrier()
        tl.store(retained_priority + count - 1, priority, mask=stays & (count <= h))

    key = load_rows(window_key, W + e, e < W, WIDE, WIDEP)
    value = load_rows(window_value, W + e, e < W, WIDE, WIDEP)
    if H > 0:
        received = tl.load(window_priority + W + e, mask=e < W, other=float("-inf"))
    tl.debug_barrier()
    store_rows(window_key, e, e < W, key, WIDE, WIDEP)
    store_rows(window_value, e, e < W, value, WIDE, WIDEP)
    store_rows(window_key, W + e, e < W, tl.zeros((EP, WIDEP), tl.float32), WIDE, WIDEP)
    store_rows(window_value, W + e, e < W, tl.zeros((EP, WIDEP), tl.float32), WIDE, WIDEP)
    if H > 0:
        tl.store(window_priority + e, received, mask=e < W)
        tl.store(window_priority + W + e, tl.full((EP,), float("-inf"), tl.float32), mask=e < W)
