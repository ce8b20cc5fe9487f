"""The backward pass of the fused kernels: what is launched, in which order, on which memory."""

from __future__ import annotations

from typing import Any

import torch

from .fused_call import Call, Sizes, carve, launcher, on_device, room_for, strides, unit_stride
from .fused_forward import kept_sizes, slot_index_sizes

try:
    from .triton_attend_backward import clear_kernel, key_kernel, query_kernel, state_kernel
    from .triton_pure import in_block_key_kernel
    from .triton_sinks import sink_kernel, sink_run_kernel
    from .triton_sums import (
        fold_gradient_kernel,
        run_gradient_kernel,
        scan_gradient_kernel,
        state_gradient_kernel,
    )
except ImportError:
    # Nothing is launched then, see `fused_attention.why_not_fused`.
    pass


def backward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    folded: list[torch.Tensor | None],
    saved: list[torch.Tensor],
    do: torch.Tensor,
    end_d_sum: torch.Tensor | None,
    end_d_mass: torch.Tensor | None,
    scaling: float,
    with_maps: bool,
    given_key_half: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Launch the kernels of one call's backward pass; arguments and result as of `fused._attend_backward`."""
    s, t = call.sizes, call.tables
    blocks, rows, runs, pool = call.blocks, call.rows, call.runs, k.shape[2]
    continues = call.continues
    o, mean, kept, slot_indices = saved
    log_sum, half_norm, log_mass, reference, key_half = carve(kept, *kept_sizes(s, blocks, rows, k))
    slots, fold, top_token = carve(slot_indices, *slot_index_sizes(s, blocks, rows))
    given = given_key_half is not None and not s.LEARNED
    if s.LEARNED:
        assert given_key_half is not None
        key_half = given_key_half
    query_step, key_step = q.shape[0] * q.shape[1] * q.shape[2], k.shape[0] * s.G * pool
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    out = gradients(q, k, rows, folded, s, with_maps, mask is not None, continues, given_key_half is not None)
    dq, dk, dv = out[:3]
    start_d_sum, start_d_mass = out[3:5] if continues else (None, None)
    d_query_half, d_key_half = out[-2:] if s.LEARNED else (reference, reference)
    if given:
        d_query_half, d_key_half = k.new_zeros(q.shape[:3], dtype=torch.float32), out[-1]
    # In the order of the kernels: weight, bias, norm, norm_bias of either side.
    d_maps = out[3 + 2 * continues :][:8] if with_maps else []
    pointers = [x if x.numel() else reference for x in d_maps] or [reference] * 8
    d_query, d_key = pointers[:4], pointers[4:]

    query_tile, key_tile = s.tiles["query"], s.tiles["key"]
    partials = blocks * s.G * query_tile.rounds * s.SINKS * s.D
    states, run_states = blocks * s.G * s.M, runs * s.G * s.M
    queries = s.G * s.R * blocks * s.W
    of_runs = runs * s.G * s.SINKS * s.D
    scratch = (
        queries, partials, partials, of_runs, of_runs, states, run_states * s.D, run_states,
        queries if s.LEARNED else 0,
    )  # fmt: skip
    delta, d_sink_key, d_sink_value, run_sink_key, run_sink_value, d_mass, run_d_sum, run_d_mass, d_top = carve(
        q.new_empty(room_for(*scratch), dtype=torch.float32), *scratch
    )
    d_sum = torch.empty_like(mean)
    # With the strides of `dk`, which is dense.
    both = (dk.numel(), dk.numel())
    # Rows of keys that are never retained are neither written nor read; those of a state's slots are all read.
    make = q.new_zeros if continues else q.new_empty
    d_slots = carve(make(room_for(*both), dtype=torch.float32), *both) if s.H else (dk, dk)

    key_strides, do_strides, dk_strides = (*strides(k), *strides(v)), strides(do), strides(dk)
    query_strides = (*strides(q), *key_strides)
    numbers = (
        *query_strides, *strides(o), *do_strides, *strides(dq), *dk_strides, blocks, pool, q.shape[2],
        query_step, key_step,
    )  # fmt: skip
    launch = launcher(
        call, "backward", numbers, (q, k, v, *saved, do, end_d_sum, end_d_mass, *call.query, *call.key, given_key_half),
        with_maps, mask is None, end_d_sum is None, given,
    )  # fmt: skip
    maps = call.maps
    # Without what only the forward pass reads, the low half of the norm.
    query_map, key_map = ((*side[:3], *side[4:]) for side in (call.query, call.key))

    def common(**more: Any) -> dict[str, Any]:
        return dict(G=s.G, D=s.D, DP=s.DP, W=s.W, WP=s.WP, **call.kinds) | more

    with on_device(q.device):
        launch(
            "query", query_kernel, (blocks * s.G * query_tile.rounds, 1, 1),
            (
                q, k, v, o, do, dq, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, slots,
                top_token, *query_map, call.root, *call.key[:2], key_half,
                mean, log_mass, log_sum, half_norm, delta, d_sink_key, d_sink_value, *d_query, d_query_half, d_top,
                call.slot_bounds, scaling, blocks, q.shape[2], query_step,
                *query_strides, *strides(o), *do_strides, *strides(dq), call.one_batch, pool,
            ),
            lambda: common(
                R=s.R, M=s.M, MP=s.MP, HEADS=query_tile.heads, TILES=query_tile.rounds, SINKS=s.SINKS, SP=s.SP, H=s.H,
                HP=s.HP, PART=s.PART, PURE=s.PURE, TAIL=s.TAIL, MATRIX=maps["MATRIX"], LEARNED=s.LEARNED,
                MAP_GRADIENT=with_maps, GIVEN=given, UNEVEN=call.slot_bounds is not None, **query_tile.options,
            ),
        )  # fmt: skip
        if s.H and not continues:
            launch(
                "clear", clear_kernel, (blocks * s.G, 1, 1),
                (*d_slots, t.block_row, t.key_token, slots, *dk_strides, call.one_batch),
                lambda: {n: getattr(s, n) for n in ("G", "D", "DP", "W", "WP", "H", "HP", "PART")} | {"num_warps": 4},
            )  # fmt: skip

        def state(of_slots: bool, part: int, parts: int) -> None:
            tile = s.tiles["slots" if of_slots else "state"]
            launch(
                f"state {of_slots}", state_kernel, (blocks * s.G * parts, 1, 1),
                (
                    q, k, v, do, t.block_row, t.query_token, slots, top_token, *call.query[:2], call.root,
                    mean, log_mass, reference, log_sum, half_norm, delta, d_top, d_sum, d_mass, *d_slots,
                    scaling, blocks,
                    *query_strides, *do_strides, *dk_strides, call.one_batch,
                ),
                lambda: common(
                    R=s.R, M=s.M, MP=s.MP, HEADS=tile.heads, TILES=tile.rounds, H=s.H, HP=s.HP, PART=part,
                    PARTS=parts, OF_SLOTS=of_slots, LEARNED=s.LEARNED, **tile.options,
                ),
            )  # fmt: skip

        if s.TAIL:
            state(False, s.state_part, -(-s.MP // s.state_part))
        if s.H:
            state(True, s.PART, s.slot_parts)
        if not s.TAIL:
            d_sum.zero_()
            d_mass.zero_()
        if s.PURE and not s.TAIL:
            dk.zero_()
            dv.zero_()
        elif s.PURE:
            launch(
                "own keys", in_block_key_kernel, (blocks * s.G, 1, 1),
                (
                    q, k, v, do, dk, dv, t.block_row, t.query_token, t.key_token, t.key_position,
                    *call.query[:2], *key_map, call.root, key_half, log_mass, log_sum, half_norm, delta, *d_key,
                    d_key_half, blocks, *query_strides, *do_strides, *dk_strides, call.one_batch, pool,
                ),
                lambda: common(
                    R=s.R, M=s.M, MP=s.MP, HEADS=key_tile.heads, TILES=key_tile.rounds, SINKS=s.SINKS, PART=s.PART,
                    KEY_MATRIX=maps["KEY_MATRIX"], MAP_GRADIENT=with_maps, GIVEN=given, **key_tile.options,
                ),
            )  # fmt: skip
        else:
            launch(
                "key", key_kernel, ((blocks + rows) * s.G, 1, 1),
                (
                    q, k, v, do, dk, dv, *d_slots, t.entry_table, t.query_token, t.key_token, t.key_position, slots,
                    top_token, log_sum, delta, d_top, scaling, blocks, *query_strides, *do_strides, *dk_strides,
                    call.one_batch,
                ),
                lambda: common(
                    R=s.R, HEADS=key_tile.heads, TILES=key_tile.rounds, SINKS=s.SINKS, H=s.H, HP=s.HP, PART=s.PART,
                    LEARNED=s.LEARNED, **key_tile.options,
                ),
            )  # fmt: skip

        def scan() -> dict[str, Any]:
            return {"G": s.G, "M": s.M, "D": s.D, "DP": s.DP, "MB": s.scan_step, "num_warps": 4}

        def walk_back() -> dict[str, Any]:
            return scan() | {"PARTS": s.scan_parts}

        own = d_sum, d_mass, run_d_sum, run_d_mass
        launch(
            "run gradient", run_gradient_kernel, (runs * s.G * s.scan_parts, 1, 1),
            (t.run_table, t.block_row, reference, *own), walk_back,
        )  # fmt: skip
        launch(
            "scan gradient", scan_gradient_kernel, (rows, s.G, s.scan_parts),
            (
                t.row_run, t.run_table, reference, run_d_sum, run_d_mass, end_d_sum, end_d_mass,
                start_d_sum, start_d_mass,
            ),
            lambda: scan() | {"END": end_d_sum is not None, "START": continues},
        )  # fmt: skip
        launch(
            "state gradient", state_gradient_kernel, (runs * s.G * s.scan_parts, 1, 1),
            (t.run_table, t.block_row, reference, mean, *own, blocks), walk_back,
        )  # fmt: skip
        launch(
            "fold gradient", fold_gradient_kernel, (blocks * s.G, 1, 1),
            (
                k, v, dk, dv, t.block_row, t.key_token, t.key_position, fold, t.block_full,
                *key_map, call.root, key_half, reference, d_sum, d_mass, *d_key, d_key_half,
                *key_strides, *dk_strides, call.one_batch, pool, key_step,
            ),
            lambda: common(
                M=s.M, MP=s.MP, SINKS=s.SINKS, RETAINED=s.H, PURE=s.PURE, PART=s.PART, MATRIX=maps["KEY_MATRIX"],
                LEARNED=s.LEARNED, MAP_GRADIENT=with_maps, GIVEN=given, **s.tiles["fold"].options,
            ),
        )  # fmt: skip
        if s.H and continues:
            _add_state_slots((dk, dv), d_slots, s, pool - q.shape[2])
        if s.SINKS:
            columns = -(-s.SINKS * s.D // 128)
            of_sinks = {"G": s.G, "D": s.D, "SINKS": s.SINKS, "COLUMNS": 128, "num_warps": 4}
            launch(
                "sinks of runs", sink_run_kernel, (runs, s.G, columns),
                (d_sink_key, d_sink_value, run_sink_key, run_sink_value, t.run_table),
                lambda: of_sinks | {"TILES": query_tile.rounds},
            )  # fmt: skip
            launch(
                "sinks", sink_kernel, (rows, s.G, columns),
                (
                    dk, dv, run_sink_key, run_sink_value, t.row_run, t.sink_token, *dk_strides, call.one_batch,
                ),
                lambda: of_sinks,
            )  # fmt: skip
    if given:
        # What keys are less by, queries are more by: it cancels in their normaliser, and so does, only with this, what
        # rounding leaves of the sum over a query's keys. Whoever adds up over many keys would add that up, too.
        d_key_half += d_query_half.unflatten(1, (s.G, s.R)).sum(2)
    for i, x in enumerate(d_maps):
        if i % 4 in (0, 2) and x.numel():
            x *= call.root
    return out


def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: int,
    folded: list[torch.Tensor | None],
    s: Sizes,
    with_maps: bool,
    has_mask: bool,
    continues: bool,
    given: bool,
) -> list[torch.Tensor]:
    """Room for what `backward` returns; zeros where kernels add, or may leave out tokens."""
    make = torch.zeros_like if has_mask else torch.empty_like
    make_pool = torch.zeros_like if has_mask or continues else torch.empty_like
    out = [make(q), make_pool(k), make_pool(k)]
    if continues:
        out += [q.new_empty(rows, s.G, s.M, s.D, dtype=torch.float32), q.new_empty(rows, s.G, s.M, dtype=torch.float32)]
    if with_maps:
        out += [q.new_zeros(0 if x is None else x.shape, dtype=torch.float32) for x in folded]
    if s.LEARNED:
        # Keys that are never folded have no features.
        halves = torch.zeros if has_mask or not s.TAIL else torch.empty
        out.append(halves(2, *q.shape[:3], dtype=torch.float32, device=q.device))
        out.append(torch.zeros(2, *k.shape[:3], dtype=torch.float32, device=q.device))
    elif given:
        out.append(torch.zeros(k.shape[:3], dtype=torch.float32, device=q.device))
    return out


def _add_state_slots(
    grads: tuple[torch.Tensor, torch.Tensor], d_slots: tuple[torch.Tensor, ...], s: Sizes, extra: int
) -> None:
    """Slots that a state brought are in no block, so no program has added their gradients yet."""
    for grad, d_slot in zip(grads, d_slots, strict=True):
        mine, theirs = (
            x[:, :, :extra].unflatten(2, (-1, s.SINKS + s.H + 2 * s.W))[:, :, :, s.SINKS : s.SINKS + s.H]
            for x in (grad, d_slot.as_strided(grad.shape, grad.stride()))
        )
        mine += theirs
