"""How rows of tokens are cut into segments: padding, packed documents, and rows that continue in mid-block.

Every row's blocks start at multiples of the block length in its *own* sequence, so that what a row computes depends
on nothing but its own tokens. One gather lays all segments out and one gather puts their outputs back, which keeps
the backward pass O(L).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .configuration import SRFConfig
from .retention import block_length
from .state import SRFState

# Tokens and blocks of a segment: long enough to amortise a segment's kernels, short enough to stay in cache.
DEFAULT_CHUNK = 1024
PURE_CHUNK = 1024
MAX_BLOCKS = 64


class Segment(NamedTuple):
    """`rows` leading rows of a layout, `new_tokens` (rows,) of each in `slots` grid slots."""

    rows: int
    slots: int
    new_tokens: torch.Tensor


class Layout(NamedTuple):
    """How rows of real tokens are cut into segments.

    `token` holds, for each segment in turn, the flat index `(rows, slots)` of each slot's token in the `B L` tokens
    of the input, or is `None` when segments are plain slices of `L`. `order` lists rows by decreasing length when
    they were sorted (packed documents), so that finished rows drop out of later segments.
    """

    segments: list[Segment]
    token: torch.Tensor | None
    is_real: torch.Tensor | None
    order: torch.Tensor | None


def plan_layout(
    b: int,
    length: int,
    device: torch.device,
    config: SRFConfig,
    mask: torch.Tensor | None,
    documents: list[tuple[int, int]] | None,
    state: SRFState | None,
    chunk_size: int | None,
) -> Layout:
    """Cut rows into segments of whole blocks; see `Layout`. `mask` is (B, L) bool, `documents` (start, end) pairs."""
    w = block_length(config)
    chunk = chunk_size or (PURE_CHUNK if config.is_pure else DEFAULT_CHUNK)
    size = w * min(max(chunk // w, 1), MAX_BLOCKS)
    phase = torch.zeros(b if documents is None else len(documents), dtype=torch.int64, device=device)
    if state is not None and config.window:
        phase = state.length % config.window
    # Slots before a row's first new token, at most.
    lead = w - 1 if state is not None and config.window else 0

    if documents is None and mask is None and not lead:
        lengths = torch.full((b,), length, dtype=torch.int64, device=device)
        sizes = [min(size, length - start) for start in range(0, length, size)]
        segments = [Segment(b, -(-t // w) * w, torch.full_like(lengths, t)) for t in sizes]
        return Layout(segments, None, None, None)

    order = None
    if documents is not None:
        counts = [end - start for start, end in documents]
        ranked = sorted(range(len(counts)), key=lambda i: -counts[i])
        order = torch.tensor(ranked, dtype=torch.int64, device=device)
        starts = torch.tensor([documents[i][0] for i in ranked], dtype=torch.int64, device=device)
        counts = [counts[i] for i in ranked]
        lengths = torch.tensor(counts, dtype=torch.int64, device=device)
        phase = phase[order]
        reach = [count + lead for count in counts]
    else:
        if mask is None:
            mask = torch.ones(b, length, dtype=torch.bool, device=device)
        lengths = mask.sum(-1)
        rank = (~mask).to(torch.int8).argsort(dim=-1, stable=True)  # real tokens first, in their order
        rank = rank + torch.arange(b, device=device).unsqueeze(-1) * length
        reach = [length + lead] * b

    segments, tokens, real = [], [], []
    longest = max(reach, default=0)
    for start in range(0, longest, size):
        rows = sum(1 for x in reach if x > start)
        slots = min(size, -(-(longest - start) // w) * w)
        slot = torch.arange(start, start + slots, device=device) - phase[:rows].unsqueeze(-1)
        count = lengths[:rows].unsqueeze(-1)
        is_real = (slot >= 0) & (slot < count)
        slot = torch.minimum(slot, count - 1).clamp_min(0)
        tokens.append(
            rank[:rows].gather(1, slot.clamp_max(length - 1)) if order is None else starts[:rows].unsqueeze(-1) + slot
        )
        real.append(is_real)
        segments.append(Segment(rows, slots, is_real.sum(-1)))
    flat = torch.cat([t.reshape(-1) for t in tokens]).clamp_max(b * length - 1)
    return Layout(segments, flat, torch.cat([r.reshape(-1) for r in real]), order)


def cut(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """One tensor per segment, (rows, heads, slots, D); a single gather (or split), so that backward stays O(L)."""
    heads, d = x.shape[1], x.shape[-1]
    if layout.token is None:
        sizes = [s.slots for s in layout.segments]
        missing = sum(sizes) - x.shape[2]
        if not missing:
            return list(x.split(sizes, dim=2))
        # Only the last segment can be short of whole blocks.
        *whole, last = x.split([*sizes[:-1], sizes[-1] - missing], dim=2)
        return [*whole, pad(last, (0, 0, 0, missing))]
    flat = x.transpose(1, 2).reshape(-1, heads, d).index_select(0, layout.token)
    pieces = flat.split([s.rows * s.slots for s in layout.segments])
    return [p.view(s.rows, s.slots, heads, d).transpose(1, 2) for p, s in zip(pieces, layout.segments, strict=True)]


def join(outputs: list[torch.Tensor], layout: Layout, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Put the segments' outputs back to their tokens; tokens of no row get zeros."""
    b, heads, length, d = shape
    if not outputs:
        return like.new_zeros(shape)
    if layout.token is None or layout.is_real is None:
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2))[:, :, :length]
    flat = torch.cat([o.transpose(1, 2).reshape(-1, heads, d) for o in outputs] + [like.new_zeros(1, heads, d)])
    total = flat.shape[0] - 1
    where = torch.full((b * length + 1,), total, dtype=torch.int64, device=like.device)
    # Slots of no token write to a spare last entry.
    target = torch.where(layout.is_real, layout.token, b * length)
    where[target] = torch.arange(total, device=like.device)
    return flat.index_select(0, where[:-1]).view(b, length, heads, d).transpose(1, 2)
