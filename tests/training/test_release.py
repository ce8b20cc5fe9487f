"""A model that was trained before is trained as its next trainer says, and given back as it was."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from srf_retrofit import SRFConfig
from srf_retrofit.data import TokenBlocks
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.surgery import retrofit
from srf_retrofit.testing import tiny_llama
from srf_retrofit.training.distillation import distill

CONFIG = SRFConfig(num_features=8, window=2, sinks=1, retained=0)
QUIET = {"progress": False, "use_cpu": True}


def random_rows(vocab: int) -> TokenBlocks:
    return TokenBlocks(torch.randint(3, vocab, (8, 24)))


@pytest.mark.parametrize("before", ["stage", "trainer", "unwrapped"])
def test_what_was_trained_before_is_trained_in_mixed_precision_again(tmp_path: Path, before: str) -> None:
    """A model that another trainer has prepared, and unwrapped or not, gets autocast and is left as it was."""
    model = tiny_llama()
    retrofit(model, CONFIG)
    rows = random_rows(model.config.vocab_size)
    plain = set(model.__dict__)
    if before == "stage":
        distill(
            model,
            None,
            rows,
            steps=1,
            output_dir=tmp_path,
            objective="attention",
            train="attention",
            bf16=True,
            **QUIET,
        )
    else:
        args = TrainingArguments(
            str(tmp_path), max_steps=1, bf16=True, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
        )
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        if before == "unwrapped":
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    seen = set()

    def note(layer: nn.Module, args: Any, out: torch.Tensor) -> None:
        if layer.training:
            seen.add(out.dtype)

    hook = srf_attentions(model)[0].q_proj.register_forward_hook(note)
    distill(model, None, rows, steps=1, output_dir=tmp_path, bf16=True, **QUIET)
    hook.remove()
    assert seen == {torch.bfloat16}
    assert set(model.__dict__) == plain
    assert model(rows[0]["input_ids"][None]).logits.dtype == torch.float32


def test_a_forward_of_the_users_own_is_theirs_after_training(tmp_path: Path) -> None:
    model = tiny_llama()
    retrofit(model, CONFIG)
    calls = []

    @functools.wraps(type(model).forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    model.forward = mine = types.MethodType(counted, model)
    rows = random_rows(model.config.vocab_size)
    for _ in range(2):
        distill(model, None, rows, steps=1, output_dir=tmp_path, bf16=True, **QUIET)
        assert model.__dict__["forward"] is mine
    assert calls
