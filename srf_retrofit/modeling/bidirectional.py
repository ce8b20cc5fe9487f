"""The non-causal form: every query sees every key of its row.

Exact are the sinks, the query's own block and both its neighbours; the keys before and after those are two sets of
feature pseudo-keys, from a prefix and a suffix sum. In the pure form one sum over the row serves all queries.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .configuration import SRFConfig
from .feature_map import FoldedMap, log_features
from .feature_sums import LOG_ZERO, FeatureSums, accumulate_features, feature_keys

# Blocks scanned at a time: the scan inside a group costs its square, between groups only sums are carried.
GROUP = 32


def attend_bidirectional(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    use_tail: bool = True,
) -> torch.Tensor:
    """Non-causal attention over the first `lengths` (B,) tokens of each row.

    Parameters
    ----------
    q : (B, H, L, D); k, v : (B, G, L, D)
    maps, config, scaling, use_tail
        As in `chunked.attend_segment`; `config.retained` plays no part.

    Returns
    -------
    (B, H, L, D) in the accumulation dtype, meaningful at the real tokens
    """
    s = config.sinks
    b, heads, length, d = q.shape
    w = config.window or length
    g = k.shape[1]
    r = heads // g
    dtype = torch.promote_types(q.dtype, torch.float32)
    n = -(-length // w)
    q, k, v = (pad(x.to(dtype), (0, 0, 0, n * w - length)) for x in (q, k, v))
    qb = q.view(b, g, r, n, w, d).transpose(2, 3).reshape(b, g, n, r * w, d)
    kb, vb = k.reshape(b, g, n, w, d), v.reshape(b, g, n, w, d)
    position = torch.arange(n * w, device=q.device).view(1, n, w)
    is_real = position < lengths.view(-1, 1, 1)
    is_key = is_real & (position >= s)

    logits, values = [], []
    if s:
        count = min(s, length)
        sinks = torch.matmul(qb, k[:, :, None, :count].mT) * scaling
        visible = is_real.flatten(1)[:, None, None, None, :count]
        logits.append(sinks.masked_fill(~visible, float("-inf")))
        values.append(v[:, :, None, :count].expand(b, g, n, count, d))
    if config.window:
        local = torch.matmul(qb, _with_neighbours(kb, 2).mT) * scaling
        visible = _with_neighbours(is_key.expand(b, n, w), 1)[:, None, :, None]
        logits.append(local.masked_fill(~visible, float("-inf")))
        values.append(_with_neighbours(vb, 2))

    log_query = log_features(qb, maps.query, scaling)
    log_key = log_features(kb, maps.key, scaling).masked_fill(~is_key[:, None, ..., None], float("-inf"))
    if config.window:
        block = torch.arange(n, device=q.device)
        before = (_scan(log_key, vb), (block - 1).clamp_min(0))
        after = (_scan(log_key.flip(2), vb.flip(2)), (n - 2 - block).clamp_min(0))
        tails = [before, after]
    else:
        tails = [(_scan(log_key, vb), torch.ones(n, dtype=torch.int64, device=q.device))]
    for sums, boundary in tails:
        log_mass, mean_value = feature_keys(*(x[:, :, boundary] for x in sums))
        tail = log_query + log_mass.unsqueeze(-2)
        # Without the tail its logits stay as a floor that keeps rows with no key at all finite.
        logits.append(tail if use_tail else torch.full_like(tail, LOG_ZERO))
        values.append(mean_value)
    o = torch.matmul(torch.cat(logits, -1).softmax(-1), torch.cat(values, 3))
    return o.view(b, g, n, r, w, d).transpose(2, 3).reshape(b, heads, n * w, d)[:, :, :length]


def _with_neighbours(blocks: torch.Tensor, dim: int) -> torch.Tensor:
    """Previous, own and next block side by side along the dimension after the block dimension `dim`."""
    zero = torch.zeros_like(blocks.narrow(dim, 0, 1))
    n = blocks.shape[dim]
    before = torch.cat([zero, blocks.narrow(dim, 0, n - 1)], dim)
    after = torch.cat([blocks.narrow(dim, 1, n - 1), zero], dim)
    return torch.cat([before, blocks, after], dim + 1)


def _scan(log_key: torch.Tensor, value: torch.Tensor) -> FeatureSums:
    """`accumulate_features` from nothing over any number of blocks, a group at a time."""
    b, g, _, _, m = log_key.shape
    carry = (
        value.new_zeros(b, g, m, value.shape[-1]),
        value.new_zeros(b, g, m),
        value.new_full((b, g, m), float("-inf")),
    )
    groups: list[FeatureSums] = []
    for keys, part in zip(log_key.split(GROUP, 2), value.split(GROUP, 2), strict=True):
        sums = accumulate_features(keys, part, carry)
        carry = (sums.values[:, :, -1], sums.mass[:, :, -1], sums.reference[:, :, -1])
        groups.append(sums if not groups else FeatureSums(*(x[:, :, 1:] for x in sums)))
    return FeatureSums(*(torch.cat(parts, 2) for parts in zip(*groups, strict=True)))
