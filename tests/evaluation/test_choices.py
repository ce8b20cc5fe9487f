"""Log-likelihoods as lm-eval takes them: whole text tokenised once, the continuation scored, ties to the first."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from toy_tokenizers import WORDS, byte_llama, byte_tokenizer

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.evaluation import choices, harness

ANSWERS = [" yes", " perhaps not", " the café"]
CHOICES = [{"context": f"Question: {WORDS[i : i + 17]}?\nAnswer:", "choices": ANSWERS, "gold": i % 3} for i in range(9)]
CLOZE = [{"context": WORDS[i : 5 * i + 9], "continuation": " " + WORDS[i : i + 4].strip()} for i in range(1, 8)]


def write(path: Path, rows: list[dict]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module", params=["softmax", "retrofitted"])
def model(request):
    model = byte_llama()
    return model if request.param == "softmax" else retrofit(model, SRFConfig(num_features=16, window=8, retained=4))


@torch.no_grad()
def one(model, context: str, continuation: str) -> tuple[float, bool]:
    """Scored alone, from full logits."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    count = len(continuation.encode())
    logits = model(ids, use_cache=False).logits[0, -count - 1 : -1].float()
    wanted = ids[0, -count:]
    return -float(functional.cross_entropy(logits, wanted, reduction="sum")), bool((logits.argmax(-1) == wanted).all())


def test_items_are_scored_as_one_by_one(model) -> None:
    pairs = [(row["context"], choice) for row in CHOICES[:4] for choice in row["choices"]]
    found = choices.log_likelihoods(model, byte_tokenizer(), pairs, batch_tokens=400)
    for (context, continuation), (log_likelihood, greedy) in zip(pairs, found, strict=True):
        wanted, same = one(model, context, continuation)
        assert log_likelihood == pytest.approx(wanted, rel=1e-4)
        assert greedy == same


def test_multiple_choice_figures(model, tmp_path) -> None:
    items = choices.read_items(write(tmp_path / "some.jsonl.gz", CHOICES))
    found = choices.score_items(model, byte_tokenizer(), items)
    lls = [[one(model, row["context"], c)[0] for c in row["choices"]] for row in CHOICES]
    for name, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
        right = []
        for row, values in zip(CHOICES, lls, strict=True):
            scores = [v / size(c) for v, c in zip(values, row["choices"], strict=True)]
            right.append(float(scores.index(max(scores)) == row["gold"]))
        mean = sum(right) / 9
        assert found[name] == pytest.approx(mean)
        assert found[f"{name}_stderr"] == pytest.approx((mean * (1 - mean) / 8) ** 0.5)
    assert found["items"] == 9


def test_cloze_figures(model, tmp_path) -> None:
    items = choices.read_items(write(tmp_path / "some.jsonl", CLOZE), limit=5)
    found = choices.score_items(model, byte_tokenizer(), items)
    lls = torch.tensor([one(model, row["context"], row["continuation"])[0] for row in CLOZE[:5]], dtype=torch.float64)
    assert found["items"] == 5
    assert found["perplexity"] == pytest.approx(math.exp(-float(lls.mean())), rel=1e-4)
    assert found["perplexity_stderr"] == pytest.approx(found["perplexity"] * float(lls.std()) / 5**0.5, rel=1e-3)
    assert found["acc"] == sum(one(model, row["context"], row["continuation"])[1] for row in CLOZE[:5]) / 5


def test_greedy_continuations_are_seen() -> None:
    """The model's own continuation counts as right, another one does not."""
    model, tokenizer = byte_llama(), byte_tokenizer()
    letters = torch.zeros(257, 1)
    letters[tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]] = 1  # other tokens have logit 0, never the largest
    row = tokenizer("the quick brown")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight.mul_(letters)
        for _ in range(3):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    text = [tokenizer.decode(row[:15]), tokenizer.decode(row[15:])]
    found = choices.log_likelihoods(model, tokenizer, [(text[0], text[1]), (text[0], " no")])
    assert [x.greedy for x in found] == [True, False]


def test_spaces_and_empty_contexts() -> None:
    model, tokenizer = byte_llama(), byte_tokenizer()
    moved, plain, empty, begun = choices.log_likelihoods(
        model, tokenizer, [("the fox ", "jumps"), ("the fox", " jumps"), ("", "the fox"), ("</s>the", " fox")]
    )
    assert moved == plain
    assert empty.log_likelihood == pytest.approx(one(model, "</s>", "the fox")[0], rel=1e-4)
    assert begun.log_likelihood == pytest.approx(one(model, "</s>the", " fox")[0], rel=1e-4)


def test_long_contexts_lose_their_beginning() -> None:
    model = byte_llama()
    model.config.max_position_embeddings = 20
    long, short = choices.log_likelihoods(
        model, byte_tokenizer(), [("x" * 50 + "the quick brown", " fox"), ("xx" + "the quick brown", " fox")]
    )
    assert long == short
    with pytest.raises(ValueError, match="has 30 tokens, the model's context 20"):
        choices.log_likelihoods(model, byte_tokenizer(), [("the", "x" * 30)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ({"choices": [" a", " b"], "gold": 0}, "line 2: an item needs a string under 'context'"),
        ({"context": "a", "choices": [" a"], "gold": 0}, "line 2: 'choices' must be two or more strings"),
        ({"context": "a", "choices": [" a", " b"], "gold": 2}, "line 2: 'gold' must be an index into 2 choices, got 2"),
        ({"context": "a"}, "line 2: an item needs 'choices' and 'gold', or a 'continuation'"),
        ({"context": "a", "continuation": " b"}, "line 2: choices and cloze items cannot share a file"),
    ],
)
def test_bad_files_are_refused(row, message, tmp_path) -> None:
    path = write(tmp_path / "bad.jsonl", CHOICES[:1])
    with path.open("a", encoding="utf-8") as file:
        file.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match="bad.jsonl, " + message.replace("(", r"\(")):
        choices.read_items(path)


def test_missing_and_empty_files_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such task file"):
        choices.read_items(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no items"):
        choices.read_items(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        choices.read_items(write(tmp_path / "some.jsonl", CLOZE), limit=0)
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        choices.read_items(tmp_path / "broken.jsonl.gz")
    with pytest.raises(ValueError, match="no token of its own"):
        choices.log_likelihoods(byte_llama(), byte_tokenizer(), [("the", "")])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: " + harness.INSTALL)
def test_agreement_with_lm_eval(tmp_path, monkeypatch) -> None:
    model = retrofit(byte_llama(), SRFConfig(num_features=16, window=8, retained=4))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files = [write(tmp_path / "which.jsonl", CHOICES), write(tmp_path / "next.jsonl.gz", CLOZE)]
    theirs = harness.harness_scores(model, byte_tokenizer(), files, limit=6, batch_size=4)
    for path in files:
        mine = choices.score_items(model, byte_tokenizer(), choices.read_items(path, limit=6))
        name = harness.task_name(path)
        compared = [key for key in mine if key != "items" and key != "perplexity_stderr"]  # theirs is a bootstrap
        assert {key: theirs[name][key] for key in compared} == pytest.approx(
            {key: mine[key] for key in compared}, rel=1e-4
        )
