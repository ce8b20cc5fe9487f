"""One text at several lengths: the same tokens, the right positions, the right bytes."""

from __future__ import annotations

import math

import pytest
import torch
from builders import CONFIG
from torch.nn import functional
from toy_tokenizers import WORDS, byte_llama, byte_tokenizer

from srf_retrofit import retrofit
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation import long_text
from srf_retrofit.evaluation import perplexity as evaluation


@pytest.fixture(scope="module")
def model():
    return retrofit(byte_llama(), CONFIG)


@pytest.fixture(scope="module")
def text() -> TokenBlocks:
    ids = byte_tokenizer()(WORDS * 4)["input_ids"][:300]
    return TokenBlocks(torch.tensor(ids).view(3, 100))


def test_positions_add_up_to_the_whole(model, text) -> None:
    found = long_text.length_perplexity(model, text, lengths=(50, 150), edges=(0, 40, 100, 1000), batch_tokens=120)
    assert list(found) == ["50", "150"]
    for length in (50, 150):
        blocks = long_text.windows(text, length)
        whole = evaluation.perplexity(model, blocks)
        one = found[str(length)]
        assert one["nll"] == pytest.approx(whole.nll, rel=1e-5)
        assert one["tokens"] == whole.tokens == 300 // length * (length - 1)
        total = sum(row["nll"] * row["tokens"] for row in one["by_position"])
        assert total == pytest.approx(one["nll"] * one["tokens"])
    spans = [(row["start"], row["end"], row["tokens"]) for row in found["150"]["by_position"]]
    assert spans == [(0, 40, 2 * 39), (40, 100, 2 * 60), (100, 150, 2 * 50)]
    with torch.no_grad():
        logits = model(long_text.windows(text, 150).blocks, use_cache=False).logits[:, 99:149]
    wanted = functional.cross_entropy(logits.flatten(0, 1), text.blocks.flatten().view(2, 150)[:, 100:].flatten())
    assert found["150"]["by_position"][2]["nll"] == pytest.approx(float(wanted), rel=1e-5)


def test_bits_per_byte(model, text) -> None:
    found = long_text.length_perplexity(model, text, lengths=(100,), tokenizer=byte_tokenizer())["100"]
    assert found["bytes"] == 297  # a token is a byte here, and the first of each window is not predicted
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / math.log(2))
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer("née")["input_ids"] + [0]])
    assert long_text.text_bytes(tokenizer, ids) == len("née".encode()) - 1  # the end of text has no bytes


def test_modes_and_bad_arguments(model, text) -> None:
    full, no_tail = (
        long_text.length_perplexity(model, text, lengths=(100,), mode=mode)["100"]["nll"]
        for mode in ("full", "no_tail")
    )
    assert full != no_tail
    with pytest.raises(ValueError, match="300 tokens do not fill one window of 400"):
        long_text.length_perplexity(model, text, lengths=(100, 400))
    with pytest.raises(ValueError, match=r"edges must rise from 0 or more, got \[0, 50, 50\]"):
        long_text.length_perplexity(model, text, lengths=(100,), edges=(0, 50, 50))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        long_text.windows(text, 1)
