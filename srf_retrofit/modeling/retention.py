"""Which keys stay exact: where tokens stand in their blocks, how keys are ranked, who leaves a slot.

Shapes as in `feature_map.py`, with `N` blocks of `w` positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .configuration import LEVELS, SRFConfig
from .state import SRFState

# Block length of the pure form, a power of two: a block's keys meet its queries by halving, see `feature_attention`.
PURE_BLOCK = 32
# Levels of 2^-20: attention below that tells no key from another.
LEAST_LEVEL = (127 - 20) * LEVELS
# What is foreseen of a key: steps in an octave, and octaves at the most.
FORECAST_STEPS = 16
MOST_FORESEEN = 60


def block_length(config: SRFConfig) -> int:
    """Positions per block of the chunked form: the window, or a fixed length in the pure form."""
    return config.window or PURE_BLOCK


class Grid(NamedTuple):
    """Where the slots of a segment stand in their sequences."""

    position: torch.Tensor  # (B, N, w) position of each slot in its own sequence
    is_new: torch.Tensor  # (B, N, w) slots that hold tokens of this call
    boundary: torch.Tensor  # (B,) block the next token will stand in, as an index into 0..N


def place_on_grid(state: SRFState, new_tokens: torch.Tensor, num_blocks: int, config: SRFConfig) -> Grid:
    """Lay `new_tokens` (B,) further tokens per row after what `state` has seen; blocks start at multiples of `w`."""
    w = block_length(config)
    phase = state.length % config.window if config.window else torch.zeros_like(state.length)
    slot = torch.arange(num_blocks * w, device=new_tokens.device)
    position = (state.length - phase).unsqueeze(-1) + slot
    end = phase + new_tokens
    is_new = (slot >= phase.unsqueeze(-1)) & (slot < end.unsqueeze(-1))
    shape = (-1, num_blocks, w)
    return Grid(position.view(shape), is_new.view(shape), end // w)


def round_priority(probability: torch.Tensor) -> torch.Tensor:
    """Probabilities, as float32 rounded to 12 bits of mantissa.

    Keys that differ by less than rounding (equal keys, vanishing queries) then tie, and ties go to the earlier key:
    the same choice in prefill and decoding, whatever the order of their sums.
    """
    return ((probability.float().view(torch.int32) + 0x400) & -0x800).view(torch.float32)


def forecast(foresight: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The part of a key's level that is foreseen from itself: linear in `k`, `k^2`, `v` and `v^2`.

    Keys differ in how long they will be looked at (a name, a full stop), and that shows in the key itself; RoPE turns
    its coordinates, but leaves the slow ones almost alone and the sums of the squares of a pair altogether.

    Parameters
    ----------
    foresight : (G, 1 + 4 D)
        A factor for the priority (see `priority_level`), then weights in octaves.
    key, value : (B, G, ..., D)

    Returns
    -------
    (B, G, ...)
        Whole numbers, rounded down to a 16th of an octave: prefill and decoding, whose sums differ in the last
        bits, agree.
    """
    g, d = key.shape[1], key.shape[-1]
    shape = (g, *[1] * (key.dim() - 3), d)
    a, b, c, e = (part.reshape(shape) for part in foresight[:, 1:].split(d, dim=-1))
    key, value = key.to(foresight.dtype), value.to(foresight.dtype)
    octaves = (key * (a + key * b) + value * (c + value * e)).sum(-1)
    return (octaves.clamp(-MOST_FORESEEN, MOST_FORESEEN) * FORECAST_STEPS).floor() * (LEVELS // FORECAST_STEPS)


def priority_level(
    priority: torch.Tensor,
    block: torch.Tensor,
    config: SRFConfig,
    foresight: torch.Tensor | None = None,
    foreseen: torch.Tensor | None = None,
) -> torch.Tensor:
    """What keys compete by: the logarithm of their priority, and a bonus for every block that they came later.

    With foresight the logarithm, no less than that of 2^-20, counts by a factor of each key/value head, and what is
    foreseen of the key is added: together a forecast of the attention that the key will receive, in octaves.

    That a priority halves every `retention_half_life` tokens changes no order among those that are there already, so it
    can be granted to the newcomers instead, once. The logarithm is that of the float's own bits, linear between powers
    of two: a whole number, on which prefill and decoding agree to the last bit.

    Parameters
    ----------
    priority : (B, G, ...)
        Rounded by `round_priority`; `-inf` for keys that may not compete.
    block : like `priority`, or expanding to it, int64
        Index of the key's block in its sequence.
    foresight : (G, 1 + 4 D), optional
    foreseen : like `priority`, optional
        `forecast` of the keys; given together with `foresight`.

    Returns
    -------
    like `priority`
        Whole numbers, exact up to 2^24 (a million tokens at the default half-life), and `-inf`.
    """
    bits = priority.float().view(torch.int32) >> 11
    bonus = block * config.fade
    if foresight is None or foreseen is None:
        level = bits + bonus
    else:
        factor = foresight[:, 0].view(-1, *[1] * (priority.dim() - 2))
        level = (factor * bits.clamp_min(LEAST_LEVEL)).floor() + foreseen + bonus
    return level.to(priority.dtype).masked_fill(priority == float("-inf"), float("-inf"))


def rank_and_evict(
    retained_priority: torch.Tensor, candidate_priority: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The running competition for the retained slots, block by block; serial, on indices only.

    At each boundary the `w` keys that leave the window compete with the `h` retained ones; the highest priorities
    stay, the earliest key first among equals. Free slots and keys that may not compete have priority `-inf`. All
    priorities are levels, see `priority_level`.

    Parameters
    ----------
    retained_priority : (B, G, h)
        `inf` for slots that nobody may have.
    candidate_priority : (B, G, N, w)

    Returns
    -------
    kept, kept_priority : (B, G, N + 1, h)
        Slots after each boundary (entry 0: before any), as indices into `[h retained | N w candidates]`, in order
        of position.
    evicted, evicted_priority : (B, G, N, w)
        Keys folded at each boundary; priority `-inf` marks those that are none.
    """
    b, g, n, w = candidate_priority.shape
    h = retained_priority.shape[-1]
    device = candidate_priority.device
    arrivals = (h + torch.arange(n * w, device=device)).view(1, 1, n, w).expand(b, g, n, w)
    slots = torch.arange(h, device=device).expand(b, g, h)
    places = torch.arange(h + w, device=device).expand(b, g, h + w)
    priority = retained_priority
    kept, kept_priority, evicted, evicted_priority = [slots], [priority], [], []
    for i in range(n):
        pool = torch.cat([slots, arrivals[:, :, i]], -1)
        pool_priority = torch.cat([priority, candidate_priority[:, :, i]], -1)
        order = pool_priority.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, places)
        # Those that stay, then those that leave, each in order of position.
        order = (rank >= h).sort(dim=-1, stable=True).indices
        pool, pool_priority = pool.gather(-1, order), pool_priority.gather(-1, order)
        slots, priority = pool[..., :h], pool_priority[..., :h]
        kept.append(slots)
        kept_priority.append(priority)
        evicted.append(pool[..., h:])
        evicted_priority.append(pool_priority[..., h:])
    return (
        torch.stack(kept, 2),
        torch.stack(kept_priority, 2),
        torch.stack(evicted, 2),
        torch.stack(evicted_priority, 2),
    )


def local_priorities(log_probability: torch.Tensor, grid: Grid, state: SRFState, config: SRFConfig) -> torch.Tensor:
    """Largest attention probability that each key received so far inside sinks and window.

    Parameters
    ----------
    log_probability : (B, G, N, R, w, 2w)
        Of each query over its previous and its own block, normalised over sinks and window; overwritten.
    grid : Grid
        Only new tokens' queries count, and only keys that are not sinks are ranked.

    Returns
    -------
    (B, G, N + 1, w)
        For the block before the segment and each of its blocks.
    """
    w = config.window
    offset = torch.arange(w, device=log_probability.device)
    distance = (w + offset).unsqueeze(-1) - torch.arange(2 * w, device=log_probability.device)
    ranked = torch.cat([grid.position - w, grid.position], -1) >= config.sinks
    counts = (distance > min(config.retention_delay, w // 2)) & grid.is_new.unsqueeze(-1) & ranked.unsqueeze(-2)
    bias = log_probability.new_zeros(counts.shape).masked_fill_(~counts, float("-inf"))
    received = log_probability.add_(bias[:, None, :, None]).amax((3, 4))
    # Keys that no query ranked keep -inf; a probability that underflows is 0.
    received = received.exp().masked_fill(~counts.any(2)[:, None], float("-inf"))
    received = round_priority(received).to(state.window_priority.dtype)  # (B, G, N, 2w)
    priority = torch.full_like(torch.cat([received[..., :w], received[:, :, :1, :w]], 2), float("-inf"))
    priority[:, :, :2] = state.window_priority.unflatten(-1, (2, w))  # the block before, and the one under way
    priority[:, :, 1:] = torch.maximum(priority[:, :, 1:], received[..., w:])
    priority[:, :, :-1] = torch.maximum(priority[:, :, :-1], received[..., :w])
    return priority
