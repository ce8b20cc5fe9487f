"""Running the softmax model over some text to look at what its layers see: for calibrations of every kind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling.attention import SRFAttention, exact_attention


def observe_whole_rows(
    model: nn.Module, hooks: dict[SRFAttention, Callable[..., None]], batches: Any, description: str
) -> int:
    """Run the softmax model over rows without padding, each layer's forward pre-hook `(layer, args, kwargs)` before it.

    Returns the number of batches, each (B, L) token ids or a mapping with `input_ids`. Everything set here is set back,
    whatever happens.

    Raises
    ------
    ValueError
        When a batch holds no token ids, or padding.
    """
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in hooks.items()]
    try:
        return run_exactly(model, ((ids, None) for ids in whole_rows(batches)), description)
    finally:
        for handle in handles:
            handle.remove()


def run_exactly(model: nn.Module, rows: Iterable[tuple[torch.Tensor, torch.Tensor | None]], description: str) -> int:
    """The softmax model over rows (B, L) and their masks, in evaluation mode; the number of batches."""
    base = getattr(model, "base_model", model)  # the language model's head is not needed
    device = next(model.parameters()).device
    count = 0
    with torch.no_grad(), evaluating(model), exact_attention(model):
        for ids, mask in tqdm(rows, desc=description, unit="batch", delay=2, leave=False):
            inputs = {"input_ids": ids, "attention_mask": mask}
            if mask is not None:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
            if device.type != "meta":  # weights on a disk: the model moves its inputs itself
                inputs = {name: None if x is None else x.to(device) for name, x in inputs.items()}
            base(**inputs, use_cache=False)
            count += 1
    return count


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def whole_rows(batches: Any) -> Iterator[torch.Tensor]:
    """Token ids (B, L) of batches as `token_rows` takes them.

    Raises
    ------
    ValueError
        When a batch holds padding.
    """
    for ids, mask in token_rows(batches, None):
        if mask is not None and not bool(mask.all()):
            raise ValueError("rows must hold no padding here: give whole rows, as data.pack makes them")
        yield ids


def token_rows(batches: Any, max_tokens: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Token ids `(B, L)` and mask `(B, L)` or None, until `max_tokens` real tokens have been given."""
    if isinstance(batches, (torch.Tensor, Mapping)):
        batches = [batches]
    if isinstance(batches, (str, bytes)) or not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise ValueError(
            f"batches must be token ids or an iterable of them, got {type(batches).__name__}: tokenise first"
        )
    left = math.inf if max_tokens is None else max_tokens
    for batch in batches:
        ids, mask = (
            (batch.get("input_ids"), batch.get("attention_mask")) if isinstance(batch, Mapping) else (batch, None)
        )
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"a batch must hold integer token ids of shape (B, L) or (L,), got {got}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} differ in shape")
        if not ids.numel():
            continue
        ids = ids.reshape(-1, ids.shape[-1])
        mask = None if mask is None else mask.reshape(ids.shape).bool()
        real = torch.full((ids.shape[0],), ids.shape[1]) if mask is None else mask.sum(-1).cpu()
        # Whole rows, up to the one that reaches the limit.
        count = int((real.cumsum(0) - real < left).sum())
        yield ids[:count], None if mask is None else mask[:count].long()
        left -= int(real[:count].sum())
        if left <= 0:
            return
