"""The chunked form through the fused kernels: states in, states out, and when they can serve.

Same inputs and outputs as the PyTorch segments of `ops`; what is differentiable there is differentiable here.
"""

from __future__ import annotations

import functools

import torch

from .block_tables import plan_blocks, pool_keys
from .configuration import SRFConfig
from .feature_map import FoldedMap, LinearFeatures, SoftmaxFeatures
from .feature_sums import LOG_ZERO
from .fused import attend
from .fused_call import HAS_TRITON, Sizes, interpreted, sizes_of
from .fused_forward import slot_tensors
from .retention import PURE_BLOCK
from .state import SRFState, slots_by_head, slots_in_a_row

# What one program can hold.
MAX_WINDOW = 128
MAX_HEAD_DIM = 256
MAX_FEATURES = 256
MAX_SINKS = 64
MAX_RETAINED = 1024
# CUDA's axes but the first.
MAX_BATCH = 65_535


def why_not_fused(q: torch.Tensor, config: SRFConfig, causal: bool, step: bool = False) -> str | None:
    """Why the fused kernels cannot serve a call, in words; `None` if they can. `step`: the call is one token."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if q.device.type != "cuda" and not interpreted():
        return f"tensors are on {q.device}, and the kernels need a CUDA device (or TRITON_INTERPRET=1)"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there is no kernel for {q.dtype}, only for float32, float16 and bfloat16"
    if q.device.type == "cuda" and _capability(q.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    if not causal:
        return "there is no kernel for causal=False"
    if config.feature_map == "relu":
        return "there is no kernel for feature_map='relu'"
    if config.feature_map == "hedgehog" and (step or not config.window):
        return f"there is no {'decode kernel' if step else 'kernel without a window'} for feature_map='hedgehog'"
    limits = {
        "window": (config.window, MAX_WINDOW),
        "num_features": (config.num_features, MAX_FEATURES),
        "head_dim": (q.shape[-1], MAX_HEAD_DIM),
        "sinks": (config.sinks, MAX_SINKS),
        "retained": (config.retained, MAX_RETAINED),
        "batch": (0 if step else q.shape[0], MAX_BATCH),
    }
    for name, (value, limit) in limits.items():
        if value > limit:
            return f"{name}={value} is above the {limit} that the kernels hold"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[tuple[int, int]] | None,
    state: SRFState | None,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    *,
    use_tail: bool = True,
    with_state: bool = False,
    past: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SRFState | None]:
    """Causal attention of whole rows, and the state after them.

    Parameters
    ----------
    q : (B, H, L, D); k, v : (B, G, L, D), with L > 0
    mask : (B, L) bool, optional
    documents : list of (start, end), optional
        Bounds of the rows packed into one.
    state : SRFState, optional
        Continue from it.
    maps, config, scaling, use_tail
        As in `ops.srf_attention`.
    with_state : bool
        Return the state after the last real token of every row.
    past : (B, G, L), optional
        As in `chunked.attend_segment`.

    Returns
    -------
    o : (B, H, L, D), the dtype of `q`
    state : SRFState or None
    """
    packed = documents is not None
    keys, values = k, v
    start: list[torch.Tensor | None] = [None] * 6
    if state is not None:
        slots = config.slots(k.shape[1])
        keys, values = pool_keys(state, k, "key", packed, slots), pool_keys(state, v, "value", packed, slots)
        start = _start(state, config, slots, packed)
    bounds = maps.slot_bounds
    ends = None if documents is None else [documents[0][0], *(end for _, end in documents)]
    learned = isinstance(maps.query, SoftmaxFeatures)
    ints = [
        config.window, config.sinks, config.retained, config.retention_delay, int(use_tail), config.fade, int(learned),
    ]  # fmt: skip
    query_half: torch.Tensor | None = None
    # In the pure form the pool is the keys themselves.
    key_half = None if past is None else past.contiguous()
    if learned:
        maps, query_half, key_half = split_softmax(maps, q, keys)
    assert isinstance(maps.query, LinearFeatures)
    assert isinstance(maps.key, LinearFeatures)
    out = attend(
        q, keys, values, mask, ends, None if state is None else state.length,
        *start,
        maps.query.weight, maps.query.bias, maps.query.norm_weight, maps.query.norm_bias,
        maps.key.weight, maps.key.bias, maps.key.norm_weight, maps.key.norm_bias, ints, float(scaling),
        None if maps.foresight is None else maps.foresight.contiguous(), query_half, key_half, bounds,
    )  # fmt: skip
    if not with_state:
        return out[0], None
    s = sizes_of(q, keys, maps.query.weight.shape[1], ints)
    return out[0], _final_state(out, keys, values, k, mask, documents, state, config, s)


def split_softmax(maps: FoldedMap, q: torch.Tensor, keys: torch.Tensor) -> tuple[FoldedMap, torch.Tensor, torch.Tensor]:
    """Learned features as the kernels take them: linear in a token but for two numbers, one for either half of them.

    With `h = U x`, the features `[log softmax(h) | log softmax(-h)]` are `[h - logsumexp h | -h - logsumexp(-h)]`.

    Parameters
    ----------
    maps : FoldedMap
        Of `SoftmaxFeatures`, with a mixing factor.
    q : (B, H, L, D); keys : (B, G, E + L, D)

    Returns
    -------
    maps : FoldedMap
        With both signs of the weights, to be taken times unscaled vectors.
    query_half : (2, B, H, L); key_half : (2, B, G, E + L), float32
        What is subtracted, less the mixing factor for queries. All is differentiable.
    """
    query, key = maps.query, maps.key
    assert isinstance(query, SoftmaxFeatures)
    assert isinstance(key, SoftmaxFeatures)
    assert query.mixing is not None
    sides = []
    for side in (query, key):
        weight = torch.cat([side.weight, -side.weight], 1)
        sides.append(LinearFeatures(weight, weight.new_zeros(weight.shape[:2]), None, None))
    query_half = _normalisers(q, query.weight) - query.mixing.reshape(-1, 1)
    return maps._replace(query=sides[0], key=sides[1]), query_half, _normalisers(keys, key.weight)


def _normalisers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`logsumexp` of `U x` and of `-U x`, (2, B, H, L), for x (B, H, L, D) in groups of heads and U (G, K, D)."""
    b, heads, length, d = x.shape
    h = torch.matmul(x.to(weight.dtype).reshape(b, weight.shape[0], -1, d), weight.mT)
    return torch.stack([h.logsumexp(-1), (-h).logsumexp(-1)]).reshape(2, b, heads, length)


def _start(state: SRFState, config: SRFConfig, slots: tuple[int, ...], packed: bool) -> list[torch.Tensor | None]:
    """What rows continue from, as `fused.attend` takes it."""
    priority = slots_by_head(state.retained_priority, slots, -torch.inf)
    rows, g, h = priority.shape
    place = config.sinks + torch.arange(h, device=state.length.device)
    if packed:
        extra = config.sinks + h + 2 * config.window
        place = place + torch.arange(rows, device=state.length.device).view(-1, 1, 1) * extra
    slot_token = torch.where(priority > -torch.inf, place.expand(rows, g, h), -1).to(torch.int32)
    mass = state.k_sum
    total = state.kv_mean.to(mass.dtype) * mass.unsqueeze(-1)
    parts = (total, mass, state.k_max, state.window_priority, slot_token, priority)
    return [x.contiguous() for x in parts]


def _final_state(
    out: list[torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[tuple[int, int]] | None,
    state: SRFState | None,
    config: SRFConfig,
    sizes: Sizes,
) -> SRFState:
    """Gather what the rows' states keep from the pool and from what the kernels left at their last boundaries."""
    w, h = config.window, config.retained
    total, mass, top = out[1:4]
    rows, g = mass.shape[:2]
    if state is None:
        state = SRFState.empty(config, rows, g, k.shape[3], dtype=k.dtype, device=k.device, unpacked=True)
        seen = None
    else:
        seen = state.length
    tables = plan_blocks(
        k.shape[0], k.shape[2], w or PURE_BLOCK, config.sinks, k.device, mask=mask, documents=documents,
        seen=seen, retained=h, pure=not w,
    )  # fmt: skip
    entry = tables.row_block[:-1].long() + torch.arange(rows, device=k.device) + tables.boundary
    packed = documents is not None

    def gather(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Rows `token` (rows, G or 1, E) of the pool, zeros where there is none."""
        token = token.long().expand(rows, x.shape[1], -1)
        empty = (token < 0).unsqueeze(-1)
        if packed:
            head = torch.arange(x.shape[1], device=x.device).view(1, -1, 1)
            taken = x[0][head, token.clamp_min(0)]
        else:
            taken = torch.take_along_dim(x, token.clamp_min(0).unsqueeze(-1), 2)
        return taken.masked_fill(empty, 0.0)

    if documents is None:
        new = k.shape[2] if mask is None else mask.sum(-1)
    else:
        new = torch.tensor([end - start for start, end in documents], device=k.device)
    after = state._replace(
        kv_mean=total / mass.clamp_min(0.5).unsqueeze(-1),
        k_sum=mass,
        k_max=top.masked_fill(top <= LOG_ZERO, float("-inf")),
        sink_key=gather(keys, tables.sink_token.unsqueeze(1)),
        sink_value=gather(values, tables.sink_token.unsqueeze(1)),
        length=state.length + new,
    )
    if w:
        # The entries on both sides of the boundary; a row that ends with a full block has no second one.
        last = (tables.row_block[1:] + torch.arange(rows, device=k.device)).long()
        inside = (entry < last).unsqueeze(-1)
        under_way = (entry + 1).clamp_max(len(tables.key_token) - 1)
        token = torch.cat(
            [tables.key_token[entry], torch.where(inside, tables.key_token[under_way], -1)], -1
        ).unsqueeze(1)
        after = after._replace(window_key=gather(keys, token), window_value=gather(values, token))
        if h:
            slots, slot_priority, priority = slot_tensors(out, len(tables.key_token), rows, sizes)
            counts = config.slots(g)
            own = priority[under_way].masked_fill(~inside.unsqueeze(-1), float("-inf"))
            after = after._replace(
                window_priority=torch.cat([priority[entry], own], -1),
                retained_key=slots_in_a_row(gather(keys, slots[entry]), counts),
                retained_value=slots_in_a_row(gather(values, slots[entry]), counts),
                retained_priority=slots_in_a_row(slot_priority[entry], counts),
            )
    return after
