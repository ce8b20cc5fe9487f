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

A log-weight per feature, added to `a_r`, gives unbiasedness up: calibration and training may damp a feature that
carries more noise than mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .feature_sums import LOG_ZERO

RELU_FLOOR = 1e-6


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
    log_weight: torch.Tensor | None = None  # (G, M), added to the queries' log-features; 0 keeps the estimate unbiased
    foresight: torch.Tensor | None = None  # (G, 1 + 4 D), which keys will matter, see `retention.priority_level`

    def to(self, *args, **kwargs) -> FeatureMap:
        """Move or cast every tensor, as `torch.Tensor.to`."""
        return FeatureMap(*(None if t is None else t.to(*args, **kwargs) for t in self))  # type: ignore[arg-type]


class LinearFeatures(NamedTuple):
    """A feature map folded for one side: `weight_r . x~ + bias_r - |norm_weight x~ + norm_bias|^2 / 2`."""

    weight: torch.Tensor  # (G, M, D), acts on x~
    bias: torch.Tensor  # (G, M)
    norm_weight: torch.Tensor | None  # (G, D, D), None for the identity
    norm_bias: torch.Tensor | None  # (G, D), None for zero


class SoftmaxFeatures(NamedTuple):
    """Learned features `[softmax(U x) | softmax(-U x)]`, `M = 2 K` (Hedgehog, 2402.04347; LoLCATs, 2410.10254)."""

    weight: torch.Tensor  # (G, K, D)
    mixing: torch.Tensor | None = None  # (G, R) for queries, see `beside_exact_keys`

    def log_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, ..., D) to (B, G, ..., M)."""
        h = _product(x, self.weight)
        return torch.cat([h.log_softmax(-1), (-h).log_softmax(-1)], -1)


class ReluFeatures(NamedTuple):
    """Learned features `relu(U x + b)` (T2R, 2103.13076)."""

    weight: torch.Tensor  # (G, M, D)
    bias: torch.Tensor  # (G, M)
    mixing: torch.Tensor | None = None  # (G, R)

    def log_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, G, ..., D) to (B, G, ..., M)."""
        bias = self.bias.view(*self.bias.shape[:1], *[1] * (x.dim() - 3), -1)
        # A key that no unit answers to keeps a little mass: its logarithm, and a query's normaliser, stay finite.
        return (torch.relu(_product(x, self.weight) + bias) + RELU_FLOOR).log()


Features = LinearFeatures | SoftmaxFeatures | ReluFeatures


class FoldedMap(NamedTuple):
    """Both sides of a feature map, folded (`fold_feature_map`), or learned; which keys are worth a slot, and whose."""

    query: Features
    key: Features
    foresight: torch.Tensor | None = None  # (G, 1 + 4 D), see `retention.priority_level`
    slot_bounds: torch.Tensor | None = None  # (G + 1,), where heads retain different numbers of keys, see `state`
    rounded_to: torch.dtype | None = None  # what the weights have been rounded to, see `round_weights`


def round_weights(maps: FoldedMap, dtype: torch.dtype) -> FoldedMap:
    """The map as inputs of `dtype` see it: in bfloat16 both sides' weights are rounded to bfloat16, once, for all.

    A product of tensor cores is then exact, in one pass, and every implementation multiplies by the same numbers. What
    is estimated stays what it was: these are the weights of another draw, see docs/decisions/0011. Biases and norms are
    not rounded.

    Parameters
    ----------
    maps : FoldedMap
    dtype : torch.dtype
        Of queries, keys and values; nothing is rounded for another than bfloat16.

    Returns
    -------
    FoldedMap
        Weights in the dtype they had; the gradient of a rounded weight goes to the weight (straight through).
    """
    if dtype != torch.bfloat16 or maps.rounded_to == dtype:
        return maps
    query, key = (side._replace(weight=_rounded(side.weight, dtype)) for side in (maps.query, maps.key))
    return maps._replace(query=query, key=key, rounded_to=dtype)


def _rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    near = weight.detach().to(dtype).to(weight.dtype)
    # Exact: numbers this close have a difference without rounding.
    return weight + (near - weight.detach()) if weight.requires_grad else near


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
    m = max(w.shape[-2], 1)
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
    if is_query and maps.log_weight is not None:
        bias = bias + maps.log_weight
    if other is not None:
        # The two linear terms that the shift leaves behind: q~ . c_k for queries, c_q . (k~ - c_k) for keys.
        weight = weight + other.unsqueeze(-2)
        if not is_query and maps.key_shift is not None:
            bias = bias - (other * maps.key_shift).sum(-1, keepdim=True)
    return LinearFeatures(weight, bias, precondition, norm_bias)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` (B, G, ..., D) times `weight` (G, K, D), per head: (B, G, ..., K)."""
    flat = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return torch.matmul(flat, weight.mT).reshape(*x.shape[:-1], weight.shape[-2])


def beside_exact_keys(log_query: torch.Tensor, folded: Features, exact: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put a query's log-features on the scale of its exact logits.

    Random features estimate `exp(q . k)` itself and are on it already. Learned ones are not: as in LoLCATs (2410.10254,
    section 3.3) they stand beside exact weights taken relative to the largest of the query, with a learned factor per
    head, of which `mixing` is the logarithm.

    Parameters
    ----------
    log_query : (B, G, ..., R w, M)
        The query heads of a group in turn, `w` queries each.
    folded : Features
    exact : of (B, G, ..., R w, E) each
        The query's exact logits, `-inf` where a key is hidden.

    Returns
    -------
    (B, G, ..., R w, M)
    """
    if isinstance(folded, LinearFeatures) or folded.mixing is None or not exact:
        return log_query
    top = exact[0].amax(-1, keepdim=True)
    for x in exact[1:]:
        top = torch.maximum(top, x.amax(-1, keepdim=True))
    g, r = folded.mixing.shape
    width = log_query.shape[-2] // r
    mixing = folded.mixing.repeat_interleave(width, 1).view(g, *[1] * (log_query.dim() - 4), r * width, 1)
    return log_query + top.clamp_min(LOG_ZERO) + mixing


def log_features(x: torch.Tensor, folded: Features, scaling: float) -> torch.Tensor:
    """Log-features of queries or keys.

    Parameters
    ----------
    x : (B, G, ..., D), the dtype of `folded`
        Unscaled queries or keys, after rotary embedding.
    folded : Features
        For the matching side: from `fold_feature_map`, or learned (these act on unscaled vectors).
    scaling : float
        Softmax scale of the layer; half of its logarithm goes to each side.

    Returns
    -------
    (B, G, ..., M)
    """
    if not isinstance(folded, LinearFeatures):
        return folded.log_features(x)
    return linear_features(x, folded, scaling).add_(norm_term(x, folded, scaling))


def linear_features(x: torch.Tensor, folded: Features, scaling: float) -> torch.Tensor:
    """`log_features` without `norm_term`, which is the same for all features and cancels in a query's normaliser."""
    if not isinstance(folded, LinearFeatures):
        return folded.log_features(x)
    b, g = x.shape[:2]
    flat = x.reshape(b, g, -1, x.shape[-1])
    # The scale goes to the small factor, to save a pass over the tokens.
    out = torch.matmul(flat, (folded.weight * scaling**0.5).mT).add_(folded.bias.unsqueeze(-2))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def norm_term(x: torch.Tensor, folded: Features, scaling: float) -> torch.Tensor:
    """`-|norm_weight x~ + norm_bias|^2 / 2` of `log_features`, (B, G, ..., 1); 0 for learned features."""
    if not isinstance(folded, LinearFeatures):
        return x.new_zeros(*x.shape[:-1], 1)
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
