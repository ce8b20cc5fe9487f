"""Closed forms for the error of random-feature estimates of the softmax kernel.

They are what the measured errors are tested against, and what calibration minimises. `q` and `k` carry the softmax
scale; `u = q + k` and `v2 = |u|^2`. The relative error of an estimate of `exp(q.k)` depends on `q` and `k` through `u`
alone: making `u` small is the whole business of the geometry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

_QUADRATURE_NODES = 256


def hypergeometric_1f1(a: float, b: float, x: float) -> float:
    """Kummer's function `1F1(a; b; x)` for positive `a`, `b` and `x >= 0`, by its series of positive terms."""
    term = total = 1.0
    k = 0
    while term > 1e-17 * total or k < x:
        term *= (a + k) / (b + k) * x / (k + 1)
        total += term
        k += 1
    return total


@functools.lru_cache(maxsize=64)
def _angle_quadrature(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes `sin(phi)` and weights for the density proportional to `sin(phi)^(D-1)` on `(0, pi)`."""
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    sines = np.sin(0.5 * math.pi * (nodes + 1))
    weights = weights * sines ** (head_dim - 1)
    return sines, weights / weights.sum()


def pair_moment(v2: float, head_dim: int, cosine: float) -> float:
    """`rho = E exp((w_1 + w_2) . u)` for two rows with independent chi norms at a fixed angle.

    The direction of `w_1 + w_2` is uniform, which gives a series in `|w_1 + w_2|^2 = s (1 + cosine sin(phi))`, where
    `s = |w_1|^2 + |w_2|^2` is chi-squared with `2 D` degrees of freedom, and `phi`, independent of it, has density
    proportional to `sin(phi)^(D-1)`. Summing over the moments of `s` leaves

        rho = E_phi 1F1(D; D/2; v2 (1 + cosine sin(phi)) / 2),

    without the alternating sums of 2301.13856, and `1F1(D; D/2; v2/2)` at a right angle.

    Parameters
    ----------
    v2 : float
        `|q + k|^2 >= 0`.
    head_dim : int
        `D >= 1`.
    cosine : float
        Of the angle between the two rows, in `[-1, 1]`.
    """
    if cosine == 0.0:
        return hypergeometric_1f1(head_dim, head_dim / 2, v2 / 2)
    sines, weights = _angle_quadrature(head_dim)
    values = [hypergeometric_1f1(head_dim, head_dim / 2, v2 * (1 + cosine * float(s)) / 2) for s in sines]
    return float(np.dot(weights, values))


def relative_mse(v2: float, head_dim: int, num_features: int, projection: str = "simplex") -> float:
    """Mean squared error of the estimate of `exp(q.k)`, over `exp(2 q.k)`, with the identity geometry.

    For one block of `m <= D` rows it is `[(e^v2 - 1) + (m - 1) (rho e^-v2 - 1)] / m`; blocks are independent, so that
    their variances add.

    Parameters
    ----------
    v2 : float
        `|q + k|^2 >= 0`.
    head_dim, num_features : int
        `D` and `M`, both `>= 1`; `M` may be larger than `D`.
    projection : {"simplex", "orthogonal", "iid"}

    Returns
    -------
    float
        The variance of the estimate relative to the squared truth (the estimate is unbiased).

    Raises
    ------
    ValueError
        When an argument is out of range.
    """
    if v2 < 0 or head_dim < 1 or num_features < 1:
        raise ValueError(f"need v2 >= 0, head_dim >= 1, num_features >= 1; got {v2}, {head_dim}, {num_features}")
    if projection == "iid":
        return math.expm1(v2) / num_features
    if projection not in ("orthogonal", "simplex"):
        raise ValueError(f"projection must be simplex, orthogonal or iid, got {projection!r}")
    full, rest = divmod(num_features, head_dim)
    total = 0.0
    for blocks, rows in ((full, head_dim), (1, rest)):
        if not blocks or not rows:
            continue
        variance = rows * math.expm1(v2)
        if rows > 1:
            cosine = -1 / (rows - 1) if projection == "simplex" else 0.0
            excess = pair_moment(v2, head_dim, cosine) * math.exp(-v2) - 1
            variance += rows * (rows - 1) * excess
        total += blocks * variance
    return total / num_features**2


def optimal_stretch(second_moment: float) -> float:
    """`t* = ((1 + 2 lambda) + sqrt((1 + 2 lambda)^2 + 8 lambda)) / 2`, the minimiser of `log_variance`.

    `t = 1 - 8 A` for one entry of the diagonal proposal `A`, and `lambda = E u_l^2` in that coordinate. With one `A`
    for all coordinates these are the optimal positive features of 2205.15317.
    """
    slope = 1 + 2 * second_moment
    return (slope + math.sqrt(slope * slope + 8 * second_moment)) / 2


def log_variance(second_moments: Sequence[float], proposal: Sequence[float] | None = None) -> float:
    """Mean of `log(1 + relative variance)` of a single feature, over pairs of queries and keys.

    It is `sum_l log((1 + t_l) / 2) - log(t_l) / 2 + lambda_l / t_l` with `t = 1 - 8 A`, and `E |u|^2` without a
    proposal.

    Parameters
    ----------
    second_moments : sequence of D floats
        `lambda_l = E u_l^2` after shift and preconditioner.
    proposal : sequence of D floats, optional
        Diagonal of `A`, every entry below 1/8 (where the variance is finite).
    """
    if proposal is None:
        return math.fsum(second_moments)
    total = []
    for moment, a in zip(second_moments, proposal, strict=True):
        t = 1 - 8 * a
        if t <= 0:
            raise ValueError(f"the proposal must stay below 1/8 for a finite variance, got {a}")
        total.append(math.log((1 + t) / 2) - math.log(t) / 2 + moment / t)
    return math.fsum(total)
