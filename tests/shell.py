"""For tests of the command line: a tiny model in a directory, text for it, and a way to call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from srf_retrofit.cli import main as cli

TEXT = "\n\n".join(" ".join(f"w{(7 * i + j * j) % 60}" for j in range(1200)) for i in range(12))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A directory with a tiny Llama and a tokenizer of sixty words."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    words = {"<unk>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(60)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=62,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exit_code == 1 and result.exception is not None:
        raise result.exception
    assert result.exit_code == status, result.output
    return result
