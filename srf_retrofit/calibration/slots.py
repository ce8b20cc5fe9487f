"""Slots where they are missed: how many keys each layer retains, or each of its heads, at one total for the model.

Layers differ by a factor of eighty in what the model loses with the keys that one of them drops, and heads of a layer
by as much again. To second order an error `e` of what a layer's heads say costs `KL = 1/2 E (g . e)^2`, with `g` the
gradient of the log-probability of a token that is drawn from the softmax model's own prediction (the Fisher
information, 1412.1193, section 5). So one pass forward and one back through the softmax model, and each layer's heads
with each number of slots, say what every number costs everywhere; errors of different tokens, and of different heads,
are taken to be independent.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.attention import SRFAttention, exact_attention, record, srf_attentions
from ..modeling.fused_attention import MAX_RETAINED
from .observation import evaluating, whole_rows

# Whose number of slots is chosen.
SLOTS_BY = ("head", "layer")
# Shares of the mean that each may have. A few values alone, for each is compiled for by itself.
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)
# Positions whose logits are held at a time.
_CHUNK = 512


@dataclass(frozen=True)
class SlotsReport:
    """What `calibrate_slots` found.

    Attributes
    ----------
    retained : dict of (tuple of int)
        By layer: slots of each key/value head, or of all of them alike.
    cost : dict of (dict of (tuple of float))
        By layer and number of slots: estimated divergence from the softmax model, nats a token, when that head alone
        drops keys (or that layer).
    before, after : float
        Sum over all, with as many slots as they had and as they have now.
    tokens : int
    """

    retained: dict[int, tuple[int, ...]]
    cost: dict[int, dict[int, tuple[float, ...]]]
    before: float
    after: float
    tokens: int

    def __str__(self) -> str:
        counts = [h for layer in self.retained.values() for h in layer]
        unit = "head" if len(counts) > len(self.retained) else "layer"
        return (
            f"{sum(counts) / len(counts):.0f} slots a head in the mean, spread over {len(counts)} {unit}s by "
            f"{self.tokens:,} tokens, {min(counts)} to {max(counts)} a {unit}: what they cost adds up to "
            f"{self.after:.4f} nats in place of {self.before:.4f}"
        )


def calibrate_slots(
    model: PreTrainedModel, batches: Any, *, by: str = "head", shares: Sequence[float] = SHARES
) -> SlotsReport:
    """Spread the slots of all heads by what each loses without them, in place; their total does not grow.

    Each gets a quarter to four times the mean of all. Needs the memory of one training step on a row, without
    gradients of weights. Call it after `calibrate_foresight`, `calibrate` and `calibrate_gain`, which decide what slots
    are filled with and what features make of the rest, and gains once more after it. Caches begun before cannot be
    continued.

    Parameters
    ----------
    model : PreTrainedModel
        A retrofitted causal language model that retains keys.
    batches : iterable of (B, L) int64, or of mappings with `input_ids`
        Whole rows, without padding, as long as the contexts that matter. Some 4 thousand tokens.
    by : {"head", "layer"}
        Whether key/value heads of a layer may differ, or layers alone.
    shares : sequence of float
        What each may have, in parts of the mean; one of them has to be 1 or less, all are above 0.

    Returns
    -------
    SlotsReport

    Raises
    ------
    TypeError
        When the model is wrapped, by PEFT for example.
    ValueError
        When no layer retains keys, there is no head for the next token, no batch, a row holds padding, `by` is another
        word, `shares` leave everyone above the mean or without a slot, or what is found is not finite. Nothing is
        changed then.
    """
    if by not in SLOTS_BY:
        raise ValueError(f"by must be one of {', '.join(SLOTS_BY)}, got {by!r}")
    if not shares or min(shares) <= 0 or min(shares) > 1:
        raise ValueError(f"shares must be above 0, and one of them not above 1, got {tuple(shares)}")
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
    heads = layers[0].attn_fn.num_kv_heads
    units = heads if by == "head" else 1
    before = {layer.layer_idx: layer.srf_config.slots(heads) for layer in layers}
    # Counted by head, or by layer as those that each of its heads has.
    total = sum(map(sum, before.values())) * units // heads
    levels = _levels(total / (len(layers) * units), shares)
    asked: list[tuple[int, ...]] = [(h,) * heads for h in levels]
    sums = {i: torch.zeros(len(asked) + 1, units, dtype=torch.float64) for i in before}
    tokens = sum(row.numel() for row in rows)
    generator = torch.Generator(device).manual_seed(0)
    with evaluating(model), exact_attention(model), _weights_without_gradients(model):
        for row in tqdm(rows, desc="spread the slots", unit="row", delay=2, leave=False):
            for layer, call, gradient in _gradients(model, layers, row, generator):
                present = before[layer.layer_idx]
                for j, slots in enumerate(asked if present in asked else [*asked, present]):
                    sums[layer.layer_idx][j] += _cost(layer, slots, call, gradient, units)
    off = [i for i, by_slots in sums.items() if not by_slots.isfinite().all()]
    if off:
        raise ValueError(f"layer {off[0]}: its cost is not finite on these batches")
    costs = {i: by_slots / tokens for i, by_slots in sums.items()}
    chosen = spread_slots(torch.cat([x[:-1].T for x in costs.values()]), levels, total)
    spread = {i: tuple(chosen[n * units : (n + 1) * units]) for n, i in enumerate(costs)}
    for layer in layers:
        layer.set_retained(_entry(spread[layer.layer_idx]))
    srf = model.config.srf_config
    kept = {i: srf.for_layer(i) for i in range(model.config.num_hidden_layers)}
    record(
        model,
        head_retained=None,
        layer_retained=tuple(_entry(spread.get(i) or kept[i].slots(heads)) for i in kept),
    )
    cost = {i: {h: tuple(x[j].tolist()) for j, h in enumerate(levels)} for i, x in costs.items()}
    had = sum(float(costs[i][asked.index(slots) if slots in asked else -1].sum()) for i, slots in before.items())
    has = sum(cost[i][h][n] for i, slots in spread.items() for n, h in enumerate(slots))
    return SlotsReport(spread, cost, had, has, tokens)


def spread_slots(cost: torch.Tensor, levels: list[int], total: int) -> list[int]:
    """One of `levels` for each of N, not above `total` in sum, such that costs (N, levels) add up to the least."""
    unit = math.gcd(*levels)
    total, sizes = total // unit, [level // unit for level in levels]
    # The least sum over those so far, by slots that are left; and what the last of them has then.
    least = torch.zeros(total + 1, dtype=torch.float64)
    choices = []
    for by_level in cost.double():
        sums = torch.full((len(sizes), total + 1), math.inf, dtype=torch.float64)
        for i, size in enumerate(sizes):
            if size <= total:
                sums[i, : total + 1 - size] = least[size:] + by_level[i]
        least, choice = sums.min(0)
        choices.append(choice.to(torch.int8))
    left = int(least.argmin())
    found = []
    for choice in reversed(choices):
        found.append(levels[int(choice[left])])
        left += found[-1] // unit
    return found[::-1]


def _entry(slots: tuple[int, ...]) -> int | tuple[int, ...]:
    """As one number where it is one."""
    return slots[0] if len(set(slots)) == 1 else slots


def _levels(mean: float, shares: Sequence[float]) -> list[int]:
    """The numbers of slots that each may have, rising; the smallest fits for all."""
    # Beyond what the kernels hold, layers would fall back to PyTorch.
    most = max(MAX_RETAINED, math.floor(mean))
    return sorted({min(max(1, math.floor(share * mean)), most) for share in shares})


@dataclass
class _Call:
    """What one layer was given, and what its heads said with exact attention (1, L, H D), one behind the other."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    heads: torch.Tensor


def _gradients(
    model: PreTrainedModel, layers: list[SRFAttention], row: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[SRFAttention, _Call, torch.Tensor]]:
    """Of each layer of the softmax model: its call on this row, and the gradient at its heads (1, L, H D).

    The gradient is that of `sum_t log p(y_t)`, with `y_t` drawn from the prediction after token `t`.
    """
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[layer.layer_idx] = args, kwargs  # type: ignore[index]

    with contextlib.ExitStack() as stack:
        said = {layer.layer_idx: stack.enter_context(_what_heads_say(layer)) for layer in layers}
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        stack.enter_context(torch.enable_grad())
        hidden = model.base_model(row, use_cache=False).last_hidden_state
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
    outputs = [said[layer.layer_idx][0] for layer in layers]
    found = torch.autograd.grad(hidden, outputs, torch.cat(parts).view_as(hidden))
    for layer, gradient in zip(layers, found, strict=True):
        i = layer.layer_idx
        yield layer, _Call(*given.pop(i), said.pop(i)[0]), gradient


@contextlib.contextmanager
def _what_heads_say(layer: SRFAttention) -> Iterator[list[torch.Tensor]]:
    """A list to which each call of the layer adds its heads' outputs, before `o_proj` mixes them."""
    said: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and not args[0].requires_grad:
            args[0].requires_grad_()
        said.append(args[0])

    handle = layer.o_proj.register_forward_pre_hook(note)
    try:
        yield said
    finally:
        handle.remove()


@torch.no_grad()
def _cost(layer: SRFAttention, slots: tuple[int, ...], call: _Call, gradient: torch.Tensor, units: int) -> torch.Tensor:
    """`1/2 sum_t (g_t . e_t)^2` in nats, `e` the error of what heads say with so many slots: of each, or of all."""
    before = layer.srf_config.slots(layer.attn_fn.num_kv_heads)
    layer.set_retained(_entry(slots))
    layer.exact = False
    try:
        with _what_heads_say(layer) as said:
            # Not called as a module: hooks have seen this call already.
            layer.forward(*call.args, **call.kwargs)
    finally:
        layer.exact = True
        layer.set_retained(_entry(before))
    error = said[0].double() - call.heads.double()
    return (gradient.double() * error).unflatten(-1, (units, -1)).sum(-1).square().sum((0, 1)).cpu() / 2


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
