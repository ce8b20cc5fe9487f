"""Several data sets as one, in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Mixture(torch.utils.data.Dataset):
    """Items of several data sets in given proportions, the same at every run.

    Item `i` depends on the sources, the weights, the seed and `i` alone: a shorter mixture is the beginning of a longer
    one, and an interrupted training that comes back to item `i` finds what it would have found. The proportions hold
    in every part of the mixture: among the first `n` items, each source has its share of `n` to within a few items.
    A source is read in an order drawn from the seed, each of its items once before any comes again.

    Parameters
    ----------
    sources : sequence of Dataset
        With `len()`, and items of the same names and shapes (`TokenBlocks` or `DocumentBlocks` of one length).
    weights : sequence of float, optional
        Shares of the items, positive, on any scale. By default the sizes of the sources.
    length : int, optional
        Items of the mixture. By default as many as all sources have together.
    tokens : int, optional
        Instead of `length`: as many items as fit into this many tokens.
    seed : int

    Attributes
    ----------
    counts : tuple of int
        Items from each source.
    epochs : tuple of float
        How often each source is read; above 1, items come again.

    Raises
    ------
    ValueError
        For no sources, an empty one, weights that do not fit, sources whose items differ in names or shapes, a length
        below 1, or both a length and a number of tokens.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float] | None = None,
        *,
        length: int | None = None,
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        sizes = [len(source) for source in sources]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a mixture needs sources with items in them, got sources of {sizes} items")
        shares = np.asarray(sizes if weights is None else weights, dtype=np.float64)
        if shares.shape != (len(sizes),) or not np.isfinite(shares).all() or not (shares > 0).all():
            raise ValueError(f"weights must be {len(sizes)} positive numbers, one for each source, got {weights}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        block = _common_length(sources)
        if tokens is not None:
            if length is not None:
                raise ValueError(f"give length or tokens, not both: got {length=}, {tokens=}")
            length = tokens // block
            if length < 1:
                raise ValueError(f"{tokens} tokens do not fill one block of {block}: give more, or shorter blocks")
        length = sum(sizes) if length is None else length
        if length < 1:
            raise ValueError(f"length must be at least 1 item, got {length}")
        self.sources = list(sources)
        self.source, self.draw = _interleave(shares / shares.sum(), length, seed)
        self.counts = tuple(int((self.source == s).sum()) for s in range(len(sizes)))
        self.epochs = tuple(count / size for count, size in zip(self.counts, sizes, strict=True))
        self._orders = [
            _order(size, count, (seed, s)) for s, (size, count) in enumerate(zip(sizes, self.counts, strict=True))
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} items, not {index}")
        source = int(self.source[index])
        return self.sources[source][int(self._orders[source][self.draw[index]])]


def _common_length(sources: Sequence[Any]) -> int:
    """Tokens of an item, the same in all sources."""
    forms = [{name: tuple(value.shape) for name, value in source[0].items()} for source in sources]
    for number, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"sources must agree in the names and shapes of their items: the first has {forms[0]}, number "
                f"{number + 1} has {form}; pack all with the same length and boundaries"
            )
    if "input_ids" not in forms[0]:
        raise ValueError(f"items need input_ids, got {', '.join(forms[0])}")
    return forms[0]["input_ids"][-1]


def _interleave(shares: np.ndarray, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For every item, its source and which draw from this source it is: two (length,) arrays.

    Draw `n` of source `s` is due at `(n + u_s) / share_s`, with `u_s` uniform in [0, 1); items are the draws in the
    order in which they are due.
    """
    offsets = np.random.default_rng([seed, len(shares)]).random(len(shares))
    # Up to time `t` a source has between `t share - 1` and `t share + 1` draws, so that `length` of them are due by
    # the time `length + number of sources`.
    counts = np.floor((length + len(shares)) * shares).astype(np.int64) + 1
    draw = np.concatenate([np.arange(n) for n in counts])
    source = np.repeat(np.arange(len(shares)), counts)
    due = (draw + offsets[source]) / shares[source]
    first = np.argsort(due, kind="stable")[:length]
    return source[first].astype(np.int32), draw[first]


def _order(size: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """The first `count` items of a source's endless order: one permutation after the other, (count,)."""
    epochs = [np.random.default_rng([*seed, epoch]).permutation(size) for epoch in range(-(-count // size))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *epochs])[:count]
