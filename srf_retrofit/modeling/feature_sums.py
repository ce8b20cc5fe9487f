"""What sums of features are to attention: running sums over blocks of keys, pseudo-keys, logits inside a block.

Shapes as in `feature_map.py`; `N` blocks of `E` keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Stands for log 0 where a difference of two of them must not be NaN.
LOG_ZERO = -1e30


class FeatureSums(NamedTuple):
    """Feature sums at block boundaries: true values are `sums * exp(reference)`."""

    values: torch.Tensor  # (B, G, N + 1, M, D), S
    mass: torch.Tensor  # (B, G, N + 1, M), z, at least 1 once a key has been folded
    reference: torch.Tensor  # (B, G, N + 1, M), running maximum of the log-features, LOG_ZERO before the first key


def accumulate_features(
    log_key: torch.Tensor, value: torch.Tensor, initial: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> FeatureSums:
    """Running feature sums over blocks of folded keys, each referenced to maxima of keys already folded.

    Parameters
    ----------
    log_key : (B, G, N, E, M)
        Log-features of the keys folded at each of the `N` boundaries, `-inf` where there is none.
    value : (B, G, N, E, D)
    initial : S (B, G, M, D), z (B, G, M), reference (B, G, M)
        Sums before the first boundary.

    Returns
    -------
    FeatureSums
        Entry 0 is `initial`, entry `n` the sums after `n` boundaries.
    """
    s0, z0, mu0 = initial
    highest = log_key.detach().amax(-2)  # (B, G, N, M)
    # The references cancel between numerator and denominator, so they carry no gradient.
    reference = torch.cat([mu0.detach().clamp_min(LOG_ZERO).unsqueeze(2), highest], 2).cummax(2).values
    feature = (log_key - reference[:, :, 1:].unsqueeze(-2)).exp_()  # <= 1, an underflow is a true negligible
    source = torch.cat([s0.unsqueeze(2), torch.matmul(feature.mT, value)], 2)  # (B, G, N + 1, M, D)
    mass = torch.cat([z0.unsqueeze(2), feature.sum(-2)], 2)  # (B, G, N + 1, M)
    # decay[n, p] carries what was added at boundary p to boundary n >= p; every exponent is <= 0.
    exponent = reference.transpose(2, 3)  # (B, G, M, N + 1)
    exponent = exponent.unsqueeze(-2) - exponent.unsqueeze(-1)  # [n, p] = mu_p - mu_n
    count = exponent.shape[-1]
    later = torch.ones(count, count, dtype=torch.bool, device=value.device).triu(1)
    decay = exponent.masked_fill_(later, float("-inf")).exp_()
    values = torch.matmul(decay, source.transpose(2, 3)).transpose(2, 3)
    mass = torch.matmul(decay, mass.transpose(2, 3).unsqueeze(-1)).squeeze(-1).transpose(2, 3)
    return FeatureSums(values, mass, reference)


def feature_keys(sums_value: torch.Tensor, mass: torch.Tensor, reference: torch.Tensor):
    """Feature sums as pseudo-keys: their log-mass `mu + log z` and their mean values `S / z`.

    The mass of a feature is at least 1 (its largest key counts 1) or 0 before the first key; the clamp only keeps
    the latter finite.
    """
    mass = mass.clamp_min(0.5)
    return reference + mass.log(), sums_value / mass.unsqueeze(-1)


def in_block_logits(log_query: torch.Tensor, log_key: torch.Tensor) -> torch.Tensor:
    """`log sum_r e^{a_ir + b_jr}` for `j <= i` inside blocks, halving them: the lower triangle, `-inf` above it.

    The second half of a block sees all keys of the first half, so their maxima are a reference that is safe for each
    of its queries, and a matrix product serves; both halves are then blocks of their own. Any reference shared with
    keys that a query does not see could underflow all that it does see.

    Parameters
    ----------
    log_query : (..., R, w, M); log_key : (..., w, M), `w` a power of two

    Returns
    -------
    (..., R, w, w)
    """
    w = log_key.shape[-2]
    if w == 1:
        return (log_query + log_key.unsqueeze(-3)).logsumexp(-1, keepdim=True)
    # Both halves at once, as a batch dimension of size two before R.
    q2 = log_query.unflatten(-2, (2, w // 2)).movedim(-3, -4)
    k2 = log_key.unflatten(-2, (2, w // 2))
    diagonal = in_block_logits(q2, k2)
    first, later = k2.select(-3, 0), q2.select(-4, 1)  # (..., w/2, M), (..., R, w/2, M)
    reference = first.detach().amax(-2)
    key = (first - reference.unsqueeze(-2)).exp_()
    later = later + reference[..., None, None, :]
    top = later.detach().amax(-1, keepdim=True)
    product = torch.matmul((later - top).exp_().flatten(-3, -2), key.mT).view(*later.shape[:-1], w // 2)
    # A key below e^-87 of its half's largest weighs nothing; the clamp keeps its gradient zero instead of 0/0.
    below = product.clamp_min(torch.finfo(product.dtype).tiny).log() + top
    upper = torch.cat([diagonal.select(-4, 0), torch.full_like(below, float("-inf"))], -1)
    return torch.cat([upper, torch.cat([below, diagonal.select(-4, 1)], -1)], -2)
