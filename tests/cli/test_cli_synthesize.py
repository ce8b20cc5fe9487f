"""`srf-retrofit synthesize`: options and recipes reach the file, mistakes are one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from builders import build_llama
from toy_tokenizers import letters
from typer.testing import CliRunner

from srf_retrofit.cli import main as cli
from srf_retrofit.data import load_documents


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(cli.app, ["synthesize", *[str(a) for a in arguments]])
    if result.exit_code == 1 and result.exception is not None:
        raise result.exception
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module", params=["chat", "base"])
def llama(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    build_llama(vocab_size=58, eos_token_id=3).save_pretrained(directory)
    tokenizer = letters()
    if request.param == "base":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    return directory


def test_options_and_recipes(llama, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tokens: 9000\nlength: 64\nbatch_size: 8\n")
    path = tmp_path / "text.jsonl.gz"
    out = run(
        "--model", llama, "--output", path, "--config", recipe, "--tokens", 400, "--seed", 5, "--json", "--top-p", 1
    )
    summary = json.loads(out.stdout)
    assert 400 <= summary["tokens"] < 500
    assert summary["settings"]["length"] == 64
    assert summary["settings"]["chat"] == llama.name.startswith("chat")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == summary["rows"] == summary["counts"]["kept"]
    assert {row["seed"] for row in rows} == {5}
    assert all(("messages" in row) == llama.name.startswith("chat") for row in rows)
    facts = json.loads((tmp_path / "text.jsonl.gz.json").read_text())
    assert facts["sampling"]["top_p"] == 1
    assert facts["model"] == str(llama)
    again = run("--model", llama, "--output", path, "--config", recipe, status=2)
    assert "is there: choose another" in again.output
    text = run("--model", llama, "--output", path, "--config", recipe, "--tokens", 300, "--no-chat", "--overwrite")
    documents = load_documents(path)
    assert f"{len(documents):,} texts of" in text.output
    assert not any("<" in document for document in documents)


def test_mistakes_are_one_line(llama, tmp_path) -> None:
    assert "pass --output FILE.jsonl.gz" in run("--model", llama, status=2).output
    path = tmp_path / "a.jsonl"
    for arguments, message in (
        (("--dtype", "int8"), "dtype must be one of"),
        (("--temperature", "0"), "temperature must be > 0"),
        (("--length", 9999), "beyond the 4096 positions"),
        (("--device", "cuda:9") if not _cuda() else ("--dtype", "x"), "error: "),
    ):
        assert message in run("--model", llama, "--output", path, *arguments, status=2).output
    if llama.name.startswith("base"):
        assert "pass --no-chat" in run("--model", llama, "--output", path, "--chat", status=2).output
    assert not list(tmp_path.iterdir())


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
