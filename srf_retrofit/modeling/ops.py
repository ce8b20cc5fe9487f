"""The one dispatch: every caller's attention goes through `srf_attention`, whatever computes it.

It checks its inputs, lays rows out (padding, packed documents, rows that continue at different positions), walks the
segments of the chunked form with recomputation in backward, or takes the one-token step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from .bidirectional import attend_bidirectional
from .checks import check_documents, check_forget, check_mask, check_state, check_tensors
from .chunked import attend_segment
from .configuration import SRFConfig
from .eight_bits import round_to_eight_bits
from .feature_map import FeatureMap, FoldedMap, LinearFeatures, fold_feature_map, round_weights
from .forget_gate import forgotten
from .fused_attention import attend_fused, why_not_fused
from .fused_call import interpreted
from .head_groups import attend_by_groups
from .layout import Layout, cut, join, plan_layout
from .recurrent import attend_token
from .state import SRFState, slot_bounds, with_features, without_features
from .triton_decode import decode_step_, refusal

ABLATIONS = (None, "no_tail", "tail_only", "no_retained")
BACKENDS = ("auto", "torch", "triton")
_FEWEST_FEATURES = 16  # that a kernel can hold


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
    log_forget: torch.Tensor | None = None,
    initial_state: SRFState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
    ablation: str | None = None,
    in_place: bool = False,
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
        One projection and geometry per key/value head; for bfloat16 inputs see `feature_map.round_weights`.
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
    log_forget : (B, G, L), the dtype that sums are taken in, at most 0
        With `config.forget_gate`: logarithm of the factor by which all earlier keys count less from a token on, see
        `forget_gate`. Through a final state it has no gradient: that is for decoding.
    initial_state : SRFState, optional
        Continue these rows, each from its own position.
    output_final_state : bool
        Return the state after the last real token of every row (of every document, if packed).
    chunk_size : int, optional
        Tokens per segment; trades memory against speed and changes nothing else.
    backend : {"auto", "torch", "triton"}
        "auto" takes the fused kernels wherever they can run, and PyTorch elsewhere, see `choose_backend`; a backend
        that is asked for by name and cannot run is refused.
    ablation : {None, "no_tail", "tail_only", "no_retained"}
        For analysis, without a state: leave the features out; estimate every key by features; keep no retained keys.
    in_place : bool
        A one-token step may overwrite `initial_state`, and then returns it; spares the fused step a copy.

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
    if isinstance(feature_map, FoldedMap):
        maps = feature_map
    else:
        with full_precision(q.device):
            maps = fold(feature_map)
    check_tensors(q, k, v, maps, chunk_size)
    config.check_head_dim(q.shape[-1])
    # The numbers themselves are not looked at where maps bring them, so that a graph need not be compiled for each.
    if maps.slot_bounds is None and config.head_retained is not None:
        maps = maps._replace(slot_bounds=slot_bounds(config.slots(k.shape[1]), q.device))
    maps = round_weights(maps, q.dtype)
    step = q.shape[2] == 1 and initial_state is not None
    chosen, _ = choose_backend(q, config, causal=causal, step=step, backend=backend)
    b, _, length, d = q.shape
    scaling = d**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        attention_mask = check_mask(attention_mask, q)
    documents = None if cu_seqlens is None else check_documents(cu_seqlens, q, attention_mask)
    check_forget(log_forget, config, k, causal)
    rows = b if documents is None else len(documents)
    if not causal and config.feature_map not in ("random", "trained"):
        raise ValueError(f"causal=False needs random features, got feature_map={config.feature_map!r}")
    if not causal and (config.retained or initial_state is not None or output_final_state):
        raise ValueError(
            f"causal=False needs retained=0 and no state, got retained={config.retained}: keys are ranked by the "
            "queries that follow them"
        )
    if initial_state is not None:
        check_state(initial_state, config, rows, k)

    use_tail = ablation != "no_tail" and config.num_features > 0
    with full_precision(q.device):
        rounds = config.packs_keys
        given = [x for x in (q, k, v, log_forget) if x is not None]
        no_graph = not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        if length == 1 and causal and documents is None and initial_state is not None and no_graph:
            active = None if attention_mask is None else attention_mask[:, 0]
            fading = None
            if log_forget is not None:
                fading = log_forget if active is None else log_forget.masked_fill(~active.view(-1, 1, 1), 0.0)
            if chosen == "triton":
                if not in_place:
                    initial_state = SRFState(*(t.clone() for t in initial_state))
                if fading is not None:
                    initial_state.k_max.add_(fading)
                o = decode_step_(q, k, v, active, initial_state, maps, config, scaling, use_tail=use_tail)
                return o, initial_state if output_final_state else None
            if fading is not None:
                initial_state = initial_state._replace(k_max=initial_state.k_max + fading)
            o, new_state = attend_token(q, k, v, active, initial_state, maps, config, scaling, use_tail=use_tail)
            if active is not None:
                o = o.masked_fill(~active.view(-1, 1, 1, 1), 0.0)
            return o.to(q.dtype), new_state if output_final_state else None

        if rounds:
            k, v = round_to_eight_bits(k), round_to_eight_bits(v)
            initial_state = None if initial_state is None else initial_state.unpacked(k.dtype)
        if not causal:
            return _attend_all(q, k, v, attention_mask, documents, maps, config, scaling, use_tail), None
        past = ends = None
        if log_forget is not None and length:
            past, ends = forgotten(log_forget, attention_mask, documents)
        if chosen == "triton" and length:
            if not config.num_features:
                maps, initial_state = with_unused_features(maps, initial_state)
            o, state = attend_fused(
                q, k, v, attention_mask, documents, initial_state, maps, config, scaling,
                use_tail=use_tail, with_state=output_final_state, past=past,
            )  # fmt: skip
            if not config.num_features and state is not None:
                state = without_features(state)
        else:
            layout = plan_layout(b, length, q.device, config, attention_mask, documents, initial_state, chunk_size)
            if initial_state is None:
                initial_state = SRFState.empty(
                    config, rows, k.shape[1], d, dtype=k.dtype, device=k.device, unpacked=True
                )
            o, state = attend_by_groups(
                partial(_walk_segments, layout=layout, scaling=scaling, use_tail=use_tail),
                q, k, v, past, initial_state, maps, config,
            )  # fmt: skip
    if not output_final_state or state is None:
        return o, None
    if ends is not None:
        # What keys weigh is counted from the last token on.
        state = state._replace(k_max=state.k_max + ends.detach().unsqueeze(-1))
    if rounds:
        state = state.packed()
    stored = SRFState.layout(config, rows, k.shape[1], d, k.dtype)["kv_mean"][1]
    return o, state._replace(kv_mean=state.kv_mean.to(stored))


def choose_backend(
    q: torch.Tensor, config: SRFConfig, *, causal: bool = True, step: bool = False, backend: str = "auto"
) -> tuple[str, str]:
    """Which implementation serves a call, and why.

    Parameters
    ----------
    q : (B, H, L, D)
        Only its shape, dtype and device matter.
    config : SRFConfig
    causal : bool
    step : bool
        Whether the call is one token that continues a state.
    backend : {"auto", "torch", "triton"}

    Returns
    -------
    backend : {"torch", "triton"}
    reason : str

    Raises
    ------
    ValueError
        For another name, or when "triton" is asked for and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "torch":
        return "torch", "asked for"
    reason = why_not_fused(q, config, causal, step)
    if reason is None and step and not config.num_features:
        reason = "the decode kernel needs features, and num_features is 0"
    elif reason is None and step:
        reason = refusal(config, q.shape[-1], q.dtype, q.device)
    if backend == "triton":
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run this call: {reason}; backend='torch' can")
        return "triton", "asked for"
    if reason is None and interpreted():
        reason = "Triton's interpreter is for tests: ask for backend='triton' to use it"
    return ("torch", reason) if reason is not None else ("triton", f"the kernels run on {q.device}")


def with_unused_features(maps: FoldedMap, state: SRFState | None) -> tuple[FoldedMap, SRFState | None]:
    """Stand-ins for no features at all (`num_features = 0`): the kernels' smallest number, for `use_tail=False`."""
    g, _, d = maps.query.weight.shape
    weight = maps.query.weight.new_zeros(g, _FEWEST_FEATURES, d)
    side = LinearFeatures(weight, weight.new_zeros(g, _FEWEST_FEATURES), None, None)
    return maps._replace(query=side, key=side), None if state is None else with_features(state, _FEWEST_FEATURES)


def fold(feature_map: FeatureMap, dtype: torch.dtype | None = None) -> FoldedMap:
    """Fold both sides of a feature map; worth keeping while the features do not change.

    `dtype`: of the inputs that it is for; `srf_attention` rounds what has not been rounded for it, at every call.
    """
    query, key = fold_feature_map(feature_map, "query"), fold_feature_map(feature_map, "key")
    maps = FoldedMap(query, key, feature_map.foresight)
    return maps if dtype is None else round_weights(maps, dtype)


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


def _walk_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: torch.Tensor | None,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    *,
    layout: Layout,
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
        x.requires_grad for x in (q, k, v, past, *state, *maps.query, *maps.key) if x is not None
    )
    parts = [cut(x, layout) for x in (q, k, v)]
    pasts = [None] * len(layout.segments) if past is None else cut(past.unsqueeze(-1), layout)
    outputs, finished = [], []
    for i, segment in enumerate(layout.segments):
        if segment.rows < state.length.shape[0]:
            finished.append(SRFState(*(t[segment.rows :] for t in state)))
            state = SRFState(*(t[: segment.rows] for t in state))

        def run(qs, ks, vs, past, *tensors, segment=segment):
            return attend_segment(
                qs, ks, vs, segment.new_tokens, SRFState(*tensors), maps, config, scaling,
                use_tail=use_tail, continues=continues, past=past,
            )  # fmt: skip

        args = (*(part[i] for part in parts), pasts[i], *state)
        if recompute:
            o, state = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = run(*args)
        outputs.append(o.to(q.dtype))

    finished.append(state)
    state = SRFState(*(torch.cat(ts) for ts in zip(*reversed(finished), strict=True)))
    if layout.order is not None:
        state = state.index_select(layout.order.argsort())
    return join(outputs, layout, (b, heads, length, d), q), state


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
        pieces = [
            _attend_all(q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], None, None, maps, config, scaling, use_tail)
            for i, j in documents
        ]
        return torch.cat(pieces, 2)
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
    front, back = (i[:, None, :, None].expand(b, 1, length, q.shape[-1]) for i in (rank, rank.argsort(dim=-1)))
    q, k, v = (torch.take_along_dim(x, front, 2) for x in (q, k, v))
    o = torch.take_along_dim(recomputed(q, k, v, mask.sum(-1)), back, 2)
    return o.masked_fill(~mask[:, None, :, None], 0.0)


def _ablated(config: SRFConfig, ablation: str | None, has_state: bool) -> SRFConfig:
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, got {ablation!r}")
    if ablation in ("tail_only", "no_retained"):
        if has_state:
            raise ValueError(f"ablation={ablation!r} changes the shape of the state: run it without one (no cache)")
        config = config.with_slots(0)
        return config if ablation == "no_retained" else config.replace(window=0, sinks=0, kv_dtype="model")
    return config
