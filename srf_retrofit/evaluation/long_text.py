"""Perplexity and bits per byte at several lengths, and by position: where in a long text the error sits.

Shapes: `N` windows of `L` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data import TokenBlocks
from .perplexity import Perplexity, ablation
from .scoring import evaluating, rows_at_once, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTHS = (512, 1024, 2048, 4096)
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)
BATCH_TOKENS = 32768


def windows(text: TokenBlocks, length: int) -> TokenBlocks:
    """The same stream of tokens in windows of another length; what does not fill the last one is dropped.

    Raises
    ------
    ValueError
        When the text does not fill one window, or windows of one token are asked for.
    """
    if length < 2:
        raise ValueError(f"windows need at least 2 tokens to predict anything, got length={length}")
    count = text.num_tokens // length
    if count < 1:
        raise ValueError(
            f"{text.num_tokens} tokens do not fill one window of {length}: give more text or shorter lengths"
        )
    return TokenBlocks(text.blocks.flatten()[: count * length].view(count, length))


def text_bytes(tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor) -> int:
    """UTF-8 bytes of the text of all tokens but the first of each row, special tokens not counted.

    Taken as what a row decodes to beyond its first token, so that a space at the beginning of a row, which some
    tokenizers leave out, does not matter. A character that a row's end cuts in two counts as the three bytes of its
    replacement.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    rows : (N, L) int64
    """

    def count(ids: torch.Tensor) -> int:
        texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode(errors="replace")) for text in texts)

    return count(rows) - count(rows[:, :1])


def length_perplexity(
    model: PreTrainedModel,
    text: TokenBlocks,
    *,
    lengths: Sequence[int] = LENGTHS,
    edges: Sequence[int] = EDGES,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mode: str = "full",
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Perplexity of one text in non-overlapping windows of several lengths.

    Parameters
    ----------
    model : PreTrainedModel
    text : TokenBlocks
        Its blocks are joined and cut anew at every length.
    lengths : sequence of int
    edges : sequence of int
        Rising positions between which the error is averaged; the position of a token is its place in its window.
    tokenizer : PreTrainedTokenizerBase, optional
        To count the bytes of the text; without it there are no bits per byte.
    mode : str
        See `perplexity.ablation`.
    batch_tokens : int
        Tokens at once; changes memory and time, not the result.
    progress : bool

    Returns
    -------
    dict
        By length (a string, as JSON wants it): `nll` (nats per token), `ppl`, `tokens` (predicted ones), with a
        tokenizer `bytes` and `bits_per_byte`, and `by_position`, a list of `{"start", "end", "nll", "ppl", "tokens"}`.

    Raises
    ------
    ValueError
        For edges that do not rise, or a text that is too short; before anything is computed.
    """
    if len(edges) < 2 or edges[0] < 0 or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"edges must rise from 0 or more, got {list(edges)}")
    cut = {length: windows(text, length).blocks for length in lengths}
    out: dict[str, dict[str, Any]] = {}
    for length, blocks in cut.items():
        total: torch.Tensor | None = None
        rows = blocks.split(rows_at_once(length, batch_tokens))
        label = f"perplexity at {length:,}, {mode}"
        with evaluating(model), ablation(model, mode):
            for ids in tqdm(rows, desc=label, unit="batch", disable=not progress, leave=False):
                nll = score_tokens(model, ids).nll.view(len(ids), length - 1).double().sum(0)
                total = nll if total is None else total + nll
        assert total is not None
        by_token = torch.cat([torch.zeros(1, dtype=torch.float64), total.cpu()])  # the first token is not predicted
        whole = _mean(by_token, 1, length, len(blocks))
        found: dict[str, Any] = whole.to_dict()
        if tokenizer is not None:
            found["bytes"] = text_bytes(tokenizer, blocks)
            found["bits_per_byte"] = whole.nll * whole.tokens / math.log(2) / max(found["bytes"], 1)
        found["by_position"] = [
            {
                "start": start,
                "end": min(end, length),
                **_mean(by_token, max(start, 1), min(end, length), len(blocks)).to_dict(),
            }
            for start, end in pairwise(edges)
            if max(start, 1) < min(end, length)
        ]
        out[str(length)] = found
    return out


def _mean(by_token: torch.Tensor, start: int, end: int, rows: int) -> Perplexity:
    tokens = (end - start) * rows
    return Perplexity(float(by_token[start:end].sum()) / tokens, tokens)
