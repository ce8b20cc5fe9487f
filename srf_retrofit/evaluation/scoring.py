"""Scores of single tokens: log-likelihood and greedy match at chosen positions, never the logits of a whole batch.

A vocabulary of 49,152 makes the float32 logits of 64k tokens 12 GiB. Here the head of a model meets only the positions
that are scored, a slice of them at a time, and two numbers of each are kept.

Shapes: `B` rows, `L` positions, `K` scored tokens of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from ..training.teacher import forward_replaced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits in float32 at once: 48 MiB where they pass through caches, 768 MiB where bandwidth counts.
_ENTRIES_CPU = 256 * 49152
_ENTRIES_GPU = 4096 * 49152

# Settings of families that scale or cap what their head returns.
_CHANGES_OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")

# Lengths of padded batches are rounded up to this, so that kernels meet few different shapes.
LENGTH_STEP = 32


class TokenScores(NamedTuple):
    """Scores of `K` tokens, in row-major order of their positions, on the model's device."""

    nll: torch.Tensor  # (K,) float32, nats
    right: torch.Tensor  # (K,) bool, whether the token was the likeliest


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; training mode comes back as it was, module by module."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def score_tokens(model: PreTrainedModel, input_ids: torch.Tensor, scored: torch.Tensor | None = None) -> TokenScores:
    """Score tokens of a batch, each from the tokens before it in its row.

    Call it inside `evaluating`. Rows may be padded on the right with any token: attention is causal, so that nothing
    that is scored sees the padding, and no mask is needed.

    Parameters
    ----------
    model : PreTrainedModel
        With or without a head of its own (`get_output_embeddings`); a model without one must return `logits`.
    input_ids : (B, L) int64
    scored : (B, L) bool, optional
        The tokens to score; every one but the first of each row by default. The first token of a row cannot be.

    Returns
    -------
    TokenScores

    Raises
    ------
    ValueError
        When the first token of a row is to be scored, or shapes differ.
    """
    if scored is not None:
        if scored.shape != input_ids.shape:
            raise ValueError(
                f"scored must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(scored.shape)}"
            )
        if bool(scored[:, 0].any()):
            raise ValueError("the first token of a row has nothing before it to be predicted from: do not score it")
    device = model.device
    input_ids = input_ids.to(device)
    if scored is None:
        places = None
        labels = input_ids[:, 1:].flatten()
    else:
        places = scored[:, 1:].to(device)
        labels = input_ids[:, 1:][places]

    def chosen(hidden: torch.Tensor) -> torch.Tensor:
        """(B, L, F) to (K, F): what predicts the scored tokens."""
        return hidden[:, :-1].flatten(0, 1) if places is None else hidden[:, :-1][places]

    head = _plain_head(model)
    if head is None:
        return _scores(chosen(model(input_ids=input_ids, use_cache=False).logits), labels, lambda x: x)
    project = head.forward
    found: list[TokenScores] = []

    def keep_scores(hidden: torch.Tensor) -> torch.Tensor:
        found.append(_scores(chosen(hidden), labels, project))
        return hidden[:, :1]  # stands where logits would be

    with forward_replaced(head, keep_scores):
        model(input_ids=input_ids, use_cache=False)
    return found[0]


def _plain_head(model: Any) -> torch.nn.Module | None:
    """The head whose outputs are the logits; None where there is none, or where the model goes on to change them."""
    get = getattr(model, "get_output_embeddings", None)
    config = getattr(model, "config", None)
    if get is None or any(getattr(config, name, None) is not None for name in _CHANGES_OF_LOGITS):
        return None
    return get()


def _scores(hidden: torch.Tensor, labels: torch.Tensor, project: Callable[..., torch.Tensor]) -> TokenScores:
    """Project (K, F) to logits, slice by slice, and keep two numbers a row."""
    if not len(labels):
        return TokenScores(hidden.new_zeros(0, dtype=torch.float32), labels.new_zeros(0, dtype=torch.bool))
    entries = _ENTRIES_GPU if hidden.is_cuda else _ENTRIES_CPU
    rows = max(1, entries // project(hidden[:1]).shape[-1])
    nll, right = [], []
    for part, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = project(part).float()
        nll.append(functional.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return TokenScores(torch.cat(nll), torch.cat(right))


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, longest first, in batches whose padded size stays within `batch_tokens`.

    The longest rows come first so that a batch that does not fit in memory fails at once. Rows that are longer than
    the budget make batches of one.

    Raises
    ------
    ValueError
        For a budget below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be >= 1, got {batch_tokens}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and padded_length(lengths[batch[0]]) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_length(length: int) -> int:
    """The next multiple of `LENGTH_STEP`."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def rows_at_once(length: int, batch_tokens: int) -> int:
    """Rows of `length` tokens that a budget of tokens holds; at least one."""
    return max(1, batch_tokens // max(length, 1))


def pad_rows(rows: Iterable[Sequence[int]], pad: int = 0) -> torch.Tensor:
    """(B, L) int64, padded on the right to a common multiple of `LENGTH_STEP`."""
    rows = list(rows)
    out = torch.full((len(rows), padded_length(max(map(len, rows)))), pad, dtype=torch.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row)
    return out
