"""Which keys are worth a slot: a forecast of the attention a key will receive, fitted to exact attention.

A key leaves the window after some tens of tokens, with little to tell whether it will be looked at again. Part of
that shows in the key and the value themselves, in some heads most of it. For every key/value head a linear model
foresees the logarithm of the attention that the key will receive after it has left the window, from the largest
attention it has received so far and from `k`, `k^2`, `v` and `v^2`: ridge regression, in closed form, on a little text.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..modeling.attention import SRFAttention, srf_attentions
from ..modeling.configuration import LEVELS, SRFConfig
from ..modeling.retention import LEAST_LEVEL, round_priority
from .observation import observe_whole_rows

# Attention is summed over so many tokens after the window; keys with fewer to come teach nothing.
HORIZON = 1024
LEAST_FUTURE = 128
# Sums below that are one: 2^-14 of one query's attention.
LEAST_SUM = 2.0**-14
# Factors are multiples of that, no larger than 2: their products with levels are then exact in float32.
FACTOR_STEP = 1 / 16
RIDGE = 1e-3


@dataclass(frozen=True)
class ForesightReport:
    """What `calibrate_foresight` found: per layer and key/value head, and as means.

    `alone` is the squared correlation of what is foreseen from the attention received so far, `foreseen` with the key
    and the value as well; on the text it was fitted to.
    """

    factors: dict[int, list[float]]
    alone: float
    foreseen: float
    tokens: int

    def __str__(self) -> str:
        heads = sum(len(row) for row in self.factors.values())
        return (
            f"foresight of {heads} heads from {self.tokens:,} keys: explains {self.foreseen:.2f} of the variance of "
            f"future attention, {self.alone:.2f} without looking at the key"
        )


class _Normal:
    """Normal equations of one layer's regressions, summed over batches on the queries and keys of the exact model."""

    def __init__(self, config: SRFConfig) -> None:
        self.config = config
        self.gram: Any = 0.0  # (G, 3 + 4 D, 3 + 4 D) of [1 | level so far | k | k^2 | v | v^2 | future]
        self.count = 0

    def __call__(self, layer: SRFAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        q, k, v = layer._project(hidden_states, kwargs["position_embeddings"])
        with torch.autocast(q.device.type, enabled=False):
            self._add(q.float(), k.float(), v.float(), layer.scaling)

    def _add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        w, s = self.config.window, self.config.sinks
        b, heads, length, _ = q.shape
        g = k.shape[1]
        # Keys that leave the window while there is enough left to see.
        if length <= least_row(self.config):
            return
        last = length - 2 * w - LEAST_FUTURE
        received = torch.zeros(b, g, length, device=q.device)
        future = torch.zeros_like(received)
        for head in range(heads):
            group = head // (heads // g)
            now, later = _attention_received(q[:, head] * scaling, k[:, group], self.config)
            received[:, group] = torch.maximum(received[:, group], now)
            future[:, group] += later
        level = (round_priority(received).view(torch.int32) >> 11).clamp_min(LEAST_LEVEL).float() / LEVELS
        # A key near the end of a row has had less time to be looked at: the rate counts.
        left = (length - torch.arange(length, device=q.device) - 2 * w).clamp(1, HORIZON)
        target = (future * (HORIZON / left)).clamp_min(LEAST_SUM).log2()
        x = torch.cat([torch.ones_like(level)[..., None], level[..., None], k, k * k, v, v * v, target[..., None]], -1)
        x = x[:, :, s:last].double().transpose(0, 1).flatten(1, 2)
        self.gram = self.gram + x.mT @ x
        self.count += x.shape[1]

    def solve(self, factor: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The table (G, 1 + 4 D) and the explained shares of variance (G,), by the level alone and by all."""
        gram = self.gram.cpu()
        n, d = gram.shape[-1] - 1, (gram.shape[-1] - 3) // 4
        mean = gram[:, :, :1] / gram[:, :1, :1]
        centred = gram - gram[:, :1, :1] * mean * mean.mT
        cov, with_target, variance = centred[:, 1:n, 1:n], centred[:, 1:n, n], centred[:, n, n].clamp_min(1e-12)
        alone = with_target[:, 0].square() / cov[:, 0, 0].clamp_min(1e-12) / variance
        # In units of each column's spread, so that the ridge means the same for all; constant columns get nothing.
        spread = cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt()
        cov = cov / spread[:, :, None] / spread[:, None] + RIDGE * torch.eye(n - 1).double()
        with_target = with_target / spread
        best = (_solve(cov, with_target) / spread)[:, :1] if factor is None else torch.full_like(spread[:, :1], factor)
        best = (best / FACTOR_STEP).round().clamp(0, 2 / FACTOR_STEP) * FACTOR_STEP
        # The rest once more, with the factor as it has been rounded.
        rest = with_target[:, 1:] - cov[:, 1:, 0] * (best * spread[:, :1])
        weight = torch.cat([best, _solve(cov[:, 1:, 1:], rest) / spread[:, 1:]], -1)
        assert weight.shape[-1] == 1 + 4 * d
        left = variance - 2 * (weight * centred[:, 1:n, n]).sum(-1)
        left = left + (weight[:, None] @ centred[:, 1:n, 1:n] @ weight[..., None])[:, 0, 0]
        return weight.float(), alone, 1 - left / variance


def _solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a^-1 b` of positive definite matrices (G, N, N) and vectors (G, N)."""
    return torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(a)).squeeze(-1)


def _attention_received(q: torch.Tensor, k: torch.Tensor, config: SRFConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest attention of keys (B, L, D) inside sinks and window, and the sum of that which comes after.

    By scaled queries (B, L, D), in parts: as `retention.local_priorities`, and over `HORIZON` tokens.
    """
    w, s, length = config.window, config.sinks, q.shape[1]
    delay = min(config.retention_delay, w // 2)
    now, later = q.new_zeros(q.shape[:2]), q.new_zeros(q.shape[:2])
    for i in torch.arange(length, device=q.device).split(16 * w):
        first, last = int(i[0]), int(i[-1]) + 1
        logits = q[:, i] @ k[:, :last].mT
        j = torch.arange(first, last, device=q.device)
        logits[:, :, first:].masked_fill_(j > i[:, None], float("-inf"))
        # The window: keys from one block before the part on, beside the sinks.
        near = max(s, first - w)
        j = torch.arange(near, last, device=q.device)
        blocks = i[:, None] // w - j // w
        local = logits[:, :, near:].masked_fill(blocks > 1, float("-inf"))
        total = torch.cat([logits[:, :, :s], local], -1).logsumexp(-1, keepdim=True)
        counts = (i[:, None] - j > delay) & (blocks <= 1)
        received = (local - total).exp_().masked_fill_(~counts, 0.0).amax(1)
        now[:, near:last] = torch.maximum(now[:, near:last], received)
        # And what lies behind it, as far as the horizon.
        least = max(0, first - HORIZON - 2 * w)
        j = torch.arange(least, last, device=q.device)
        counts = (i[:, None] // w - j // w >= 2) & (i[:, None] - j < HORIZON + 2 * w)
        later[:, least:last] += logits.softmax(-1)[:, :, least:].mul_(counts).sum(1)
    return now, later


def least_row(config: SRFConfig) -> int:
    """Tokens that a row must have more than, to show what becomes of any key."""
    return config.sinks + 2 * config.window + LEAST_FUTURE


@torch.no_grad()
def calibrate_foresight(model: nn.Module, batches: Any, *, factor: float | None = 1.0) -> ForesightReport:
    """Fit which keys are worth a slot, for every key/value head, and write it to the layers' buffers.

    The model runs with exact attention. Needs no particular order with `calibrate` and `calibrate_gain`; gains are
    better chosen afterwards, when it is settled what is left to the features.

    Parameters
    ----------
    model : nn.Module
        A retrofitted model that retains keys.
    batches : iterable of (B, L) int64, or of mappings with `input_ids`
        Whole rows, without padding, of at least two windows and 128 tokens; rows as long as the contexts that matter
        are better (attention counts for 1,024 tokens after a key has left the window). Some 16 thousand tokens:
        there are `4 D + 2` coefficients a head.
    factor : float or None
        Weight of the attention that a key has received, 0 to 2 in steps of 1/16. `None` for what fits best, mostly
        below 1/4: that predicts text a little better untrained, and forgets what was conspicuous once but is not the
        kind of key that is usually looked at again, such as a number to be recalled.

    Returns
    -------
    ForesightReport

    Raises
    ------
    ValueError
        When no layer retains keys, no row is long enough, a row holds padding, statistics are not finite, or `factor`
        is out of range. Nothing is changed then.
    """
    if factor is not None and not 0 <= factor <= 2:
        raise ValueError(f"factor must be in 0..2, got {factor}")
    layers = [layer for layer in srf_attentions(model) if layer.srf_config.retained]
    if not layers:
        raise ValueError("no layer retains keys (retained=0): there is nothing to foresee")
    normal = [_Normal(layer.srf_config) for layer in layers]
    observe_whole_rows(model, dict(zip(layers, normal, strict=True)), batches, "foresee")
    if not all(mine.count for mine in normal):
        least = least_row(layers[0].srf_config)
        raise ValueError(f"there was no row of more than {least} tokens to foresee anything on: give longer rows")
    for layer, mine in zip(layers, normal, strict=True):
        if not bool(torch.isfinite(mine.gram).all()):
            raise ValueError(f"layer {layer.layer_idx}: keys, values or attention are not finite on these batches")
    solved = [mine.solve(factor) for mine in normal]
    for layer, (table, *_) in zip(layers, solved, strict=True):
        layer.attn_fn.set_foresight(table)
    return ForesightReport(
        {layer.layer_idx: table[:, 0].tolist() for layer, (table, *_) in zip(layers, solved, strict=True)},
        fmean(float(x) for _, alone, _ in solved for x in alone),
        fmean(float(x) for *_, all_ in solved for x in all_),
        normal[0].count,
    )
