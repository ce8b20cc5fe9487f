"""What the softmax model is trained with when its logits, too, are taken in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk_size: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Mean cross-entropy of (N, E) hidden states with (N,) labels, the logits of `chunk_size` positions at a time."""
    entropy = torch.compile(_cross_entropy) if compiled else _cross_entropy

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return entropy(head(states), wanted)

    total: Any = 0
    for states, wanted in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        total = total + checkpoint(part, states, wanted, use_reentrant=False, preserve_rng_state=False)
    return total / labels.numel()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
