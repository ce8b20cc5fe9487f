"""Loops and copies are found; ordinary text is left alone."""

from __future__ import annotations

import random

import pytest

from srf_retrofit.data import language_reference
from srf_retrofit.synthesis.text_filters import SeenTexts, repeated_share


def words(seed: int, count: int = 300) -> list[int]:
    return random.Random(seed).choices(range(40_000), k=count)


def changed(ids: list[int], share: float, seed: int = 9) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(40_000) if draw.random() < share else i for i in ids]


def test_repeated_share() -> None:
    assert repeated_share(words(0)) == 0
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([]) == 0
    assert repeated_share([5] * 103) == pytest.approx(0.99)
    # 200 tokens of their own, then a loop of ten that begins 30 times: the first round is new.
    assert repeated_share(words(0, 200) + list(range(10)) * 30) == pytest.approx(287 / 497)
    # Order matters: the same tokens in another order are no repetition.
    assert repeated_share([1, 2, 3, 4, 4, 3, 2, 1]) == 0


def test_ordinary_prose_is_kept() -> None:
    texts = [text for text in language_reference() if len(text) > 500]
    numbers: dict[str, int] = {}
    shares = [repeated_share([numbers.setdefault(w, len(numbers)) for w in text.split()]) for text in texts]
    assert len(shares) > 30
    assert max(shares) < 0.3


def test_exact_duplicates() -> None:
    seen = SeenTexts()
    assert seen.add("Some text.", words(0)) is None
    assert seen.add(" some\nTEXT. ", words(1)) == "duplicate"
    assert seen.add("Some other text.", words(1)) is None
    # Too short for shingles, and so for near-duplicates.
    assert seen.add("a", [1]) is None
    assert seen.add("b", [1]) is None
    assert seen.add("b", [1]) == "duplicate"


def test_near_duplicates() -> None:
    seen = SeenTexts(0.7)
    for i in range(200):
        assert seen.add(f"text {i}", words(i)) is None
    # A changed token changes five shingles: 2 % of them leave a similarity of about 0.8, 30 % one of 0.1.
    found = [seen.add(f"close {i}", changed(words(i), 0.01)) for i in range(50)]
    assert found.count("near_duplicate") >= 48
    found = [seen.add(f"far {i}", changed(words(i), 0.3)) for i in range(50)]
    assert found == [None] * 50
    # A dropped text is not remembered, a kept one is.
    assert seen.add("far 3", words(777)) == "duplicate"
    assert seen.add("close 3", words(778)) is None


def test_similarity_is_the_threshold() -> None:
    base, other = words(0), words(0)[:150] + words(1)[:150]  # half of it, and so a Jaccard similarity of a third
    strict, loose = SeenTexts(0.9), SeenTexts(0.1)
    for seen in (strict, loose):
        assert seen.add("a", base) is None
    assert strict.add("b", other) is None
    close = base[:290] + words(1)[:10]  # 0.93
    assert loose.add("c", close) == "near_duplicate"
    for value in (0, 1.1):
        with pytest.raises(ValueError, match="similarity"):
            SeenTexts(value)
