"""Positive random features of the softmax kernel, in the log domain, with a variance-reducing geometry.

Shape legend, used in all of `modeling/`: `B` rows, `H` query heads, `G` key/value heads, `R = H / G`, `L` positions,
`D` head dimension, `M` features.

Writing `q~ = sqrt(scaling) q` and `k~ = sqrt(scaling) k`, the maps below satisfy, for any fixed geometry and in
expectation over the rows of the projection, `sum_r exp(a_r(q) + b_r(k)) = exp(q~ . k~)`:

    q' = P (q~ - c_q),   k' = P^-T (k~ - c_k),   T = (I - 4A)^(1/2)
    a_r(q) = w_r' A w_r + w_r' T q' - |q'|^2/2 + q~ . c_k          + log(det(I - 4A)^(1/4) M^(-1/2))
    b_r(k) = w_r' A w_r + w_r' T k' - |k'|^2/2 + c_q . (k~ - c_k)  + log(det(I - 4A)^(1/4) M^(-1/2))

With the identity geometry these are the positive features of FAVOR+ (2009.14794, lemma 1); an isotropic `A` gives
the optimal positive features of Chefs' Random Tables (2205.15317, theorem 3.3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class FeatureMap(NamedTuple):
    """Projection and geometry of one layer, all float32 (or all float64), one of each per key/value head.

    `query_shift`, `key_shift` and `proposal` are `(G, D)`, `preconditioner` and `inverse_transpose` are
    `(G, D, D)` with `inverse_transpose = preconditioner^-T`; each pair may be `None`, which means the identity.
    """

    projection: torch.Tensor  # (G, M, D)
    query_shift: torch.Tensor | None = None
    key_shift: torch.Tensor | None = None
    preconditioner: torch.Tensor | None = None
    inverse_transpose: torch.Tensor | None = None
    proposal: torch.Tensor | None = None  # diagonal of A, every entry below 1/4

    def to(self, *args, **kwargs) -> FeatureMap:
        """Move or cast every tensor, as `torch.Tensor.to`."""
        return FeatureMap(*(None if t is None else t.to(*args, **kwargs) for t in self))  # type: ignore[arg-type]


class LinearFeatures(NamedTuple):
    """A feature map folded for one side: `weight_r . x~ + bias_r - |norm_weight x~ + norm_bias|^2 / 2`."""

    weight: torch.Tensor  # (G, M, D), acts on x~
    bias: torch.Tensor  # (G, M)
    norm_weight: torch.Tensor | None  # (G, D, D), None for the identity
    norm_bias: torch.Tensor | None  # (G, D), None for zero


class FoldedMap(NamedTuple):
    """Both sides of a feature map, folded; see `fold_feature_map`."""

    query: LinearFeatures
    key: LinearFeatures


def fold_feature_map(maps: FeatureMap, side: str) -> LinearFeatures:
    """Fold projection, geometry and constants into one affine map per side, once per call.

    Parameters
    ----------
    maps : FeatureMap
    side : {"query", "key"}

    Returns
    -------
    LinearFeatures
        In the dtype of `maps.projection`; differentiable in every tensor of `maps`.
    """
    w = maps.projection
    m = w.shape[-2]
    is_query = side == "query"
    shift = maps.query_shift if is_query else maps.key_shift
    other = maps.key_shift if is_query else maps.query_shift
    precondition = maps.preconditioner if is_query else maps.inverse_transpose

    bias = w.new_full(w.shape[:-1], -0.5 * math.log(m))
    weight = w
    if maps.proposal is not None:
        stretch = (1 - 4 * maps.proposal).unsqueeze(-2)  # (G, 1, D)
        weight = w * stretch.sqrt()
        bias = bias + (w.square() * maps.proposal.unsqueeze(-2)).sum(-1) + 0.25 * stretch.log().sum(-1)
    if precondition is not None:
        weight = weight @ precondition
    if shift is not None:
        bias = bias - (weight @ shift.unsqueeze(-1)).squeeze(-1)
    norm_bias = None
    if shift is not None:
        norm_bias = -shift if precondition is None else -(precondition @ shift.unsqueeze(-1)).squeeze(-1)
    if other is not None:
        # The two linear terms that the shift leaves behind: q~ . c_k for queries, c_q . (k~ - c_k) for keys.
        weight = weight + other.unsqueeze(-2)
        if not is_query and maps.key_shift is not None:
            bias = bias - (other * maps.key_shift).sum(-1, keepdim=True)
    return LinearFeatures(weight, bias, precondition, norm_bias)


def log_features(x: torch.Tensor, folded: LinearFeatures, scaling: float) -> torch.Tensor:
    """Log-features of queries or keys.

    Parameters
    ----------
    x : (B, G, ..., D), the dtype of `folded`
        Unscaled queries or keys, after rotary embedding.
    folded : LinearFeatures
        From `fold_feature_map`, for the matching side.
    scaling : float
        Softmax scale of the layer; half of its logarithm goes to each side.

    Returns
    -------
    (B, G, ..., M)
    """
    return linear_features(x, folded, scaling).add_(norm_term(x, folded, scaling))


def linear_features(x: torch.Tensor, folded: LinearFeatures, scaling: float) -> torch.Tensor:
    """`log_features` without `norm_term`, which is the same for all features and cancels in a query's normaliser."""
    b, g = x.shape[:2]
    flat = x.reshape(b, g, -1, x.shape[-1])
    # The scale goes to the small factor, to save a pass over the tokens.
    out = torch.matmul(flat, (folded.weight * scaling**0.5).mT).add_(folded.bias.unsqueeze(-2))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def norm_term(x: torch.Tensor, folded: LinearFeatures, scaling: float) -> torch.Tensor:
    """`-|norm_weight x~ + norm_bias|^2 / 2` of `log_features`, (B, G, ..., 1)."""
    b, g = x.shape[:2]
    flat = x.reshape(b, g, -1, x.shape[-1])
    root = scaling**0.5
    if folded.norm_weight is not None:
        moved = torch.matmul(flat, (folded.norm_weight * root).mT)
    else:
        moved = flat if folded.norm_bias is None else flat * root
    if folded.norm_bias is not None:
        moved = moved.add_(folded.norm_bias.unsqueeze(-2))
    half = 0.5 * scaling if moved is flat else 0.5
    # Negated here rather than subtracted later: the gradient is then summed over features without a copy.
    return (-half * moved.square().sum(-1, keepdim=True)).reshape(*x.shape[:-1], 1)
