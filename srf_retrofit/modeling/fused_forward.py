"""The forward pass of the fused kernels: what is launched, in which order, on which memory."""

from __future__ import annotations

from typing import Any

import torch

from .block_tables import run_blocks
from .fused_call import Call, Sizes, carve, launcher, on_device, power, room_for, strides, unit_stride

try:
    from .triton_attend import attend_kernel
    from .triton_retain import forecast_kernel, priority_kernel, rank_block_kernel, rank_run_kernel, rank_scan_kernel
    from .triton_sums import key_norm_kernel, run_kernel, scan_kernel
except ImportError:
    # Nothing is launched then, see `fused_attention.why_not_fused`.
    pass


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    start: tuple[torch.Tensor | None, ...],
    delay: int,
    scaling: float,
    foresight: torch.Tensor | None = None,
    query_half: torch.Tensor | None = None,
    given_key_half: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Launch the kernels of one call; arguments as of `fused.attend`, with what rows continue from in `start`."""
    s, t = call.sizes, call.tables
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    blocks, rows, runs, pool = call.blocks, call.rows, call.runs, k.shape[2]
    out = outputs(q, k, s, blocks, rows, keep_zeros=mask is not None)
    o, end_sum, end_mass, end_max, mean, kept, slot_indices, slot_values = out
    log_sum, half_norm, log_mass, reference, key_half = carve(kept, *kept_sizes(s, blocks, rows, k))
    slots, fold, top_token = carve(slot_indices, *slot_index_sizes(s, blocks, rows))
    if s.LEARNED:
        assert given_key_half is not None
        key_half = given_key_half
    # From one half of learned features to the other, in what is given for queries and for keys.
    query_step, key_step = q.shape[0] * q.shape[1] * q.shape[2], k.shape[0] * s.G * pool
    slot_top, priority = carve(slot_values, *slot_value_sizes(s, blocks, rows))
    sums = runs * s.G * s.M
    foresight = foresight if s.H else None
    keys = 0 if foresight is None else k.shape[0] * s.G * pool
    levels = blocks * s.G * s.W if s.H else 0
    scratch = (sums * s.D, sums, sums, 2 * levels, levels, runs * s.G * s.H, keys)
    run_sum, run_mass, run_max, received, level, run_priority, octaves = carve(
        q.new_empty(room_for(*scratch), dtype=torch.float32), *scratch
    )
    delay = min(delay, s.W // 2)
    query_strides, key_strides = strides(q), (*strides(k), *strides(v))
    numbers = (*query_strides, *key_strides, *strides(o), blocks, pool, delay, q.shape[2], query_step, key_step)
    tensors = (q, k, v, *start, *call.query, *call.key, foresight, query_half, given_key_half)
    launch = launcher(call, "forward", numbers, tensors, foresight is not None, given_key_half is not None)

    def common(**more: Any) -> dict[str, Any]:
        return dict(G=s.G, D=s.D, DP=s.DP, W=s.W, WP=s.WP, SINKS=s.SINKS, **call.kinds) | more

    with on_device(q.device):
        if s.H:
            run_token = q.new_empty(runs * s.G * s.H, dtype=torch.int32)
            tile = s.tiles["priority"]
            launch(
                "priority", priority_kernel, (blocks, s.G, 1),
                (
                    q, k, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, received, scaling,
                    *query_strides, *key_strides[:3], call.one_batch, delay,
                ),
                lambda: common(R=s.R, HEADS=tile.heads, SP=s.SP, **tile.options),
            )  # fmt: skip

            if foresight is not None:
                launch(
                    "forecast", forecast_kernel, (-(-pool // 64), s.G, k.shape[0]),
                    (k, v, foresight, octaves, *key_strides, pool),
                    lambda: {"G": s.G, "D": s.D, "DP": s.DP, "ROWS": 64, "num_warps": 4, "num_stages": 1},
                )  # fmt: skip

            slots_of = {"G": s.G, "W": s.W, "H": s.H, "HP": s.HP, "UNEVEN": call.slot_bounds is not None}
            per_run = run_blocks(s.W)
            run_keys = power(per_run * s.W)
            begins = {"WP": s.WP, "START": start[0] is not None}
            launch(
                "rank runs", rank_run_kernel, (runs, s.G, 1),
                (
                    t.run_table, t.block_row, t.row_block, t.key_token, t.key_position, t.block_full, received,
                    start[3], foresight, octaves, call.slot_bounds, call.one_batch, pool, blocks,
                    priority, level, run_token, run_priority,
                ),
                lambda: slots_of | begins | s.tiles["rank"].options | {
                    "KEYS": run_keys, "SINKS": s.SINKS, "D": s.D, "FADE": s.FADE, "FORESIGHT": foresight is not None,
                },
            )  # fmt: skip
            launch(
                "rank scan", rank_scan_kernel, (rows, s.G, 1),
                (
                    t.row_run, t.row_block, start[4], start[5], start[3], run_token, run_priority,
                    call.slot_bounds, priority, slots, slot_top,
                ),
                lambda: slots_of | begins | s.tiles["rank"].options,
            )  # fmt: skip
            launch(
                "rank blocks", rank_block_kernel, (blocks, s.G, 1),
                (
                    t.block_row, t.row_block, t.row_run, t.key_token, level, run_token, run_priority,
                    call.slot_bounds, blocks, slots, slot_top, fold,
                ),
                lambda: slots_of | {"RUN": per_run, "KEYS": run_keys} | s.tiles["rank"].options,
            )  # fmt: skip
        if not s.LEARNED:
            launch(
                "key norm", key_norm_kernel, (-(-pool // 64), s.G, k.shape[0]),
                (k, *call.key[2:5], call.root, given_key_half, key_half, *key_strides[:3], pool),
                lambda: dict(
                    G=s.G, D=s.D, DP=s.DP, ROWS=64, PART=s.PART, MATRIX=call.maps["KEY_MATRIX"],
                    SPLIT=call.maps["SPLIT"], **call.kinds, num_warps=4, num_stages=1,
                ),
            )  # fmt: skip

        def walk(write: bool) -> None:
            launch(
                f"walk {write}", run_kernel, (runs * s.G * s.feature_parts, 1, 1),
                (
                    k, v, t.run_table, t.block_row, t.key_token, t.key_position, fold, t.block_full,
                    *call.key[:2], call.root, key_half, run_sum, run_mass, run_max, mean, log_mass, reference,
                    *key_strides, call.one_batch, pool, key_step,
                ),
                lambda: common(
                    M=s.M, RETAINED=s.H, PURE=s.PURE, FEATURES=min(s.PART, s.MP), PARTS=s.feature_parts, WRITE=write,
                    LEARNED=s.LEARNED, **s.tiles["run"].options,
                ),
            )  # fmt: skip

        walk(False)
        launch(
            "scan", scan_kernel, (rows, s.G, s.scan_parts),
            (
                t.row_run, t.row_block, run_sum, run_mass, run_max, *start[:3], end_sum, end_mass, end_max, reference,
            ),
            lambda: {
                "G": s.G, "M": s.M, "D": s.D, "DP": s.DP, "MB": s.scan_step, "START": call.continues, "num_warps": 4,
            },
        )  # fmt: skip
        walk(True)
        wide = s.tiles["attend"]
        launch(
            "attend", attend_kernel, (blocks * s.G * wide.rounds, 1, 1),
            (
                q, k, v, o, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, slots, top_token,
                *call.query[:5], call.root, log_sum if query_half is None else query_half, *call.key[:2], key_half,
                mean, log_mass, log_sum, half_norm, call.slot_bounds, scaling, blocks, q.shape[2], query_step,
                *query_strides, *key_strides, *strides(o), call.one_batch, pool,
            ),
            lambda: common(
                R=s.R, M=s.M, MP=s.MP, HEADS=wide.heads, TILES=wide.rounds, SP=s.SP, H=s.H, HP=s.HP, PART=s.PART,
                PURE=s.PURE, TAIL=s.TAIL, MATRIX=call.maps["MATRIX"], LEARNED=s.LEARNED, SPLIT=call.maps["SPLIT"],
                UNEVEN=call.slot_bounds is not None, **wide.options,
            ),
        )  # fmt: skip
    return out


def kept_sizes(s: Sizes, blocks: int, rows: int, k: torch.Tensor) -> tuple[int, ...]:
    """Sizes of what the backward pass starts from.

    log_sum and half_norm (H, N w) of queries; log_mass and reference (N + rows, G, M); half_norm of keys (B, G, E + L).
    With learned features half_norm is (2, H, N w), and that of keys is given.
    """
    queries, states = s.G * s.R * blocks * s.W, (blocks + rows) * s.G * s.M
    keys = k.shape[0] * s.G * k.shape[2]
    return queries, queries * (1 + s.LEARNED), states, states, 0 if s.LEARNED else keys


def slot_index_sizes(s: Sizes, blocks: int, rows: int) -> tuple[int, int, int]:
    """Sizes of slot_token (N + rows, G, h), fold_token (N, G, w), and with learned features top_token (H, N w)."""
    queries = s.G * s.R * blocks * s.W
    return (blocks + rows) * s.G * s.H, blocks * s.G * s.W if s.H else 0, queries if s.LEARNED else 0


def slot_value_sizes(s: Sizes, blocks: int, rows: int) -> tuple[int, int]:
    """Sizes of slot_priority (N + rows, G, h) and priority (N + rows, G, w)."""
    return (blocks + rows) * s.G * s.H, (blocks + rows) * s.G * s.W if s.H else 0


def slot_tensors(
    out: list[torch.Tensor], entries: int, rows: int, s: Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of outputs 6 and 7 of `attend`: slot_token and slot_priority (entries, G, h), priority (entries, G, w)."""
    token, *_ = carve(out[6], *slot_index_sizes(s, entries - rows, rows))
    top, priority = carve(out[7], *slot_value_sizes(s, entries - rows, rows))
    slots = entries * s.G * s.H
    shape = entries, s.G, -1
    return token[:slots].view(shape), top[:slots].view(shape), priority[: entries * s.G * s.W].view(shape)


def outputs(q: torch.Tensor, k: torch.Tensor, s: Sizes, blocks: int, rows: int, keep_zeros: bool) -> list[torch.Tensor]:
    """Room for what `fused.attend` returns, in its order."""
    # (B, L, H, D) in memory, as the output projection reads it.
    b, heads, length, d = q.shape
    o = q.new_zeros(b, length, heads, d) if keep_zeros else q.new_empty(b, length, heads, d)
    sums, wide = (rows, s.G, s.M), torch.float32
    narrow = torch.bfloat16 if q.dtype == torch.bfloat16 else wide
    return [
        o.transpose(1, 2),
        q.new_empty((*sums, s.D), dtype=wide), q.new_empty(sums, dtype=wide), q.new_empty(sums, dtype=wide),
        q.new_empty((blocks, s.G, s.M, s.D), dtype=narrow),
        q.new_empty(room_for(*kept_sizes(s, blocks, rows, k)), dtype=wide),
        q.new_empty(room_for(*slot_index_sizes(s, blocks, rows)), dtype=torch.int32),
        q.new_empty(room_for(*slot_value_sizes(s, blocks, rows)), dtype=wide),
    ]  # fmt: skip
