"""Text in, token blocks out; the parts stay apart and bad input says what to do."""

from __future__ import annotations

import gzip
import json
import lzma
from types import SimpleNamespace

import pytest
import torch

from srf_retrofit import data


class Letters:
    """One token per character; the end of a text is token 0."""

    eos_token_id: int | None = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


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
    with pytest.raises(ValueError, match="no field 'body'"):
        data.load_documents("owner/texts", field="body")


def test_unknown_source_is_one_clear_error(monkeypatch) -> None:
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="neither a text file nor a hub data set.*offline"):
        data.load_documents("nobody/nothing")
