"""One softmax over keys that lie in several tensors, without putting them side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable


def attend_parts(logits: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """`softmax(cat(logits, -1)) @ cat(values, -2)`, differentiable once.

    Parameters
    ----------
    logits : of (..., Q, E_p) each
        At least one finite one in every row. Overwritten where no gradient is asked for.
    values : of (..., E_p, D) each

    Returns
    -------
    (..., Q, D)
    """
    return _PartsAttention.apply(*logits, *values)


class _PartsAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        count = len(tensors) // 2
        lead, d = tensors[0].shape[:-1], tensors[-1].shape[-1]
        logits, values = ([x.reshape(-1, *x.shape[-2:]) for x in part] for part in (tensors[:count], tensors[count:]))
        top = logits[0].amax(-1, keepdim=True)
        for x in logits[1:]:
            top = torch.maximum(top, x.amax(-1, keepdim=True))
        # Without a backward pass, no new memory: touching it for the first time costs more than the arithmetic.
        needed = any(ctx.needs_input_grad)
        weights = [(x - top if needed else x.sub_(top)).exp_() for x in logits]
        scale = _total(weights).reciprocal_()
        output = values[0].new_empty(*lead, d)  # not a view, so that callers may write to it
        o = output.view(-1, lead[-1], d)
        torch.bmm(weights[0], values[0], out=o)
        for weight, value in zip(weights[1:], values[1:], strict=True):
            o.baddbmm_(weight, value)
        o.mul_(scale)
        if needed:
            ctx.save_for_backward(scale, *weights, *values)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output):
        scale, *saved = ctx.saved_tensors
        count = len(saved) // 2
        weights, values = saved[:count], saved[count:]
        lead = d_output.shape[:-2]
        with torch.autocast(d_output.device.type, enabled=False):
            d_o = d_output.reshape(-1, *d_output.shape[-2:]) * scale
            # By the logits' own gradients, not `d_output . output`: what cancels then cancels to the last bit.
            d_logits = [torch.bmm(d_o, value.mT).mul_(weight) for weight, value in zip(weights, values, strict=True)]
            shared = _total(d_logits).mul_(scale)
            d_logits = [x.addcmul_(weight, shared, value=-1) for x, weight in zip(d_logits, weights, strict=True)]
            d_values = [
                torch.bmm(weight.mT, d_o) if needed else None
                for weight, needed in zip(weights, ctx.needs_input_grad[count:], strict=True)
            ]
        return tuple(None if x is None else x.view(*lead, *x.shape[-2:]) for x in (*d_logits, *d_values))


def _total(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the last dimension of all parts, kept as one of length 1."""
    total = parts[0].sum(-1, keepdim=True)
    for part in parts[1:]:
        total += part.sum(-1, keepdim=True)
    return total
