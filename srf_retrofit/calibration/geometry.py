"""Closed-form geometry from a few thousand tokens: where queries and keys lie decides how well features serve them.

The geometry of a layer never changes what its features estimate, only their variance. It is fitted per key/value head
to first and second moments of the scaled queries `q~` and keys `k~` after rotary embedding, with the queries of a group
pooled. Padding is left out, and so are the sinks: they are always attended to exactly, and the first position's key is
an outlier that would dominate every moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modeling.attention import SRFAttention
from ..modeling.features import SRFFeatures
from ..modeling.random_features import single_thread
from ..theory import log_variance, optimal_stretch
from .observation import run_exactly, token_rows

GEOMETRIES = ("identity", "shift", "preconditioner", "proposal")
DEFAULT_GEOMETRY = "preconditioner"
DEFAULT_MAX_TOKENS = 8192
TOKENS_PER_DIMENSION = 4
_SHRINKAGE = 1e-2


class Geometry(NamedTuple):
    """The fields of `FeatureMap` that calibration fits, all set, per key/value head."""

    query_shift: torch.Tensor  # (G, D)
    key_shift: torch.Tensor  # (G, D)
    preconditioner: torch.Tensor  # (G, D, D)
    inverse_transpose: torch.Tensor  # (G, D, D)
    proposal: torch.Tensor  # (G, D)


class Moments:
    """Count, sum and sum of outer products of vectors per head, in float64, without keeping the vectors.

    Parameters
    ----------
    num_heads, head_dim : int
        `G` and `D`.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(num_heads, head_dim, dtype=torch.float64)
        self.outer = torch.zeros(num_heads, head_dim, head_dim, dtype=torch.float64)

    def update(self, x: torch.Tensor) -> None:
        """Add vectors `(G, N, D)` of any dtype, on any device."""
        # Not every accelerator has float64; moments of a few thousand tokens are quick on the CPU.
        x = x.detach().to("cpu", torch.float64)
        self.count += x.shape[1]
        self.sum += x.sum(1)
        self.outer += x.mT @ x

    @property
    def mean(self) -> torch.Tensor:
        """`(G, D)`."""
        return self.sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """About the mean, `(G, D, D)`."""
        mean = self.mean
        return self.outer / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)


class LayerMoments(NamedTuple):
    """Moments of the unscaled queries (a group's pooled) and keys of one layer."""

    query: Moments
    key: Moments


def _power(eigenvalues: torch.Tensor, vectors: torch.Tensor, exponent: float) -> torch.Tensor:
    return (vectors * eigenvalues.pow(exponent).unsqueeze(-2)) @ vectors.mT


def _shrink(covariance: torch.Tensor, amount: float) -> torch.Tensor:
    """Towards the multiple of the identity with the same trace, `(G, D, D)`; an all-zero matrix becomes tiny."""
    d = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float64).tiny ** 0.25)
    return (1 - amount) * covariance + amount * level[:, None, None] * torch.eye(d, dtype=covariance.dtype)


def balance(query_covariance: torch.Tensor, key_covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The preconditioner that minimises `tr(M Sq M') + tr(M^-T Sk M^-1)`, and its inverse transpose.

    `P = M'M = Sq^-1/2 (Sq^1/2 Sk Sq^1/2)^1/2 Sq^-1/2` and `M = U' P^1/2`, with `U` diagonalising `P^1/2 Sq P^1/2`:
    both covariances become the same diagonal matrix.

    Parameters
    ----------
    query_covariance, key_covariance : (G, D, D) float64, positive definite

    Returns
    -------
    preconditioner, inverse_transpose : (G, D, D) float64
    """
    values, vectors = torch.linalg.eigh(query_covariance)
    root, inverse_root = _power(values, vectors, 0.5), _power(values, vectors, -0.5)
    values, vectors = torch.linalg.eigh(root @ key_covariance @ root)
    middle = _power(values, vectors, 0.5)
    values, vectors = torch.linalg.eigh(inverse_root @ middle @ inverse_root)
    half, inverse_half = _power(values, vectors, 0.5), _power(values, vectors, -0.5)
    _, rotation = torch.linalg.eigh(half @ query_covariance @ half)
    # Eigenvectors are free up to sign: the largest entry of each is made positive.
    largest = rotation.gather(-2, rotation.abs().argmax(-2, keepdim=True))
    rotation = rotation * largest.sign()
    return rotation.mT @ half, rotation.mT @ inverse_half


def second_moments(moments: LayerMoments, geometry: Geometry, scaling: float) -> torch.Tensor:
    """`lambda_l = E u_l^2` of `u = q' + k'` over independent pairs of a query and a key, `(G, D)` float64."""
    parts, means = [], []
    for side, shift, transform in (
        (moments.query, geometry.query_shift, geometry.preconditioner),
        (moments.key, geometry.key_shift, geometry.inverse_transpose),
    ):
        transform = transform.double()
        moved = transform @ (side.covariance * scaling) @ transform.mT
        parts.append(moved.diagonal(dim1=-2, dim2=-1))
        means.append((transform @ (side.mean * scaling**0.5 - shift.double()).unsqueeze(-1)).squeeze(-1))
    # Shifting by rounded means can leave a variance a hair below zero.
    return (parts[0] + parts[1]).clamp_min(0) + (means[0] + means[1]).square()


def fit_geometry(moments: LayerMoments, *, scaling: float, geometry: str = DEFAULT_GEOMETRY) -> Geometry:
    """Geometry of one layer from its moments, in closed form.

    Parameters
    ----------
    moments : LayerMoments
        Of unscaled queries and keys.
    scaling : float
        Softmax scale of the layer; the geometry acts on vectors times its square root.
    geometry : {"identity", "shift", "preconditioner", "proposal"}
        How far to go, each level with all before it: nothing; subtract the means; equalise the covariances, see
        `balance`; per coordinate the variance-minimising Gaussian proposal, see `theory.optimal_stretch`.

    Returns
    -------
    Geometry
        float32, fitted in float64.

    Raises
    ------
    ValueError
        For an unknown level, statistics that are not finite, or no statistics at all.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
    for name, side in zip(("query", "key"), moments, strict=True):
        if not side.count:
            raise ValueError(f"no {name} was observed")
        if not (side.sum.isfinite().all() and side.outer.isfinite().all()):
            raise ValueError(f"{name} statistics are not finite: the model or its input holds NaN or infinity")

    level = GEOMETRIES.index(geometry)
    g, d = moments.query.sum.shape
    eye = torch.eye(d, dtype=torch.float64).repeat(g, 1, 1)
    zero = torch.zeros(g, d, dtype=torch.float64)
    out = Geometry(zero, zero, eye, eye, zero)
    if level >= 1:
        out = out._replace(query_shift=moments.query.mean * scaling**0.5, key_shift=moments.key.mean * scaling**0.5)
    if level >= 2:
        covariances = (_shrink(side.covariance * scaling, _SHRINKAGE) for side in moments)
        with single_thread():
            preconditioner, inverse_transpose = balance(*covariances)
        out = out._replace(preconditioner=preconditioner, inverse_transpose=inverse_transpose)
    if level >= 3:
        stretch = [[optimal_stretch(x) for x in row] for row in second_moments(moments, out, scaling).tolist()]
        out = out._replace(proposal=(1 - torch.tensor(stretch, dtype=torch.float64)) / 8)
    return Geometry(*(t.float() for t in out))


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` saw and what the geometry is predicted to do.

    The figures are means over independent query-key pairs of `log(1 + relative variance)` of one feature
    (`theory.log_variance`; `E |q + k|^2` without a proposal), per layer index, one for each key/value head.
    """

    geometry: str
    tokens: int  # real tokens that entered the key statistics: no padding, no sinks
    seconds: float
    before: dict[int, list[float]]  # with the identity geometry
    after: dict[int, list[float]]  # with the geometry fitted

    def __str__(self) -> str:
        before, after = (fmean(x for row in side.values() for x in row) for side in (self.before, self.after))
        return (
            f"geometry {self.geometry!r} of {len(self.after)} layers, {self.tokens} tokens in {self.seconds:.1f} s: "
            f"mean log-variance of a feature {before:.2f} -> {after:.2f}"
        )


class _LayerObserver:
    """Feeds the moments of one layer with what its attention is called on."""

    def __init__(self, layer: SRFAttention) -> None:
        features = layer.attn_fn
        self.heads, self.dim, self.sinks = features.num_kv_heads, features.head_dim, layer.srf_config.sinks
        self.moments = LayerMoments(Moments(self.heads, self.dim), Moments(self.heads, self.dim))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        b, _, length, d = q.shape
        real = q.new_ones(b, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        # Positions count real tokens only, as they do in the attention.
        chosen = real & (real.cumsum(-1) > self.sinks)
        # Selected, never multiplied by the mask: what stands at padding may be anything, NaN included.
        grouped = q.unflatten(1, (self.heads, -1)).permute(0, 3, 1, 2, 4)[chosen]  # (N, G, R, D)
        self.moments.query.update(grouped.transpose(0, 1).reshape(self.heads, -1, d))
        self.moments.key.update(k.transpose(1, 2)[chosen].transpose(0, 1))


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    geometry: str = DEFAULT_GEOMETRY,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
) -> CalibrationReport:
    """Fit the geometry of every retrofitted layer and write it to the layer's buffers.

    The model runs as its own teacher, with exact softmax attention, so that the result does not depend on the features
    it has now, nor on an earlier calibration.

    Parameters
    ----------
    model : nn.Module
        A retrofitted model; its mode, gradients and attention are as before afterwards.
    batches : tensor, mapping, or iterable of these
        Token ids `(B, L)` or `(L,)`, or mappings with `input_ids` and optionally an `attention_mask` of that shape.
    geometry : {"identity", "shift", "preconditioner", "proposal"}
        See `fit_geometry`. "identity" takes an earlier calibration back.
    max_tokens : int or None
        No further row is read once this many real tokens have been; None reads everything.

    Returns
    -------
    CalibrationReport

    Raises
    ------
    ValueError
        When the model has no retrofitted layer, the batches are no token ids, there are fewer than four key tokens per
        head dimension, or a layer's statistics are not finite. The geometry is unchanged then.
    """
    layers = {module.attn_fn.layer: module for module in model.modules() if isinstance(module, SRFAttention)}
    if not layers:
        raise ValueError("the model has no retrofitted layer to calibrate: call retrofit(model) first")
    features = {index: layer.attn_fn for index, layer in layers.items() if isinstance(layer.attn_fn, SRFFeatures)}
    if len(features) < len(layers):
        kind = next(layer.srf_config.feature_map for i, layer in layers.items() if i not in features)
        raise ValueError(f"calibration fits the geometry of random features, this model's are {kind!r}: train them")
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise ValueError(f"max_tokens must be a positive integer or None, got {max_tokens!r}")

    start = time.perf_counter()
    observers = {index: _LayerObserver(layer) for index, layer in layers.items()}
    _observe(model, layers, observers, token_rows(batches, max_tokens))

    scalings = {index: float(layer.scaling) for index, layer in layers.items()}  # type: ignore[arg-type]
    fitted: dict[int, Geometry] = {}
    before: dict[int, list[float]] = {}
    after: dict[int, list[float]] = {}
    tokens = 0
    for index, observer in observers.items():
        moments, tokens = observer.moments, observer.moments.key.count
        needed = TOKENS_PER_DIMENSION * observer.dim
        if tokens < needed:
            raise ValueError(
                f"calibration was given {tokens} key tokens (padding and the first {observer.sinks} of each row not "
                f"counted), but needs at least {needed}, four per head dimension: give more or longer batches"
            )
        try:
            plain = fit_geometry(moments, scaling=scalings[index], geometry="identity")
            fitted[index] = fit_geometry(moments, scaling=scalings[index], geometry=geometry)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        for out, choice in ((before, plain), (after, fitted[index])):
            lambdas = second_moments(moments, choice, scalings[index]).tolist()
            out[index] = [log_variance(x, a) for x, a in zip(lambdas, choice.proposal.tolist(), strict=True)]
    for index in layers:
        values = fitted[index]._asdict()
        # Parts that this level leaves out are not given, so that they become the exact identity.
        given = {"shift": 2, "preconditioner": 4, "proposal": 5}.get(geometry, 0)
        features[index].set_geometry(**{name: values[name] for name in Geometry._fields[:given]})
    return CalibrationReport(geometry, tokens, time.perf_counter() - start, before, after)


def _observe(
    model: nn.Module,
    layers: dict[int, SRFAttention],
    observers: dict[int, _LayerObserver],
    rows: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
) -> None:
    """Run the softmax model over the rows; everything set here is set back, whatever happens."""
    previous = {index: layer.observer for index, layer in layers.items()}
    try:
        for index, layer in layers.items():
            layer.observer = observers[index]
        run_exactly(model, rows, "calibrate")
    finally:
        for index, layer in layers.items():
            layer.observer = previous[index]
