"""What the softmax model is trained with when its logits, too, are taken in chunks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..training.chunks import sum_in_chunks


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    chunk_size: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Mean cross-entropy of (N, E) hidden states with (N,) labels, the logits of `chunk_size` positions at a time."""
    entropy = torch.compile(_cross_entropy) if compiled else _cross_entropy

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return entropy(head(states), wanted)

    total = sum_in_chunks(part, (hidden, labels), chunk_size, head.parameters())
    return total / labels.numel()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
