"""Distillation: the chunked loss is the plain one, and students come nearer to their teachers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from srf_retrofit import SRFConfig
from srf_retrofit.modeling.attention import exact_attention, srf_attentions
from srf_retrofit.surgery import retrofit
from srf_retrofit.testing import tiny_llama
from srf_retrofit.training.attention_transfer import AttentionTransferTrainer
from srf_retrofit.training.callbacks import ResampleFeaturesCallback
from srf_retrofit.training.distillation import DistillationTrainer, distill, next_labels
from srf_retrofit.training.teacher import frozen_copy, training_only

CONFIG = SRFConfig(num_features=8, window=2, sinks=1, retained=0)
LENGTH = 24
QUIET = {"progress": False, "use_cpu": True}


class Rows(torch.utils.data.Dataset):
    """Random token rows; every third one has padding on the right."""

    def __init__(self, count: int, vocab: int, padded: bool = False) -> None:
        self.ids = torch.randint(3, vocab, (count, LENGTH), generator=torch.Generator().manual_seed(1))
        self.padded = padded

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": self.ids[index], "labels": self.ids[index]}
        if self.padded:
            item["attention_mask"] = (torch.arange(LENGTH) < (LENGTH if index % 3 else 10)).long()
        return item


def softmax_model() -> PreTrainedModel:
    """Tiny, with attention sharp enough to be worth matching."""
    torch.manual_seed(0)
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.v_proj.weight *= 8
            layer.self_attn.o_proj.weight *= 8
        model.lm_head.weight *= 8
    return model


def student_and_teacher() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = softmax_model()
    return retrofit(copy.deepcopy(teacher), CONFIG), teacher


def make_trainer(kind: type, directory: Path, model: nn.Module, *, padded: bool = False, **given: Any) -> Any:
    own = {k: given.pop(k) for k in ("teacher", "temperature", "cross_entropy_weight", "chunk_size") if k in given}
    callbacks = given.pop("callbacks", [])
    values = {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    values |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **given}
    rows = Rows(48, model.config.vocab_size, padded)
    arguments = TrainingArguments(output_dir=str(directory), **values)
    eval_rows = torch.utils.data.Subset(rows, range(6))
    return kind(model, arguments, train_dataset=rows, eval_dataset=eval_rows, callbacks=callbacks, **own)


def run(student: nn.Module, teacher: PreTrainedModel | None, directory: Path, **given: Any) -> dict[str, Any]:
    """`distill` on rows of six, quietly, on the CPU."""
    rows = Rows(48, student.config.vocab_size)
    return distill(student, teacher, rows, **{"output_dir": directory, "batch_size": 6, **QUIET, **given})


def mean_divergence(student: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The definition, over all logits at once."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    p, s = (model(**inputs, use_cache=False).logits.log_softmax(-1)[:, :-1] for model in (teacher, student))
    kl = (p.exp() * (p - s)).sum(-1)
    return kl[(mask[:, :-1] * mask[:, 1:]).bool()].mean()


def test_labels_of_padding_are_ignored() -> None:
    ids = torch.arange(10).view(2, 5)
    inputs = {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    }
    inputs["labels"][0, 3] = -100
    x = -100
    assert next_labels(inputs).tolist() == [[x, 2, x, 4, x], [6, x, x, x, x]]
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert next_labels({"shift_labels": ids}) is ids
    with pytest.raises(ValueError, match="DataCollatorForLanguageModeling"):
        next_labels({"input_ids": ids})


def test_the_trainer_computes_the_divergence(tmp_path: Path) -> None:
    """In training and in evaluation, with padding, over chunks smaller than a row."""
    student, teacher = student_and_teacher()
    trainer = make_trainer(
        DistillationTrainer, tmp_path, student, teacher=teacher, padded=True, chunk_size=5, per_device_eval_batch_size=6
    )
    rows = [trainer.eval_dataset[i] for i in range(6)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = mean_divergence(student, teacher, inputs)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    loss = trainer.compute_loss(student, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_accumulation_weighs_every_token_alike(tmp_path: Path, weight: float) -> None:
    """Two micro-batches of three rows take the step of one batch of six, though they differ in padding."""
    steps = []
    for size, accumulate in ((6, 1), (3, 2)):
        student, teacher = student_and_teacher()
        trainer = make_trainer(
            DistillationTrainer,
            tmp_path,
            student,
            teacher=teacher,
            padded=True,
            cross_entropy_weight=weight,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        steps.append((list(student.parameters()), [line for line in trainer.state.log_history if "loss" in line]))
    (together, logs), (apart, logs_apart) = steps
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for line, other in zip(logs, logs_apart, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert ("kl" in line) == (weight > 0)
        if weight:
            assert line["loss"] == pytest.approx((1 - weight) * line["kl"] + weight * line["ce"], rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    runs = []
    for checkpointing in (False, True):
        student, teacher = student_and_teacher()
        trainer = make_trainer(
            DistillationTrainer,
            tmp_path,
            student,
            teacher=teacher,
            callbacks=[ResampleFeaturesCallback()],
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            chunk_size=10,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        runs.append(list(student.parameters()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("own_teacher", [False, True])
def test_distillation_brings_the_student_nearer(tmp_path: Path, own_teacher: bool) -> None:
    student, teacher = student_and_teacher()
    weights = [p.clone() for p in teacher.parameters()]
    inputs = {"input_ids": Rows(12, student.config.vocab_size).ids}
    with torch.no_grad():
        before = mean_divergence(student, teacher, inputs)
    metrics = run(student, teacher if own_teacher else None, tmp_path, steps=30, learning_rate=5e-4)
    with torch.no_grad():
        after = mean_divergence(student, teacher, inputs)
    assert after < 0.7 * before
    assert metrics["last_loss"] < metrics["first_loss"]
    assert metrics["steps"] == 30
    assert metrics["tokens"] == 30 * 6 * LENGTH
    assert metrics["history"][-1]["srf/features_step"] == 14
    assert all(map(torch.equal, teacher.parameters(), weights))
    assert not student.training
    assert "forward" not in student.__dict__
    assert all(p.grad is None and p.requires_grad for p in student.parameters())
    assert not any("teacher" in key for key in student.state_dict())


def test_interrupted_distillation_resumes_to_the_same_student(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    common: dict[str, Any] = {"steps": 6, "save_steps": 3}
    students = []
    for interrupted in (False, True):
        student, teacher = student_and_teacher()
        directory = tmp_path / str(interrupted)
        if interrupted:
            run(student, teacher, directory, callbacks=[Stop()], **common)
            student, _ = student_and_teacher()
        run(student, teacher, directory, resume=interrupted, **common)
        students.append(student.state_dict())
    assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])


@pytest.mark.parametrize(("part", "names"), [("attention", "qkvo"), ("queries_keys", "qk")])
@pytest.mark.parametrize("objective", ["logits", "attention"])
def test_only_the_chosen_part_is_trained(tmp_path: Path, part: str, names: str, objective: str) -> None:
    student, _ = student_and_teacher()
    student.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in student.named_parameters()}
    settings = {"steps": 20, "schedule": "fixed", "learning_rate": 1e-3}
    metrics = run(student, None, tmp_path, train=part, objective=objective, **settings)
    assert metrics["last_loss"] < metrics["first_loss"]
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[-2] for name in changed} == {f"{x}_proj" for x in names}
    trained = {name: p.requires_grad for name, p in student.named_parameters()}
    assert [name for name in trained if not trained[name]] == ["lm_head.weight"]


def test_attention_transfer_is_the_error_of_every_layer_on_exact_input(tmp_path: Path) -> None:
    student, _ = student_and_teacher()
    with training_only(student, "attention"):
        trainer = make_trainer(AttentionTransferTrainer, tmp_path, student, padded=True)
        rows = [trainer.train_dataset[i] for i in range(4)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss = trainer.compute_loss(student, dict(batch))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        captured: list[tuple] = []
        for layer in srf_attentions(student):
            layer.register_forward_hook(
                lambda module, args, kwargs, output: captured.append((module, args, kwargs, output[0])),
                with_kwargs=True,
            )
        with torch.no_grad(), exact_attention(student):
            student.model(**inputs, use_cache=False)
        ratios = []
        for layer, args, kwargs, exact in list(captured):
            ours = layer(*args, **kwargs)[0]
            real = batch["attention_mask"].bool()
            ratios.append((ours - exact)[real].square().sum() / exact[real].square().sum())
        torch.testing.assert_close(loss, torch.stack(ratios).mean())
        assert loss > 1e-3
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in student.parameters())


def test_the_frozen_copy_shares_what_is_not_trained() -> None:
    student, original = student_and_teacher()
    with training_only(student, "attention"):
        teacher = frozen_copy(student)
    shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
    attention = {id(p) for layer in srf_attentions(student) for p in layer.parameters()}
    assert shared == {id(p) for p in student.parameters()} - attention
    assert not any(layer.exact for layer in srf_attentions(student))
    ids = torch.randint(3, student.config.vocab_size, (2, LENGTH))
    assert torch.equal(teacher(ids, use_cache=False).logits, original(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="no retrofitted layers"):
        frozen_copy(original)


def test_lora_student_teaches_itself(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    student, original = student_and_teacher()
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(student, lora)
    teacher = frozen_copy(model)
    base = {id(p) for name, p in model.named_parameters() if "lora_" not in name}
    assert {id(p) for p in teacher.parameters()} == base
    ids = torch.randint(3, student.config.vocab_size, (2, LENGTH))
    assert torch.equal(teacher(ids, use_cache=False).logits, original(ids, use_cache=False).logits)
    metrics = run(model, None, tmp_path, steps=12, train="as_is", learning_rate=1e-2)
    assert metrics["last_loss"] < metrics["first_loss"]


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    student, teacher = student_and_teacher()
    vocab = student.config.vocab_size

    def message(kind: type = DistillationTrainer, **given: Any) -> str:
        with pytest.raises(ValueError) as info:
            make_trainer(kind, tmp_path, student, **given)
        return str(info.value)

    assert f"vocabulary of {vocab + 1}, the student of {vocab}" in message(teacher=tiny_llama(vocab_size=vocab + 1))
    assert "one object" in message(teacher=student)
    sharing = copy.deepcopy(teacher)
    sharing.lm_head.weight = student.lm_head.weight
    assert "share weights" in message(teacher=sharing)
    assert "torch_compile" in message(teacher=teacher, torch_compile=True)
    capped = copy.deepcopy(teacher)
    capped.config.final_logit_softcapping = 30.0
    assert "final_logit_softcapping" in message(teacher=capped)
    assert "temperature must be > 0" in message(teacher=teacher, temperature=0.0)
    assert "cross_entropy_weight" in message(teacher=teacher, cross_entropy_weight=1.5)
    assert "chunk_size" in message(teacher=teacher, chunk_size=0)
    assert "freeze them" in message(AttentionTransferTrainer)
    with training_only(student, "attention"):
        assert "copy of the student with exact attention" in message(AttentionTransferTrainer, teacher=teacher)
    for values, text in (({"steps": 0}, "steps"), ({"objective": "x"}, "objective"), ({"train": "x"}, "train must be")):
        with pytest.raises(ValueError, match=text):
            run(student, teacher, tmp_path, **{"steps": 1, **values})
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("kind", [DistillationTrainer, AttentionTransferTrainer])
def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path: Path, kind: type) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.layers[0].self_attn.q_proj.weight.data.fill_(float("nan"))

    student, _ = student_and_teacher()
    with training_only(student, "attention"):
        trainer = make_trainer(kind, tmp_path, student, callbacks=[Poison()], max_steps=5)
        with pytest.raises(FloatingPointError, match="the loss is nan at step 3 of 5"):
            trainer.train()
