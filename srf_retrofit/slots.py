"""Slots where they are missed: how many keys each layer retains, at one total for the model.

Layers differ by two orders of magnitude in what they lose with the keys they drop. So the loss is measured, one layer
at a time: the divergence of the model's predictions from those of the softmax model when that layer alone is
retrofitted, with half and with twice its share of slots. In between `d(h) = a h^-p`, and slots go where the next one
gains most. What a layer's own output is off by does not say that: the two were hardly correlated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling.attention import SRFAttention, exact_attention, srf_attentions
from .modeling.fused_attention import MAX_RETAINED
from .observation import evaluating, whole_rows

# Shares of the mean that a layer may have. A few values alone, for each is compiled for by itself.
SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)
# Positions whose logits are held at a time.
_CHUNK = 512
_LEAST = 1e-9


@dataclass(frozen=True)
class SlotsReport:
    """What `calibrate_slots` found.

    Attributes
    ----------
    retained : dict of int
        Slots of each layer, by its index.
    few, many : dict of float
        Divergence from the softmax model, nats a token, with that layer alone retrofitted, at the smallest and the
        largest share.
    before, after : float
        Sum of the layers' divergences by `d(h) = a h^-p`, with slots spread evenly and as they are now.
    tokens : int
    """

    retained: dict[int, int]
    few: dict[int, float]
    many: dict[int, float]
    before: float
    after: float
    tokens: int

    def __str__(self) -> str:
        counts = list(self.retained.values())
        return (
            f"{sum(counts):,} slots spread over {len(counts)} layers by {self.tokens:,} tokens, {min(counts)} to "
            f"{max(counts)} a layer: their divergences add up to {self.after:.4f} nats in place of {self.before:.4f}"
        )


@torch.no_grad()
def calibrate_slots(model: PreTrainedModel, batches: Any) -> SlotsReport:
    """Spread the slots of all layers by what each loses without them, in place; their total does not grow.

    Every layer gets between half and twice the mean of all. Costs two forward passes a layer over the batches. Call it
    after `calibrate_foresight` and `calibrate`, which decide what slots are filled with and what is left to them, and
    before `calibrate_gain`. Caches begun before cannot be continued.

    Parameters
    ----------
    model : PreTrainedModel
        A retrofitted causal language model that retains keys.
    batches : iterable of (B, L) int64, or of mappings with `input_ids`
        Whole rows, without padding, as long as the contexts that matter. Some 4 thousand tokens.

    Returns
    -------
    SlotsReport

    Raises
    ------
    ValueError
        When no layer retains keys, there is no head for the next token, no batch, a row holds padding, or a
        divergence is not finite. Nothing is changed then.
    """
    layers = [layer for layer in srf_attentions(model) if layer.srf_config.retained]
    if not layers:
        raise ValueError("no layer retains keys (retained=0): there are no slots to spread")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"this {type(model).__name__} predicts no token: give the causal language model")
    device = next(model.parameters()).device
    rows = [ids.to(device) for ids in whole_rows(batches)]
    if not rows:
        raise ValueError("there was no batch to measure the layers on: give a few thousand tokens")
    total = sum(layer.srf_config.retained for layer in layers)
    levels = _levels(total / len(layers))
    few: dict[int, float] = {}
    many: dict[int, float] = {}
    with evaluating(model), exact_attention(model):
        exact = [model.base_model(ids, use_cache=False).last_hidden_state for ids in rows]
        for layer in tqdm(layers, desc="spread the slots", unit="layer", delay=2, leave=False):
            for found, slots in ((few, levels[0]), (many, levels[-1])):
                found[layer.layer_idx] = _divergence(model, head, layer, slots, rows, exact)
    off = [i for i in few if not math.isfinite(few[i] + many[i])]
    if off:
        raise ValueError(f"layer {off[0]}: its divergence is not finite on these batches")
    curves = {i: _Curve.through(levels[0], few[i], levels[-1], many[i]) for i in few}
    spread = spread_slots(curves, levels, total)
    for layer in layers:
        layer.set_retained(spread[layer.layer_idx])
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "srf", None):
            srf = module.config.srf_config
            all_layers = range(module.config.num_hidden_layers)
            counts = tuple(spread.get(i, srf.for_layer(i).retained) for i in all_layers)
            module.config.srf = srf.replace(layer_retained=counts).to_dict()
    even = total / len(layers)
    return SlotsReport(
        spread, few, many,
        sum(curve(even) for curve in curves.values()), sum(curves[i](h) for i, h in spread.items()),
        sum(ids.numel() for ids in rows),
    )  # fmt: skip


@dataclass(frozen=True)
class _Curve:
    """`d(h) = a h^-p`, nats a token lost by a layer with `h` slots."""

    a: float
    p: float

    def __call__(self, slots: float) -> float:
        return self.a * slots**-self.p

    @classmethod
    def through(cls, few: int, d_few: float, many: int, d_many: float) -> _Curve:
        """Through two measurements; flat where more slots did not help."""
        if many == few or d_few <= d_many:
            return cls(max(d_few, _LEAST), 0.0)
        p = math.log(max(d_few, _LEAST) / max(d_many, _LEAST)) / math.log(many / few)
        return cls(max(d_few, _LEAST) * few**p, p)


def spread_slots(curves: dict[int, _Curve], levels: list[int], total: int) -> dict[int, int]:
    """One of `levels` for each layer, not above `total` in sum, such that the curves add up to the least."""
    # The least sum over the layers so far, by slots that are left; and what the last of them has then.
    least = torch.zeros(total + 1, dtype=torch.float64)
    choices = []
    for curve in curves.values():
        sums = torch.full((len(levels), total + 1), math.inf, dtype=torch.float64)
        for i, level in enumerate(levels):
            sums[i, : total + 1 - level] = least[level:] + curve(level)
        least, choice = sums.min(0)
        choices.append(choice)
    left = int(least.argmin())
    found = {}
    for index, choice in zip(reversed(curves), reversed(choices), strict=True):
        found[index] = levels[int(choice[left])]
        left += found[index]
    return {index: found[index] for index in curves}


def _levels(mean: float) -> list[int]:
    """The numbers of slots that a layer may have, rising; the smallest fits for all."""
    # Beyond what the kernels hold, layers would fall back to PyTorch.
    most = max(MAX_RETAINED, math.floor(mean))
    return sorted({min(max(1, math.floor(share * mean)), most) for share in SHARES})


def _divergence(
    model: PreTrainedModel,
    head: nn.Module,
    layer: SRFAttention,
    slots: int,
    rows: list[torch.Tensor],
    exact: list[torch.Tensor],
) -> float:
    """Nats a token, `KL(softmax model || model)` with one layer retrofitted that has so many slots."""
    before = layer.srf_config.retained
    layer.set_retained(slots)
    layer.exact = False
    try:
        sums = [
            _kl(head, theirs, model.base_model(ids, use_cache=False).last_hidden_state)
            for ids, theirs in zip(rows, exact, strict=True)
        ]
    finally:
        layer.exact = True
        layer.set_retained(before)
    return float(torch.stack(sums).sum()) / sum(ids.numel() for ids in rows)


def _kl(head: nn.Module, exact: torch.Tensor, approximate: torch.Tensor) -> torch.Tensor:
    """Sum over positions, a part of them at a time: logits of all would be the largest tensor of all."""
    total = torch.zeros((), dtype=torch.float64, device=exact.device)
    parts = (x.flatten(0, 1).split(_CHUNK) for x in (exact, approximate))
    for theirs, mine in zip(*parts, strict=True):
        target, found = (functional.log_softmax(head(x).float(), -1) for x in (theirs, mine))
        total += functional.kl_div(found, target, reduction="sum", log_target=True)
    return total
