"""The callback inside real trainers: accumulation, checkpointing, evaluation, resume, adapters, packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from srf_retrofit import SRFConfig
from srf_retrofit.surgery import retrofit
from srf_retrofit.testing import tiny_llama
from srf_retrofit.training.callbacks import ResampleFeaturesCallback, feature_modules, resample_features

CONFIG = SRFConfig(num_features=8, window=4, sinks=1, retained=2)
LENGTH = 16
SCHEDULES = ["every_step", "every:2", "settle:0.5", "every:2,settle:0.6", "fixed"]


class Rows(torch.utils.data.Dataset):
    """Random token rows."""

    def __init__(self, count: int, vocab: int) -> None:
        self.ids = torch.randint(3, vocab, (count, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return retrofit(tiny_llama(), CONFIG)


def make_trainer(
    directory: Path, model: nn.Module | None = None, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    model = make_model() if model is None else model
    values = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    values |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **arguments}
    rows = Rows(64, model.config.vocab_size)
    return Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **values),
        train_dataset=rows,
        eval_dataset=torch.utils.data.Subset(rows, range(4)),
        callbacks=list(callbacks),
    )


def projection(model: nn.Module) -> torch.Tensor:
    return torch.stack([features.projection for features in feature_modules(model)])


def drawn(step: int) -> torch.Tensor:
    model = make_model()
    resample_features(model, step)
    return projection(model)


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_features_change_at_optimizer_steps_only(tmp_path: Path) -> None:
    """Four micro-batches share a draw, the next step has another, and evaluation takes what the step left."""
    model = make_model()
    seen: list[tuple[bool, int, torch.Tensor]] = []
    trainer = make_trainer(
        tmp_path,
        model,
        ResampleFeaturesCallback("every_step"),
        gradient_accumulation_steps=4,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    model.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, trainer.state.global_step, projection(module)))
    )
    trainer.train()
    assert sum(training for training, *_ in seen) == 12
    assert sum(not training for training, *_ in seen) >= 3
    for training, step, current in seen:
        # An evaluation comes after the step has been counted.
        assert torch.equal(current, drawn(step if training else step - 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_runs_have_the_same_losses(tmp_path: Path, schedule: str) -> None:
    whole = make_trainer(
        tmp_path / "whole", None, ResampleFeaturesCallback(schedule), save_strategy="steps", save_steps=3
    )
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", None, ResampleFeaturesCallback(schedule))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert len(losses(whole)) == 6
    assert losses(whole) == losses(resumed)
    assert torch.equal(projection(whole.model), projection(resumed.model))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedules_differ_in_what_they_train_on(tmp_path: Path) -> None:
    """Otherwise the test above would compare runs that no schedule touches."""
    runs = []
    for schedule in SCHEDULES:
        trainer = make_trainer(tmp_path, None, ResampleFeaturesCallback(schedule))
        trainer.train()
        runs.append(tuple(losses(trainer)))
    assert len(set(runs)) == len(SCHEDULES)


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(tmp_path: Path, reentrant: bool) -> None:
    runs = []
    for arguments in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        gradients, model = Gradients(), make_model()
        forwards = []
        model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        trainer = make_trainer(
            tmp_path,
            model,
            ResampleFeaturesCallback("every_step"),
            gradients,
            max_steps=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
            **arguments,
        )
        trainer.train()
        runs.append((gradients.steps, len(forwards)))
    (plain, forwards), (checkpointed, recomputed) = runs
    assert (forwards, recomputed) == (4, 8)
    assert len(plain) == 2
    for step, again in zip(plain, checkpointed, strict=True):
        assert all(g.abs().max() > 0 for g in step)
        for a, b in zip(step, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_step_and_schedule_are_recorded(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, None, ResampleFeaturesCallback("every:2,settle:0.5"), save_strategy="steps", save_steps=6
    )
    trainer.train()
    steps = [line["srf/features_step"] for line in trainer.state.log_history if "loss" in line]
    assert steps == [0, 0, 2, 2, 2, 2]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    record = saved["stateful_callbacks"]["ResampleFeaturesCallback"]
    assert record["args"] == {"schedule": "every:2,settle:0.5"}
    assert record["attributes"] == {"features_step": 2, "seed": 0, "max_steps": 6}


def test_a_checkpoint_made_without_the_callback_can_be_resumed_with_it(tmp_path: Path) -> None:
    make_trainer(tmp_path, None, save_strategy="steps", save_steps=3, max_steps=3).train()
    trainer = make_trainer(tmp_path, None, ResampleFeaturesCallback(), save_strategy="steps", save_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "checkpoint-6").is_dir()
    assert torch.equal(projection(trainer.model), drawn(5))


def test_softmax_models_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no retrofitted layers"):
        make_trainer(tmp_path, tiny_llama(), ResampleFeaturesCallback())


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def test_lora(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(make_model(), lora())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model, ResampleFeaturesCallback("every:2"), max_steps=3)
    trainer.train()
    assert torch.equal(projection(model), drawn(2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_packed_lora_with_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = make_model()
    tokenizer = word_tokenizer(PreTrainedTokenizerFast)
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"input_ids": torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()}
        for length in [5, 9, 3, 12, 7, 4] * 4
    ]
    seen: list[int] = []
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            packing=True,
            padding_free=True,
            max_length=LENGTH,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[ResampleFeaturesCallback()],
    )
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].eq(0).sum().item()), with_kwargs=True
    )
    trainer.train()
    assert min(seen) > 1, "no document was packed with another"
    assert torch.equal(projection(trainer.model), drawn(2))
    history = losses(trainer)
    assert len(history) == 3
    assert all(torch.isfinite(torch.tensor(history)))


def word_tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return kind(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
