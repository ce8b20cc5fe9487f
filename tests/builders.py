"""Small models with something to lose: peaked attention, so that a wrong mask or a lost state shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from srf_retrofit import SRFConfig
from srf_retrofit.testing import tiny_llama

# Blocks of 8, so that a few dozen tokens pass through window, retained slots and features.
CONFIG = SRFConfig(num_features=16, window=8, sinks=2, retained=4)
PURE = SRFConfig(num_features=16, window=0, sinks=0, retained=0)

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OTHERS = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}
FAMILY_NAMES = ("llama", *_OTHERS)


def build(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The same random softmax model at every call, in evaluation mode."""
    torch.manual_seed(seed)
    if family == "llama":
        model: PreTrainedModel = tiny_llama(**{"num_hidden_layers": 3, **overrides})
    else:
        head, config, defaults = _OTHERS[family]
        model = head(config(**{**_SIZES, **defaults, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def build_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """`build("llama")`."""
    model = build("llama", seed, **overrides)
    assert isinstance(model, LlamaForCausalLM)
    return model


def tokens(model: PreTrainedModel, *shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits (B, L, vocabulary) of one forward, without a cache unless asked for."""
    kwargs.setdefault("use_cache", False)
    return model(ids, **kwargs).logits
