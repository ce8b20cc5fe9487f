"""LoRA adapters on a retrofitted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.attention import srf_attentions


def with_adapters(model: PreTrainedModel, *, rank: int, alpha: int, targets: Sequence[str], seed: int = 0) -> Any:
    """Wrap a model in LoRA adapters (2106.09685), which are all that is left to train; the same at every run.

    Forget gates begin as constants and are trained whole, as a part of the adapter.

    Parameters
    ----------
    model : PreTrainedModel
        Retrofitted; changed in place, as PEFT does.
    rank, alpha : int
        Of the adapters, `>= 1`; their product counts `alpha / rank`.
    targets : sequence of str
        Names of the linear layers that get one.
    seed : int
        Of their first values. Torch's generators are set to it.

    Returns
    -------
    PeftModel

    Raises
    ------
    ImportError
        When peft is not installed.
    ValueError
        When no module has one of these names.
    """
    from peft import LoraConfig, get_peft_model

    gated = any(layer.attn_fn.gate is not None for layer in srf_attentions(model))
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM",
        modules_to_save=["attn_fn.gate"] if gated else None,
    )  # fmt: skip
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(f"lora_targets {list(targets)} do not fit the model: {error}") from None
