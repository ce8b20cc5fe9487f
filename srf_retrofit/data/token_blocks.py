"""Documents as blocks of tokens of one length: as one stream, several in a row, or one a row.

Shapes: `N` blocks, `L` tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOUNDARIES = ("cross", "respect", "pad")
IGNORED = -100  # label of positions that take no part in a loss, as everywhere in Transformers

# Documents in one call of the tokenizer: few at first, so that a short budget does not tokenise much for nothing.
_FIRST_BATCH, _LARGEST_BATCH = 16, 1024


class TokenBlocks(torch.utils.data.Dataset):
    """Packed token blocks of one length, ready for `Trainer`, `calibrate` and the evaluation.

    Items are `{"input_ids": (L,), "labels": (L,)}` int64; the labels are the inputs, as causal models expect.

    Parameters
    ----------
    blocks : (N, L) int64
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        if blocks.ndim != 2 or not blocks.numel():
            raise ValueError(f"blocks must be a non-empty (N, L) tensor of token ids, got shape {tuple(blocks.shape)}")
        self.blocks = blocks.to(torch.int64)

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}

    @property
    def num_tokens(self) -> int:
        return self.blocks.numel()

    def first(self, count: int) -> TokenBlocks:
        """The first `count` blocks, or all of them where there are fewer."""
        return TokenBlocks(self.blocks[:count])

    def batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches `{"input_ids": (B, L)}` in order; the last one may be smaller."""
        for rows in self.blocks.split(batch_size):
            yield {"input_ids": rows}


class DocumentBlocks(torch.utils.data.Dataset):
    """Rows of whole documents that do not see one another, ready for `Trainer` with its default collator.

    Items are int64 tensors (L,). A row of several documents is `{"input_ids", "position_ids", "labels"}`: positions
    start again at each document, which is how Transformers and retrofitted models know packed documents; there is no
    attention mask, and the end of the row is filled with one more document that no label counts. A row of one document
    is `{"input_ids", "attention_mask", "labels"}`, padded on the right. Labels are -100 on padding and at the first
    token of a document, which nothing before it can predict.

    Parameters
    ----------
    rows : sequence of sequences of (n,) int
        The documents of every row, at most `length` tokens together.
    length : int
        `L`.
    boundaries : {"respect", "pad"}
        "pad" for one document a row.
    filler : int
        Token on padding.

    Raises
    ------
    ValueError
        For no rows, a row that is empty or longer than `length`, or more than one document in a padded row.
    """

    def __init__(
        self, rows: Sequence[Sequence[np.ndarray]], length: int, *, boundaries: str = "respect", filler: int = 0
    ) -> None:
        if boundaries not in ("respect", "pad"):
            raise ValueError(f"boundaries must be 'respect' or 'pad', got {boundaries!r}")
        if not len(rows):
            raise ValueError("there are no rows of documents to make blocks of")
        self.boundaries = boundaries
        self.sizes = [tuple(len(document) for document in row) for row in rows]
        # Not `blocks`: what reads that of a `TokenBlocks` would overlook the boundaries.
        self._ids = torch.full((len(rows), length), filler, dtype=torch.int32)
        for number, (row, sizes) in enumerate(zip(rows, self.sizes, strict=True)):
            if not 0 < sum(sizes) <= length or min(sizes) < 1:
                raise ValueError(f"row {number} has documents of {sizes} tokens, which do not fit {length}")
            if boundaries == "pad" and len(sizes) > 1:
                raise ValueError(f"row {number} has {len(sizes)} documents, a padded row has one")
            self._ids[number, : sum(sizes)] = torch.from_numpy(np.concatenate(row).astype(np.int32))

    def __len__(self) -> int:
        return self._ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, sizes = self._ids[index].long(), self.sizes[index]
        real, labels = sum(sizes), ids.clone()
        labels[real:] = IGNORED
        if self.boundaries == "pad":
            labels[0] = IGNORED
            mask = torch.zeros_like(ids)
            mask[:real] = 1
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        parts = [*sizes, ids.shape[0] - real]
        positions = torch.cat([torch.arange(n) for n in parts])
        labels[positions == 0] = IGNORED
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, without padding."""
        return sum(map(sum, self.sizes))

    @property
    def padding(self) -> float:
        """Share of padding among all tokens, in [0, 1)."""
        return 1 - self.num_tokens / self._ids.numel()

    def first(self, count: int) -> DocumentBlocks:
        """The first `count` rows, or all of them where there are fewer."""
        part: DocumentBlocks = object.__new__(DocumentBlocks)
        part.boundaries, part.sizes, part._ids = self.boundaries, self.sizes[:count], self._ids[:count]
        if not len(part):
            raise ValueError(f"count must be at least 1, got {count}")
        return part

    def batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of items, (B, L) each, in order; the last one may be smaller."""
        numbers = iter(range(len(self)))
        while rows := [self[i] for i in islice(numbers, batch_size)]:
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer that was not made for a model.

    Raises
    ------
    ValueError
        When it has ids beyond the model's vocabulary, or no end-of-text token; the message names both.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    other = model.config._name_or_path or type(model).__name__
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ValueError(
            f"tokenizer {name} does not fit model {other}: its token {token!r} is number {largest}, the model has "
            f"{rows} embeddings: take the model's own tokenizer, or model.resize_token_embeddings({largest + 1})"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name} for model {other} has no eos_token: set one, documents end with it")


def beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts before its texts, as Llama's does; None where it puts none, as SmolLM2's."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return begin if begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin] else None


def tokenise(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Token ids of each document, (n,) int32, tokenised in batches as they are asked for.

    A document begins with the tokenizer's `beginning`, if it has one, and ends with the end-of-text token; where the
    text itself has them, as rendered conversations do, they are not put twice.

    Raises
    ------
    ValueError
        When the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token: set one, documents are joined with it")
    begin = beginning(tokenizer)
    texts = iter(documents)
    size = _FIRST_BATCH
    while batch := list(islice(texts, size)):
        size = min(2 * size, _LARGEST_BATCH)
        encoded: Any = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            before = [begin] if begin is not None and ids[:1] != [begin] else []
            after = [end] if ids[-1:] != [end] else []
            yield np.array([*before, *ids, *after], dtype=np.int32)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items to go into each bin: largest first, each into the fullest bin that has room for it.

    Best-fit decreasing, as for documents in 2404.10830; `O(n log n + n capacity / 64)`. Bins are in the order of their
    first items, and items in a bin in their own order.

    Parameters
    ----------
    sizes : sequence of int
        In [1, capacity].
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with this much room left
    rooms = 0  # bit r is set where some bin has room r
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - size
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return sorted(sorted(items) for items in bins)


@overload
def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = ...,
    boundaries: Literal["cross"] = ...,
) -> TokenBlocks: ...


@overload
def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = ...,
    boundaries: Literal["respect", "pad"],
) -> DocumentBlocks: ...


@overload
def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = ...,
    boundaries: str,
) -> TokenBlocks | DocumentBlocks: ...


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = None,
    boundaries: str = "cross",
) -> TokenBlocks | DocumentBlocks:
    """Tokenise documents (see `tokenise`) and lay them into blocks of `length` tokens.

    Documents are read only as far as `limit` asks for, and only their tokens are kept.

    Parameters
    ----------
    documents : iterable of str
    tokenizer : PreTrainedTokenizerBase
        Needs an `eos_token_id`.
    length : int
        `L`, tokens per block, at least 2.
    limit : int, optional
        At most this many blocks: a budget of `limit * length` tokens.
    boundaries : {"cross", "respect", "pad"}
        What becomes of the boundaries between documents. "cross" joins all documents into one stream and cuts it every
        `length` tokens: attention inside a block crosses the joints, for teacher and student alike, and what does not
        fill the last block is dropped. "respect" lays several documents into a row by `best_fit`, and neither
        attention nor positions cross from one to the next. "pad" lays one document into a row. Both cut documents that
        are longer than a row into pieces of `length`, and leave out pieces of one token.

    Returns
    -------
    TokenBlocks for "cross", DocumentBlocks for the others, whose `padding` says what is wasted.

    Raises
    ------
    ValueError
        When the text does not fill one block ("cross") or has no two tokens (the others), for arguments out of range,
        or when the tokenizer has no end-of-text token.
    """
    if length < 2:
        raise ValueError(f"blocks need at least 2 tokens to predict anything, got length={length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 block, got {limit}")
    if boundaries not in BOUNDARIES:
        raise ValueError(f"boundaries must be one of {', '.join(BOUNDARIES)}, got {boundaries!r}")
    whole = tokenise(documents, tokenizer)
    if boundaries == "cross":
        return TokenBlocks(_stream(whole, length, limit))
    pieces = _pieces(whole, length, limit if boundaries == "pad" else None, None if limit is None else limit * length)
    if not pieces:
        raise ValueError("the documents have no two tokens in a row to learn from: give more text")
    if boundaries == "pad":
        rows = [[piece] for piece in pieces]
    else:
        rows = [[pieces[i] for i in row] for row in best_fit([len(piece) for piece in pieces], length)]
    return DocumentBlocks(rows[:limit], length, boundaries=boundaries, filler=int(tokenizer.eos_token_id))  # type: ignore[arg-type]


def _stream(documents: Iterable[np.ndarray], length: int, limit: int | None) -> torch.Tensor:
    """All documents in a row, cut every `length` tokens: (N, L)."""
    parts: list[np.ndarray] = []
    total = 0
    for ids in documents:
        parts.append(ids)
        total += len(ids)
        if limit is not None and total >= limit * length:
            break
    count = total // length if limit is None else min(total // length, limit)
    if count < 1:
        raise ValueError(f"{total} tokens do not fill one block of {length}: give more text or a smaller length")
    return torch.from_numpy(np.concatenate(parts)[: count * length]).view(count, length)


def _pieces(documents: Iterable[np.ndarray], length: int, count: int | None, tokens: int | None) -> list[np.ndarray]:
    """Pieces of at most `length` tokens, until there are `count` of them or `tokens` tokens in them."""
    pieces: list[np.ndarray] = []
    total = 0
    for ids in documents:
        pieces += [ids[i : i + length] for i in range(0, len(ids) - 1, length)]
        total += len(ids)
        if (count is not None and len(pieces) >= count) or (tokens is not None and total >= tokens):
            break
    return pieces
