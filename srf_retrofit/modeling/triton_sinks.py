"""The gradient of a row's sinks: every query of the row has a part in it.

Each tile of queries leaves its part in memory; what is here adds them up in a fixed order, blocks of a run first and
then the runs of a row, since a single program that walks a long row is the slowest of its step.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common
    raise


@triton.jit
def add_lines(x, low, high, g, column, G: tl.constexpr, LINES: tl.constexpr, N: tl.constexpr):
    """`sum_i x[i, g, l, column]` over `low <= i < high` and all `l`, of x (..., G, LINES, N)."""
    total = tl.zeros((column.shape[0],), tl.float32)
    count = (high - low) * LINES
    for start in range(0, count, 32):
        i = start + tl.arange(0, 32)
        at = (((low + i // LINES).to(tl.int64) * G + g) * LINES + i % LINES) * N
        mask = (i < count)[:, None] & (column < N)[None, :]
        total += tl.sum(tl.load(x + at[:, None] + column[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def sink_run_kernel(
    d_key, d_value, run_key, run_value, run_table,
    G: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the parts (N, G, TILES, SINKS, D) that the blocks of a run left, their sum (runs, G, SINKS, D)."""
    run, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(run_table + 2 * run)
    high = low + tl.load(run_table + 2 * run + 1)
    to = (run * G + g) * (SINKS * D) + column
    inside = column < SINKS * D
    tl.store(run_key + to, add_lines(d_key, low, high, g, column, G, TILES, SINKS * D), mask=inside)
    tl.store(run_value + to, add_lines(d_value, low, high, g, column, G, TILES, SINKS * D), mask=inside)


@triton.jit
def sink_kernel(
    dk, dv, run_key, run_value, row_run, sink_token, sgb, sgg, sgl, one_batch,
    G: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the sums of a row's runs to the gradients of the tokens that are its sinks."""
    row, g = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SINKS * D
    low, high = tl.load(row_run + row), tl.load(row_run + row + 1)
    key_total = add_lines(run_key, low, high, g, column, G, 1, SINKS * D)
    value_total = add_lines(run_value, low, high, g, column, G, 1, SINKS * D)
    token = tl.load(sink_token + row * SINKS + column // D, mask=inside, other=-1)
    batch = tl.where(one_batch > 0, 0, row).to(tl.int64)
    here = batch * sgb + g * sgg + token.to(tl.int64) * sgl + column % D
    key_total += tl.load(dk + here, mask=token >= 0, other=0.0).to(tl.float32)
    value_total += tl.load(dv + here, mask=token >= 0, other=0.0).to(tl.float32)
    tl.store(dk + here, key_total.to(dk.dtype.element_ty), mask=token >= 0)
    tl.store(dv + here, value_total.to(dv.dtype.element_ty), mask=token >= 0)
