"""A number that is not finite is traced to its layer, memory that ran out to the settings that use it."""

from __future__ import annotations

import json

import pytest
import torch
from builders import build_llama, tokens
from torch import nn
from transformers import TrainerState, TrainingArguments

from srf_retrofit.training.guards import FiniteGradients, first_not_finite, last_checkpoint, memory_advice


def test_the_first_layer_that_is_not_finite() -> None:
    model = build_llama()
    inputs = {"input_ids": tokens(model, 2, 12), "use_cache": False}
    assert first_not_finite(model, inputs) is None
    model.model.layers[2].self_attn.v_proj.weight.data[1, 2] = float("nan")
    model.model.layers[1].mlp.down_proj.weight.data[0] = float("inf")
    assert first_not_finite(model, inputs) == "model.layers.1.mlp.down_proj (its weight is not finite)"
    assert not any(module._forward_hooks for module in model.modules())
    # A layer with finite weights can be the first to overflow.
    net = nn.Sequential(nn.Identity(), nn.LayerNorm(4))
    assert first_not_finite(net, {"input": torch.full((2, 4), torch.inf)}) == "0"


def test_whole_checkpoints_only(tmp_path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"torn')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_gradients_that_are_not_finite_stop_before_the_step(tmp_path) -> None:
    layer = nn.Linear(2, 2)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=6, max_steps=9)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps({}))
    guard = FiniteGradients()
    guard.on_pre_optimizer_step(arguments, state, None, model=layer)  # no gradients at all
    layer(torch.ones(1, 2)).sum().backward()
    guard.on_pre_optimizer_step(arguments, state, None, model=layer)
    layer.weight.grad[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 7 of 9.*checkpoint-5"):
        guard.on_pre_optimizer_step(arguments, state, None, model=layer)


@pytest.mark.parametrize("text", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory: you tried"])
def test_memory_advice(text) -> None:
    knobs = {"batch_size": 4, "length": 2048, "gradient_checkpointing": False}
    advice = r"batch_size \(4\), length \(2048\), gradient_checkpointing"
    with pytest.raises(RuntimeError, match=advice) as info, memory_advice(knobs, "logits"):
        raise RuntimeError(text)
    assert str(info.value.__cause__) == text
    with pytest.raises(RuntimeError, match="^shapes differ$"), memory_advice(knobs, "logits"):
        raise RuntimeError("shapes differ")
    with pytest.raises(ValueError, match="^x$"), memory_advice(knobs, "logits"):
        raise ValueError("x")
