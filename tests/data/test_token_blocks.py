"""Documents as blocks: nothing is lost, nothing crosses a boundary that should hold, little is wasted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import CONFIG, build_llama, logits
from hypothesis import given
from hypothesis import strategies as st
from transformers import default_data_collator

from srf_retrofit import data, retrofit
from srf_retrofit.data.token_blocks import beginning, best_fit
from srf_retrofit.training.distillation import distill


class Letters:
    """One token per character; the end of a text is token 0."""

    eos_token_id: int | None = 0
    bos_token_id: int | None = None

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **_: object) -> dict[str, list]:
        if isinstance(texts, str):
            begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
            return {"input_ids": begin + [ord(c) for c in texts]}
        return {"input_ids": [self(text, add_special_tokens)["input_ids"] for text in texts]}


def test_pack_joins_with_eos_and_drops_the_rest() -> None:
    blocks = data.pack(["abc", "de"], Letters(), 3)
    assert blocks.blocks.tolist() == [[97, 98, 99], [0, 100, 101]]
    assert len(blocks) == 2
    assert blocks.num_tokens == 6
    item = blocks[1]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    assert [b["input_ids"].shape for b in data.pack(["x" * 100], Letters(), 20).batches(2)] == [
        (2, 20),
        (2, 20),
        (1, 20),
    ]


def test_pack_limit() -> None:
    def endless():
        while True:
            yield "abcdefg"

    assert len(data.pack(endless(), Letters(), 4, limit=3)) == 3


def test_pack_refuses_too_little() -> None:
    with pytest.raises(ValueError, match="6 tokens do not fill one block of 100"):
        data.pack(["hello"], Letters(), 100)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        data.pack(["hello"], Letters(), 1)
    no_end = Letters()
    no_end.eos_token_id = None
    with pytest.raises(ValueError, match="no eos_token"):
        data.pack(["hello"], no_end, 2)
    with pytest.raises(ValueError, match="non-empty"):
        data.TokenBlocks(torch.zeros(0, 4))


def test_a_budget_reads_no_more_than_it_needs() -> None:
    read = []

    def documents():
        for i in range(10_000):
            read.append(i)
            yield "abcdefg"

    for boundaries in data.BOUNDARIES:
        read.clear()
        assert len(data.pack(documents(), Letters(), 32, limit=2, boundaries=boundaries)) == 2
        assert len(read) < 50


def test_documents_begin_and_end_once() -> None:
    tokenizer = Letters()
    assert [ids.tolist() for ids in data.tokenise(["ab", "b\0"], tokenizer)] == [[97, 98, 0], [98, 0]]
    tokenizer.bos_token_id = 1
    assert beginning(tokenizer) == 1
    assert [ids.tolist() for ids in data.tokenise(["ab", "\1b"], tokenizer)] == [[1, 97, 98, 0], [1, 98, 0]]


def test_tokenise_keeps_the_order_over_many_batches() -> None:
    texts = [chr(33 + i % 90) * (1 + i % 7) for i in range(3000)]
    assert ["".join(map(chr, ids[:-1])) for ids in data.tokenise(texts, Letters())] == texts


def test_respected_boundaries() -> None:
    blocks = data.pack(["abcdef", "xy", "klm"], Letters(), 8, boundaries="respect")
    assert len(blocks) == 2
    row = blocks[0]
    assert row["input_ids"].tolist() == [97, 98, 99, 100, 101, 102, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    assert row["labels"].tolist() == [-100, 98, 99, 100, 101, 102, 0, -100]
    row = blocks[1]
    assert row["input_ids"].tolist() == [120, 121, 0, 107, 108, 109, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert row["labels"].tolist() == [-100, 121, 0, -100, 108, 109, 0, -100]
    assert all(value.dtype == torch.int64 for value in row.values())
    assert "attention_mask" not in row
    assert (blocks.num_tokens, blocks.padding) == (14, 2 / 16)
    assert [b["input_ids"].shape for b in blocks.batches(1)] == [(1, 8)] * 2
    assert len(blocks.first(1)) == 1
    # Readers of `TokenBlocks.blocks` know nothing of boundaries.
    assert not hasattr(blocks, "blocks")


def test_padded_rows() -> None:
    blocks = data.pack(["abc", "x" * 9], Letters(), 5, boundaries="pad")
    assert len(blocks) == 3
    row = blocks[0]
    assert row["input_ids"].tolist() == [97, 98, 99, 0, 0]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 0]
    assert row["labels"].tolist() == [-100, 98, 99, 0, -100]
    assert blocks[2]["attention_mask"].tolist() == [1, 1, 1, 1, 1]
    assert blocks.padding == pytest.approx(1 / 15)
    assert len(data.pack(["abc", "x" * 9], Letters(), 5, boundaries="pad", limit=2)) == 2
    # A last piece of one token predicts nothing.
    assert len(data.pack(["abcde"], Letters(), 5, boundaries="pad")) == 1
    with pytest.raises(ValueError, match="no two tokens"):
        data.pack([""], Letters(), 5, boundaries="pad")
    with pytest.raises(ValueError, match="boundaries must be one of cross, respect, pad, got 'none'"):
        data.pack(["abc"], Letters(), 5, boundaries="none")


@given(st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_lays_every_item_into_one_bin(sizes: list[int]) -> None:
    bins = best_fit(sizes, 40)
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in items) for items in bins]
    assert all(load <= 40 for load in loads)
    # No two bins could be one.
    assert sum(sorted(loads)[:2]) > 40 or len(loads) < 2


def test_best_fit_wastes_little() -> None:
    sizes = np.random.default_rng(0).lognormal(5, 1, 2000).astype(int).clip(1, 1024).tolist()
    bins = best_fit(sizes, 1024)
    assert sum(sizes) / (1024 * len(bins)) > 0.99
    assert best_fit([3, 5, 2, 4], 7) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("retrofitted", [False, True], ids=["teacher", "student"])
@pytest.mark.parametrize("boundaries", ["respect", "pad"])
def test_a_document_has_the_logits_it_has_alone(retrofitted: bool, boundaries: str) -> None:
    model = build_llama(vocab_size=128)
    if retrofitted:
        retrofit(model, CONFIG)
    texts = ["The quick brown fox jumps over", "a lazy dog", "and sleeps", "x" * 90, "for a long while, dreaming."]
    whole = {tuple(ids[i : i + 64].tolist()) for ids in data.tokenise(texts, Letters()) for i in range(0, len(ids), 64)}
    blocks = data.pack(texts, Letters(), 64, boundaries=boundaries)
    assert len(blocks) == (3 if boundaries == "respect" else 6)
    found = set()
    batch = default_data_collator([blocks[i] for i in range(len(blocks))])
    labels = batch.pop("labels")
    together = logits(model, batch.pop("input_ids"), **batch)
    for number, sizes in enumerate(blocks.sizes):
        begin = 0
        for size in sizes:
            ids = blocks[number]["input_ids"][begin : begin + size]
            found.add(tuple(ids.tolist()))
            torch.testing.assert_close(together[number, begin : begin + size], logits(model, ids[None])[0])
            assert labels[number, begin + 1 : begin + size].tolist() == ids[1:].tolist()
            assert labels[number, begin] == -100
            begin += size
        assert (labels[number, begin:] == -100).all()
    assert found == whole


def test_loss_counts_each_document_alone() -> None:
    model = build_llama(vocab_size=128)
    texts = ["The quick brown fox", "jumps", "over a lazy dog"]
    packed = next(data.pack(texts, Letters(), 64, boundaries="respect").batches(1))
    padded = next(data.pack(texts, Letters(), 64, boundaries="pad").batches(3))
    with torch.no_grad():
        one, three = model(**packed, use_cache=False).loss, model(**padded, use_cache=False).loss
    torch.testing.assert_close(one, three)


def test_distillation_takes_both_kinds_of_rows(tmp_path) -> None:
    texts = ["The quick brown fox jumps over", "a lazy dog", "and sleeps", "for a long while."]
    losses = {}
    for boundaries, rows in (("respect", 2), ("pad", 4)):
        model = build_llama(vocab_size=128)
        retrofit(model, CONFIG)
        blocks = data.pack(texts, Letters(), 48, boundaries=boundaries)
        assert len(blocks) == rows
        mixture = data.Mixture([blocks])
        result = distill(model, None, mixture, steps=1, batch_size=rows, output_dir=tmp_path, seed=0, progress=False)
        losses[boundaries] = result["first_loss"]
    assert losses["respect"] > 1e-3
    assert losses["respect"] == pytest.approx(losses["pad"], rel=1e-4)


def test_check_tokenizer() -> None:
    class Words(Letters):
        name_or_path = "words"

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(97)}

    model = build_llama()
    model.config._name_or_path = "small"
    tokenizer = Words()
    data.check_tokenizer(tokenizer, model)
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="tokenizer words for model small has no eos_token"):
        data.check_tokenizer(tokenizer, model)
    with pytest.raises(ValueError, match="words does not fit model small: its token '`' is number 96.* 90 embeddings"):
        smaller = build_llama(vocab_size=90)
        smaller.config._name_or_path = "small"
        data.check_tokenizer(tokenizer, smaller)
