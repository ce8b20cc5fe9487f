"""Slots where they are missed: how many keys each layer retains, at one total for the model.

Layers differ by a factor of eighty in what the model loses with the keys that one of them drops. To second order an
error `e` of a layer's output costs `KL = 1/2 E (g . e)^2`, with `g` the gradient of the log-probability of a token that
is drawn from the softmax model's own prediction (the Fisher information, 1412.1193, section 5). So one pass forward and
one back through the softmax model, and each layer's output with each number of slots, say what every number costs
everywhere; errors of different tokens are taken to be independent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.attention import SRFAttention, exact_attention, record, srf_attentions
from ..modeling.fused_attention import MAX_RETAINED
from .observation import evaluating, whole_rows

# Shares of the mean that a layer may have. A few values alone, for each is compiled for by itself.
SHARES = (0.5, 0.75, 1.0, 1.5, 2.0)
# Positions whose logits are held at a time.
_CHUNK = 512


@dataclass(frozen=True)
class SlotsReport:
    """What `calibrate_slots` found.

    Attributes
    ----------
    retained : dict of int
        Slots of each layer, by its index.
    cost : dict of (dict of float)
        By layer and number of slots: estimated divergence from the softmax model, nats a token, when that layer alone
        drops keys.
    before, after : float
        Sum over the layers, with as many slots as they had and as they have now.
    tokens : int
    """

    retained: dict[int, int]
    cost: dict[int, dict[int, float]]
    before: float
    after: float
    tokens: int

    def __str__(self) -> str:
        counts = list(self.retained.values())
        return (
            f"{sum(counts):,} slots spread over {len(counts)} layers by {self.tokens:,} tokens, {min(counts)} to "
            f"{max(counts)} a layer: what they cost adds up to {self.after:.4f} nats in place of {self.before:.4f}"
        )


def calibrate_slots(model: PreTrainedModel, batches: Any) -> SlotsReport:
    """Spread the slots of all layers by what each loses without them, in place; their total does not grow.

    Every layer gets between half and twice the mean of all. Needs the memory of one training step on a row, without
    gradients of weights. Call it after `calibrate_foresight` and `calibrate`, which decide what slots are filled with
    and what is left to them, and before `calibrate_gain`. Caches begun before cannot be continued.

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
    TypeError
        When the model is wrapped, by PEFT for example.
    ValueError
        When no layer retains keys, there is no head for the next token, no batch, a row holds padding, or what is
        found is not finite. Nothing is changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a Transformers model, got {type(model).__name__}: give the model inside it")
    layers = [layer for layer in srf_attentions(model) if layer.srf_config.retained]
    if not layers:
        raise ValueError("no layer retains keys (retained=0): there are no slots to spread")
    if model.get_output_embeddings() is None:
        raise ValueError(f"this {type(model).__name__} predicts no token: give the causal language model")
    device = next(model.parameters()).device
    rows = [row.to(device) for ids in whole_rows(batches) for row in ids.split(1)]
    if not rows:
        raise ValueError("there was no batch to measure the layers on: give a few thousand tokens")
    before = {layer.layer_idx: layer.srf_config.retained for layer in layers}
    total = sum(before.values())
    levels = _levels(total / len(layers))
    asked = {i: sorted({*levels, h}) for i, h in before.items()}
    sums = {i: dict.fromkeys(counts, 0.0) for i, counts in asked.items()}
    tokens = sum(row.numel() for row in rows)
    generator = torch.Generator(device).manual_seed(0)
    with evaluating(model), exact_attention(model), _weights_without_gradients(model):
        for row in tqdm(rows, desc="spread the slots", unit="row", delay=2, leave=False):
            for layer, call, gradient in _gradients(model, layers, row, generator):
                for slots in asked[layer.layer_idx]:
                    sums[layer.layer_idx][slots] += _cost(layer, slots, call, gradient)
    cost = {i: {h: x / tokens for h, x in by_slots.items()} for i, by_slots in sums.items()}
    off = [i for i, by_slots in cost.items() if not math.isfinite(sum(by_slots.values()))]
    if off:
        raise ValueError(f"layer {off[0]}: its cost is not finite on these batches")
    spread = spread_slots({i: [cost[i][h] for h in levels] for i in cost}, levels, total)
    for layer in layers:
        layer.set_retained(spread[layer.layer_idx])
    srf, all_layers = model.config.srf_config, range(model.config.num_hidden_layers)
    record(model, layer_retained=tuple(spread.get(i, srf.for_layer(i).retained) for i in all_layers))
    return SlotsReport(
        spread, cost, sum(cost[i][h] for i, h in before.items()), sum(cost[i][h] for i, h in spread.items()), tokens
    )


def spread_slots(cost: dict[int, list[float]], levels: list[int], total: int) -> dict[int, int]:
    """One of `levels` for each layer, not above `total` in sum, such that costs (by level) add up to the least."""
    # The least sum over the layers so far, by slots that are left; and what the last of them has then.
    least = torch.zeros(total + 1, dtype=torch.float64)
    choices = []
    for by_level in cost.values():
        sums = torch.full((len(levels), total + 1), math.inf, dtype=torch.float64)
        for i, level in enumerate(levels):
            sums[i, : total + 1 - level] = least[level:] + by_level[i]
        least, choice = sums.min(0)
        choices.append(choice)
    left = int(least.argmin())
    found = {}
    for index, choice in zip(reversed(cost), reversed(choices), strict=True):
        found[index] = levels[int(choice[left])]
        left += found[index]
    return {index: found[index] for index in cost}


def _levels(mean: float) -> list[int]:
    """The numbers of slots that a layer may have, rising; the smallest fits for all."""
    # Beyond what the kernels hold, layers would fall back to PyTorch.
    most = max(MAX_RETAINED, math.floor(mean))
    return sorted({min(max(1, math.floor(share * mean)), most) for share in SHARES})


@dataclass
class _Call:
    """What one layer was given, and what it said with exact attention."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


def _gradients(
    model: PreTrainedModel, layers: list[SRFAttention], row: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[SRFAttention, _Call, torch.Tensor]]:
    """Of each layer of the softmax model: its call on this row, and the gradient at its output (1, L, E).

    The gradient is that of `sum_t log p(y_t)`, with `y_t` drawn from the prediction after token `t`.
    """
    calls: dict[int, _Call] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not output[0].requires_grad:
            output[0].requires_grad_()
        calls[layer.layer_idx] = _Call(args, kwargs, output[0])  # type: ignore[index]

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.enable_grad():
            hidden = model.base_model(row, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    head = model.get_output_embeddings()
    parts = []
    for part in hidden.detach().flatten(0, 1).split(_CHUNK):
        part.requires_grad_()
        with torch.enable_grad():
            log_p = head(part).float().log_softmax(-1)
            if not bool(log_p.isfinite().all()):
                raise ValueError("predictions of the softmax model are not finite on these batches")
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            parts += torch.autograd.grad(log_p.gather(-1, drawn).sum(), part)
    outputs = [calls[layer.layer_idx].output for layer in layers]
    found = torch.autograd.grad(hidden, outputs, torch.cat(parts).view_as(hidden))
    yield from ((layer, calls.pop(layer.layer_idx), x) for layer, x in zip(layers, found, strict=True))


@torch.no_grad()
def _cost(layer: SRFAttention, slots: int, call: _Call, gradient: torch.Tensor) -> float:
    """`1/2 sum_t (g_t . e_t)^2` in nats, `e` the error of the layer's output with so many slots."""
    before = layer.srf_config.retained
    layer.set_retained(slots)
    layer.exact = False
    try:
        # Not called as a module: hooks have seen this call already.
        error = layer.forward(*call.args, **call.kwargs)[0].double() - call.output.double()
    finally:
        layer.exact = True
        layer.set_retained(before)
    return float((gradient.double() * error).sum(-1).square().sum()) / 2


@contextlib.contextmanager
def _weights_without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside this context no weight wants a gradient: those of outputs are all that is asked for."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
