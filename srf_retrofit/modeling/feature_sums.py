"""What sums of features are to attention: running sums over blocks of keys, and pseudo-keys.

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
