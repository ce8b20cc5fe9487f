"""What `ops.srf_attention` accepts: every refusal names the argument and the value, before anything is computed."""

from __future__ import annotations

import itertools

import torch

from .configuration import SRFConfig
from .feature_map import FoldedMap
from .state import SRFState


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: FoldedMap, chunk_size: int | None) -> None:
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


def check_mask(mask: torch.Tensor, q: torch.Tensor) -> torch.Tensor | None:
    if mask.shape != (q.shape[0], q.shape[2]) or mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be a bool or integer tensor of shape {(q.shape[0], q.shape[2])}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    mask = mask.to(q.device, torch.bool)
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def check_documents(cu_seqlens: torch.Tensor, q: torch.Tensor, mask: torch.Tensor | None) -> list[tuple[int, int]]:
    if mask is not None:
        raise ValueError("give attention_mask or cu_seqlens, not both: packed rows hold no padding")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor of N + 1 bounds, got {cu_seqlens!r}")
    bounds = cu_seqlens.tolist()
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs one packed row, got a batch of {q.shape[0]}: flatten it first")
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or any(x > y for x, y in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to L={q.shape[2]}, got {bounds}")
    return list(itertools.pairwise(bounds))


def check_state(state: SRFState, config: SRFConfig, rows: int, k: torch.Tensor) -> None:
    expected = SRFState.layout(config, rows, k.shape[1], k.shape[3], k.dtype)
    for name, mine in zip(SRFState._fields, state, strict=True):
        shape, dtype = expected[name]
        if mine.shape != shape or mine.dtype != dtype or mine.device != k.device:
            raise ValueError(
                f"initial_state.{name} must be {dtype} of shape {shape} on {k.device}, got {mine.dtype} of shape "
                f"{tuple(mine.shape)} on {mine.device}: it was made with another config, batch or dtype"
            )


def check_forget(log_forget: torch.Tensor | None, config: SRFConfig, k: torch.Tensor, causal: bool) -> None:
    """`log_forget` is there exactly where the configuration has a gate, and fits the keys."""
    if log_forget is None:
        if config.forget_gate:
            raise ValueError("this configuration has forget_gate=True: give log_forget (B, G, L), see ForgetGate")
        return
    if not config.forget_gate:
        raise ValueError("log_forget was given, but the configuration has forget_gate=False: set it, or leave it out")
    if not causal:
        raise ValueError("a forget gate looks back from every token: it needs causal=True")
    wide = torch.promote_types(k.dtype, torch.float32)
    if log_forget.shape != k.shape[:3] or log_forget.dtype != wide or log_forget.device != k.device:
        raise ValueError(
            f"log_forget must be {wide} of shape {tuple(k.shape[:3])} on {k.device}, got {log_forget.dtype} of shape "
            f"{tuple(log_forget.shape)} on {log_forget.device}"
        )
