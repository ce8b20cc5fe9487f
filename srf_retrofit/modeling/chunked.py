"""Causal attention with exact keys and random features in one normaliser: chunked, O(L) in time and memory.

The sequence is walked in segments of whole blocks. Inside a segment everything is parallel over blocks; between
segments only the `SRFState` is carried, and the backward pass recomputes each segment from it, so that nothing of
size `L x L` or `L x M` outlives a segment.

A tail that is summed up in `S_r = sum_j e^{b_jr} v_j` and `z_r = sum_j e^{b_jr}` enters a query's softmax as `M`
further keys, with logits `a_ir + log z_r` and values `S_r / z_r`; so one softmax over
`[sinks | window | retained | features]` is the whole of the attention. Shapes are as in `feature_map.py`, with `N`
blocks of `w` positions in a segment and `T = N w`.
"""

from __future__ import annotations

import torch

from .configuration import SRFConfig
from .feature_attention import attend_features
from .feature_map import FoldedMap, beside_exact_keys, linear_features, log_features, norm_term
from .feature_sums import LOG_ZERO, accumulate_features, feature_keys
from .retention import PURE_BLOCK, Grid, forecast, local_priorities, place_on_grid, priority_level, rank_and_evict
from .softmax_parts import attend_parts
from .state import SRFState


def take_keys(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`source` (B, G, K, D) at `index` (B, G, ...), as (B, G, ..., D)."""
    b, g, count, d = source.shape
    base = torch.arange(b * g, device=index.device).view(b, g, *[1] * (index.dim() - 2)) * count
    return source.reshape(-1, d).index_select(0, (index + base).reshape(-1)).view(*index.shape, d)


def attend_segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    new_tokens: torch.Tensor,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    *,
    use_tail: bool = True,
    continues: bool = True,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SRFState]:
    """One segment: attention of its tokens, and the state after them.

    Parameters
    ----------
    q : (B, H, T, D); k, v : (B, G, T, D)
        Token `t` of a row stands at slot `length % w + t`; the slots before hold anything finite.
    new_tokens : (B,) int64
        Tokens per row; slots after them hold anything finite.
    state : SRFState
        Before the segment, feature part in the accumulation dtype.
    maps, config, scaling
        As in `ops.srf_attention`, for heads that retain as many keys as one another.
    use_tail : bool
        False leaves the features out of the softmax (an ablation); the state is the same.
    continues : bool
        False promises that no row's state stands inside a block, which saves a copy.
    past : (B, G, T, 1), optional
        What log-features of keys are counted from, see `forget_gate.forgotten`; for the pure form.

    Returns
    -------
    o : (B, H, T, D) in the accumulation dtype, meaningful at the new tokens' slots
    state : SRFState
    """
    if config.is_pure:
        return _attend_pure(q, k, v, past, new_tokens, state, maps, config, scaling, use_tail)
    w, s, h = config.window, config.sinks, config.retained
    b, heads, t, d = q.shape
    g, n = k.shape[1], t // w
    r = heads // g
    dtype = state.k_sum.dtype
    grid = place_on_grid(state, new_tokens, n, config)

    qb = q.to(dtype).view(b, g, r, n, w, d).transpose(2, 3).reshape(b, g, n, r * w, d)
    kb, vb = k.view(b, g, n, w, d), v.view(b, g, n, w, d)
    if continues:
        # A block that an earlier call began: its first slots come from the state.
        seen = grid.position[:, :1] < state.length.view(-1, 1, 1)
        seen = seen[:, None, ..., None]
        kb, vb = (
            torch.cat([torch.where(seen, window[:, :, None, w:], x[:, :, :1]), x[:, :, 1:]], 2)
            for x, window in ((kb, state.window_key), (vb, state.window_value))
        )
    state = _store_sinks(state, kb, vb, grid, config)
    kf, vf = kb.to(dtype), vb.to(dtype)

    # Logits of the sinks and of the query's own and previous block.
    logits, values = [], []
    scaled = qb * scaling
    if s:
        sinks = torch.matmul(scaled, state.sink_key.to(dtype).mT.unsqueeze(2))
        visible = torch.arange(s, device=q.device) <= grid.position.unsqueeze(-1)  # (B, N, w, s)
        logits.append(_hide(sinks, visible, r))
        values.append(state.sink_value.to(dtype).unsqueeze(2).expand(b, g, n, s, d))
    offset = torch.arange(w, device=q.device)
    log_query = log_features(qb, maps.query, scaling)  # (B, G, N, R w, M)
    before_k = torch.cat([state.window_key[:, :, None, :w].to(dtype), kf[:, :, :-1]], 2)
    before_v = torch.cat([state.window_value[:, :, None, :w].to(dtype), vf[:, :, :-1]], 2)
    local = torch.matmul(scaled, torch.cat([before_k, kf], 3).mT)
    two_blocks = torch.cat([grid.position - w, grid.position], -1)  # (B, N, 2w)
    # Sinks never enter window or features.
    visible = (torch.arange(2 * w, device=q.device) <= w + offset.unsqueeze(-1)) & (two_blocks >= s).unsqueeze(-2)
    logits.append(_hide(local, visible, r))
    values.append(torch.cat([before_v, vf], 3))

    # Keys that leave the window at each boundary: folded into the features, or kept in a retained slot.
    slots = None
    folded_k, folded_v = before_k, before_v
    may_fold = (grid.position - w >= s)[:, None].expand(b, g, n, w)
    if h:
        with torch.no_grad():
            log_mass = torch.stack([x.logsumexp(-1, keepdim=True) for x in logits]).logsumexp(0)
            log_probability = (logits[-1] - log_mass).view(b, g, n, r, w, 2 * w)
            priority = local_priorities(log_probability, grid, state, config)
            candidates = priority[:, :, :-1].masked_fill(~may_fold, float("-inf"))
            foreseen = None if maps.foresight is None else forecast(maps.foresight, before_k, before_v)
            candidates = priority_level(
                candidates, (grid.position[:, None, :, :1] - w) // w, config, maps.foresight, foreseen
            )
            held = state.retained_priority.view(b, g, h)
            slots, slot_priority, evicted, evicted_priority = rank_and_evict(held, candidates)
            may_fold = evicted_priority > float("-inf")
        pool_k = torch.cat([state.retained_key.to(dtype).view(b, g, h, d), before_k.flatten(2, 3)], 2)
        pool_v = torch.cat([state.retained_value.to(dtype).view(b, g, h, d), before_v.flatten(2, 3)], 2)
        folded_k, folded_v = take_keys(pool_k, evicted), take_keys(pool_v, evicted)
        retained = torch.matmul(scaled, take_keys(pool_k, slots[:, :, :n]).mT)
        empty = slot_priority[:, :, :n, None].isinf()
        logits.append(retained.add_(retained.new_zeros(empty.shape).masked_fill_(empty, float("-inf"))))
        values.append(take_keys(pool_v, slots[:, :, :n]))
    log_key = log_features(folded_k, maps.key, scaling).masked_fill(~may_fold.unsqueeze(-1), float("-inf"))

    log_query = beside_exact_keys(log_query, maps.query, logits)
    mass = state.k_sum
    sums = accumulate_features(log_key, folded_v, (state.kv_mean.to(dtype) * mass.unsqueeze(-1), mass, state.k_max))
    if use_tail:
        log_mass, mean_value = feature_keys(sums.values[:, :, :n], sums.mass[:, :, :n], sums.reference[:, :, :n])
        logits.append(log_query.add_(log_mass.unsqueeze(-2)))
        values.append(mean_value)
    else:
        # Keeps rows with no key at all (padding) finite, as the features do.
        logits.append(log_query.new_full((b, g, n, r * w, 1), LOG_ZERO))
        values.append(vf.new_zeros(b, g, n, 1, d))
    o = attend_parts(logits, values)
    o = o.view(b, g, n, r, w, d).transpose(2, 3).reshape(b, heads, t, d)

    # The state at each row's own end.
    rows = torch.arange(b, device=q.device)
    boundary = grid.boundary
    final_mass = sums.mass[rows, :, boundary]
    reference = sums.reference[rows, :, boundary]
    new = state._replace(
        kv_mean=sums.values[rows, :, boundary] / final_mass.clamp_min(0.5).unsqueeze(-1),
        k_sum=final_mass,
        k_max=reference.masked_fill(reference <= LOG_ZERO, float("-inf")),
        length=state.length + new_tokens,
    )
    new = _store_window(new, state, kb, vb, boundary)
    if slots is not None:
        final = slots[rows, :, boundary]
        new = new._replace(
            window_priority=_two_blocks(priority, boundary, float("-inf")),
            retained_priority=slot_priority[rows, :, boundary].flatten(1),
            retained_key=take_keys(pool_k, final).to(k.dtype).flatten(1, 2),
            retained_value=take_keys(pool_v, final).to(v.dtype).flatten(1, 2),
        )
    return o, new


def _attend_pure(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor | None,
    new_tokens: torch.Tensor,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    use_tail: bool,
) -> tuple[torch.Tensor, SRFState]:
    """`attend_segment` for the form that keeps no exact block: features, and sinks if there are any."""
    w, s = PURE_BLOCK, config.sinks
    b, heads, t, d = q.shape
    g, n = k.shape[1], t // w
    r = heads // g
    dtype = state.k_sum.dtype
    grid = place_on_grid(state, new_tokens, n, config)
    kb, vb = k.view(b, g, n, w, d), v.view(b, g, n, w, d)
    state = _store_sinks(state, kb, vb, grid, config)
    # Token by token, heads of a token side by side: halves of a block are then contiguous.
    qb = q.to(dtype).view(b, g, r, n, w, d).permute(0, 1, 3, 4, 2, 5).reshape(b, g, n, w * r, d)
    kf, vf = kb.to(dtype), vb.to(dtype)

    # Beside sinks the norm of a query counts; among features it cancels.
    log_query = (log_features if s else linear_features)(qb, maps.query, scaling)
    is_key = (grid.is_new & (grid.position >= s))[:, None, ..., None]
    log_key = linear_features(kf, maps.key, scaling)
    beside = norm_term(kf, maps.key, scaling)
    if past is not None:
        beside = beside - past.view(b, g, n, w, 1)
    log_key = log_key.add_(beside.masked_fill(~is_key, float("-inf")))
    mass = state.k_sum
    initial = (
        (state.kv_mean.to(dtype) * mass.unsqueeze(-1)).flatten(0, 1), mass.flatten(0, 1), state.k_max.flatten(0, 1)
    )  # fmt: skip
    result = attend_features(log_query.flatten(0, 1), log_key.flatten(0, 1), vf.flatten(0, 1), initial)
    o = result.output.unflatten(0, (b, g))
    if not use_tail:
        o = torch.zeros_like(o)
    if s:
        # The features are one more key, of their total mass and their mean value.
        log_mass = result.log_mass.unflatten(0, (b, g))
        if not use_tail:
            log_mass = torch.full_like(log_mass, LOG_ZERO)
        logits = torch.matmul(qb, state.sink_key.to(dtype).mT.unsqueeze(2)) * scaling
        seen = torch.arange(s, device=q.device) <= grid.position.unsqueeze(-1)  # (B, N, w, s)
        seen = seen.repeat_interleave(r, 2)[:, None]
        share = torch.cat([logits.masked_fill(~seen, float("-inf")), log_mass], -1).softmax(-1)
        o = share[..., s:] * o + torch.matmul(share[..., :s], state.sink_value.to(dtype).unsqueeze(2))
    o = o.view(b, g, n * w, r, d).transpose(2, 3).reshape(b, heads, t, d)

    k_sum, reference = (x.unflatten(0, (b, g)) for x in (result.mass, result.reference))
    return o, state._replace(
        kv_mean=result.values.unflatten(0, (b, g)) / k_sum.clamp_min(0.5).unsqueeze(-1),
        k_sum=k_sum,
        k_max=reference.masked_fill(reference <= LOG_ZERO, float("-inf")),
        length=state.length + new_tokens,
    )


def _hide(logits: torch.Tensor, visible: torch.Tensor, groups: int) -> torch.Tensor:
    """`-inf` in `logits` (B, G, N, R w, E), in place, outside `visible` (B or 1, N or 1, w, E), alike for all heads.

    By a sum: unlike a fill it costs one quick pass, and none in backward, where hidden logits have gradient zero.
    """
    bias = logits.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    return logits.add_(bias.repeat(1, 1, groups, 1).unsqueeze(1))


def _store_sinks(state: SRFState, kb: torch.Tensor, vb: torch.Tensor, grid: Grid, config: SRFConfig) -> SRFState:
    """Copy the new tokens at positions below `sinks` into their slots."""
    s = config.sinks
    if not s:
        return state
    b, g = kb.shape[:2]
    target = torch.arange(s, device=kb.device)
    slot = target - grid.position[:, 0, :1]  # (B, s)
    total = kb.shape[2] * kb.shape[3]
    inside = slot.clamp(0, total - 1)
    arrives = (slot >= 0) & (slot < total) & grid.is_new.flatten(1).gather(1, inside)
    index = inside[:, None].expand(b, g, s)
    arrives = arrives[:, None, :, None]
    return state._replace(
        sink_key=torch.where(arrives, take_keys(kb.flatten(2, 3), index), state.sink_key),
        sink_value=torch.where(arrives, take_keys(vb.flatten(2, 3), index), state.sink_value),
    )


def _two_blocks(blocks: torch.Tensor, boundary: torch.Tensor, empty: float) -> torch.Tensor:
    """The block before each row's boundary and the one after it: (B, G, N + 1, w, ...) -> (B, G, 2w, ...)."""
    rows = torch.arange(len(boundary), device=boundary.device)
    blocks = torch.cat([blocks, torch.full_like(blocks[:, :, :1], empty)], 2)
    return torch.cat([blocks[rows, :, boundary], blocks[rows, :, boundary + 1]], 2)


def _store_window(new: SRFState, old: SRFState, kb: torch.Tensor, vb: torch.Tensor, boundary: torch.Tensor) -> SRFState:
    """Previous and current block of each row; slots not yet in use are zero."""
    w = kb.shape[3]
    used = torch.arange(2 * w, device=kb.device) < (w + new.length % w).unsqueeze(-1)
    used = used[:, None, :, None]
    windows = (
        _two_blocks(torch.cat([window[:, :, None, :w], blocks], 2), boundary, 0.0)
        for blocks, window in ((kb, old.window_key), (vb, old.window_value))
    )
    key, value = (torch.where(used, x, torch.zeros_like(x)) for x in windows)
    return new._replace(window_key=key, window_value=value)
