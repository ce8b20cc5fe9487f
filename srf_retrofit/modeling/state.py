"""The recurrent state of one layer: everything that decoding needs to remember, at any length the same size."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from .configuration import SRFConfig
from .eight_bits import pack, row_width, unpack

_PARTS = ("key", "value")
# Tensors of exact keys and values.
EXACT = tuple(f"{place}_{part}" for place in ("window", "sink", "retained") for part in _PARTS)


class SRFState(NamedTuple):
    """A flat set of batch-first tensors of fixed shape and dtype (`S, z, mu` of estimator notation, and exact keys).

    The feature part is kept as `M` weighted mean values: `kv_mean = S / z`, a convex combination of values, so that
    it neither overflows nor underflows in half precision; `S = kv_mean * k_sum[..., None]`, and the true mass of
    feature `r` is `k_sum[r] * exp(k_max[r])`. Slots not in use hold zeros (priorities `-inf`, `k_max` `-inf`).

    `window_*[..., :w, :]` is the previous block, `window_*[..., w:, :]` the current, unfinished one; `length` counts
    the tokens seen, so `length % w` slots of the current block are in use. The state is always ready for its next
    token: a block that has left the window is folded as soon as the last token of the block after it is in.

    With `kv_dtype="int8"` exact keys and values are rows of `eight_bits`, `D` is then `row_width(D)`. The chunked form
    unpacks them, decoding reads them as they are.
    """

    kv_mean: torch.Tensor  # (B, G, M, D) state dtype
    k_sum: torch.Tensor  # (B, G, M) float32
    k_max: torch.Tensor  # (B, G, M) float32
    window_key: torch.Tensor  # (B, G, 2w, D) model dtype, or int8
    window_value: torch.Tensor  # (B, G, 2w, D)
    window_priority: torch.Tensor  # (B, G, 2w) float32; empty when nothing is retained
    sink_key: torch.Tensor  # (B, G, s, D)
    sink_value: torch.Tensor  # (B, G, s, D)
    retained_key: torch.Tensor  # (B, H, D): the H slots of all heads, head behind head, see `slots_by_head`
    retained_value: torch.Tensor  # (B, H, D)
    retained_priority: torch.Tensor  # (B, H) float32, `retention.priority_level`; in order of position, free first
    length: torch.Tensor  # (B,) int64

    @classmethod
    def empty(
        cls,
        config: SRFConfig,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        unpacked: bool = False,
    ) -> SRFState:
        """State before the first token, for keys and values of `dtype`; `unpacked`: as the chunked form has it."""
        layout = cls.layout(config, batch_size, num_kv_heads, head_dim, dtype, unpacked=unpacked)
        empty = dict.fromkeys(("k_max", "window_priority", "retained_priority"), -torch.inf)
        return cls(
            **{
                name: torch.full(shape, empty.get(name, 0), dtype=kind, device=device)
                for name, (shape, kind) in layout.items()
            }
        )

    @staticmethod
    def layout(
        config: SRFConfig,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        unpacked: bool = False,
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, for keys and values of `dtype`; `unpacked`: see `unpacked`."""
        heads, m = (batch_size, num_kv_heads), config.num_features
        w, s, h = config.window, config.sinks, sum(config.slots(num_kv_heads))
        # float64 inputs (the oracles') keep float64 sums; everything else accumulates in float32.
        accumulator = torch.promote_types(dtype, torch.float32)
        half = getattr(torch, config.state_dtype)
        exact = {"window": (*heads, 2 * w), "sink": (*heads, s), "retained": (batch_size, h)}
        packs = config.packs_keys and not unpacked
        width, kind = (row_width(head_dim), torch.int8) if packs else (head_dim, dtype)
        tensors = {f"{name}_{part}": ((*shape, width), kind) for name, shape in exact.items() for part in _PARTS}
        return {
            "kv_mean": ((*heads, m, head_dim), accumulator if half == torch.float32 else half),
            "k_sum": ((*heads, m), accumulator),
            "k_max": ((*heads, m), accumulator),
            **tensors,
            "window_priority": ((*heads, 2 * w if h else 0), accumulator),
            "retained_priority": ((batch_size, h), accumulator),
            "length": ((batch_size,), torch.int64),
        }

    def unpacked(self, dtype: torch.dtype) -> SRFState:
        """With exact keys and values in `dtype`, however they are stored; packed ones are unpacked together."""
        stored = [getattr(self, name) for name in EXACT]
        if self.window_key.dtype != torch.int8:
            return self._replace(**{name: x.to(dtype) for name, x in zip(EXACT, stored, strict=True)})
        rows = [x.flatten(1, -2) for x in stored]
        numbers = unpack(torch.cat(rows, 1), dtype)
        pieces = zip(EXACT, numbers.split([x.shape[1] for x in rows], 1), stored, strict=True)
        return self._replace(**{name: x.reshape(*old.shape[:-1], x.shape[-1]) for name, x, old in pieces})

    def packed(self) -> SRFState:
        """With exact keys and values in eight bits, without loss if they have been rounded to them."""
        return self._replace(**{name: pack(getattr(self, name)) for name in EXACT})

    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.numel() * t.element_size() for t in self)

    def index_select(self, rows: torch.Tensor) -> SRFState:
        """State of the rows with these indices, in their order; `rows` is `(B',)` int64."""
        return SRFState(*(t.index_select(0, rows.to(t.device)) for t in self))

    def copy_(self, other: SRFState) -> SRFState:
        """Overwrite in place, keeping every pointer."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_(theirs)
        return self


def slots_by_head(x: torch.Tensor, slots: tuple[int, ...], empty: float = 0.0) -> torch.Tensor:
    """Slots (B, H, ...) of all heads, `slots` of each, as (B, G, h, ...), with `h` the most of any.

    Those that a head has not got come first, and hold `empty`.
    """
    h = max(slots)
    if min(slots) == h:
        return x.unflatten(1, (len(slots), h))
    missing = (x.new_full((x.shape[0], h - n, *x.shape[2:]), empty) for n in slots)
    return torch.stack([torch.cat(pair, 1) for pair in zip(missing, x.split(slots, 1), strict=True)], 1)


@functools.lru_cache(maxsize=256)
def slot_bounds(slots: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Where each head's slots begin when they stand one head behind the other, and their end: (G + 1,) int32.

    `None` where all heads have as many. Kept, so that a step recorded in a CUDA graph copies nothing to the device.
    """
    if min(slots) == max(slots):
        return None
    with torch.inference_mode(False):
        return torch.tensor([0, *itertools.accumulate(slots)], dtype=torch.int32, device=device)


def slots_in_a_row(x: torch.Tensor, slots: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `slots_by_head`."""
    h = max(slots)
    if min(slots) == h:
        return x.flatten(1, 2)
    return torch.cat([x[:, head, h - n :] for head, n in enumerate(slots)], 1)


def with_features(state: SRFState, count: int) -> SRFState:
    """A state without features (`M = 0`) as one with `count` of them, all empty."""
    b, g, _, d = state.kv_mean.shape
    return state._replace(
        kv_mean=state.kv_mean.new_zeros(b, g, count, d),
        k_sum=state.k_sum.new_zeros(b, g, count),
        k_max=state.k_max.new_full((b, g, count), -torch.inf),
    )


def without_features(state: SRFState) -> SRFState:
    """A state with its features left out (`M = 0`)."""
    return state._replace(kv_mean=state.kv_mean[:, :, :0], k_sum=state.k_sum[:, :, :0], k_max=state.k_max[:, :, :0])
