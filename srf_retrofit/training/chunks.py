"""Sums over positions, taken in chunks, so that what a chunk needs never exists for all positions at once.

Backward, either every chunk is computed again, or its gradient was taken on the way forward, while what it needs was
there: a loss that is a sum has one incoming gradient, a factor that can wait. The second takes one pass in place of two
and has to know the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def sum_in_chunks(
    loss: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    chunk_size: int,
    parameters: Iterable[torch.Tensor] | None = None,
) -> torch.Tensor:
    """`loss(*tensors)` for a loss that sums over positions, computed for `chunk_size` of them at a time.

    Parameters
    ----------
    loss : callable
        Of as many tensors as are given, each of a chunk of positions. Differentiated in the first of them, in whatever
        it closes over, and in no other.
    tensors : sequence of tensor
        (N, ...) each.
    chunk_size : int
        Positions at a time.
    parameters : iterable of tensor, optional
        All that the loss reaches beside `tensors` and that may want a gradient. When they are given, the gradients
        are taken together with the loss, which is then a scalar, and kept in float32 or wider: for `parameters` as many
        numbers as they have. They are taken at scale 1: not for float16, where they would need a larger one.

    Returns
    -------
    As `loss` returns.
    """
    if parameters is not None and torch.is_grad_enabled():
        return _WithGradients.apply(loss, chunk_size, tuple(tensors[1:]), tensors[0], *parameters)
    if tensors[0].shape[0] <= chunk_size:
        return loss(*tensors)
    total: Any = 0
    for parts in zip(*(t.split(chunk_size) for t in tensors), strict=True):
        total = total + checkpoint(loss, *parts, use_reentrant=False, preserve_rng_state=False)
    return total


class _WithGradients(torch.autograd.Function):
    """The sum, with its gradients found chunk by chunk on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[..., torch.Tensor],
        chunk_size: int,
        others: tuple[torch.Tensor, ...],
        given: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        needs_given, *needs = ctx.needs_input_grad[3:]
        d_given = torch.empty_like(given) if needs_given else None
        wanted = [p for p, need in zip(parameters, needs, strict=True) if need]
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        total: Any = 0
        parts = zip(*(t.split(chunk_size) for t in (given, *others)), strict=True)
        for i, (part, *rest) in enumerate(parts):
            part = part.detach().requires_grad_(needs_given)
            with torch.enable_grad():
                value = loss(part, *rest)
            inputs = [part] * needs_given + wanted
            # What does not reach the loss, a part of an adapter for example, has no gradient.
            found = list(torch.autograd.grad(value, inputs, allow_unused=True)) if inputs else []
            total = total + value.detach()
            if d_given is not None:
                d_given[i * chunk_size : (i + 1) * chunk_size] = found.pop(0)
            for j, new in enumerate(found):
                if new is not None:
                    wide = torch.promote_types(new.dtype, torch.float32)
                    # A copy to add to: parameters that are added to each other are given one tensor between them.
                    before = sums[j]
                    sums[j] = new.to(wide, copy=True) if before is None else before.add_(new)
        ctx.needs, ctx.dtypes = needs, [p.dtype for p in wanted]
        ctx.present = [d_given is not None, *(x is not None for x in sums)]
        ctx.save_for_backward(*(x for x in (d_given, *sums) if x is not None))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        d_given, *sums = [saved.pop(0) if here else None for here in ctx.present]
        if d_given is not None:
            d_given = (d_given * d_total).to(d_given.dtype)
        scaled = [None if x is None else (x * d_total).to(dtype) for x, dtype in zip(sums, ctx.dtypes, strict=True)]
        return None, None, None, d_given, *(scaled.pop(0) if need else None for need in ctx.needs)
