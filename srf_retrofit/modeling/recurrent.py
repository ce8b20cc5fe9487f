"""The one-token step on the recurrent state: what decoding runs, at a cost that no context length changes.

Same attention as `chunked.py`, token by token: the new key enters the current block, the query meets sinks, retained
keys, both blocks and the features in one softmax, and once a row's block is full the block before it is folded.
"""

from __future__ import annotations

import torch

from .chunked import take_keys
from .configuration import SRFConfig
from .eight_bits import as_numbers, pack
from .feature_map import FoldedMap, beside_exact_keys, log_features
from .feature_sums import LOG_ZERO, accumulate_features
from .retention import forecast, priority_level, rank_and_evict, round_priority
from .state import SRFState


def attend_token(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    active: torch.Tensor | None,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    *,
    use_tail: bool = True,
) -> tuple[torch.Tensor, SRFState]:
    """Attention of one token per row, and the state after it.

    Parameters
    ----------
    q : (B, H, 1, D); k, v : (B, G, 1, D)
    active : (B,) bool, optional
        Rows whose token is real; the others' output is meaningless and their state unchanged. `None`: all.
    state, maps, config, scaling, use_tail
        As in `chunked.attend_segment`.

    Returns
    -------
    o : (B, H, 1, D) in the accumulation dtype
    state : SRFState
        Tensors that the step leaves alone are those of the input.
    """
    w, s, h = config.window, config.sinks, config.retained
    b, heads, _, d = q.shape
    g = k.shape[1]
    dtype = state.k_sum.dtype
    position = state.length
    if active is None:
        active = torch.ones_like(position, dtype=torch.bool)
    qh = q.view(b, g, heads // g, d).to(dtype)
    is_sink = active & (position < s)

    # As they are stored.
    rows_k, rows_v = pack(torch.stack([k, v])) if config.packs_keys else (k, v)
    if s:
        here = (torch.arange(s, device=q.device) == position.unsqueeze(-1)) & is_sink.unsqueeze(-1)
        state = _write(state, "sink_key", here, rows_k)
        state = _write(state, "sink_value", here, rows_v)
    if w:
        phase = position % w
        slot = torch.arange(2 * w, device=q.device)
        here = (slot == (w + phase).unsqueeze(-1)) & active.unsqueeze(-1)
        state = _write(state, "window_key", here, rows_k)
        state = _write(state, "window_value", here, rows_v)
    exact = state.unpacked(dtype)

    logits, values = [], []
    uneven: torch.Tensor | None = None
    if s:
        sinks = torch.matmul(qh, exact.sink_key.mT) * scaling
        visible = torch.arange(s, device=q.device) <= position.unsqueeze(-1)
        logits.append(sinks.masked_fill(~visible[:, None, None], float("-inf")))
        values.append(exact.sink_value)
    if w:
        in_window = (position - phase - w).unsqueeze(-1) + slot  # position of each slot
        visible = (in_window >= s) & (in_window <= position.unsqueeze(-1))
        window = torch.matmul(qh, exact.window_key.mT) * scaling
        logits.append(window.masked_fill(~visible[:, None, None], float("-inf")))
        values.append(exact.window_value)
    if h:
        with torch.no_grad():
            near = torch.cat(logits, -1)
            lse = near.logsumexp(-1, keepdim=True)
            received = round_priority(torch.exp(near[..., s:] - lse).amax(2)).to(dtype)  # (B, G, 2w)
            counts = visible & (position.unsqueeze(-1) - in_window > min(config.retention_delay, w // 2))
            counts = counts & active.unsqueeze(-1)
            received = received.masked_fill(~counts.unsqueeze(1), float("-inf"))
            state = state._replace(window_priority=torch.maximum(state.window_priority, received))
        if config.head_retained is None:
            key, value = (x.unflatten(1, (g, h)) for x in (exact.retained_key, exact.retained_value))
            empty = (state.retained_priority == float("-inf")).view(b, g, 1, h)
            logits.append((torch.matmul(qh, key.mT) * scaling).masked_fill(empty, float("-inf")))
            values.append(value)
        else:
            uneven = _slot_logits(qh, exact.retained_key, state.retained_priority, config.slots(g), scaling)
    if not w:
        # The pure form: the token's own key is a feature key before its query reads (unless it is a sink).
        state = _fold(state, k, v, (active & ~is_sink)[:, None, None].expand(b, g, 1), maps, config, scaling)
    if use_tail:
        # The state is kept as pseudo-keys already; see `chunked.feature_keys`.
        log_mass = state.k_max.clamp_min(LOG_ZERO) + state.k_sum.clamp_min(0.5).log()
        exact_keys = logits if uneven is None else [*logits, uneven]
        log_query = beside_exact_keys(log_features(qh, maps.query, scaling), maps.query, exact_keys)
        logits.append(log_query + log_mass.unsqueeze(-2))
        values.append(state.kv_mean.to(dtype))
    else:
        logits.append(qh.new_full((b, g, heads // g, 1), LOG_ZERO))
        values.append(qh.new_zeros(b, g, 1, d))
    if uneven is None:
        o = torch.matmul(torch.cat(logits, -1).softmax(-1), torch.cat(values, 2))
    else:
        weight, to_slots = torch.cat([*logits, uneven], -1).softmax(-1).tensor_split([-h], -1)
        o = torch.matmul(weight, torch.cat(values, 2)) + _slot_values(to_slots, exact.retained_value, config.slots(g))
    o = o.view(b, heads, 1, d)

    state = state._replace(length=position + active)
    if w:
        full = active & (phase == w - 1)
        # Once a block, so off the hot path; a compiled graph takes it always, under the same row mask.
        if torch.compiler.is_compiling() or bool(full.any()):
            state = _finish_block(state, full, maps, config, scaling)
    return o, state


def _slot_logits(
    q: torch.Tensor, key: torch.Tensor, priority: torch.Tensor, slots: tuple[int, ...], scaling: float
) -> torch.Tensor:
    """Logits (B, G, R, h) of q (B, G, R, D) over retained keys (B, H, D), of which heads have different numbers.

    Padded to the most of any; to pad the keys themselves would copy all of them at every token.
    """
    scaled = q * scaling
    hidden = torch.zeros_like(priority).masked_fill_(priority == float("-inf"), float("-inf"))
    logits = q.new_full((*q.shape[:3], max(slots)), float("-inf"))
    parts = zip(key.split(slots, 1), hidden.split(slots, 1), slots, strict=True)
    for head, (mine, bias, n) in enumerate(parts):
        logits[:, head, :, :n] = torch.baddbmm(bias.unsqueeze(1), scaled[:, head], mine.mT)
    return logits


def _slot_values(weight: torch.Tensor, value: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
    """Retained values (B, H, D) in weights (B, G, R, h), as `_slot_logits` has them: (B, G, R, D)."""
    out = weight.new_empty(*weight.shape[:3], value.shape[-1])
    for head, (mine, n) in enumerate(zip(value.split(slots, 1), slots, strict=True)):
        out[:, head] = torch.matmul(weight[:, head, :, :n], mine)
    return out


def _write(state: SRFState, name: str, here: torch.Tensor, x: torch.Tensor) -> SRFState:
    """`x` (B, G, 1, D) into the slots `here` (B, E) of the state's tensor `name` (B, G, E, D)."""
    return state._replace(**{name: torch.where(here[:, None, :, None], x, getattr(state, name))})


def _fold(
    state: SRFState,
    k: torch.Tensor,
    v: torch.Tensor,
    which: torch.Tensor,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
) -> SRFState:
    """Add the keys `k`, `v` (B, G, E, D), packed or not, marked in `which` (B, G, E) to the feature sums."""
    dtype = state.k_sum.dtype
    log_key = log_features(as_numbers(k, dtype), maps.key, scaling).masked_fill(~which.unsqueeze(-1), float("-inf"))
    mass = state.k_sum
    initial = (state.kv_mean.to(dtype) * mass.unsqueeze(-1), mass, state.k_max)
    sums = accumulate_features(log_key.unsqueeze(2), as_numbers(v, dtype).unsqueeze(2), initial)
    mass, reference = sums.mass[:, :, 1], sums.reference[:, :, 1]
    return state._replace(
        kv_mean=(sums.values[:, :, 1] / mass.clamp_min(0.5).unsqueeze(-1)).to(state.kv_mean.dtype),
        k_sum=mass,
        k_max=reference.masked_fill(reference <= LOG_ZERO, float("-inf")),
    )


def _compete(
    key: torch.Tensor,
    value: torch.Tensor,
    priority: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    candidates: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Retained keys (B, G h, D) and those that leave the window (B, G, w, D): who is kept, who is folded.

    `priority` (B, G h) and `candidates` (B, G, w) are levels, `-inf` for nobody. Returns keys, values and levels that
    are kept, keys and values (B, G, w, D) that are not, and which of these there are.
    """
    b, g, _, d = new_key.shape
    kept, level, evicted, evicted_level = rank_and_evict(priority.view(b, g, -1), candidates.unsqueeze(2))
    pool_k, pool_v = (
        torch.cat([x.view(b, g, -1, d), new], 2) for x, new in ((key, new_key), (value, new_value))
    )  # fmt: skip
    kept, evicted = kept[:, :, 1], evicted[:, :, 0]
    return (
        take_keys(pool_k, kept).flatten(1, 2),
        take_keys(pool_v, kept).flatten(1, 2),
        level[:, :, 1].flatten(1),
        take_keys(pool_k, evicted),
        take_keys(pool_v, evicted),
        evicted_level[:, :, 0] > float("-inf"),
    )


def _finish_block(state: SRFState, full: torch.Tensor, maps: FoldedMap, config: SRFConfig, scaling: float) -> SRFState:
    """For the rows `full` (B,): the previous block leaves the window, the current one takes its place."""
    w, h = config.window, config.retained
    b, g = state.window_key.shape[:2]
    old_k, old_v = state.window_key[:, :, :w], state.window_value[:, :, :w]
    first = state.length - 2 * w  # position of the first slot of the block that leaves
    position = first.unsqueeze(-1) + torch.arange(w, device=full.device)
    leaves = ((position >= config.sinks) & full.unsqueeze(-1))[:, None].expand(b, g, w)
    if h:
        candidates = state.window_priority[:, :, :w].masked_fill(~leaves, float("-inf"))
        foreseen = None
        if maps.foresight is not None:
            wide = maps.foresight.dtype
            foreseen = forecast(maps.foresight, as_numbers(old_k, wide), as_numbers(old_v, wide))
        candidates = priority_level(candidates, (first // w).view(-1, 1, 1), config, maps.foresight, foreseen)
        # Heads with as many slots as one another compete side by side, others in turn.
        slots = config.slots(g)
        groups = [(0, g)] if config.head_retained is None else [(head, head + 1) for head in range(g)]
        widths = [sum(slots[low:high]) for low, high in groups]
        parts = (x.split(widths, 1) for x in (state.retained_key, state.retained_value, state.retained_priority))
        found = [
            _compete(key, value, level, old_k[:, low:high], old_v[:, low:high], candidates[:, low:high])
            for (low, high), key, value, level in zip(groups, *parts, strict=True)
        ]
        key, value, priority, old_k, old_v, leaves = (torch.cat(x, 1) for x in zip(*found, strict=True))
        leaves = leaves & full[:, None, None]
        # Rows in mid-block offered no candidate, so their slots come back as they were.
        state = state._replace(retained_key=key, retained_value=value, retained_priority=priority)
    state = _fold(state, old_k, old_v, leaves, maps, config, scaling)

    def shift(x: torch.Tensor, empty: float) -> torch.Tensor:
        moved = torch.cat([x[:, :, w:], torch.full_like(x[:, :, w:], empty)], 2)
        return torch.where(full.view(b, *[1] * (x.dim() - 1)), moved, x)

    state = state._replace(window_key=shift(state.window_key, 0.0), window_value=shift(state.window_value, 0.0))
    if h:
        state = state._replace(window_priority=shift(state.window_priority, float("-inf")))
    return state
