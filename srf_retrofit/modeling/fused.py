"""The fused kernels as one differentiable operator: `srf_retrofit::attend` and its backward pass.

Registered with PyTorch, so that `torch.compile(fullgraph=True)` sees two opaque operators. Besides inputs and outputs
they keep one state per block (`L / w` of `M x D` numbers, in the inputs' precision) and two numbers per query;
log-features are computed anew wherever they are needed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .block_tables import block_counts
from .fused_call import PART, PURE_BLOCK, Sizes, begin, on_device, unit_stride

try:
    from .triton_attend import attend_kernel
    from .triton_attend_backward import key_kernel, query_kernel, sink_kernel, state_kernel
    from .triton_pure import in_block_key_kernel
    from .triton_retain import priority_kernel, rank_run_kernel, rank_scan_kernel
    from .triton_sums import (
        fold_gradient_kernel,
        run_gradient_kernel,
        run_kernel,
        scan_gradient_kernel,
        scan_kernel,
        state_gradient_kernel,
    )

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[int] | None,
    seen: torch.Tensor | None,
    start_sum: torch.Tensor,
    start_mass: torch.Tensor,
    start_max: torch.Tensor,
    window_priority: torch.Tensor,
    slot_token: torch.Tensor,
    slot_priority: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor,
    query_norm: torch.Tensor | None,
    query_norm_bias: torch.Tensor | None,
    key_weight: torch.Tensor,
    key_bias: torch.Tensor,
    key_norm: torch.Tensor | None,
    key_norm_bias: torch.Tensor | None,
    ints: list[int],
    scaling: float,
) -> list[torch.Tensor]:
    """Attention of all blocks, and what the backward pass and the final state are made of.

    Parameters
    ----------
    q : (B, H, L, D); k, v : the pool, (B, G, E + L, D)
    mask, documents, seen
        Padding mask (B, L), bounds of packed documents, tokens that the rows' states have seen (rows,).
    start_sum, start_mass, start_max : (rows, G, M, D) and (rows, G, M) twice, float32
    window_priority, slot_token, slot_priority : (rows, G, 2w), (rows, G, h) int32, (rows, G, h)
        What rows continue from; empty where `seen` is not given.
    query_*, key_*
        Both sides of a `FoldedMap`.
    ints
        Window, sinks, retained, retention delay, whether features are attended to.
    scaling : float

    Returns
    -------
    list
        0: o (B, H, L, D); 1-3: sum, mass, maximum after each row; 4, 5: log_sum, half_norm (H, N w);
        6: mean (N, G, M, D); 7, 8: log_mass, reference (N + rows, G, M); 9, 10: slot_token, slot_priority
        (N + rows, G, h); 11: priority (N + rows, G, w); 12: fold_token (N, G, w).
    """
    folded = [query_weight, query_bias, query_norm, query_norm_bias, key_weight, key_bias, key_norm, key_norm_bias]
    call = begin(q, k, mask, documents, seen, folded, ints, scaling)
    s, t = call.sizes, call.tables
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = _outputs(q, s, call.blocks, call.rows, keep_zeros=mask is not None)
    (o, end_sum, end_mass, end_max, log_sum, half_norm, mean, log_mass, reference, slots, slot_top, priority, fold) = (
        out
    )
    key_strides = (*k.stride()[:3], *v.stride()[:3])
    common: dict[str, Any] = dict(G=s.G, D=s.D, DP=s.DP, W=s.W, WP=s.WP, SINKS=s.SINKS, **call.kinds)
    with on_device(q.device):
        if s.H:
            received = q.new_empty(call.blocks, s.G, 2, s.W, dtype=torch.float32)
            priority_kernel[(call.blocks, s.G)](
                q, k, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, received, scaling,
                *q.stride()[:3], *k.stride()[:3], call.one_batch, min(ints[3], s.W // 2),
                R=s.R, HEADS=s.heads(64), SP=s.SP, **common, num_warps=4, num_stages=1,
            )  # fmt: skip
            run_token = q.new_empty(call.runs, s.G, s.H, dtype=torch.int32)
            run_priority = q.new_empty(call.runs, s.G, s.H, dtype=torch.float32)
            sizes = {"G": s.G, "W": s.W, "WP": s.WP, "H": s.H, "HP": s.HP, "START": seen is not None, "num_warps": 4}

            def rank(write: bool) -> None:
                rank_run_kernel[(call.runs, s.G)](
                    t.run_table, t.block_row, t.row_block, t.key_token, t.key_position, t.block_full, received,
                    window_priority, run_token, run_priority, priority, slots, slot_top, fold,
                    SINKS=s.SINKS, WRITE=write, **sizes,
                )  # fmt: skip

            rank(False)
            rank_scan_kernel[(call.rows, s.G)](
                t.row_run, t.row_block, slot_token, slot_priority, window_priority, run_token, run_priority,
                priority, slots, slot_top, **sizes,
            )  # fmt: skip
            rank(True)
        run_sum = q.new_empty(call.runs, s.G, s.M, s.D, dtype=torch.float32)
        run_mass, run_max = (q.new_empty(call.runs, s.G, s.M, dtype=torch.float32) for _ in range(2))

        def walk(write: bool) -> None:
            run_kernel[(call.runs, s.G, s.feature_parts)](
                k, v, t.run_table, t.block_row, t.key_token, t.key_position, fold, t.block_full,
                *call.key, call.root, run_sum, run_mass, run_max, mean, log_mass, reference,
                *key_strides, call.one_batch, M=s.M, RETAINED=s.H, PURE=s.PURE, PART=PART, FEATURES=min(PART, s.MP),
                MATRIX=call.maps["KEY_MATRIX"], SPLIT=call.maps["SPLIT"], WRITE=write, **common,
                num_warps=4, num_stages=1,
            )  # fmt: skip

        walk(False)
        scan_kernel[(call.rows, s.G, -(-s.M // s.scan_step()))](
            t.row_run, t.row_block, run_sum, run_mass, run_max, start_sum, start_mass, start_max, end_sum, end_mass,
            end_max, reference,
            G=s.G, M=s.M, D=s.D, DP=s.DP, MB=s.scan_step(), START=seen is not None, num_warps=4,
        )  # fmt: skip
        walk(True)
        wide = s.PURE and s.MP >= PART
        heads = s.heads(128 if s.DP > 64 else 64)
        attend_kernel[(call.blocks, s.G, -(-s.R // heads))](
            q, k, v, o, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, slots,
            *call.query, call.root, *call.key, mean, log_mass, log_sum, half_norm, scaling, call.blocks,
            *q.stride()[:3], *key_strides, *o.stride()[:3], call.one_batch,
            R=s.R, M=s.M, MP=s.MP, HEADS=heads, SP=s.SP, H=s.H, HP=s.HP, PART=PART, PURE=s.PURE,
            TAIL=s.TAIL, **call.maps, **common, num_warps=8 if heads * s.WP > 64 or wide else 4, num_stages=1,
        )  # fmt: skip
    return out


def _outputs(q: torch.Tensor, s: Sizes, blocks: int, rows: int, keep_zeros: bool) -> list[torch.Tensor]:
    """Room for what `_attend` returns, in its order."""

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return q.new_empty(shape, dtype=dtype)

    sums, entries = (rows, s.G, s.M), (blocks + rows, s.G)
    # (B, L, H, D) in memory, as the output projection reads it.
    b, heads, length, d = q.shape
    o = q.new_zeros(b, length, heads, d) if keep_zeros else q.new_empty(b, length, heads, d)
    queries = (s.G * s.R, blocks * s.W)
    return [
        o.transpose(1, 2), room(*sums, s.D), room(*sums), room(*sums), room(*queries), room(*queries),
        room(blocks, s.G, s.M, s.D, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32),
        room(*entries, s.M), room(*entries, s.M), room(*entries, s.H, dtype=torch.int32), room(*entries, s.H),
        room(*entries, s.W if s.H else 0), room(blocks, s.G, s.W if s.H else 0, dtype=torch.int32),
    ]  # fmt: skip


def _attend_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[int] | None,
    seen: torch.Tensor | None,
    folded: list[torch.Tensor | None],
    saved: list[torch.Tensor],
    do: torch.Tensor,
    end_d_sum: torch.Tensor,
    end_d_mass: torch.Tensor,
    ints: list[int],
    scaling: float,
    with_maps: bool,
) -> list[torch.Tensor]:
    """Gradients of `_attend`; `saved` are its outputs 0 and 4 to 9, and 12.

    Returns
    -------
    list
        dq, dk, dv, those of start_sum and start_mass, then of the eight tensors of the folded map (empty where
        `with_maps` is false or there is none).
    """
    call = begin(q, k, mask, documents, seen, folded, ints, scaling)
    s, t = call.sizes, call.tables
    o, log_sum, half_norm, mean, log_mass, reference, slots, fold = saved
    q, k, v, do = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(do)
    out = _gradients(q, k, call.rows, folded, s, with_maps, mask is not None, seen is not None)
    dq, dk, dv, start_d_sum, start_d_mass, *maps = out
    pointers = [x if x.numel() else end_d_mass for x in maps]
    # In the order of the kernels: weight, bias, norm, norm_bias of either side.
    d_query, d_key = pointers[:4], pointers[4:]
    query_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    common: dict[str, Any] = dict(G=s.G, D=s.D, DP=s.DP, W=s.W, WP=s.WP, **call.kinds)
    split = call.maps["SPLIT"]
    with on_device(q.device):
        delta = torch.empty_like(log_sum)
        wide = s.PURE and s.MP >= PART
        heads = s.heads(64)
        tiles = -(-s.R // heads)
        d_sinks = [q.new_empty(call.blocks, s.G, tiles, s.SINKS, s.D, dtype=torch.float32) for _ in range(2)]
        query_kernel[(call.blocks, s.G, tiles)](
            q, k, v, o, do, dq, t.block_row, t.query_token, t.key_token, t.key_position, t.sink_token, slots,
            *call.query, call.root, *call.key, mean, log_mass, log_sum, half_norm, delta, *d_sinks, *d_query,
            scaling, call.blocks,
            *query_strides, *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3], call.one_batch,
            R=s.R, M=s.M, MP=s.MP, HEADS=heads, TILES=tiles, SINKS=s.SINKS, SP=s.SP, H=s.H, HP=s.HP, PART=PART,
            PURE=s.PURE, TAIL=s.TAIL, **call.maps, MAP_GRADIENT=with_maps, **common,
            num_warps=8 if wide else 4, num_stages=1,
        )  # fmt: skip
        d_slots = [torch.zeros_like(dk, dtype=torch.float32) if s.H else dk for _ in range(2)]
        d_sum = torch.empty_like(mean)
        d_mass = q.new_empty(call.blocks, s.G, s.M, dtype=torch.float32)
        tails = s.feature_parts if s.TAIL else 0
        if tails + s.slot_parts:
            state_kernel[(call.blocks, s.G, tails + s.slot_parts)](
                q, k, v, do, t.block_row, t.query_token, slots, *call.query[:3],
                log_mass, reference, log_sum, half_norm, delta, d_sum, d_mass, *d_slots, scaling, call.blocks,
                *query_strides, *do.stride()[:3], *d_slots[0].stride()[:3], call.one_batch,
                R=s.R, M=s.M, MP=s.MP, HEADS=heads, TILES=tiles, H=s.H, HP=s.HP, PART=PART, TAILS=tails, SPLIT=split,
                **common, num_warps=4, num_stages=1,
            )  # fmt: skip
        if not s.TAIL:
            d_sum.zero_()
            d_mass.zero_()
        if s.PURE and not s.TAIL:
            dk.zero_()
            dv.zero_()
        elif s.PURE:
            in_block_key_kernel[(call.blocks, s.G)](
                q, k, v, do, dk, dv, t.block_row, t.query_token, t.key_token, t.key_position,
                *call.query[:3], *call.key, call.root, log_sum, half_norm, delta, *d_key, call.blocks,
                *query_strides, *do.stride()[:3], *dk.stride()[:3], call.one_batch,
                R=s.R, M=s.M, MP=s.MP, SINKS=s.SINKS, PART=PART, KEY_MATRIX=call.maps["KEY_MATRIX"], SPLIT=split,
                MAP_GRADIENT=with_maps, **common, num_warps=8 if wide else 4, num_stages=1,
            )  # fmt: skip
        else:
            key_kernel[(call.blocks + call.rows, s.G)](
                q, k, v, do, dk, dv, *d_slots, t.entry_table, t.query_token, t.key_token, t.key_position,
                log_sum, delta, scaling, call.blocks,
                *query_strides, *do.stride()[:3], *dk.stride()[:3], call.one_batch,
                R=s.R, HEADS=heads, TILES=tiles, SINKS=s.SINKS, H=s.H, **common, num_warps=4, num_stages=1,
            )  # fmt: skip
        run_d_sum = q.new_empty(call.runs, s.G, s.M, s.D, dtype=torch.float32)
        run_d_mass = q.new_empty(call.runs, s.G, s.M, dtype=torch.float32)
        parts = -(-s.M // s.scan_step())
        scan: dict[str, Any] = {"G": s.G, "M": s.M, "D": s.D, "DP": s.DP, "MB": s.scan_step(), "num_warps": 4}
        run_gradient_kernel[(call.runs, s.G, parts)](
            t.run_table, t.block_row, reference, d_sum, d_mass, run_d_sum, run_d_mass, **scan
        )
        scan_gradient_kernel[(call.rows, s.G, parts)](
            t.row_run, t.run_table, reference, run_d_sum, run_d_mass, end_d_sum, end_d_mass,
            start_d_sum, start_d_mass, **scan,
        )  # fmt: skip
        state_gradient_kernel[(call.runs, s.G, parts)](
            t.run_table, t.block_row, reference, d_sum, d_mass, run_d_sum, run_d_mass, **scan
        )
        fold_gradient_kernel[(call.blocks, s.G)](
            k, v, dk, dv, t.block_row, t.key_token, t.key_position, fold, t.block_full,
            *call.key, call.root, reference, d_sum, d_mass, *d_key,
            *k.stride()[:3], *v.stride()[:3], *dk.stride()[:3], call.one_batch,
            M=s.M, MP=s.MP, SINKS=s.SINKS, RETAINED=s.H, PURE=s.PURE, PART=PART, MATRIX=call.maps["KEY_MATRIX"],
            SPLIT=split, MAP_GRADIENT=with_maps, **common, num_warps=4, num_stages=1,
        )  # fmt: skip
        if s.H and seen is not None:
            _add_state_slots((dk, dv), d_slots, s, dk.shape[2] - q.shape[2])
        if s.SINKS:
            for grad, partial in zip((dk, dv), d_sinks, strict=True):
                sink_kernel[(call.rows, s.G, -(-s.SINKS * s.D // 128))](
                    grad, partial, t.row_block, t.sink_token, *dk.stride()[:3], call.one_batch,
                    G=s.G, D=s.D, SINKS=s.SINKS, TILES=tiles, COLUMNS=128, num_warps=4,
                )  # fmt: skip
    if with_maps:
        for i, x in enumerate(maps):
            if i % 4 in (0, 2) and x.numel():
                x *= call.root
    return out


def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: int,
    folded: list[torch.Tensor | None],
    s: Sizes,
    with_maps: bool,
    has_mask: bool,
    has_state: bool,
) -> list[torch.Tensor]:
    """Room for what `_attend_backward` returns; zeros where kernels add, or may leave out tokens."""
    make = torch.zeros_like if has_mask else torch.empty_like
    make_pool = torch.zeros_like if has_mask or has_state else torch.empty_like
    sums = q.new_empty(rows, s.G, s.M, dtype=torch.float32)
    maps = [q.new_zeros(x.shape if with_maps and x is not None else 0, dtype=torch.float32) for x in folded]
    return [make(q), make_pool(k), make_pool(k), q.new_empty(*sums.shape, s.D, dtype=torch.float32), sums, *maps]


def _add_state_slots(
    grads: tuple[torch.Tensor, torch.Tensor], d_slots: list[torch.Tensor], s: Sizes, extra: int
) -> None:
    """Slots that a state brought are in no block, so no program has added their gradients yet."""
    for grad, d_slot in zip(grads, d_slots, strict=True):
        mine, theirs = (
            x[:, :, :extra].unflatten(2, (-1, s.SINKS + s.H + 2 * s.W))[:, :, :, s.SINKS : s.SINKS + s.H]
            for x in (grad, d_slot)
        )
        mine += theirs


_OPERATOR = torch.library.custom_op("srf_retrofit::attend", _attend, mutates_args=())
_BACKWARD = torch.library.custom_op("srf_retrofit::attend_backward", _attend_backward, mutates_args=())


@_OPERATOR.register_fake
def _(q, k, v, mask, documents, seen, *args):
    query_weight, ints = args[6], args[14]
    w, sinks, h, _, tail = ints
    rows, g = q.shape[0] if documents is None else len(documents) - 1, k.shape[1]
    pairs = None if documents is None else list(itertools.pairwise(documents))
    size = w or PURE_BLOCK
    counts = block_counts(rows, q.shape[2], size, pairs, seen is not None and w > 0)
    sizes = Sizes(g, q.shape[1] // g, query_weight.shape[1], q.shape[3], size, sinks, h, w == 0, bool(tail))
    return _outputs(q, sizes, sum(counts), rows, False)


@_BACKWARD.register_fake
def _(q, k, v, mask, documents, seen, folded, saved, do, end_d_sum, end_d_mass, ints, scaling, with_maps):
    g = k.shape[1]
    w, sinks, h, _, tail = ints
    m = folded[0].shape[1]
    sizes = Sizes(g, q.shape[1] // g, m, q.shape[3], w or PURE_BLOCK, sinks, h, w == 0, bool(tail))
    return _gradients(q, k, end_d_mass.shape[0], folded, sizes, with_maps, True, True)


def _keep(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    q, k, v, mask, documents, seen = inputs[:6]
    folded, ctx.ints, ctx.scaling = inputs[12:20], inputs[20], inputs[21]
    ctx.documents = documents
    ctx.save_for_backward(q, k, v, mask, seen, *folded, output[0], *output[4:10], output[12])
    ctx.ends = output[1].shape, output[2].shape


def _differentiate(ctx: Any, grads: Any, backward: Any) -> tuple:
    q, k, v, mask, seen, *rest = ctx.saved_tensors
    folded, saved = rest[:8], rest[8:]
    do, d_sum, d_mass = grads[:3]
    do = torch.zeros_like(saved[0]) if do is None else do
    d_sum, d_mass = (
        q.new_zeros(shape, dtype=torch.float32) if x is None else x.contiguous()
        for x, shape in zip((d_sum, d_mass), ctx.ends, strict=True)
    )
    with_maps = any(ctx.needs_input_grad[12:20])
    out = backward(
        q, k, v, mask, ctx.documents, seen, folded, saved, do, d_sum, d_mass, ctx.ints, ctx.scaling, with_maps
    )
    maps = [x if with_maps and like is not None else None for x, like in zip(out[5:], folded, strict=True)]
    start = (None, None) if seen is None else out[3:5]
    return (*out[:3], None, None, None, *start, *[None] * 4, *maps, None, None)


torch.library.register_autograd(
    "srf_retrofit::attend", lambda ctx, grads: _differentiate(ctx, grads, _BACKWARD), setup_context=_keep
)


class _Eager(torch.autograd.Function):
    """The same without the registered operator around it, which costs more time than a short sequence takes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        output = _attend(*inputs)
        _keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return _differentiate(ctx, grads, _attend_backward)


def attend(*inputs: Any) -> Any:
    """`_attend`, differentiable; as a registered operator while `torch.compile` traces."""
    return _OPERATOR(*inputs) if torch.compiler.is_compiling() else _Eager.apply(*inputs)
