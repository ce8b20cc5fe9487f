"""Feature sums at every block boundary, and their gradient: runs of blocks side by side, a short scan over the runs.

`sum_runs` adds up each run of blocks by itself, `scan_runs` turns the runs' sums into sums before each run, and
`write_states` walks each run again from there and writes what the queries of its blocks see. So only the scan is
serial in the length, and its steps are runs. The gradient goes the same way back.

Everything is referenced to the running maxima `mu` of the log-features of keys already folded, per feature; so every
exponent is at most 0, and an output never depends on a later key.
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
    half_norm_of,
    less_half,
    less_half_across,
    load_part,
    load_rows,
    load_vector,
    norm_gradient,
    of_second_half,
    program,
    store_part,
    store_rows,
    store_sum_gradient,
    store_vector,
)


@triton.jit
def folded_tokens(
    entry, block, g, key_token, key_position, fold_token, block_full,
    G: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, SINKS: tl.constexpr, RETAINED: tl.constexpr, PURE: tl.constexpr,
):  # fmt: skip
    """Tokens that are folded at the end of a block, -1 where there is none: (WP,)."""
    slot = tl.arange(0, WP)
    if RETAINED > 0:
        return tl.load(fold_token + (block * G + g) * W + slot, mask=slot < W, other=-1)
    source = entry + 1 if PURE else entry
    token = tl.load(key_token + source * W + slot, mask=slot < W, other=-1)
    position = tl.load(key_position + source) + slot
    token = tl.where(position >= SINKS, token, -1)
    if PURE:
        return token
    return tl.where(tl.load(block_full + block) > 0, token, -1)


@triton.jit
def key_norm_kernel(
    k, norm, norm_low, norm_bias, root, given, key_half, skb, skg, skl, pool,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, MATRIX: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`half_norm_of` every key of the pool, (B, G, pool), and what is `given` to be subtracted beside it.

    Each kernel that needs log-features of keys reads it.
    """
    g, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.where(place < pool, place, -1)
    x = load_rows(k + batch * skb + g * skg, token, skl, D, DP, OPERAND)
    half = half_norm_of(x, norm, norm_low, norm_bias, root, g, D, DP, min(PART, DP), MATRIX, SPLIT, PRECISION)
    if given is not None:
        half += tl.load(given + (batch * G + g) * pool + place, mask=place < pool, other=0.0)
    tl.store(key_half + (batch * G + g) * pool + place, half, mask=place < pool)


@triton.jit
def run_kernel(
    k, v, run_table, block_row, key_token, key_position, fold_token, block_full,
    weight, bias, root, key_half, run_sum, run_mass, run_max, mean, log_mass, reference,
    skb, skg, skl, svb, svg, svl, one_batch, pool, one_half,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    SINKS: tl.constexpr, RETAINED: tl.constexpr, PURE: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr,
    WRITE: tl.constexpr, LEARNED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A run of blocks, a head, `FEATURES` features: their sums (`WRITE` false), or the states before each block."""
    run, g, part = program(G, PARTS)
    start = part * FEATURES
    first, count = tl.load(run_table + 2 * run), tl.load(run_table + 2 * run + 1)
    row = tl.load(block_row + first)
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    k += batch * skb + g * skg
    v += batch * svb + g * svg
    key_half += (batch * G + g) * pool
    place = (run * G + g) * M
    if WRITE:
        total = load_part(run_sum + place * D, start, M, FEATURES, D, DP)
        mass = load_vector(run_mass + place, start, M, FEATURES, 0.0)
        top = load_vector(run_max + place, start, M, FEATURES, LOG_ZERO)
    else:
        total = tl.zeros((FEATURES, DP), tl.float32)
        mass = tl.zeros((FEATURES,), tl.float32)
        top = tl.full((FEATURES,), LOG_ZERO, tl.float32)
    w = load_part(weight + g * M * D, start, M, FEATURES, D, DP)
    shift = load_vector(bias + g * M, start, M, FEATURES, 0.0)
    for i in range(count):
        block = (first + i).to(tl.int64)
        entry = block + row
        # Asked for before anything is written or computed, so that what comes next need not wait.
        token = folded_tokens(
            entry, block, g, key_token, key_position, fold_token, block_full, G, W, WP, SINKS, RETAINED, PURE
        )
        x = load_rows(k, token, skl, D, DP, OPERAND)
        y = load_rows(v, token, svl, D, DP, OPERAND)
        half = tl.load(key_half + token, mask=token >= 0, other=0.0)
        other = tl.load(key_half + one_half + token, mask=token >= 0, other=0.0) if LEARNED else half
        if WRITE:
            safe = tl.maximum(mass, 0.5)
            here = (block * G + g) * M
            store_part(mean + here * D, start, total / safe[:, None], M, FEATURES, D, DP)
            here = (entry * G + g) * M
            store_vector(log_mass + here, start, top + tl.log(safe), M, FEATURES)
            store_vector(reference + here, start, top, M, FEATURES)
        # Features in lines: their sums are then taken inside a warp, and the next product has its operand in registers.
        b = dot(w, tl.trans(x), PRECISION) * root + shift[:, None]
        b = less_half_across(b, half, other, start, M, FEATURES, LEARNED)
        b = tl.where((token >= 0)[None, :], b, float("-inf"))
        above = tl.maximum(top, tl.max(b, 1))
        feature = tl.exp(b - above[:, None])
        decay = tl.exp(top - above)
        total = total * decay[:, None] + dot(feature.to(OPERAND), y, PRECISION)
        mass = mass * decay + tl.sum(feature, 1)
        top = above
    if not WRITE:
        store_part(run_sum + place * D, start, total, M, FEATURES, D, DP)
        store_vector(run_mass + place, start, mass, M, FEATURES)
        store_vector(run_max + place, start, top, M, FEATURES)


@triton.jit
def scan_kernel(
    row_run, row_block, run_sum, run_mass, run_max, start_sum, start_mass, start_max, end_sum, end_mass, end_max,
    reference,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MB: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Turn the sums of runs, in place, into the sums before each run; one row, head and `MB` features a program."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f, dim = tl.program_id(2) * MB + tl.arange(0, MB), tl.arange(0, DP)
    here, inside = f < M, (f < M)[:, None] & (dim < D)[None, :]
    grid = f[:, None] * D + dim[None, :]
    place = (row * G + g) * M
    total = tl.zeros((MB, DP), tl.float32)
    mass = tl.zeros((MB,), tl.float32)
    top = tl.full((MB,), LOG_ZERO, tl.float32)
    if START:
        total += tl.load(start_sum + place * D + grid, mask=inside, other=0.0)
        mass += tl.load(start_mass + place + f, mask=here, other=0.0)
        top = tl.maximum(top, tl.load(start_max + place + f, mask=here, other=LOG_ZERO))
    low, high = tl.load(row_run + row), tl.load(row_run + row + 1)
    for i in range(high - low):
        at = ((low + i).to(tl.int64) * G + g) * M
        new_total = tl.load(run_sum + at * D + grid, mask=inside, other=0.0)
        new_mass = tl.load(run_mass + at + f, mask=here, other=0.0)
        new_top = tl.load(run_max + at + f, mask=here, other=LOG_ZERO)
        # Every warp asks for the maxima and one of them writes over them: not before all have read.
        tl.debug_barrier()
        tl.store(run_sum + at * D + grid, total, mask=inside)
        tl.store(run_mass + at + f, mass, mask=here)
        tl.store(run_max + at + f, top, mask=here)
        above = tl.maximum(top, new_top)
        old, new = tl.exp(top - above), tl.exp(new_top - above)
        total = total * old[:, None] + new_total * new[:, None]
        mass = mass * old + new_mass * new
        top = above
    tl.store(end_sum + place * D + grid, total, mask=inside)
    tl.store(end_mass + place + f, mass, mask=here)
    tl.store(end_max + place + f, top, mask=here)
    # The row's last entry stands behind its last block, where no run writes.
    entry = (tl.load(row_block + row + 1) + row).to(tl.int64)
    tl.store(reference + (entry * G + g) * M + f, top, mask=here)


@triton.jit
def run_gradient_kernel(
    run_table, block_row, reference, d_sum, d_mass, run_d_sum, run_d_mass,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MB: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums before each run that comes from the run's own queries."""
    run, g, part = program(G, PARTS)
    f, dim = part * MB + tl.arange(0, MB), tl.arange(0, DP)
    here, inside = f < M, (f < M)[:, None] & (dim < D)[None, :]
    grid = f[:, None] * D + dim[None, :]
    first, count = tl.load(run_table + 2 * run), tl.load(run_table + 2 * run + 1)
    row = tl.load(block_row + first)
    start = tl.load(reference + ((first + row).to(tl.int64) * G + g) * M + f, mask=here, other=0.0)
    total = tl.zeros((MB, DP), tl.float32)
    mass = tl.zeros((MB,), tl.float32)
    for i in range(count):
        block = (first + i).to(tl.int64)
        decay = tl.exp(start - tl.load(reference + ((block + row) * G + g) * M + f, mask=here, other=0.0))
        at = (block * G + g) * M
        total += decay[:, None] * tl.load(d_sum + at * D + grid, mask=inside, other=0.0).to(tl.float32)
        mass += decay * tl.load(d_mass + at + f, mask=here, other=0.0)
    at = (run * G + g) * M
    tl.store(run_d_sum + at * D + grid, total, mask=inside)
    tl.store(run_d_mass + at + f, mass, mask=here)


@triton.jit
def scan_gradient_kernel(
    row_run, run_table, reference, run_d_sum, run_d_mass, end_d_sum, end_d_mass, start_d_sum, start_d_mass,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MB: tl.constexpr,
    END: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Turn the runs' gradients, in place, into the gradient of the sums after each run; from the last run back."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f, dim = tl.program_id(2) * MB + tl.arange(0, MB), tl.arange(0, DP)
    here, inside = f < M, (f < M)[:, None] & (dim < D)[None, :]
    grid = f[:, None] * D + dim[None, :]
    place = (row * G + g) * M
    total = tl.zeros((MB, DP), tl.float32)
    mass = tl.zeros((MB,), tl.float32)
    if END:
        total += tl.load(end_d_sum + place * D + grid, mask=inside, other=0.0)
        mass += tl.load(end_d_mass + place + f, mask=here, other=0.0)
    low, high = tl.load(row_run + row), tl.load(row_run + row + 1)
    for back in range(high - low):
        run = (high - 1 - back).to(tl.int64)
        at = (run * G + g) * M
        new_total = tl.load(run_d_sum + at * D + grid, mask=inside, other=0.0)
        new_mass = tl.load(run_d_mass + at + f, mask=here, other=0.0)
        tl.debug_barrier()  # as in `scan_kernel`
        tl.store(run_d_sum + at * D + grid, total, mask=inside)
        tl.store(run_d_mass + at + f, mass, mask=here)
        # The sums before the run's first block, and those after its last, have these references.
        entry = tl.load(run_table + 2 * run) + row
        after = entry + tl.load(run_table + 2 * run + 1)
        decay = tl.exp(
            tl.load(reference + (entry * G + g) * M + f, mask=here, other=0.0)
            - tl.load(reference + (after * G + g) * M + f, mask=here, other=0.0)
        )
        total = total * decay[:, None] + new_total
        mass = mass * decay + new_mass
    if START:
        tl.store(start_d_sum + place * D + grid, total, mask=inside)
        tl.store(start_d_mass + place + f, mass, mask=here)


@triton.jit
def state_gradient_kernel(
    run_table, block_row, reference, mean, d_sum, d_mass, run_d_sum, run_d_mass, blocks,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MB: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Walk a run back and turn the gradient of the sums before each block, in place, into that of those after it.

    What comes in is the part that a block's own queries give; what goes out is the whole.
    """
    run, g, part = program(G, PARTS)
    start = part * MB
    first, count = tl.load(run_table + 2 * run), tl.load(run_table + 2 * run + 1)
    row = tl.load(block_row + first)
    place = (run * G + g) * M
    total = load_part(run_d_sum + place * D, start, M, MB, D, DP)
    mass = load_vector(run_d_mass + place, start, M, MB, 0.0)
    last = (first + count - 1).to(tl.int64)
    above = load_vector(reference + ((last + 1 + row) * G + g) * M, start, M, MB, 0.0)
    own = load_part(d_sum + (last * G + g) * M * D, start, M, MB, D, DP).to(tl.float32)
    own_mass = load_vector(d_mass + (last * G + g) * M, start, M, MB, 0.0)
    # Mean values after the run: those before the next block, if the row has one.
    after = tl.minimum(last + 1, blocks - 1)
    after = tl.where(tl.load(block_row + after) == row, after, last)
    values = load_part(mean + (after * G + g) * M * D, start, M, MB, D, DP)
    for back in range(count):
        block = last - back
        at = (block * G + g) * M
        # The next block is asked for before this one is written: the compiler cannot know that they differ.
        ahead = (tl.maximum(block - 1, first) * G + g) * M
        next_own = load_part(d_sum + ahead * D, start, M, MB, D, DP).to(tl.float32)
        next_mass = load_vector(d_mass + ahead, start, M, MB, 0.0)
        next_values = load_part(mean + at * D, start, M, MB, D, DP)
        store_sum_gradient(d_sum, d_mass, at, start, total, mass, values, M, MB, D, DP)
        below = load_vector(reference + ((block + row) * G + g) * M, start, M, MB, 0.0)
        decay = tl.exp(below - above)
        total = total * decay[:, None] + own
        mass = mass * decay + own_mass
        above = below
        own = next_own
        own_mass = next_mass
        values = next_values


@triton.jit
def fold_gradient_kernel(
    k, v, dk, dv, block_row, key_token, key_position, fold_token, block_full,
    weight, bias, norm, norm_bias, gram, gram_bias, root,
    key_half, reference, d_sum, d_mass, d_weight, d_bias, d_norm, d_norm_bias, d_half,
    skb, skg, skl, svb, svg, svl, sgb, sgg, sgl, one_batch, pool, one_half,
    G: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr,
    WP: tl.constexpr, SINKS: tl.constexpr, RETAINED: tl.constexpr, PURE: tl.constexpr, PART: tl.constexpr,
    MATRIX: tl.constexpr, MAP_GRADIENT: tl.constexpr, LEARNED: tl.constexpr, GIVEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to `dk` and `dv` what the keys folded at the end of a block contributed to all later states.

    `d_half` is the gradient of what was given to be subtracted: with learned features `key_half`, which is then not all
    of theirs; without, where it is asked for (`GIVEN`), to be added to that of the queries of the block.
    """
    block, g, _ = program(G, 1)
    row = tl.load(block_row + block)
    entry = block + row
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    token = folded_tokens(
        entry, block, g, key_token, key_position, fold_token, block_full, G, W, WP, SINKS, RETAINED, PURE
    )
    x = load_rows(k + batch * skb + g * skg, token, skl, D, DP, OPERAND)
    y = load_rows(v + batch * svb + g * svg, token, svl, D, DP, OPERAND)
    own_half = (batch * G + g) * pool + token
    half = tl.load(key_half + own_half, mask=token >= 0, other=1e30)
    other = tl.load(key_half + one_half + own_half, mask=token >= 0, other=1e30) if LEARNED else half
    dx = tl.zeros((WP, DP), tl.float32)
    dy = tl.zeros((WP, DP), tl.float32)
    total = tl.zeros((WP,), tl.float32)
    second = tl.zeros((WP,), tl.float32)
    FEATURES: tl.constexpr = min(PART, MP)
    for start in range(0, MP, FEATURES):
        # Padded features get a reference that no key reaches.
        above = load_vector(reference + ((entry + 1) * G + g) * M, start, M, FEATURES, 1e30)
        above -= load_vector(bias + g * M, start, M, FEATURES, 0.0)
        at = (block * G + g) * M
        w = load_part(weight + g * M * D, start, M, FEATURES, D, DP)
        grad = load_part(d_sum + at * D, start, M, FEATURES, D, DP).to(OPERAND)
        mass = load_vector(d_mass + at, start, M, FEATURES, 0.0)
        b = dot(x, tl.trans(w), PRECISION) * root
        feature = tl.exp(less_half(b, half, other, start, M, FEATURES, LEARNED) - above[None, :])
        dy += dot(feature.to(OPERAND), grad, PRECISION)
        d_log = feature * (dot(y, tl.trans(grad), PRECISION) + mass[None, :])
        dx += dot((d_log * root).to(w.dtype), w, PRECISION)
        total += tl.sum(d_log, 1)
        if LEARNED:
            second += of_second_half(d_log, start, M, FEATURES)
        if MAP_GRADIENT:
            add_weight_gradient(d_log, x, d_weight, d_bias, g, start, M, FEATURES, D, DP, PRECISION)
    if LEARNED:
        tl.store(d_half + own_half, second - total, mask=token >= 0)
        tl.store(d_half + one_half + own_half, -second, mask=token >= 0)
    else:
        if GIVEN:
            before = tl.load(d_half + own_half, mask=token >= 0, other=0.0)
            tl.store(d_half + own_half, before - total, mask=token >= 0)
        dx = norm_gradient(
            dx, total, x, norm, norm_bias, gram, gram_bias, root, g, d_norm, d_norm_bias, D, DP, min(PART, DP), MATRIX,
            MAP_GRADIENT, PRECISION,
        )  # fmt: skip
    # Every key is folded at most once, so nobody else writes these rows now.
    dk += batch * sgb + g * sgg
    dv += batch * sgb + g * sgg
    store_rows(dk, token, sgl, load_rows(dk, token, sgl, D, DP, tl.float32) + dx, D, DP)
    store_rows(dv, token, sgl, load_rows(dv, token, sgl, D, DP, tl.float32) + dy, D, DP)
