"""Text by the model itself: sampled as asked, filtered, the same again, and whole on the disk."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from builders import CONFIG, build_llama, logits
from toy_tokenizers import letters
from transformers import PreTrainedTokenizerFast

from srf_retrofit import retrofit
from srf_retrofit.data import load_documents, render_messages
from srf_retrofit.synthesis import sampling
from srf_retrofit.synthesis import synthesize as synthesis
from srf_retrofit.synthesis.synthesize import Sampling, synthesize

# The end of the user's turn is ordinary text here, as in Llama 2's template.
ORDINARY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q{{ m['content'] }}A"
    "{% else %}{{ m['content'] }}<end>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letters()


@pytest.fixture
def model():
    return build_llama(vocab_size=58, eos_token_id=3)


SHORT = {"length": 48, "batch_size": 8, "min_tokens": 4}


def test_tokenizer_of_these_tests(tokenizer) -> None:
    ids = tokenizer("<user>ab<end>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "a", "b", "<end>"]
    assert tokenizer.decode(ids) == "<user>ab<end>"


@pytest.mark.parametrize("prompts", ["bos", "chat", ["abc", "d"]])
def test_the_same_again_and_nothing_else_changed(model, tokenizer, prompts) -> None:
    model.train()
    before = torch.random.get_rng_state()
    first = synthesize(model, tokenizer, tokens=120, prompts=prompts, **SHORT)
    assert model.training
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(77)
    more = synthesize(model, tokenizer, tokens=240, prompts=prompts, **SHORT)
    assert more.rows[: len(first.rows)] == first.rows
    assert len(more.rows) > len(first.rows)
    other = synthesize(model, tokenizer, tokens=120, prompts=prompts, seed=1, **SHORT)
    assert other.documents != first.documents


def test_budget_and_counts(model, tokenizer) -> None:
    result = synthesize(model, tokenizer, tokens=500, **SHORT)
    assert result.tokens >= 500 > result.tokens - result.rows[-1]["tokens"]
    assert all(
        len(tokenizer(text)["input_ids"]) == row["tokens"] <= 47
        for text, row in zip(result.documents, result.rows, strict=True)
    )
    counts = dict(result.counts)
    assert counts.pop("written") == sum(counts.values())
    assert counts["kept"] == len(result.rows)
    assert all(row["tokens"] < 47 for row in result.rows if row["finished"])
    assert all("<" not in text for text in result.documents)


def test_settings_of_the_model_do_not_interfere(model, tokenizer) -> None:
    plain = synthesize(model, tokenizer, tokens=200, **SHORT)
    config = model.generation_config
    config.update(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=3.0, min_p=0.9, num_beams=4)
    assert synthesize(model, tokenizer, tokens=200, **SHORT) == plain


def test_tokens_are_drawn_from_the_distribution_of_the_model(model, tokenizer) -> None:
    settings = [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5)]
    scores = logits(model, tokenizer("abcd", return_tensors="pt")["input_ids"])[0, -1]
    expected, found = [], []
    for temperature, top_p in settings:
        chances = (scores / temperature).softmax(-1)
        order = chances.argsort(descending=True)
        kept = order[: int((chances[order].cumsum(0) < top_p).sum()) + 1]
        chances = torch.zeros_like(chances).index_put((kept,), chances[kept] / chances[kept].sum())
        # A text that ends at once may do so by any special token; they are counted together.
        expected.append(torch.cat([chances[:5].sum()[None], chances[5:]]))
        one = Sampling(length=8, batch_size=4000, temperature=temperature, top_p=top_p)
        drafts = sampling.Writer(model, tokenizer, ["abcd"], one).write(0)
        first = Counter(draft.ids[0] if draft.ids else 0 for draft in drafts)
        found.append(torch.tensor([first[i] for i in (0, *range(5, 58))]) / 4000)
    distances = (torch.stack(found)[:, None] - torch.stack(expected)).abs().sum(-1) / 2
    assert (distances.diagonal() < 0.07).all()
    assert distances.argmin(1).tolist() == [0, 1, 2]


def test_a_free_text_begins_with_the_likeliest_tokens(model, tokenizer) -> None:
    writer = sampling.Writer(model, tokenizer, "bos", Sampling(length=16, batch_size=12, greedy_tokens=3))
    drafts = writer.write(0)
    assert len({draft.ids[0] for draft in drafts}) > 6
    for draft in drafts:
        ids = torch.tensor([[3, *draft.ids]])
        expected = logits(model, ids)[0].argmax(-1)
        assert ids[0, 2:5].tolist() == expected[1 : min(4, ids.shape[1] - 1)].tolist()
    freely = sampling.Writer(model, tokenizer, "bos", Sampling(length=16, batch_size=12, greedy_tokens=0)).write(0)
    assert [d.ids[0] for d in freely] == [d.ids[0] for d in drafts]
    assert freely != drafts


def test_ordinary_tokens_begin_with_a_letter(tokenizer) -> None:
    assert sampling.ordinary_tokens(tokenizer, tokenizer.all_special_ids) == list(range(6, 58))


def test_conversations(model, tokenizer) -> None:
    result = synthesize(model, tokenizer, tokens=600, prompts="chat", **SHORT)
    assert result.counts["unanswered"] > 0
    for row in result.rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"]
        assert "<" not in user["content"] + assistant["content"]
        assert row["text"].startswith(f"<user>{user['content']}<end>\n<assistant>{assistant['content']}")
        if row["finished"]:
            assert row["text"] == render_messages(row["messages"], tokenizer)
        else:
            assert not row["text"].endswith("<end>")
            assert row["tokens"] <= 48
    assert {row["finished"] for row in result.rows} == {True, False}


def test_a_user_turn_may_end_with_ordinary_text(model) -> None:
    tokenizer = letters(ORDINARY)
    assert sampling.user_frame(tokenizer) == ("Q", "A")
    result = synthesize(model, tokenizer, tokens=300, prompts="chat", **SHORT)
    for row in result.rows:
        assert "A" not in row["messages"][0]["content"]
        assert row["text"].startswith(f"Q{row['messages'][0]['content']}A{row['messages'][1]['content']}")
    with pytest.raises(ValueError, match="no chat template"):
        synthesize(model, letters(None), tokens=10, prompts="chat")


def test_prompts_of_different_lengths_do_not_disturb_each_other(model, tokenizer) -> None:
    prompts = ["abcdefghijk", "x", [{"role": "user", "content": "Hello"}], "YZ"]
    # So cold that only the likeliest token is drawn.
    settings = Sampling(length=40, batch_size=6, temperature=1e-6)
    drafts = sampling.Writer(model, tokenizer, prompts, settings).write(0)
    assert drafts[4] == drafts[0]
    for draft, prompt in zip(drafts, ["abcdefghijk", "x", "<user>Hello<end>\n<assistant>", "YZ"], strict=False):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        begin = ids.shape[1]
        for token in draft.ids:
            assert logits(model, ids)[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert draft.text.startswith(prompt)
        assert draft.tokens == begin + len(draft.ids)
        # The room is the row's own, whatever stands beside it.
        assert draft.finished or draft.tokens == 40


def test_static_cache_and_retrofitted_models(model, tokenizer) -> None:
    dynamic = synthesize(model, tokenizer, tokens=200, cache="dynamic", **SHORT)
    assert synthesize(model, tokenizer, tokens=200, cache="static", **SHORT) == dynamic
    retrofit(model, CONFIG)
    mine = synthesize(model, tokenizer, tokens=200, **SHORT)
    assert mine.tokens >= 200
    assert mine.documents != dynamic.documents


def test_loops_and_copies_are_dropped(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(synthesis, "_FRUITLESS", 3)
    # Cold texts are the same for the same prompt, and run into loops.
    with pytest.raises(
        RuntimeError, match="nothing was kept of the last 3 batches .0 texts before; dropped: .*repetitive"
    ):
        synthesize(
            model,
            tokenizer,
            tokens=9_999,
            prompts=["ab"],
            temperature=1e-6,
            **{**SHORT, "length": 200, "max_repeated": 0.0},
        )
    with pytest.raises(RuntimeError, match="dropped: duplicate 31") as caught:
        synthesize(model, tokenizer, tokens=9_999, prompts=["ab"], temperature=1e-6, max_repeated=1.0, **SHORT)
    assert "1 texts before" in str(caught.value)


@pytest.mark.parametrize("name", ["text.jsonl", "text.jsonl.gz", "deep/text.jsonl.xz"])
def test_an_interrupted_run_goes_on(model, tokenizer, tmp_path, monkeypatch, name) -> None:
    path, settings = tmp_path / name, {"tokens": 900, "prompts": "chat", **SHORT}
    whole = synthesize(model, tokenizer, output=tmp_path / "a" / name, **settings)
    batches = whole.rows[-1]["batch"] + 1
    assert batches > 3
    written = []
    write = sampling.Writer.write

    def interrupted(self, batch: int):
        if batch == 2 and not written.count(2):
            written.append(2)
            raise KeyboardInterrupt
        written.append(batch)
        return write(self, batch)

    monkeypatch.setattr(sampling.Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(model, tokenizer, output=path, **settings)
    assert not path.exists()
    with pytest.raises(ValueError, match="interrupted run with another sampling .*'seed': 0.*: run with its settings"):
        synthesize(model, tokenizer, output=path, seed=1, **settings)
    written.clear()
    written.append(2)
    assert synthesize(model, tokenizer, output=path, **settings) == whole
    assert written[1:] == list(range(2, batches))
    assert path.read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert sorted(p.name for p in path.parent.iterdir() if p.is_file()) == [path.name, f"{path.name}.json"]
    assert load_documents(path) == whole.documents
    finished = [row["messages"] for row in whole.rows]
    assert load_documents(path, field="messages", tokenizer=tokenizer) == [
        render_messages(m, tokenizer) for m in finished
    ]
    facts = json.loads((path.parent / f"{path.name}.json").read_text())
    assert (facts["rows"], facts["tokens"], facts["counts"]) == (len(whole.rows), whole.tokens, whole.counts)
    assert facts["sampling"]["length"] == 48
    assert facts["prompts"] == "chat"


def test_outputs_are_not_overwritten(model, tokenizer, tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("mine")
    with pytest.raises(ValueError, match="is there: choose another"):
        synthesize(model, tokenizer, tokens=100, output=path, **SHORT)
    assert path.read_text() == "mine"
    synthesize(model, tokenizer, tokens=100, output=path, overwrite=True, **SHORT)
    assert len(load_documents(path)) > 1
    with pytest.raises(ValueError, match="ends in .jsonl"):
        synthesize(model, tokenizer, tokens=100, output=tmp_path / "text.txt", **SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.jsonl", "text.jsonl.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"length": 4}, "length must be at least 8"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"length": 5000}, "beyond the 4096 positions"),
        ({"cache": "paged"}, "cache must be"),
        ({"max_repeated": 2.0}, "max_repeated"),
        ({"similarity": 0.0}, "similarity"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"prompts": "freely"}, "'bos', 'chat' or a sequence"),
        ({"prompts": []}, "'bos', 'chat' or a sequence"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"prompts": ["a", "b" * 46]}, "prompt 1 has 46 tokens"),
    ],
)
def test_bad_settings(model, tokenizer, tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(model, tokenizer, output=tmp_path / "a.jsonl", **{"tokens": 100, **SHORT, **settings})
    assert not list(tmp_path.iterdir())


def test_unknown_settings_and_wrong_tokenizers(model, tokenizer) -> None:
    with pytest.raises(TypeError, match="unknown setting.s. top_k; known: length"):
        synthesize(model, tokenizer, tokens=10, top_k=3)
    with pytest.raises(ValueError, match="does not fit model"):
        synthesize(build_llama(vocab_size=40), tokenizer, tokens=10)
    assert synthesis.Filters(min_tokens=3).max_repeated == 0.3


@pytest.mark.real
def test_smollm2_talks_to_itself() -> None:
    from srf_retrofit.pretrained import load_model

    teacher, words = load_model("smollm2")
    result = synthesize(teacher, words, tokens=60, prompts="chat", length=80, batch_size=6, top_p=0.9, min_tokens=8)
    row = result.rows[0]
    assert row["text"].startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n" in row["text"]
    assert sum(c.isalpha() or c.isspace() for c in row["messages"][0]["content"]) > 0.7 * len(
        row["messages"][0]["content"]
    )
