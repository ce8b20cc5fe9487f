"""The one dispatch: every caller's attention goes through `srf_attention`, whatever computes it.

It checks its inputs, lays rows out (padding, packed documents, rows that continue at different positions), walks the
segments of the chunked form with recomputation in backward, or takes the one-token step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from .bidirectional import attend_bidirectional
from .chunked import FoldedMap, attend_segment, block_length
from .configuration import SRFConfig
from .feature_map import FeatureMap, fold_feature_map
from .recurrent import attend_token
from .state import SRFState

# Tokens and blocks of a segment: long enough to amortise a segment's kernels, short enough to stay in cache.
DEFAULT_CHUNK = 1024
PURE_CHUNK = 256
MAX_BLOCKS = 64
ABLATIONS = (None, "no_tail", "tail_only", "no_retained")
BACKENDS = ("auto", "torch")


def srf_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMap | FoldedMap,
    config: SRFConfig,
    *,
    scaling: float | None = None,
    causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: SRFState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
    ablation: str | None = None,
) -> tuple[torch.Tensor, SRFState | None]:
    """Attention with exact sinks, window and retained keys, and simplex random features for every other key.

    For query `i`, with `E(i)` the exact keys and `T(i)` the other visible ones (Scatterbrain's sum of an exact part
    and positive features, 2110.15343, in one normaliser; features of 2009.14794 and 2301.13856):

        o_i = (sum_{j in E} e^{s_ij} v_j + sum_r e^{a_ir} S_r) / (sum_{j in E} e^{s_ij} + sum_r e^{a_ir} z_r)
        S_r = sum_{j in T} e^{b_jr} v_j,   z_r = sum_{j in T} e^{b_jr}

    Parameters
    ----------
    q : (B, H, L, D), floating
    k, v : (B, G, L, D), the dtype and device of `q`, `H` a multiple of `G`
        After rotary embedding, unscaled.
    feature_map : FeatureMap, or the FoldedMap that `fold` made of one
        One projection and geometry per key/value head.
    config : SRFConfig
    scaling : float, optional
        Softmax scale, `D ** -0.5` by default.
    causal : bool
        False lets every query see every key of its row; needs `retained = 0` and no state.
    attention_mask : (B, L) bool or integer, optional
        Nonzero for real tokens, in any pattern. Positions count real tokens only; masked tokens leave no trace and
        their outputs are 0.
    cu_seqlens : (N + 1,) integer, optional
        Bounds of documents packed into a single row (`B = 1`); attention never crosses them.
    initial_state : SRFState, optional
        Continue these rows, each from its own position.
    output_final_state : bool
        Return the state after the last real token of every row (of every document, if packed).
    chunk_size : int, optional
        Tokens per segment; trades memory against speed and changes nothing else.
    backend : {"auto", "torch"}
    ablation : {None, "no_tail", "tail_only", "no_retained"}
        For analysis, without a state: leave the features out; estimate every key by features; keep no retained keys.

    Returns
    -------
    o : (B, H, L, D), the dtype of `q`
    state : SRFState or None

    Raises
    ------
    ValueError
        Naming the argument and the value, before anything is computed.
    """
    config = _ablated(config, ablation, initial_state is not None or output_final_state)
    maps = feature_map if isinstance(feature_map, FoldedMap) else fold(feature_map)
    _check_tensors(q, k, v, maps, chunk_size, backend)
    b, _, length, d = q.shape
    scaling = d**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        attention_mask = _check_mask(attention_mask, q)
    documents = None if cu_seqlens is None else _check_documents(cu_seqlens, q, attention_mask)
    rows = b if documents is None else len(documents)
    if not causal and (config.retained or initial_state is not None or output_final_state):
        raise ValueError(
            f"causal=False needs retained=0 and no state, got retained={config.retained}: keys are ranked by the "
            "queries that follow them"
        )
    if initial_state is not None:
        _check_state(initial_state, config, rows, k)

    use_tail = ablation != "no_tail"
    single = length == 1 and causal and initial_state is not None and documents is None
    with full_precision(q.device):
        if single and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
            active = None if attention_mask is None else attention_mask[:, 0]
            o, state = attend_token(q, k, v, active, initial_state, maps, config, scaling, use_tail=use_tail)
            if active is not None:
                o = o.masked_fill(~active.view(-1, 1, 1, 1), 0.0)
            return o.to(q.dtype), state if output_final_state else None

        if not causal:
            return _attend_all(q, k, v, attention_mask, documents, maps, config, scaling, use_tail), None
        layout = plan_layout(b, length, q.device, config, attention_mask, documents, initial_state, chunk_size)
        state = initial_state
        if state is None:
            state = SRFState.empty(config, rows, k.shape[1], d, dtype=k.dtype, device=k.device)
        o, state = _walk_segments(q, k, v, layout, state, maps, config, scaling, use_tail)
    if not output_final_state:
        return o, None
    stored = SRFState.empty(config, 0, k.shape[1], d, dtype=k.dtype).kv_mean.dtype
    return o, state._replace(kv_mean=state.kv_mean.to(stored))


def fold(feature_map: FeatureMap) -> FoldedMap:
    """Fold both sides of a feature map; worth keeping while the features do not change."""
    return FoldedMap(fold_feature_map(feature_map, "query"), fold_feature_map(feature_map, "key"))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products as such: no autocast, no TF32. Exponents rounded to bf16 cost 1e-2 of the output."""
    matmul = torch.backends.cuda.matmul
    with torch.autocast(device.type, enabled=False):
        # Not an ExitStack: torch.compile cannot trace through one.
        if torch.compiler.is_compiling() or device.type != "cuda" or not matmul.allow_tf32:
            yield
            return
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = True


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


def _walk_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    use_tail: bool,
) -> tuple[torch.Tensor, SRFState]:
    """Run the segments in turn, recomputing each in backward."""
    b, heads, length, d = q.shape
    # Between segments the sums stay in the accumulation dtype; only the final state is stored in `state_dtype`.
    state = state._replace(kv_mean=state.kv_mean.to(state.k_sum.dtype))
    if layout.order is not None:
        state = state.index_select(layout.order)
    # Rows that end early stand inside a block in the segments after their end; so may rows that continue.
    continues = layout.token is not None
    recompute = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, *state, *maps.query, *maps.key) if x is not None
    )
    parts = [_cut(x, layout) for x in (q, k, v)]
    outputs, finished = [], []
    for i, segment in enumerate(layout.segments):
        if segment.rows < state.length.shape[0]:
            finished.append(SRFState(*(t[segment.rows :] for t in state)))
            state = SRFState(*(t[: segment.rows] for t in state))

        def run(qs, ks, vs, *tensors, segment=segment):
            return attend_segment(
                qs, ks, vs, segment.new_tokens, SRFState(*tensors), maps, config, scaling,
                use_tail=use_tail, continues=continues,
            )  # fmt: skip

        args = (*(part[i] for part in parts), *state)
        if recompute:
            o, state = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = run(*args)
        outputs.append(o.to(q.dtype))

    finished.append(state)
    state = SRFState(*(torch.cat(ts) for ts in zip(*reversed(finished), strict=True)))
    if layout.order is not None:
        state = state.index_select(layout.order.argsort())
    return _join(outputs, layout, (b, heads, length, d), q), state


def _attend_all(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[tuple[int, int]] | None,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    use_tail: bool,
) -> torch.Tensor:
    """The non-causal form, with padding moved behind the real tokens and back, one packed document at a time."""
    if documents is not None:
        return torch.cat(
            [
                _attend_all(*(x[:, :, i:j] for x in (q, k, v)), None, None, maps, config, scaling, use_tail)
                for i, j in documents
            ],
            2,
        )
    b, _, length, _ = q.shape
    if length == 0:
        return torch.zeros_like(q)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return attend_bidirectional(q, k, v, lengths, maps, config, scaling, use_tail).to(q.dtype)

    def recomputed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(attend, *args, use_reentrant=False, preserve_rng_state=False)

    if mask is None:
        return recomputed(q, k, v, q.new_full((b,), length, dtype=torch.int64))
    rank = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    front, back = (
        i[:, None, :, None].expand(b, 1, length, q.shape[-1]) for i in (rank, rank.argsort(dim=-1))
    )
    q, k, v = (torch.take_along_dim(x, front, 2) for x in (q, k, v))
    o = torch.take_along_dim(recomputed(q, k, v, mask.sum(-1)), back, 2)
    return o.masked_fill(~mask[:, None, :, None], 0.0)


def _cut(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
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
    return [
        p.view(s.rows, s.slots, heads, d).transpose(1, 2) for p, s in zip(pieces, layout.segments, strict=True)
    ]


def _join(outputs: list[torch.Tensor], layout: Layout, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Put the segments' outputs back to their tokens; tokens of no row get zeros."""
    b, heads, length, d = shape
    if not outputs:
        return like.new_zeros(shape)
    if layout.token is None:
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2))[:, :, :length]
    flat = torch.cat([o.transpose(1, 2).reshape(-1, heads, d) for o in outputs] + [like.new_zeros(1, heads, d)])
    total = flat.shape[0] - 1
    where = torch.full((b * length + 1,), total, dtype=torch.int64, device=like.device)
    # Slots of no token write to a spare last entry.
    target = torch.where(layout.is_real, layout.token, b * length)
    where[target] = torch.arange(total, device=like.device)
    return flat.index_select(0, where[:-1]).view(b, length, heads, d).transpose(1, 2)


def _ablated(config: SRFConfig, ablation: str | None, has_state: bool) -> SRFConfig:
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, got {ablation!r}")
    if ablation in ("tail_only", "no_retained"):
        if has_state:
            raise ValueError(f"ablation={ablation!r} changes the shape of the state: run it without one (no cache)")
        exact = {"retained": 0} if ablation == "no_retained" else {"retained": 0, "window": 0, "sinks": 0}
        return config.replace(**exact)
    return config


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: FoldedMap, chunk_size: int | None, backend: str
) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be (B, heads, L, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    b, heads, length, d = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (b, length, d):
        raise ValueError(
            f"k and v must be (B, G, L, D) with B={b}, L={length}, D={d}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if heads % k.shape[1]:
        raise ValueError(f"the {heads} query heads must be a multiple of the {k.shape[1]} key/value heads")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device == maps.query.weight.device):
        raise ValueError(
            f"q, k, v and the feature map must be on one device, got {q.device}, {k.device}, {v.device} and "
            f"{maps.query.weight.device}"
        )
    weight = maps.query.weight
    if (weight.shape[0], weight.shape[-1]) != (k.shape[1], d):
        raise ValueError(
            f"the feature map is for {weight.shape[0]} key/value heads of dimension {weight.shape[-1]}, but k has "
            f"{k.shape[1]} of dimension {d}"
        )
    expected = torch.promote_types(q.dtype, torch.float32)
    if weight.dtype != expected:
        raise ValueError(f"the feature map must be {expected} for {q.dtype} inputs, got {weight.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _check_mask(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor | None:
    if mask.shape != (q.shape[0], q.shape[2]) or mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be a bool or integer tensor of shape {(q.shape[0], q.shape[2])}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    mask = mask.to(q.device, torch.bool)
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _check_documents(
    cu_seqlens: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None
) -> list[tuple[int, int]]:
    if mask is not None:
        raise ValueError("give attention_mask or cu_seqlens, not both: packed rows hold no padding")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor of N + 1 bounds, got {cu_seqlens!r}")
    bounds = cu_seqlens.tolist()
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs one packed row, got a batch of {q.shape[0]}: flatten it first")
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or any(x > y for x, y in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"cu_seqlens must rise from 0 to L={q.shape[2]}, got {bounds}")
    return list(zip(bounds, bounds[1:], strict=False))


def _check_state(state: SRFState, config: SRFConfig, rows: int, k: torch.Tensor) -> None:
    expected = SRFState.empty(config, rows, k.shape[1], k.shape[3], dtype=k.dtype, device="meta")
    for name, mine, right in zip(SRFState._fields, state, expected, strict=True):
        if mine.shape != right.shape or mine.dtype != right.dtype or mine.device != k.device:
            raise ValueError(
                f"initial_state.{name} must be {right.dtype} of shape {tuple(right.shape)} on {k.device}, got "
                f"{mine.dtype} of shape {tuple(mine.shape)} on {mine.device}: it was made with another config, batch "
                "or dtype"
            )
