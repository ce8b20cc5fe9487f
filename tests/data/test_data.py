"""Documents from wherever they are; the parts stay apart and bad input says what to do."""

from __future__ import annotations

import gzip
import json
import lzma
from itertools import islice
from types import SimpleNamespace

import pytest

from srf_retrofit import data
from srf_retrofit.data import corpus


def test_language_reference_repeats_no_paragraph() -> None:
    documents = data.language_reference()
    paragraphs = [" ".join(p.split()) for text in documents for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert sum(map(len, documents)) > 200_000
    assert any("lambda" in text for text in documents)


def test_parts_share_no_text_and_have_their_sizes() -> None:
    documents = data.language_reference()
    parts = data.split_documents(documents)
    everything = [*parts.calibration, *parts.training, *parts.held_out]
    assert sorted(everything) == sorted(documents)
    total = sum(map(len, documents))
    held_out = {" ".join(p.split()) for text in parts.held_out for p in text.split("\n\n")}
    training = {" ".join(p.split()) for text in parts.training for p in text.split("\n\n")}
    assert not held_out & training
    assert 0.15 < sum(map(len, parts.held_out)) / total < 0.45
    assert sum(map(len, parts.training)) / total > 0.4


def test_split_ignores_order_and_duplicates() -> None:
    documents = [f"document {i}" for i in range(20)]
    assert data.split_documents(documents) == data.split_documents([*reversed(documents), documents[3]])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1000, 1, 1), (1, 1000, 1), (1, 1, 1000)])
def test_split_leaves_no_part_empty(sizes: tuple[int, ...]) -> None:
    parts = data.split_documents([letter * size for letter, size in zip("abc", sizes, strict=True)])
    assert len(parts.held_out) == len(parts.calibration) == len(parts.training) == 1


def test_split_needs_three_documents() -> None:
    with pytest.raises(ValueError, match="three different documents"):
        data.split_documents(["one", "one", "two"])
    with pytest.raises(ValueError, match="leave some training text"):
        data.split_documents(["a", "b", "c"], held_out=0.9, calibration=0.1)


def test_read_text_is_cut_at_blank_lines(tmp_path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "x" * 1500 for i in range(9))
    for name, opener in (("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        documents = data.load_documents(tmp_path / name)
        assert len(documents) == 3
        assert "\n\n".join(documents) == text


def test_read_jsonl(tmp_path) -> None:
    path = tmp_path / "rows.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in ("ä", "b", " "))
    assert data.load_documents(path) == ["ä", "b"]
    assert data.load_documents(path, field="body") == ["Ä", "B"]
    with pytest.raises(ValueError, match="line 1: no text under 'words'"):
        data.load_documents(path, field="words")


def test_bad_files(tmp_path) -> None:
    def written(name: str, content: bytes):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    with pytest.raises(ValueError, match="no such text file"):
        data.load_documents(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="expected .txt"):
        data.load_documents(written("a.parquet", b"x"))
    with pytest.raises(ValueError, match="line 2: not JSON"):
        data.load_documents(written("a.jsonl", b'{"text": "a"}\n{oops\n'))
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        data.load_documents(written("b.txt", b"\xff\xfe\xfa"))
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        data.load_documents(written("c.txt.gz", b"not gzip"))
    with pytest.raises(ValueError, match="there is no text"):
        data.load_documents(written("d.txt", b" \n\n \n"))


def test_hub_data_set(monkeypatch) -> None:
    calls = []

    def load_dataset(name, configuration, *, split, streaming):
        calls.append((name, configuration, split, streaming))
        return iter([{"text": f"{name} {i}"} for i in range(5000)])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = data.load_documents("owner/texts:english")
    assert calls == [("owner/texts", "english", "train", True)]
    assert len(documents) == data.HUB_LIMIT
    with pytest.raises(ValueError, match="row 0: no text under 'body'; the row has 'text'"):
        data.load_documents("owner/texts", field="body")


def test_unknown_source_is_one_clear_error(monkeypatch) -> None:
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="neither a text file nor a hub data set.*offline"):
        data.load_documents("nobody/nothing")


def test_sections_do_not_depend_on_the_chunks_a_file_is_read_in(tmp_path, monkeypatch) -> None:
    text = "".join(f"line {i}" + "\n" * (i % 5) + "x" * (i % 700) for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    whole = data.load_documents(tmp_path / "a.txt")
    assert "\n\n".join(whole) == text
    monkeypatch.setattr(corpus, "_CHUNK_CHARACTERS", 3)
    assert data.load_documents(tmp_path / "a.txt") == whole


def test_a_large_file_is_read_as_far_as_asked(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)) + "{broken\n")
    assert data.load_documents(path, limit=50)[-1] == "text 49"
    assert list(islice(data.iterate_documents(path), 3)) == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match="line 51: not JSON"):
        data.load_documents(path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        data.load_documents(path, limit=0)


def test_directories_and_several_sources(tmp_path) -> None:
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("deep/c.jsonl", '{"text": "third"}'), ("d.png", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert data.load_documents(tmp_path) == ["first", "second", "third"]
    assert data.load_documents([tmp_path / "b.txt", str(tmp_path / "a.md")]) == ["second", "first"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .txt"):
        data.load_documents(tmp_path / "empty")


class Chat:
    """Renders turns as `<role>content</role>`, and a line break that no model would write."""

    chat_template: str | None = "there is one"

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages) + "\n"


def test_conversations_are_rendered(tmp_path) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, shared)))
    assert (
        data.load_documents(path, field="messages", tokenizer=Chat())
        == ["<user>Hi</user><assistant>Hello.</assistant>"] * 2
    )
    with pytest.raises(ValueError, match="line 1: 'messages' holds conversations: pass the tokenizer"):
        data.load_documents(path, field="messages")
    base = Chat()
    base.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.load_documents(path, field="messages", tokenizer=base)
    with pytest.raises(ValueError, match="no text under 'text'; the row has 'messages': name the field"):
        data.load_documents(path, tokenizer=Chat())
    path.write_text(json.dumps({"messages": [{"role": "user", "content": None}]}))
    with pytest.raises(ValueError, match="a turn needs texts under 'role' and 'content'"):
        data.load_documents(path, field="messages", tokenizer=Chat())


def test_instructions_are_rendered(tmp_path) -> None:
    path = tmp_path / "alpaca.jsonl"
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = data.load_documents(path, template="alpaca")
    assert first.endswith("request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3")
    assert "paired with an input" in first
    assert second.endswith("request.\n\n### Instruction:\nGreet.\n\n### Response:\nHello.")
    assert "paired with an input" not in second
    assert data.load_documents(path, template="chat", tokenizer=Chat()) == [
        "<user>Add.\n\n1 2</user><assistant>3</assistant>",
        "<user>Greet.</user><assistant>Hello.</assistant>",
    ]
    with pytest.raises(ValueError, match="pass template='alpaca' or 'chat'"):
        data.load_documents(path)
    with pytest.raises(ValueError, match="template must be one of alpaca, chat, got 'dolly'"):
        data.load_documents(path, template="dolly")
    with pytest.raises(ValueError, match="pass the tokenizer"):
        data.load_documents(path, template="chat")
    path.write_text(json.dumps({"instruction": "Add."}))
    with pytest.raises(ValueError, match="line 1: no text under 'output'"):
        data.load_documents(path, template="alpaca")


def test_hub_rows_split_and_limit(monkeypatch) -> None:
    calls = []

    def load_dataset(name, configuration, *, split, streaming):
        calls.append((configuration, split))
        return iter([{"instruction": f"Do {i}.", "output": f"Done {i}."} for i in range(50)])

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = data.load_documents("owner/tasks", template="alpaca", split="validation", limit=7)
    assert calls == [(None, "validation")]
    assert len(documents) == 7
    assert documents[6].endswith("Done 6.")
    with pytest.raises(ValueError, match="data set 'owner/tasks', row 0: no text under 'text'"):
        data.load_documents("owner/tasks")
