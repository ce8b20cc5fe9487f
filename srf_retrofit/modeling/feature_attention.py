"""Causal attention through features alone, blocks at a time: the pure form's inner part, with its own backward pass.

With log-features `a`, `b` and the weight `K_ij = sum_r e^{a_ir + b_jr}` of key `j` for query `i`,

    o_i = sum_{j <= i} K_ij v_j / Z_i,   Z_i = sum_{j <= i} K_ij

Exponents have any size, so each is taken relative to the largest that its query may see, `c_ir = max_{j <= i} b_jr`:
`e^{a_ir + b_jr} = e^{T_i} G_ir e^{b_jr - c_ir}`, `G_ir = e^{a_ir + c_ir - T_i} <= 1` with `T_i = max_r(a_ir + c_ir)`.
A reference that took in later keys could underflow all that a query sees, and would let those keys change its bits.

Keys before a block are met through their sums, keys inside it by halving: at half size `s` the second half of a group
of `2 s` positions sees all of the first half, whose maxima serve as a reference for both, and a matrix product does.
What separates one reference from the next is the same for a whole group, so the exponentials per token are those of
`G` and of the references; going up the halves the rest are products of numbers below 1, which underflow only where the
whole does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .feature_sums import LOG_ZERO

# Rows and columns of the smallest matrix products: smaller groups share one, and what they do not see is left out.
TILE = 4


class FeatureOutput(NamedTuple):
    """What queries got from features, and the sums after all keys."""

    output: torch.Tensor  # (X, N, w R, D), zero where a query sees no key
    log_mass: torch.Tensor  # (X, N, w R, 1), log Z_i, about LOG_ZERO where a query sees no key
    values: torch.Tensor  # (X, M, D)
    mass: torch.Tensor  # (X, M)
    reference: torch.Tensor  # (X, M), LOG_ZERO before the first key; carries no gradient


def attend_features(
    log_query: torch.Tensor,
    log_key: torch.Tensor,
    value: torch.Tensor,
    initial: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> FeatureOutput:
    """Attention of every query to the keys before its block and to those of its block up to its own position.

    Parameters
    ----------
    log_query : (X, N, w R, M)
        Rows are tokens, then the `R` query heads of one key/value head; `w` a power of two. `X` stands for `B G`.
    log_key : (X, N, w, M)
        `-inf` for keys that are none.
    value : (X, N, w, D)
    initial : S (X, M, D), z (X, M), reference (X, M)
        Sums before the first block.

    Returns
    -------
    FeatureOutput
        Differentiable once, in everything but `reference`: the references cancel.
    """
    return FeatureOutput(*_FeatureAttention.apply(log_query, log_key, value, *initial))


class _FeatureAttention(torch.autograd.Function):
    """Written by hand for speed: autograd would keep and read every intermediate of the halving."""

    @staticmethod
    def forward(ctx, log_query, log_key, value, sums, mass, reference):
        x, n, w, m = log_key.shape
        y, r, levels = x * n, log_query.shape[2] // w, w.bit_length() - 1
        b, v = log_key.reshape(y, w, m), value.reshape(y, w, -1)

        # Up the halves: the maximum of each group.
        highest = [b]
        for _ in range(levels):
            first, second = highest[-1].view(y, -1, 2, m).unbind(2)
            highest.append(torch.maximum(first, second).clamp_min_(LOG_ZERO))
        start = reference.clamp_min(LOG_ZERO).unsqueeze(1)
        reference = torch.cat([start, highest[-1].view(x, n, m)], 1).cummax(1).values  # (X, N + 1, M)
        decay = (reference[:, :-1] - reference[:, 1:]).exp_().unsqueeze(-1).unbind(1)

        # Down the halves: the maximum before each group.
        before = [reference[:, :-1].reshape(y, 1, m)]
        for groups in highest[-2::-1]:
            seen = torch.maximum(before[-1], groups.view(y, -1, 2, m)[:, :, 0])
            before.append(torch.stack([before[-1], seen], 2).view(y, -1, m))
        before.reverse()  # by size of the groups, as `highest`
        seen = torch.maximum(before[0], b)

        query = log_query.reshape(y, w, r, m) + seen.unsqueeze(2)
        top = query.amax(-1, keepdim=True)
        query.sub_(top).exp_()  # G
        own = query * (b - seen).exp_().unsqueeze(2)
        query.mul_(torch.sub(before[0], seen, out=seen).exp_().unsqueeze(2))
        weight = v.new_zeros(y, w * r, w)  # K_ij e^-T_i inside blocks
        _diagonal(weight, r).copy_(own.sum(-1))
        keep = any(ctx.needs_input_grad)
        factors = []
        key = torch.ones_like(b)
        for level in range(levels):
            s = 1 << level
            # What the second halves see: the first halves, and all before both.
            seen = before[level].view(y, -1, 2, m)[:, :, 1]
            near = highest[level].view(y, -1, 2, m)[:, :, 0] - seen
            past = before[level + 1] - seen
            later = query.view(y, -1, 2, s, r, m)[:, :, 1]
            left = (later * near.exp_()[:, :, None, None]).view(-1, _tile(s, w) * r, m)
            later.mul_(past.exp_()[:, :, None, None])
            halves = key.view(y, -1, 2, s, m)
            right = halves[:, :, 0].clone(memory_format=torch.contiguous_format).view(-1, _tile(s, w), m)
            fall = highest[level].view(y, -1, 2, m) - highest[level + 1].unsqueeze(2)
            halves.mul_(fall.exp_().unsqueeze(3))
            _pairs(weight, s, r).copy_(_products(torch.bmm(left, right.mT), y, s, r))
            factors += [left, right] if keep else []
        # By now `query` is e^{a + reference before the block - T}; and so `key` after this, for its end.
        key.mul_((highest[-1] - reference[:, 1:].reshape(y, 1, m)).exp_())

        query = query.view(y, w * r, m)
        sums_before = torch.bmm(key.mT, v)
        mass_before = key.sum(1).unsqueeze(-1)
        end_sums = _running_sums(sums_before.view(x, n, m, -1), sums, decay)
        end_mass = _running_sums(mass_before.view(x, n, m, 1), mass.unsqueeze(-1), decay)
        total = torch.bmm(query, mass_before).add_(weight.sum(-1, keepdim=True))
        # At least 1 where a query sees a key: the largest of its weights counts 1.
        scale = total.clamp_min(0.5).reciprocal_().mul_(total > 0)
        output = v.new_empty(x, n, w * r, v.shape[-1])  # not a view, so that callers may write to it
        o = output.view(y, w * r, -1)
        torch.bmm(query, sums_before, out=o).baddbmm_(weight, v).mul_(scale)
        log_mass = top.view(x, n, w * r, 1) + total.clamp_min_(0.5).log_().view(x, n, w * r, 1)
        if keep:
            ctx.save_for_backward(output, scale, v, query, own, weight, key, sums_before, mass_before, *decay, *factors)
            ctx.sizes = x, n, w, r, m
        end_reference = reference[:, -1].clone()
        ctx.mark_non_differentiable(end_reference)
        return output, log_mass, end_sums, end_mass.squeeze(-1), end_reference

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output, d_log_mass, d_sums, d_mass, _):
        x, n, w, r, m = ctx.sizes
        y = x * n
        output, scale, v, query, own, weight, key, sums, mass, *rest = ctx.saved_tensors
        decay, factors = rest[:n], rest[n:]
        with torch.autocast(output.device.type, enabled=False):
            d_total = d_log_mass - (d_output * output).sum(-1, keepdim=True)
            d_total = d_total.reshape(scale.shape) * scale
            d_o = d_output.reshape(y, w * r, -1) * scale
            d_weight = torch.bmm(d_o, v.mT).add_(d_total)
            d_v = torch.bmm(weight.mT, d_o)

            d_query = torch.bmm(d_o, sums.mT).addcmul_(d_total, mass.mT).mul_(query)
            added = torch.bmm(query.mT, d_o)
            added_mass = torch.bmm(query.mT, d_total)
            # The sums before a block hold all keys before it: the gradients run the other way.
            d_sums = _running_sums(added.view(x, n, m, -1), d_sums, decay, reverse=True)
            d_mass = _running_sums(added_mass.view(x, n, m, 1), d_mass.unsqueeze(-1), decay, reverse=True)
            d_key = torch.bmm(v, added.mT).add_(added_mass.mT).mul_(key)
            d_v.baddbmm_(key, added)

            d_query = d_query.view(y, w, r, m)
            d_own = own * _diagonal(d_weight, r).unsqueeze(-1)
            d_query.add_(d_own)
            d_key.add_(d_own.sum(2))
            for level, (left, right) in enumerate(zip(factors[::2], factors[1::2], strict=True)):
                s = 1 << level
                d_product = d_weight.new_zeros(left.shape[0], left.shape[1], right.shape[1])
                _products(d_product, y, s, r).copy_(_pairs(d_weight, s, r))
                d_left = torch.bmm(d_product, right).mul_(left)
                d_query.view(y, -1, 2, s, r, m)[:, :, 1].add_(d_left.view(y, -1, s, r, m))
                d_right = torch.bmm(d_product.mT, left).mul_(right)
                d_key.view(y, -1, 2, s, m)[:, :, 0].add_(d_right.view(y, -1, s, m))
        return (
            d_query.view(x, n, w * r, m),
            d_key.view(x, n, w, m),
            d_v.view(x, n, w, -1),
            d_sums,
            d_mass.squeeze(-1),
            None,
        )


def _tile(s: int, w: int) -> int:
    """Rows and columns of a matrix product for half size `s`: itself, or several groups side by side."""
    return max(s, min(TILE, w // 2))


def _diagonal(weight: torch.Tensor, r: int) -> torch.Tensor:
    """Each token's weight for itself, as a view: (Y, w R, w) -> (Y, w, R)."""
    return weight.unflatten(1, (-1, r)).diagonal(dim1=1, dim2=3).mT


def _pairs(weight: torch.Tensor, s: int, r: int) -> torch.Tensor:
    """Second halves meeting first halves at half size `s`, as a view shaped as `_products`."""
    y, _, w = weight.shape
    c = w // (2 * s)
    below = weight.view(y, c, 2, s * r, c, 2, s)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return below.unflatten(1, (-1, _tile(s, w) // s))


def _products(product: torch.Tensor, y: int, s: int, r: int) -> torch.Tensor:
    """Groups' own parts of products that they share, as a view: (., tile R, tile) -> (Y, ., tile/s, s R, s)."""
    groups = product.shape[-1] // s
    return product.view(y, -1, groups, s * r, groups, s).diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _running_sums(
    added: torch.Tensor, start: torch.Tensor, decay: Sequence[torch.Tensor], reverse: bool = False
) -> torch.Tensor:
    """Replace what each block adds, `added` (X, N, M, E), by the sum before it (in `reverse`: after); the last sum."""
    steps = list(zip(added.unbind(1), decay, strict=True))
    for block, factor in reversed(steps) if reverse else steps:
        following = torch.addcmul(block, start, factor)
        block.copy_(start)
        start = following
    return start
