"""What a batch says about its tokens: which are padding, where documents begin, at which position each stands."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache import SRFCacheLayer


def padding_mask(attention_mask: Any, b: int, length: int) -> torch.Tensor | None:
    """Padding mask (B, L) bool of the new tokens; `None` if there is no padding among them.

    Parameters
    ----------
    attention_mask : (B, at least L) tensor or None
        Nonzero for real tokens; masks that also cover cached positions are cut to the last `L` columns.

    Raises
    ------
    ValueError
        For a mask of another shape.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        what = (
            f"a tensor of shape {tuple(attention_mask.shape)}"
            if isinstance(attention_mask, torch.Tensor)
            else type(attention_mask).__name__
        )
        raise ValueError(
            f"attention_mask must be a padding mask of shape (batch, length), got {what}: random features cannot "
            "choose which key a query sees. Packed documents are given by cu_seq_lens_q or position_ids"
        )
    if attention_mask.shape[0] != b or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must cover {b} row(s) of at least {length} tokens, got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -length:] != 0
    # One look here instead of one in every layer.
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def document_bounds(
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
    b: int,
    length: int,
) -> torch.Tensor | None:
    """Bounds (N + 1,) int64 on the CPU of documents packed into the `b * length` tokens; `None` if nothing is packed.

    They are `cu_seq_lens_q` of `kwargs` if that is there. Otherwise, as in Transformers, documents show by their
    positions where there is neither padding nor a cache: one begins wherever a position is not the last one plus one.

    Raises
    ------
    ValueError
        When the given bounds contradict each other, the batch or the mask.
    """
    given, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    given = keys if given is None else given
    if given is not None:
        bounds = given.reshape(-1).to("cpu", torch.int64)
        if keys is not None and not torch.equal(bounds, keys.reshape(-1).to("cpu", torch.int64)):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: queries and keys are the same tokens here")
        if b != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, got a batch of {b}")
        if mask is not None:
            raise ValueError("give attention_mask or cu_seq_lens_q, not both: packed rows hold no padding")
        return bounds
    if position_ids is None or position_ids.dim() != 2 or mask is not None or cache is not None or length < 2:
        return None
    starts = position_ids.diff(dim=-1) != 1
    if not bool(starts.any()):
        return None
    first = torch.ones(b, 1, dtype=torch.bool, device=starts.device)
    starts = torch.cat([first, starts.expand(b, -1)], dim=-1).reshape(-1)
    bounds = torch.nonzero(starts).reshape(-1).cpu()
    return torch.cat([bounds, torch.tensor([b * length])])


def own_positions(
    mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    cache: Cache | None,
    b: int,
    length: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Positions (B, L) by each sequence's own real tokens; `None` if they are just 0 to L - 1.

    Softmax attention sees only differences of positions. Features of a rotated key depend on the position itself, so
    the same tokens must stand at the same positions wherever they lie in a batch.
    """
    if bounds is not None:
        starts = torch.repeat_interleave(bounds[:-1], bounds.diff())
        return (torch.arange(b * length) - starts).view(b, length).to(device)
    layers = [] if cache is None else [x for x in cache.layers if isinstance(x, SRFCacheLayer)]
    past = layers[0].state.length if layers and layers[0].state is not None else None
    if past is not None and past.shape[0] != b:
        past = None
    if past is None and mask is None:
        return None
    if mask is None:
        new = torch.arange(length, device=device).expand(b, -1)
    else:
        new = (mask.to(device, torch.int64).cumsum(-1) - 1).clamp_min(0)
    return new if past is None else new + past.to(device).unsqueeze(-1)
