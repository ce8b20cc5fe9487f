"""Several sources as one: exact proportions, the same every time, from any item on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srf_retrofit.data import DocumentBlocks, Mixture, TokenBlocks


def source(name: int, size: int, length: int = 4) -> TokenBlocks:
    """Blocks that say where they come from: [name, number, ...]."""
    return TokenBlocks(torch.tensor([[name, number] + [0] * (length - 2) for number in range(size)]))


def origins(mixture: Mixture) -> list[tuple[int, int]]:
    return [tuple(mixture[i]["input_ids"][:2].tolist()) for i in range(len(mixture))]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 300), st.integers(0, 5))
def test_every_beginning_has_its_proportions(weights: list[float], length: int, seed: int) -> None:
    mixture = Mixture([source(i, 7) for i in range(len(weights))], weights, length=length, seed=seed)
    assert len(mixture) == length == sum(mixture.counts)
    names = np.array([name for name, _ in origins(mixture)])
    shares = np.array(weights) / sum(weights)
    taken = np.cumsum(names[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, length + 1)[:, None] * shares
    assert np.abs(taken - expected).max() < len(weights) + 1
    assert taken[-1].tolist() == list(mixture.counts)


def test_a_shorter_mixture_is_the_beginning_of_a_longer_one() -> None:
    sources = [source(0, 10), source(1, 33), source(2, 5)]
    long = origins(Mixture(sources, [1, 5, 2], length=200, seed=3))
    for length in (1, 2, 7, 50, 199):
        assert origins(Mixture(sources, [1, 5, 2], length=length, seed=3)) == long[:length]
    assert origins(Mixture(sources, [1, 5, 2], length=200, seed=4)) != long


def test_a_source_comes_round_once_everything_was_read() -> None:
    mixture = Mixture([source(0, 6), source(1, 100)], [1, 1], length=60)
    drawn = [number for name, number in origins(mixture) if name == 0]
    assert mixture.counts == (30, 30)
    assert mixture.epochs == (5, 0.3)
    rounds = [drawn[i : i + 6] for i in range(0, 30, 6)]
    assert all(sorted(one) == list(range(6)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert len({number for name, number in origins(mixture) if name == 1}) == 30


def test_defaults_and_budget() -> None:
    sources = [source(0, 30), source(1, 10)]
    everything = Mixture(sources)
    assert everything.counts == (30, 10)
    assert sorted(origins(everything)) == [(0, i) for i in range(30)] + [(1, i) for i in range(10)]
    assert len(Mixture(sources, tokens=35)) == 8  # of 4 tokens
    assert torch.equal(everything[-1]["labels"], everything[39]["labels"])
    with pytest.raises(IndexError, match="40 items"):
        everything[40]


def test_what_does_not_mix() -> None:
    good = source(0, 3)
    with pytest.raises(ValueError, match="sources with items"):
        Mixture([])
    for weights in ([1], [1, 0], [1, float("nan")], [1, -1]):
        with pytest.raises(ValueError, match="2 positive numbers"):
            Mixture([good, good], weights)
    with pytest.raises(ValueError, match="number 2 has .*8"):
        Mixture([good, source(1, 3, length=8)])
    padded = DocumentBlocks([[np.array([1, 2])]], 4, boundaries="pad")
    with pytest.raises(ValueError, match="attention_mask"):
        Mixture([good, padded])
    with pytest.raises(ValueError, match="not both"):
        Mixture([good], length=1, tokens=4)
    with pytest.raises(ValueError, match="3 tokens do not fill one block of 4"):
        Mixture([good], tokens=3)
    with pytest.raises(ValueError, match="at least 1 item"):
        Mixture([good], length=0)
    with pytest.raises(ValueError, match="seed"):
        Mixture([good], seed=-1)
