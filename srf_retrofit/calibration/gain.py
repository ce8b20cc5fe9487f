"""How loud the features may be: a log-weight per key/value head, fitted to the output of exact attention.

Random features are unbiased, and noisy where the keys they stand for are many and far apart: in such a head the noise
costs more than the mass is worth. A factor `e^g <= 1` on a head's features trades bias for variance, as a shrinkage
estimator does; `g = 0` leaves the head as it is and `-inf` goes without features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..modeling.attention import SRFAttention, srf_attentions
from ..modeling.features import SRFFeatures
from ..modeling.ops import srf_attention
from .observation import observe_whole_rows

# Log-weights that are tried; the last silences a head.
GAINS = (0.0, -0.35, -0.7, -1.05, -1.4, -2.1, -2.8, -3.5, -4.2, -5.6, -20.0)
_PROBE = 0.7


@dataclass(frozen=True)
class GainReport:
    """What `calibrate_gain` chose, and the mean relative error of a head's output with and without it."""

    gains: dict[int, list[float]]  # by layer, one for each key/value head
    before: float
    after: float

    def __str__(self) -> str:
        chosen = [g for row in self.gains.values() for g in row]
        silent = sum(g == GAINS[-1] for g in chosen)
        return (
            f"log-weights of {len(chosen)} heads, {silent} of them silenced: mean relative error of a head's output "
            f"{self.before:.3f} -> {self.after:.3f}"
        )


class _HeadErrors:
    """Squared errors of one layer's heads for every gain, on the queries, keys and values of the exact model.

    A query's output with gain `g` lies on the line from `o_E`, that of its exact keys alone, through `o`, that without
    a gain: `o(g) = o_E + c (o - o_E)` with `c = e^g / (1 - p + e^g p)`, where `p` is the features' share of the
    normaliser. A third output, at one other gain, shows the share; errors at all gains then follow from inner products.
    """

    def __init__(self, gains: Sequence[float]) -> None:
        self.factors = [math.exp(gain) for gain in gains]
        self.wrong: Any = 0.0  # (gains, G)
        self.whole: Any = 0.0  # (G,)

    def __call__(self, layer: SRFAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        q, k, v = layer._project(hidden_states, kwargs["position_embeddings"])
        groups, log_forget = k.shape[1], layer._forget(hidden_states)
        exact = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.scaling, enable_gqa=q.shape[1] != groups
        ).float()
        maps: Any = layer.attn_fn.folded()
        quieter = maps._replace(query=maps.query._replace(bias=maps.query.bias - _PROBE))

        def attend(maps: Any, ablation: str | None = None) -> torch.Tensor:
            o, _ = srf_attention(
                q, k, v, maps, layer.srf_config, scaling=layer.scaling, ablation=ablation, log_forget=log_forget
            )
            return o.float()

        alone = attend(maps, "no_tail")
        pull = attend(maps) - alone
        length = pull.square().sum(-1)
        slope = ((attend(quieter) - alone) * pull).sum(-1) / length.clamp_min(torch.finfo(length.dtype).tiny)
        factor = math.exp(-_PROBE)
        # Where the features change nothing the slope means nothing, and neither does the share.
        share = ((factor / slope.clamp_min(factor) - 1) / (factor - 1)).clamp(0, 1)
        missing = alone - exact
        still, along = missing.square().sum(-1), (missing * pull).sum(-1)
        rows = []
        for factor in self.factors:
            step = factor / (1 - share + factor * share)
            rows.append(_per_group(still + 2 * step * along + step.square() * length, groups))
        self.wrong = self.wrong + torch.stack(rows)
        self.whole = self.whole + _per_group(exact.square().sum(-1), groups)


def _per_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum of (B, H, L) per key/value head, (G,) float64 on the CPU."""
    return x.sum((0, 2)).double().view(groups, -1).sum(-1).cpu()


@torch.no_grad()
def calibrate_gain(model: nn.Module, batches: Any, *, gains: Sequence[float] = GAINS) -> GainReport:
    """Choose a log-weight for the features of every key/value head, and write it to the layer's buffers.

    The model runs as its own teacher; each head takes the gain with the smallest squared error of its group's outputs
    against exact attention. Call it after `calibrate`: the geometry decides how noisy a head is; and again after
    `calibrate_slots`, which has changed what is left to the features.

    Parameters
    ----------
    model : nn.Module
        A retrofitted model whose features are random ones.
    batches : iterable of (B, L) int64, or of mappings with `input_ids`
        Whole rows, without padding. A few thousand tokens, as long as the contexts that matter.
    gains : sequence of float
        Candidates, in nats.

    Returns
    -------
    GainReport

    Raises
    ------
    ValueError
        When no layer has random features, or there is nothing to look at. Nothing is changed then.
    """
    layers, features = [], []
    for layer in srf_attentions(model):
        if isinstance(layer.attn_fn, SRFFeatures) and layer.srf_config.num_features:
            layers.append(layer)
            features.append(layer.attn_fn)
    if not layers:
        raise ValueError("the model has no layer with random features to weigh: call retrofit(model) first")
    if not gains:
        raise ValueError("gains is empty: give candidates, 0.0 among them")
    before = [mine.log_weight.detach().clone() for mine in features]
    errors = [_HeadErrors(gains) for _ in layers]
    try:
        for mine in features:
            mine.set_log_weight(None)
        count = observe_whole_rows(model, dict(zip(layers, errors, strict=True)), batches, "weigh the features")
    finally:
        for mine, old in zip(features, before, strict=True):
            mine.set_log_weight(old)
    if not count:
        raise ValueError("there was no batch to weigh the features on: give a few thousand tokens")
    report: dict[int, list[float]] = {}
    first, last = [], []
    for layer, mine, error in zip(layers, features, errors, strict=True):
        best = error.wrong.argmin(0)  # (G,)
        chosen = torch.tensor(gains, dtype=torch.float32)[best]
        mine.set_log_weight(chosen.unsqueeze(-1))
        report[layer.layer_idx] = chosen.tolist()
        relative = (error.wrong / error.whole).sqrt()
        first += relative[list(gains).index(0.0)].tolist() if 0.0 in gains else relative[0].tolist()
        last += relative.gather(0, best.unsqueeze(0))[0].tolist()
    return GainReport(report, fmean(first), fmean(last))
