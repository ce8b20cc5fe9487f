"""Rows ask for what they say they ask for, at the distance they say, and scores count exactly that."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from builders import CONFIG, build_llama
from toy_tokenizers import byte_llama, byte_tokenizer

from srf_retrofit import SRFConfig, pretrained, retrofit
from srf_retrofit.data import TokenBlocks, language_reference, pack
from srf_retrofit.evaluation import recall

WORDS = torch.arange(10, 810)
PROSE = TokenBlocks(torch.arange(2000, 4000).view(10, 200))


class Copying(torch.nn.Module):
    """Names the token that followed the last earlier occurrence of the current one, at most `reach` back."""

    def __init__(self, reach: int = 10**6) -> None:
        super().__init__()
        self.reach, self.device = reach, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: object):
        logits = torch.zeros(*input_ids.shape, 4000)
        for row, out in zip(input_ids.tolist(), logits, strict=True):
            last: dict[int, int] = {}
            for i, token in enumerate(row):
                if token in last and i - last[token] <= self.reach:
                    out[i, row[last[token] + 1]] = 1
                last[token] = i
        return type("Output", (), {"logits": logits})()


def test_copies_stand_at_their_distance() -> None:
    rows = recall.copy_rows(6, WORDS, distance=100, string=20, seed=3)
    assert rows.input_ids.shape == rows.scored.shape == (6, 64 + 120)
    starts = set()
    for ids, scored in zip(rows.input_ids, rows.scored, strict=True):
        places = scored.nonzero().flatten()
        assert len(places) == 17
        assert torch.equal(ids[places], ids[places - 100])
        second = torch.arange(int(places[0]) - 3, int(places[-1]) + 1)
        assert len(set(ids[second].tolist())) == 20
        assert torch.equal(ids[second], ids[second - 100])
        starts.add(int(second[0]))
    assert len(starts) > 1
    assert min(starts) >= 100 + 8  # never in the sinks
    assert torch.isin(rows.input_ids, WORDS).all()
    again = recall.copy_rows(6, WORDS, distance=100, string=20, seed=3)
    assert torch.equal(again.input_ids, rows.input_ids)
    assert not torch.equal(recall.copy_rows(6, WORDS, distance=100, string=20, seed=4).input_ids, rows.input_ids)


def test_random_filler_keeps_clear_of_what_is_asked_for() -> None:
    rows = recall.copy_rows(3, WORDS[:100], distance=200, string=40)
    for ids, scored in zip(rows.input_ids, rows.scored, strict=True):
        asked = ids[scored]
        assert torch.isin(ids, asked).sum() == 2 * len(asked)


def test_prose_fills_the_gap() -> None:
    rows = recall.copy_rows(2, WORDS, distance=100, string=20, filler=PROSE)
    words = torch.isin(rows.input_ids, WORDS).sum(-1)
    assert words.tolist() == [40, 40]
    assert torch.isin(rows.input_ids, torch.cat([WORDS, PROSE.blocks.flatten()])).all()
    labels = rows.labels
    assert torch.equal(labels != -100, rows.scored)
    assert torch.equal(labels[rows.scored], rows.input_ids[rows.scored])


def test_associations_are_told_and_asked() -> None:
    rows = recall.mqar_rows(4, WORDS, pairs=9, gap=30, seed=1)
    assert rows.input_ids.shape == (4, 64 + 36 + 30)
    orders = set()
    for ids, scored in zip(rows.input_ids.tolist(), rows.scored.tolist(), strict=True):
        places = [i for i, s in enumerate(scored) if s]
        assert len(places) == 9
        first = places[0] - 1 - 30 - 18
        told = dict(zip(ids[first : first + 18 : 2], ids[first + 1 : first + 18 : 2], strict=True))
        assert len(told) == 9
        assert all(told[ids[i - 1]] == ids[i] for i in places)
        orders.add(tuple(ids[i - 1] == key for i, key in zip(places, told, strict=True)))
    assert len(orders) > 1


def test_pass_keys_stand_at_their_depth() -> None:
    tokenizer = byte_tokenizer()
    prose = TokenBlocks(torch.full((3, 600), tokenizer.convert_tokens_to_ids(".")))
    for depth in (0.0, 0.5, 1.0):
        rows = recall.passkey_rows(3, tokenizer, prose, context=500, depth=depth, seed=2)
        assert rows.input_ids.shape == (3, 500)
        keys = set()
        for ids, scored in zip(rows.input_ids, rows.scored, strict=True):
            text = tokenizer.decode(ids)
            key = tokenizer.decode(ids[scored])
            assert len(key) == 5
            assert key.isdecimal()
            assert text.endswith(f"The pass key is {key}")
            assert text.count(key) == 3
            assert (text.index("\n\nThe pass key") / text.count(".")) == pytest.approx(depth, abs=0.02)
            keys.add(key)
        assert len(keys) == 3
    with pytest.raises(ValueError, match="context=60 leaves no room"):
        recall.passkey_rows(1, tokenizer, prose, context=60, depth=0.5)
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\], got 2"):
        recall.passkey_rows(1, tokenizer, prose, context=500, depth=2)


def test_scores_tell_who_remembers() -> None:
    near, far = Copying(reach=80), Copying()
    found = recall.copy_by_distance(far, WORDS, distances=(50, 200), trials=3)
    assert [row["accuracy"] for row in found] == [1.0, 1.0]
    assert [row["whole"] for row in found] == [1.0, 1.0]
    assert found[0]["tokens"] == 3 * 29
    found = recall.copy_by_distance(near, WORDS, distances=(50, 200), trials=3)
    assert found[0]["accuracy"] == 1.0
    assert found[1]["accuracy"] < 0.2
    cells = recall.mqar_grid(far, WORDS, pairs=(4, 8), gaps=(0, 60), trials=2)
    assert [(c["pairs"], c["gap"]) for c in cells] == [(4, 0), (4, 60), (8, 0), (8, 60)]
    assert cells[0]["accuracy"] == 1.0
    assert recall.mqar_grid(near, WORDS, pairs=(4,), gaps=(200,), trials=2)[0]["accuracy"] < 0.3


def test_stderr_is_over_rows() -> None:
    rows = recall.copy_rows(4, WORDS, distance=40, string=20)
    half = Copying()
    forward = half.forward

    def forget(input_ids: torch.Tensor, **_: object):
        out = forward(input_ids)
        out.logits[2:] = 0
        return out

    half.forward = forget
    found = recall.score_recall(half, rows, batch_tokens=10**6)
    assert found.accuracy == found.whole == 0.5
    assert found.stderr == pytest.approx((1 / 3) ** 0.5 / 2)
    assert (found.tokens, found.rows) == (4 * 17, 4)


def test_batches_and_modes_do_not_mix() -> None:
    model = retrofit(build_llama(), CONFIG)
    rows = recall.copy_rows(5, torch.arange(3, 97), distance=60, string=20)
    one = recall.score_recall(model, rows, batch_tokens=1)
    assert one == recall.score_recall(model, rows, batch_tokens=10**6)
    assert recall.score_recall(model, rows, mode="tail_only") != one


@pytest.mark.parametrize("kind", recall.KINDS)
def test_training_rows_resume_and_vary(kind) -> None:
    tokenizer = byte_tokenizer()
    prose = TokenBlocks(torch.randint(1, 257, (4, 200), generator=torch.Generator().manual_seed(0)))
    given = {"batch_size": 3, "length": 320, "vocabulary": torch.arange(1, 257), "filler": prose, "seed": 5}
    first = list(islice(recall.recall_rows(kind, tokenizer=tokenizer, **given), 3))
    for rows in first:
        assert rows.input_ids.shape == rows.scored.shape == (3, 320)
        assert rows.scored.any(-1).all()
        assert not rows.scored[:, 0].any()
    resumed = next(recall.recall_rows(kind, tokenizer=tokenizer, start=2, **given))
    assert torch.equal(resumed.input_ids, first[2].input_ids)
    assert torch.equal(resumed.scored, first[2].scored)
    places = {int(row.nonzero()[0]) for rows in first for row in rows.scored}
    assert kind == "passkey" or len(places) > 4  # pass keys are always asked for at the end
    told = {tuple(row[:20].tolist()) for rows in first for row in rows.input_ids}
    assert len(told) == 9


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="string must be above 3 and below distance=20, got 32"):
        recall.copy_rows(1, WORDS, distance=20)
    with pytest.raises(ValueError, match="32 different tokens are needed, and the vocabulary has 5"):
        recall.copy_rows(1, WORDS[:5], distance=50)
    with pytest.raises(ValueError, match="give more text"):
        recall.copy_rows(1, WORDS, distance=5000, filler=PROSE)
    with pytest.raises(ValueError, match="gap must be >= 0, got -1"):
        recall.mqar_rows(1, WORDS, pairs=2, gap=-1)
    with pytest.raises(ValueError, match="kind must be one of copy, mqar, passkey, got 'needle'"):
        next(recall.recall_rows("needle", batch_size=1, length=320, vocabulary=WORDS))
    with pytest.raises(ValueError, match="give tokenizer and filler"):
        next(recall.recall_rows("passkey", batch_size=1, length=320, vocabulary=WORDS))
    rows = recall.copy_rows(2, WORDS, distance=50)
    with pytest.raises(ValueError, match="every row must have a token to score"):
        recall.score_recall(Copying(), rows._replace(scored=torch.zeros_like(rows.scored)))


@pytest.mark.real
def test_a_real_model_recalls_and_forgets_without_its_past() -> None:
    """SmolLM2 names a pass key; with the window alone it is out of sight."""
    model, tokenizer = pretrained.load_smollm2()
    prose = pack(language_reference()[:2], tokenizer, 256, limit=2)
    rows = recall.passkey_rows(1, tokenizer, prose, context=128, depth=0.1)
    assert recall.score_recall(model, rows).accuracy > 0.9
    retrofit(model, SRFConfig(num_features=16, window=8, sinks=4, retained=0))
    assert recall.score_recall(model, rows, mode="no_tail").accuracy < 0.7


def test_ordinary_tokens() -> None:
    tokenizer = byte_tokenizer()
    assert recall.ordinary_tokens(tokenizer).tolist() == list(range(1, 257))
    tokenizer.add_tokens(["<tool>"])
    assert recall.ordinary_tokens(tokenizer).tolist() == list(range(1, 257))


def test_word_tokens_are_frequent_words() -> None:
    tokenizer = byte_tokenizer()
    assert torch.equal(recall.word_tokens(tokenizer), recall.ordinary_tokens(tokenizer))  # bytes are no words

    class Words(type(tokenizer)):
        """Every third token is a word."""

        def convert_ids_to_tokens(self, ids, **_: object):
            return [("Ġword", "word", "Ġw2")[i % 3] for i in ids]

        def __len__(self) -> int:
            return 1200

    tokenizer.__class__ = Words
    assert recall.word_tokens(tokenizer, 300).tolist() == list(range(3, 903, 3))


def test_pass_key_grid_runs_on_a_model() -> None:
    tokenizer = byte_tokenizer()
    prose = TokenBlocks(torch.randint(1, 257, (2, 300), generator=torch.Generator().manual_seed(0)))
    model = retrofit(byte_llama(), CONFIG)
    cells = recall.passkey_grid(model, tokenizer, prose, contexts=(200, 300), depths=(0.2, 0.8), trials=2)
    assert [(c["context"], c["depth"], c["tokens"]) for c in cells] == [
        (200, 0.2, 10), (200, 0.8, 10), (300, 0.2, 10), (300, 0.8, 10),
    ]  # fmt: skip
