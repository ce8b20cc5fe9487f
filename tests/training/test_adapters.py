"""LoRA adapters: what they train, the same from the same seed, and what is refused."""

from __future__ import annotations

import pytest
import torch
from builders import CONFIG, build, logits, tokens

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.training.adapters import with_adapters

SIZES = {"rank": 2, "alpha": 4, "targets": ("q_proj", "v_proj")}


def _student(config: SRFConfig = CONFIG):
    model = build("llama")
    retrofit(model, config)
    return model


def test_adapters_alone_are_trained_and_begin_without_effect() -> None:
    plain = _student()
    ids = tokens(plain, 2, 37)
    before = logits(plain, ids)
    model = with_adapters(_student(), **SIZES)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert torch.equal(logits(model.eval(), ids), before)


def test_a_seed_is_one_adapter() -> None:
    first, again, other = (with_adapters(_student(), **SIZES, seed=seed).state_dict() for seed in (3, 3, 4))
    names = [name for name in first if "lora_A" in name]
    assert names
    assert all(torch.equal(first[name], again[name]) for name in names)
    assert not any(torch.equal(first[name], other[name]) for name in names)


def test_a_gate_is_trained_whole() -> None:
    gated = SRFConfig(num_features=8, window=0, sinks=0, retained=0, forget_gate=True)
    model = with_adapters(_student(gated), **SIZES)
    assert any("gate" in name and p.requires_grad for name, p in model.named_parameters())


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_targets \['nothing'\] do not fit the model"):
        with_adapters(_student(), rank=2, alpha=4, targets=["nothing"])
