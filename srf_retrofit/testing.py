"""What tests and the benchmark's gate share: float64 oracles, a comparison that explains itself, tiny models.

Two oracles compute what `modeling.ops.srf_attention` promises, each its own way and sharing no code with it:
`quadratic_attention` writes down the L x L weights, `stepwise_attention` keeps Python lists of keys, token by token.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .modeling.configuration import SRFConfig
from .modeling.feature_map import FeatureMap
from .modeling.random_features import draw_projection
from .modeling.state import SRFState


def oracle_log_features(
    x: torch.Tensor, maps: FeatureMap, side: str, scaling: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Log-features `(G, ..., M)` of `x` (G, ..., D), term by term as in `modeling.feature_map`'s definition.

    `dtype`: of the inputs that are meant; for bfloat16 the coefficients of `x` are those rounded to bfloat16.
    """
    w = maps.projection
    g, m, d = w.shape
    eye = torch.eye(d, dtype=x.dtype).expand(g, d, d)
    zero = x.new_zeros(g, d)
    c_q = zero if maps.query_shift is None else maps.query_shift
    c_k = zero if maps.key_shift is None else maps.key_shift
    p = eye if maps.preconditioner is None else maps.preconditioner
    p_inv = eye if maps.inverse_transpose is None else maps.inverse_transpose
    a = zero if maps.proposal is None else maps.proposal
    xt = math.sqrt(scaling) * x
    if side == "query":
        moved = torch.einsum("gij,g...j->g...i", p, xt - _like(c_q, xt))
        linear = (xt * _like(c_k, xt)).sum(-1)
    else:
        moved = torch.einsum("gij,g...j->g...i", p_inv, xt - _like(c_k, xt))
        linear = (_like(c_q, xt) * (xt - _like(c_k, xt))).sum(-1)
    stretch = 1 - 4 * a
    dot = torch.einsum("gmi,g...i->g...m", w * stretch.sqrt()[:, None], moved)
    quadratic = _like((w * a[:, None] * w).sum(-1), dot)
    if dtype == torch.bfloat16:
        matrix, other = (p, c_k) if side == "query" else (p_inv, c_q)
        whole = (w * stretch.sqrt()[:, None]) @ matrix + other[:, None]
        dot = dot + torch.einsum("gmi,g...i->g...m", whole.to(dtype).to(whole.dtype) - whole, xt)
    if side == "query" and maps.log_weight is not None:
        dot = dot + _like(maps.log_weight, dot)
    constant = _like(0.25 * stretch.log().sum(-1, keepdim=True) - 0.5 * math.log(max(m, 1)), dot)
    return quadratic + dot + (linear - 0.5 * (moved * moved).sum(-1))[..., None] + constant


def oracle_eight_bits(x: torch.Tensor) -> torch.Tensor:
    """What `modeling.eight_bits` keeps of float64 vectors (..., D); gradients pass straight through."""
    groups = x.detach().unflatten(-1, (-1, 16))
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))  # the largest is in 2^(e - 1) .. 2^e
    step = 2.0 ** (exponent - 7).clamp(-24, 120)
    kept = (groups / step + 0.5).floor().clamp(-127, 127) * step
    return x + (kept.flatten(-2) - x.detach())


def _like(per_head: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return per_head.reshape(per_head.shape[0], *[1] * (x.dim() - 2), per_head.shape[-1])


def _rows(
    q: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> list[tuple[int, torch.Tensor]]:
    """(batch row, indices of its real tokens) for every sequence."""
    b, length = q.shape[0], q.shape[2]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, torch.arange(i, j)) for i, j in itertools.pairwise(bounds)]
    if mask is None:
        return [(i, torch.arange(length)) for i in range(b)]
    return [(i, mask[i].nonzero().flatten()) for i in range(b)]


def quadratic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMap,
    config: SRFConfig,
    *,
    scaling: float | None = None,
    causal: bool = True,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    log_forget: torch.Tensor | None = None,
    output_final_state: bool = False,
    ablation: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, SRFState | None]:
    """`srf_attention` as an L x L matrix of weights, in float64, on the CPU; differentiable; without `initial_state`.

    Shapes as there; every tensor is cast to float64 first, and the outputs are float64. `dtype`: of the inputs whose
    attention is meant, that of `q` unless given.
    """
    dtype = q.dtype if dtype is None else dtype
    if ablation == "tail_only":
        config = config.with_slots(0).replace(window=0, sinks=0)
    elif ablation == "no_retained":
        config = config.with_slots(0)
    q, k, v = (x.to("cpu", torch.float64) for x in (q, k, v))
    if config.kv_dtype == "int8":
        k, v = oracle_eight_bits(k), oracle_eight_bits(v)
    maps = feature_map.to("cpu", torch.float64)
    heads, d = q.shape[1], q.shape[3]
    g = k.shape[1]
    scaling = d**-0.5 if scaling is None else scaling
    out = torch.zeros_like(q)
    states = []
    for row, index in _rows(q, attention_mask, cu_seqlens):
        qr = q[row][:, index].view(g, heads // g, -1, d)
        kr, vr = k[row][:, index], v[row][:, index]
        faded = None if log_forget is None else log_forget[row][:, index].to("cpu", torch.float64)
        o, state = _quadratic_row(qr, kr, vr, maps, config, scaling, causal, ablation != "no_tail", dtype, faded)
        out = out.index_put((torch.tensor(row), torch.arange(heads)[:, None], index[None]), o.reshape(heads, -1, d))
        states.append(state)
    final = SRFState(*(torch.stack(x) for x in zip(*states, strict=True))) if output_final_state and causal else None
    return out, final


def _quadratic_row(qr, kr, vr, maps, config, scaling, causal, use_tail, dtype, log_forget=None):
    """One sequence: q (G, R, L, D), k and v (G, L, D), log_forget (G, L)."""
    g, _, length, _ = qr.shape
    w, s = config.window, config.sinks
    score = scaling * torch.einsum("grid,gjd->grij", qr, kr)
    a = oracle_log_features(qr, maps, "query", scaling, dtype)
    b = oracle_log_features(kr, maps, "key", scaling, dtype)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    visible = (j <= i) if causal else torch.ones(length, length, dtype=torch.bool)
    exact = visible & (j < s)
    if w:
        near = (i // w - j // w <= 1) & (j // w - i // w <= 1)
        exact = exact | (visible & near)
    exact = exact.expand(g, length, length).clone()
    slots: Any = [[] for _ in range(g)]
    priority = level = None
    if config.retained:
        slots, priority, level = _retained_sets(score, exact, kr, vr, maps, config)
    if config.retained:
        for head in range(g):
            for block, kept in enumerate(slots[head][:-1]):
                exact[head, block * w : (block + 1) * w, kept] = True
            exact[head] &= visible
    tail = visible & ~exact
    estimate = _log_kernel(a, b)
    if log_forget is not None:
        # (G, L, L): what is forgotten after key j, up to query i.
        between = (j[..., None] < torch.arange(length)) & (torch.arange(length) <= i[..., None])
        faded = torch.einsum("ijt,gt->gij", between.double(), log_forget)
        estimate = estimate + faded[:, None]
        b = b + faded[:, -1, :, None]
    logit = torch.where(exact[:, None], score, torch.where(tail[:, None], estimate, -torch.inf))
    if not use_tail:
        logit = logit.masked_fill(tail[:, None], -torch.inf)
    weight = torch.exp(logit - logit.detach().amax(-1, keepdim=True))
    o = torch.einsum("grij,gjd->grid", weight, vr) / weight.sum(-1, keepdim=True)
    if not causal:
        return o, None
    return o, _final_state(kr, vr, b, slots, priority, level, config)


def _log_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log sum_r exp(a_ir + b_jr), (G, R, L, M), (G, L, M) -> (G, R, L, L); elementwise where that is affordable."""
    if not a.shape[-1]:
        return a.new_full((*a.shape[:-1], b.shape[1]), -torch.inf)
    if a[..., 0].numel() * b.shape[1] * b.shape[2] <= 3e7:
        return (a.unsqueeze(-2) + b[:, None, None]).logsumexp(-1)
    top = b.detach().amax(1, keepdim=True)  # (G, 1, M)
    a = a + top[:, None]
    high = a.detach().amax(-1, keepdim=True)
    return torch.einsum("grim,gjm->grij", torch.exp(a - high), torch.exp(b - top)).log() + high


def _retained_sets(score, exact, kr, vr, maps, config):
    """Retained positions of every block and kv head (and of the block after the last), keys' priorities and levels."""
    g, _, length, _ = score.shape
    w, s = config.window, config.sinks
    delay = min(config.retention_delay, w // 2)
    p = score.detach().masked_fill(~exact[:, None], -torch.inf).softmax(-1)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    counts = (i - j > delay) & (i // w - j // w <= 1) & (j >= s)
    priority = _rounded(p.masked_fill(~counts, -torch.inf).amax((1, 2)))  # (G, L)
    level = _level(priority, kr, vr, maps) + config.fade * (torch.arange(length) // w)
    slots = []
    for head, h in enumerate(config.slots(g)):
        sets: list[list[int]] = [[], []]  # nothing has left the window before block 2
        for block in range(2, length // w + 1):
            arriving = [x for x in range((block - 2) * w, (block - 1) * w) if x >= s]
            pool = sorted(sets[-1] + arriving, key=lambda x: (-float(level[head, x]), x))
            sets.append(sorted(pool[:h]))
        last = length // w + 1
        # One entry a block that holds queries, then the one that the next token would see.
        sets = sets[:last]
        queries = -(-length // w)
        slots.append([sets[min(x, len(sets) - 1)] for x in range(queries)] + [sets[length // w]])
    return slots, priority, level


def _level(p: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: FeatureMap) -> torch.Tensor:
    """Logarithm of rounded priorities (G, N), 4096 steps an octave and linear inside it; 0 at 2^-127.

    With foresight, its forecast for the keys and values (G, N, D).
    """
    mantissa, exponent = torch.frexp(p)
    level = torch.where(p > 0, (4096 * (exponent + 126 + 2 * mantissa - 1)).clamp_min(0), p)
    if maps.foresight is None:
        return level
    k, v = k.detach().double(), v.detach().double()
    octaves = torch.einsum("gnd,gd->gn", torch.cat([k, k**2, v, v**2], -1), maps.foresight[:, 1:].double())
    seen = (maps.foresight[:, :1].double() * level.clamp_min(107 * 4096)).floor()
    return torch.where(p >= 0, seen + 256 * (16 * octaves.clamp(-60, 60)).floor(), p)


def _rounded(p: torch.Tensor) -> torch.Tensor:
    """To 12 bits of mantissa (13 with the leading one), as priorities are compared."""
    mantissa, exponent = torch.frexp(p)
    return torch.where(p > 0, torch.ldexp((mantissa * 2**13).round() / 2**13, exponent), p)


def _final_state(kr, vr, b, slots, priority, level, config) -> SRFState:
    g, length, d = kr.shape
    w, s, h = config.window, config.sinks, config.retained
    last = list(itertools.accumulate(config.slots(g)))  # behind each head's slots
    state = SRFState.empty(config, 1, g, d, dtype=torch.float64, unpacked=True)
    state = SRFState(*(t[0].clone() for t in state))
    state = state._replace(length=torch.tensor(length))
    block = length // w if w else 0
    kv_mean, k_sum, k_max = [], [], []
    for head in range(g):
        kept = slots[head][-1] if h else []
        end = (block - 1) * w if w else length
        folded = [x for x in range(s, max(end, 0)) if x not in set(kept)]
        if folded:
            top = b[head, folded].detach().amax(0)
            weight = torch.exp(b[head, folded] - top)  # (E, M)
            k_sum.append(weight.sum(0))
            k_max.append(top)
            kv_mean.append((weight.mT @ vr[head, folded]) / weight.sum(0)[:, None])
        else:
            k_sum.append(state.k_sum[head])
            k_max.append(state.k_max[head])
            kv_mean.append(state.kv_mean[head])
        for place, x in zip(range(last[head] - len(kept), last[head]), kept, strict=True):
            state.retained_key[place] = kr[head, x].detach()
            state.retained_value[place] = vr[head, x].detach()
            state.retained_priority[place] = level[head, x]
        for x in range(max((block - 1) * w, 0), length if w else 0):
            place = x - (block - 1) * w
            state.window_key[head, place] = kr[head, x].detach()
            state.window_value[head, place] = vr[head, x].detach()
            if h:
                state.window_priority[head, place] = priority[head, x] if x >= s else state.window_priority[head, place]
    state.sink_key[:, : min(s, length)] = kr[:, :s].detach()
    state.sink_value[:, : min(s, length)] = vr[:, :s].detach()
    return state._replace(kv_mean=torch.stack(kv_mean), k_sum=torch.stack(k_sum), k_max=torch.stack(k_max))


def stepwise_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMap,
    config: SRFConfig,
    *,
    scaling: float | None = None,
    log_forget: torch.Tensor | None = None,
) -> torch.Tensor:
    """`srf_attention` one token after the other, in float64, from lists of keys: (B, H, L, D), causal, unpadded."""
    q, k, v = (x.to("cpu", torch.float64) for x in (q, k, v))
    if config.kv_dtype == "int8":
        k, v = oracle_eight_bits(k), oracle_eight_bits(v)
    maps = feature_map.to("cpu", torch.float64)
    bsz, heads, length, d = q.shape
    g = k.shape[1]
    scaling = d**-0.5 if scaling is None else scaling
    rows = []
    for row in range(bsz):
        per_head = []
        for head in range(g):
            one = FeatureMap(*(None if t is None else t[head : head + 1] for t in maps))  # type: ignore[arg-type]
            qs = q[row].view(g, heads // g, length, d)[head]
            faded = None if log_forget is None else log_forget[row, head].to("cpu", torch.float64)
            alone = config.with_slots(config.slots(g)[head])
            per_head.append(_step_head(qs, k[row, head], v[row, head], one, alone, scaling, faded))
        rows.append(torch.cat(per_head))
    return torch.stack(rows)


def _step_head(qs, ks, vs, maps, config, scaling, log_forget=None):
    """One kv head: q (R, L, D), k and v (L, D), log_forget (L,)."""
    w, s, h = config.window, config.sinks, config.retained
    a = oracle_log_features(qs[None], maps, "query", scaling)[0]
    b = oracle_log_features(ks[None], maps, "key", scaling)[0]
    priority = [-math.inf] * qs.shape[1]
    retained: list[int] = []
    tail: list[int] = []
    outputs = []
    for i in range(qs.shape[1]):
        if w and i % w == 0 and i >= 2 * w:
            pool = retained + [x for x in range(i - 2 * w, i - w) if x >= s]
            now = torch.tensor([priority], dtype=torch.float64)
            level = _level(now, ks[None], vs[None], maps)[0] + config.fade * (torch.arange(len(priority)) // w)
            pool.sort(key=lambda x: (-float(level[x]), x))
            retained, losers = sorted(pool[:h]), pool[h:]
            tail += losers
        if not w and i >= s:
            tail.append(i)
        start = max(i // w - 1, 0) * w if w else i + 1
        local = [*range(min(s, i + 1)), *range(max(start, s), i + 1)]
        logits = [scaling * qs[:, i] @ ks[local + retained].mT]
        if w:
            p = _rounded((scaling * qs[:, i] @ ks[local].mT).detach().softmax(-1).amax(0))
            for x, received in zip(local, p.tolist(), strict=True):
                if x >= s and i - x > min(config.retention_delay, w // 2):
                    priority[x] = max(priority[x], received)
        values = [vs[local + retained]]
        if tail:
            estimate = (a[:, i, None] + b[tail]).logsumexp(-1)
            if log_forget is not None:
                estimate = estimate + torch.stack([log_forget[x + 1 : i + 1].sum() for x in tail])
            logits.append(estimate)
            values.append(vs[tail])
        outputs.append(torch.cat(logits, -1).softmax(-1) @ torch.cat(values))
    return torch.stack(outputs, 1)


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "result", least_scale: float = 1e-30
) -> None:
    """Compare by `max |actual - expected| <= tolerance * max(max |expected|, least_scale)`, and by finiteness.

    A relative error of the whole tensor, so that entries near zero are held to the scale of their neighbours;
    `least_scale` is for results that are zero by cancellation of terms of that size.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} entries are not finite"
    if not expected.numel():
        return
    error = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max().item()
    scale = expected.detach().double().abs().max().item()
    assert error <= tolerance * max(scale, least_scale), f"{name}: error {error:.3e} on a scale of {scale:.3e}"


def random_feature_map(
    num_heads: int, num_features: int, head_dim: int, *, geometry: str = "proposal", seed: int = 0
) -> FeatureMap:
    """A float32 feature map with a random, well-conditioned geometry of the given level (see `calibration`).

    The highest one, "proposal", comes with log-weights and with foresight.
    """
    generator = torch.Generator().manual_seed(seed)
    w = draw_projection(num_features, head_dim, num_heads=num_heads, seed=seed)
    if geometry == "identity":
        return FeatureMap(w)
    c_q, c_k = 0.3 * torch.randn(2, num_heads, head_dim, generator=generator)
    if geometry == "shift":
        return FeatureMap(w, c_q, c_k)
    noise = torch.randn(num_heads, head_dim, head_dim, generator=generator)
    m = torch.eye(head_dim) + 0.2 * noise / head_dim**0.5
    inverse = torch.linalg.inv(m.double()).mT.float().contiguous()
    if geometry == "preconditioner":
        return FeatureMap(w, c_q, c_k, m, inverse)
    proposal = -0.1 * torch.rand(num_heads, head_dim, generator=generator)
    log_weight = -0.3 * torch.rand(num_heads, num_features, generator=generator)
    foresight = torch.randn(num_heads, 1 + 4 * head_dim, generator=generator) / head_dim**0.5
    foresight[:, 0] = 0.5
    return FeatureMap(w, c_q, c_k, m, inverse, proposal, log_weight, foresight)


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama of two layers, 4 query and 2 key/value heads of dimension 16; float32, on the CPU."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    settings.update(overrides)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()
