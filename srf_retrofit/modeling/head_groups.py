"""Heads that retain different numbers of keys, on the PyTorch core: those with as many go together.

Every key/value head is an attention of its own, so that a layer of uneven heads is a few layers of even ones side by
side. Nothing is padded, and the core need not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .configuration import SRFConfig
from .feature_map import FoldedMap
from .state import SRFState

_RETAINED = ("retained_key", "retained_value", "retained_priority")

# Of q (B, H, L, D), k, v, past, state, maps and configuration: the outputs, and the state after them.
Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, SRFState, FoldedMap, SRFConfig],
    tuple[torch.Tensor, SRFState],
]


def attend_by_groups(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor | None,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
) -> tuple[torch.Tensor, SRFState]:
    """`attend` for each group of key/value heads with equal slots, put together again.

    Parameters
    ----------
    attend : callable
        Takes what follows, for heads that have as many slots as one another.
    q : (B, H, L, D); k, v : (B, G, L, D)
    past : (B, G, L), optional
    state : SRFState
    maps : FoldedMap
    config : SRFConfig

    Returns
    -------
    o : (B, H, L, D)
    state : SRFState
    """
    g = k.shape[1]
    slots = config.slots(g)
    if config.head_retained is None:
        return attend(q, k, v, past, state, maps, config)
    outputs: list[torch.Tensor] = [q] * g
    states: list[SRFState] = [state] * g
    for count in sorted(set(slots)):
        heads = [head for head in range(g) if slots[head] == count]
        o, after = attend(
            q.unflatten(1, (g, -1))[:, heads].flatten(1, 2), k[:, heads], v[:, heads],
            None if past is None else past[:, heads],
            _state_of(state, slots, heads), _maps_of(maps, heads), config.with_slots(max(count, 1)),
        )  # fmt: skip
        for head, x, s in zip(heads, o.chunk(len(heads), 1), _split(after, len(heads)), strict=True):
            outputs[head], states[head] = x, s if count else _without_slots(s)
    joined = {name: torch.cat([getattr(s, name) for s in states], 1) for name in SRFState._fields if name != "length"}
    return torch.cat(outputs, 1), SRFState(**joined, length=states[0].length)


def _state_of(state: SRFState, slots: tuple[int, ...], heads: list[int]) -> SRFState:
    """The state of some heads with equal slots, or without any: they get one each, which is taken for ever."""
    parts = {name: getattr(state, name) for name in SRFState._fields}
    for name, x in parts.items():
        if name in _RETAINED:
            if slots[heads[0]]:
                pieces = x.split(slots, 1)
                parts[name] = torch.cat([pieces[head] for head in heads], 1)
            else:
                empty = float("inf") if name == "retained_priority" else 0.0
                parts[name] = x.new_full((x.shape[0], len(heads), *x.shape[2:]), empty)
        elif name != "length":
            parts[name] = x[:, heads]
    return SRFState(**parts)


def _split(state: SRFState, heads: int) -> list[SRFState]:
    """The state of each of some heads with equal slots."""
    whole = [[x] * heads if name == "length" else x.chunk(heads, 1) for name, x in state._asdict().items()]
    return [SRFState(*parts) for parts in zip(*whole, strict=True)]


def _without_slots(state: SRFState) -> SRFState:
    return state._replace(**{name: getattr(state, name)[:, :0] for name in _RETAINED})


def _maps_of(maps: FoldedMap, heads: list[int]) -> FoldedMap:
    """The maps of some heads."""
    query, key = (type(side)(*(None if x is None else x[heads] for x in side)) for side in (maps.query, maps.key))  # type: ignore[arg-type]
    foresight = None if maps.foresight is None else maps.foresight[heads]
    return maps._replace(query=query, key=key, foresight=foresight, slot_bounds=None)
