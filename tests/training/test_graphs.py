"""Steps from a CUDA graph: when they are recorded, that they are the same steps, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from builders import tiny_llama
from transformers import TrainingArguments

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.training.distillation import DistillationTrainer, distill
from srf_retrofit.training.graphs import WARM_UP, GraphedSteps, causal_alone, check_batch
from srf_retrofit.training.teacher import frozen_copy

CONFIG = SRFConfig(num_features=16, window=8, sinks=1, retained=0)


class Recorder:
    """Stands for a `GradientGraph` where there is no GPU: computes what would be replayed."""

    made = 0

    def __init__(self, loss_of: Any, parameters: Iterable[torch.nn.Parameter], inputs: Mapping[str, Any]) -> None:
        type(self).made += 1
        self.loss_of, self.parameters = loss_of, list(parameters)

    def replay(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss_of(inputs)
        loss.backward()
        return loss.detach()


def test_a_step_is_recorded_once_batches_look_alike_and_again_when_features_change() -> None:
    model = retrofit(tiny_llama(), CONFIG)
    Recorder.made = 0
    steps = GraphedSteps(lambda batch: batch["x"].sum() * model.lm_head.weight.sum(), model, Recorder)  # type: ignore[arg-type]

    def run(width: int) -> bool:
        model.zero_grad()
        loss = steps({"x": torch.ones(2, width)})
        assert loss == 2 * width * model.lm_head.weight.sum()
        assert torch.equal(model.lm_head.weight.grad, torch.full_like(model.lm_head.weight, 2.0 * width))
        return steps.recorded

    assert [run(3) for _ in range(WARM_UP + 2)] == [False] * WARM_UP + [True] * 2
    assert [run(4) for _ in range(WARM_UP + 1)] == [False] * WARM_UP + [True]
    srf_attentions(model)[0].attn_fn.resample(1)
    assert [run(4) for _ in range(WARM_UP + 1)] == [False] * WARM_UP + [True]
    assert Recorder.made == 3


def test_positions_weighed_by_zero_are_positions_left_out(tmp_path: Any) -> None:
    """What is recorded cannot pick positions; the loss and every gradient are the same."""
    model = retrofit(tiny_llama(), CONFIG)
    teacher = frozen_copy(model)
    teacher.get_output_embeddings().weight.mul_(2)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for weight, temperature in ((0.0, 1.0), (0.3, 2.0)):
        trainer = DistillationTrainer(
            model, args, teacher=teacher, cross_entropy_weight=weight, temperature=temperature, chunk_size=7
        )
        ids = torch.randint(3, 90, (2, 20))
        labels = ids.clone()
        labels[0, 3:9] = -100
        found = []
        for whole in (False, True):
            model.zero_grad()
            loss = trainer._loss(model, {"input_ids": ids, "labels": labels}, None, whole=whole)
            loss.backward()
            found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
        torch.testing.assert_close(found[0][0], found[1][0])
        for mine, theirs in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_causality_without_a_mask_is_what_the_model_computes_anyway() -> None:
    model, ids = tiny_llama(), torch.randint(3, 90, (2, 20))
    expected = model(input_ids=ids).logits
    made: list[Any] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: made.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with causal_alone(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        model(input_ids=ids, position_ids=torch.arange(20).remainder(10).expand(2, -1))
    hook.remove()
    assert made == [None, None]
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_a_graph_is_refused(tmp_path: Any) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (2, 8))]
    with pytest.raises(ValueError, match="needs a CUDA device"):
        distill(retrofit(tiny_llama(), CONFIG), None, rows, steps=1, output_dir=tmp_path, cuda_graph=True, use_cpu=True)
    with pytest.raises(ValueError, match="attention_mask"):
        check_batch({"input_ids": None, "labels": None, "attention_mask": None})


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_recorded_steps_are_the_steps_themselves(compile: bool, tmp_path: Any) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (32, 64))]
    teacher = tiny_llama(hidden_size=128, head_dim=32).requires_grad_(False)
    teacher.get_output_embeddings().weight.mul_(3)

    def history(**given: Any) -> list[float]:
        torch.manual_seed(0)
        torch.compiler.reset()
        model = retrofit(tiny_llama(hidden_size=128, head_dim=32), SRFConfig(16, window=16, sinks=1, retained=16))
        found = distill(
            model.cuda(), teacher.cuda(), rows, steps=12, output_dir=tmp_path, batch_size=2, learning_rate=1e-3,
            schedule="fixed", progress=False, logging_steps=1, bf16=False, **given,
        )  # fmt: skip
        return [line["loss"] for line in found["history"] if "loss" in line]

    assert history(cuda_graph=True, compile=compile) == pytest.approx(history(), rel=2e-3)
