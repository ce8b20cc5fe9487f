"""The fused kernels as one differentiable operator: `srf_retrofit::attend` and its backward pass.

Registered with PyTorch, so that `torch.compile(fullgraph=True)` sees two opaque operators. Besides inputs and outputs
they keep one state per block (`L / w` of `M x D` numbers, in the inputs' precision) and two numbers per query;
log-features are computed anew wherever they are needed.
"""

from __future__ import annotations

from typing import Any

import torch

from .fused_backward import backward, gradients
from .fused_call import Call, begin, count_blocks, sizes_of
from .fused_forward import forward, outputs
from .operators import operator_name


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[int] | None,
    seen: torch.Tensor | None,
    start_sum: torch.Tensor | None,
    start_mass: torch.Tensor | None,
    start_max: torch.Tensor | None,
    window_priority: torch.Tensor | None,
    slot_token: torch.Tensor | None,
    slot_priority: torch.Tensor | None,
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
    foresight: torch.Tensor | None,
    query_half: torch.Tensor | None,
    key_half: torch.Tensor | None,
    slot_bounds: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Attention of all blocks, and what the backward pass and the final state are made of.

    Parameters
    ----------
    q : (B, H, L, D); k, v : the pool, (B, G, E + L, D)
    mask, documents, seen
        Padding mask (B, L), bounds of packed documents, tokens that the rows' states have seen (rows,).
    start_sum, start_mass, start_max : (rows, G, M, D) and (rows, G, M) twice, float32
    window_priority, slot_token, slot_priority : (rows, G, 2w), (rows, G, h) int32, (rows, G, h)
        What rows continue from; given together with `seen`.
    query_*, key_*
        Both sides of a `FoldedMap`.
    ints
        Window, sinks, retained, retention delay, whether features are attended to, fading, whether they are learned.
    scaling : float
    foresight : (G, 1 + 4 D), optional
        See `retention.priority_level`.
    query_half : (2, B, H, L), key_half : (2, B, G, E + L), float32, optional
        What the first and the second half of a token's learned features subtract, in place of the half-norm; queries'
        relative to the largest exact logit. Of other features key_half (B, G, E + L) alone: what those of keys
        subtract beside the half-norm.
    slot_bounds : (G + 1,) int32, optional
        Where heads retain different numbers of keys, see `state.slot_bounds`; retained is then the most of any.

    Returns
    -------
    list
        0: o (B, H, L, D); 1-3: sum, mass, maximum after each row; 4: mean (N, G, M, D); flat: 5, see
        `fused_forward.kept_sizes`, 6 and 7, see `fused_forward.slot_tensors`.
    """
    folded = [query_weight, query_bias, query_norm, query_norm_bias, key_weight, key_bias, key_norm, key_norm_bias]
    start = (start_sum, start_mass, start_max, window_priority, slot_token, slot_priority)
    call = begin(q, k, mask, documents, seen, folded, ints, scaling, slot_bounds)
    return forward(call, q, k, v, mask, start, ints[3], scaling, foresight, query_half, key_half)


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
    end_d_sum: torch.Tensor | None,
    end_d_mass: torch.Tensor | None,
    ints: list[int],
    scaling: float,
    with_maps: bool,
    key_half: torch.Tensor | None,
    slot_bounds: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Gradients of `_attend`; `saved` are its outputs 0 and 4 to 6.

    Returns
    -------
    list
        dq, dk, dv; with `seen` those of start_sum and start_mass; with `with_maps` those of the eight tensors of the
        folded map (empty where there is none); those of query_half and key_half, of what was given.
    """
    call = begin(q, k, mask, documents, seen, folded, ints, scaling, slot_bounds)
    return backward(call, q, k, v, mask, folded, saved, do, end_d_sum, end_d_mass, scaling, with_maps, key_half)


_OPERATOR = torch.library.custom_op(operator_name("attend"), _attend, mutates_args=())
_BACKWARD = torch.library.custom_op(operator_name("attend_backward"), _attend_backward, mutates_args=())


@_OPERATOR.register_fake
def _(q, k, v, mask, documents, seen, *args):
    s = sizes_of(q, k, args[6].shape[1], args[14])
    return outputs(q, k, s, *count_blocks(q, s, documents, seen), False)


@_BACKWARD.register_fake
def _(q, k, v, mask, documents, seen, folded, saved, do, d_sum, d_mass, ints, scaling, with_maps, key_half, bounds):
    s = sizes_of(q, k, folded[0].shape[1], ints)
    _, rows = count_blocks(q, s, documents, seen)
    return gradients(q, k, rows, folded, s, with_maps, True, seen is not None, key_half is not None)


def _keep(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    q, k, v, mask, documents, seen = inputs[:6]
    folded, ctx.ints, ctx.scaling = inputs[12:20], inputs[20], inputs[21]
    ctx.documents = documents
    ctx.save_for_backward(q, k, v, mask, seen, *inputs[24:], *folded, output[0], *output[4:7])


def _differentiate(ctx: Any, grads: Any, call: Call | None = None) -> tuple:
    q, k, v, mask, seen, key_half, slot_bounds, *rest = ctx.saved_tensors
    folded, saved = rest[:8], rest[8:]
    do, d_sum, d_mass = grads[:3]
    do = torch.zeros_like(saved[0]) if do is None else do
    if d_sum is not None or d_mass is not None:
        d_mass = q.new_zeros(d_sum.shape[:-1], dtype=torch.float32) if d_mass is None else d_mass.contiguous()
        d_sum = d_mass.new_zeros(*d_mass.shape, q.shape[-1]) if d_sum is None else d_sum.contiguous()
    with_maps = any(ctx.needs_input_grad[12:20])
    if call is None:
        out = _BACKWARD(
            q, k, v, mask, ctx.documents, seen, folded, saved, do, d_sum, d_mass, ctx.ints, ctx.scaling, with_maps,
            key_half, slot_bounds,
        )  # fmt: skip
    else:
        out = backward(call, q, k, v, mask, folded, saved, do, d_sum, d_mass, ctx.scaling, with_maps, key_half)
    start, out = ((None, None), out) if seen is None else (out[3:5], out[:3] + out[5:])
    maps: list[Any] = [None] * 8
    if with_maps:
        maps = [x if like is not None else None for x, like in zip(out[3:11], folded, strict=True)]
    halves: tuple[Any, ...] = (None, None)
    if key_half is not None:
        halves = tuple(out[-2:]) if ctx.ints[6] else (None, out[-1])
    return (*out[:3], None, None, None, *start, *[None] * 4, *maps, None, None, None, *halves, None)


_OPERATOR.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The same without the registered operator around it, which costs more time than a short sequence takes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, mask, documents, seen = inputs[:6]
        ints, scaling, *more, slot_bounds = inputs[20:]
        # Kept for the backward pass: tables of masks and documents take a hundred small operators.
        ctx.call = begin(q, k, mask, documents, seen, list(inputs[12:20]), ints, scaling, slot_bounds)
        output = forward(ctx.call, q, k, v, mask, inputs[6:12], ints[3], scaling, *more)
        _keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        return _differentiate(ctx, grads, ctx.call)


def attend(*inputs: Any) -> Any:
    """`_attend`, differentiable; as a registered operator while `torch.compile` traces."""
    return _OPERATOR(*inputs) if torch.compiler.is_compiling() else _Eager.apply(*inputs)
