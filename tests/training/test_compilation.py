"""Compiled layers train as eager ones do, share one graph, see new features, and leave nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import tiny_llama

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.training.compilation import compiled_layers, decoder_layers
from srf_retrofit.training.distillation import distill
from srf_retrofit.training.teacher import frozen_copy


def student(backend: str) -> Any:
    model = retrofit(tiny_llama(num_hidden_layers=2), SRFConfig(num_features=16, window=8, sinks=0, retained=0))
    for layer in srf_attentions(model):
        layer.backend = backend
    return model.train()


def loss_and_gradients(model: Any, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_one_graph_for_all_layers_with_the_same_results_and_with_new_features() -> None:
    torch.compiler.reset()
    model, ids = student("triton"), torch.randint(3, 90, (1, 32))
    eager = loss_and_gradients(model, ids)
    for layer in srf_attentions(model):
        layer.attn_fn.resample(1)
    redrawn = loss_and_gradients(model, ids)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with compiled_layers(model, backend=count):
        found = loss_and_gradients(model, ids)
        for layer in srf_attentions(model):
            layer.attn_fn.resample(0)
        back = loss_and_gradients(model, ids)
        assert copy.deepcopy(model).model.layers[0]._compiled_call_impl is None
        names = list(model.state_dict())
    assert len(graphs) == 1
    assert eager[0] != redrawn[0]
    for compiled, expected in ((found, redrawn), (back, eager)):
        assert compiled[0] == pytest.approx(expected[0], abs=1e-6)
        for mine, theirs in zip(compiled[1], expected[1], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert names == list(model.state_dict())
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    assert not model._forward_pre_hooks


def graphs_of(config: SRFConfig, ids: torch.Tensor) -> tuple[int, Any, torch.Tensor]:
    """Graphs that a model with so many layers has compiled on the kernels, with the same logits as eager: all three."""
    torch.compiler.reset()
    assert config.layer_retained is not None
    model = retrofit(tiny_llama(num_hidden_layers=len(config.layer_retained)), config)
    for layer in srf_attentions(model):
        layer.backend = "triton"
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with compiled_layers(model, backend=count):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    return len(graphs), model, expected


def test_layers_that_retain_differently_are_compiled_one_by_one() -> None:
    """More kinds of layers than Dynamo lets a function have graphs by default."""
    slots = tuple(range(1, 11))
    config = SRFConfig(num_features=16, window=8, sinks=0, retained=4, layer_retained=slots)
    graphs, _, _ = graphs_of(config, torch.randint(3, 90, (1, 20)))
    assert graphs == len(slots)
    assert torch._dynamo.config.recompile_limit < len(slots)


def test_layers_whose_heads_retain_differently_share_a_graph() -> None:
    """Where their slots begin is a tensor: the graph is for the largest number alone, and for the number of heads."""
    slots = ((2, 5), (5, 1), (5, 3), (0, 5))
    config = SRFConfig(num_features=16, window=4, sinks=0, retained=4, layer_retained=slots)
    ids = torch.randint(3, 90, (1, 30))
    graphs, model, expected = graphs_of(config, ids)
    assert graphs == 1
    for layer in srf_attentions(model):
        layer.backend = "torch"
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


def test_layers_on_the_pytorch_core_stay_eager_and_their_softmax_teacher_does_not() -> None:
    model = student("torch")
    teacher = frozen_copy(model)
    with compiled_layers(model, teacher, backend="eager"):
        assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
        assert all(layer._compiled_call_impl is not None for layer in decoder_layers(teacher))


def test_distillation_takes_compiled_layers(tmp_path: Any) -> None:
    torch.compiler.reset()
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (4, 24))]
    teacher = tiny_llama().requires_grad_(False)
    teacher.get_output_embeddings().weight.mul_(3)  # something to learn

    def losses(compile: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = retrofit(tiny_llama(), SRFConfig(num_features=16, window=8, sinks=0, retained=0))
        return distill(
            model, teacher, rows, steps=2, output_dir=tmp_path / str(compile), batch_size=2, use_cpu=True,
            progress=False, compile=compile,
        )  # fmt: skip

    eager, compiled = losses(False), losses(True)
    assert compiled["first_loss"] == pytest.approx(eager["first_loss"], rel=1e-4)
    assert compiled["last_loss"] == pytest.approx(eager["last_loss"], rel=1e-3)


def test_what_cannot_be_compiled_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no decoder layers"), compiled_layers(torch.nn.Linear(2, 2)):
        pass
    model = student("torch")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (2, 8))]
    with pytest.raises(ValueError, match="exclude one another"):
        distill(model, None, rows, steps=1, output_dir=tmp_path, compile=True, gradient_checkpointing=True)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointed"), compiled_layers(model):
        pass
