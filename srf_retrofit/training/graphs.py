"""Forward and backward of a training step as one CUDA graph: the host launches it once, whatever it is made of.

A small model's step is thousands of short kernels, and the host needs longer to launch them than the GPU to run them.
Batches of one shape repeat the same launches on other numbers, so these are recorded and replayed; the optimizer's
step, clipping, schedules and callbacks run outside, as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..modeling.features import SRFFeatures

# Steps as they are before one is recorded: kernels are compiled, tables and scratch memory made.
WARM_UP = 3
_CAUSAL = "srf_retrofit_causal"

Loss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class GradientGraph:
    """One recorded forward and backward.

    Parameters
    ----------
    loss_of : callable
        From a batch to a scalar loss, without asking the device for a value.
    parameters : iterable of Parameter
        Those that the loss may reach.
    inputs : mapping of str to tensor
        A batch; later ones are copied over a copy of it.

    Raises
    ------
    RuntimeError
        When something in the loss cannot be recorded.
    """

    def __init__(self, loss_of: Loss, parameters: Iterable[nn.Parameter], inputs: Mapping[str, torch.Tensor]) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        parameters = list(parameters)
        for parameter in parameters:
            # A gradient that is there would be added to; one that is made while recording is written anew every time.
            parameter.grad = None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            loss = loss_of(self._inputs)
            loss.backward()
        self._loss = loss.detach()
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]

    def replay(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss () of a batch; the parameters' `grad` are its gradients, until the next replay."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.clone()


class GraphedSteps:
    """Losses and gradients of batches, recorded once several in a row have looked alike.

    Features that are drawn anew are other tensors, which a recording would not see: it is made again once they stay.

    Parameters
    ----------
    loss_of : callable
        As of `GradientGraph`.
    model : nn.Module
        What is trained; its `SRFFeatures` are watched.
    record : type
        For tests without a GPU.
    """

    def __init__(self, loss_of: Loss, model: nn.Module, record: type[GradientGraph] = GradientGraph) -> None:
        self._loss_of, self._record = loss_of, record
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._features = [module for module in model.modules() if isinstance(module, SRFFeatures)]
        self._kind: Hashable = None
        self._seen = 0
        self._graph: GradientGraph | None = None

    @property
    def recorded(self) -> bool:
        """Whether the last batch was replayed."""
        return self._graph is not None

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss () of a batch, whose gradients are then in the parameters' `grad`."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        kind = (shapes, tuple(b._version for each in self._features for b in each.buffers()))
        if kind != self._kind:
            self._kind, self._seen, self._graph = kind, 0, None
        if self._graph is None and self._seen >= WARM_UP:
            self._graph = self._record(self._loss_of, self._parameters, inputs)
        if self._graph is not None:
            return self._graph.replay(inputs)
        self._seen += 1
        loss = self._loss_of(inputs)
        loss.backward()
        return loss.detach()


@contextlib.contextmanager
def causal_alone(*models: nn.Module) -> Iterator[None]:
    """Inside this context PyTorch's attention in these models is causal and asks for no mask.

    Transformers looks at the positions of a batch for documents packed into its rows, which asks the device; while a
    graph is recorded it cannot, and hands a mask of every query and key to an attention that is then far slower. Rows
    here hold one document each (`check_batch`).
    """
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    found: list[Any] = [model.config for model in models]
    configs = {id(config): config for config in found if config._attn_implementation == "sdpa"}
    try:
        for config in configs.values():
            # A name that is unknown where masks are made gets none.
            config._attn_implementation = _CAUSAL
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = "sdpa"


def check_graphable(args: TrainingArguments, processes: int) -> None:
    """Refuse settings under which a step cannot be one graph.

    Raises
    ------
    ValueError
        Naming the setting.
    """
    if args.device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, and training runs on {args.device}")
    if processes > 1:
        raise ValueError(f"cuda_graph=True serves one process, not {processes}: gradients are exchanged in between")
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"cuda_graph=True writes gradients and cannot add to them: gradient_accumulation_steps must be 1, got "
            f"{args.gradient_accumulation_steps}"
        )
    if args.gradient_checkpointing:
        raise ValueError("cuda_graph=True and gradient_checkpointing=True exclude one another: leave one of them off")


def check_batch(inputs: Mapping[str, object]) -> None:
    """Refuse batches whose layout would have to be read back from the device.

    Raises
    ------
    ValueError
        When there is more in a batch than `input_ids` and `labels`.
    """
    more = sorted(set(inputs) - {"input_ids", "labels"})
    if more or len(inputs) < 2:
        raise ValueError(
            f"cuda_graph=True takes batches of input_ids and labels alone, got {sorted(inputs)}: rows of one length "
            "without padding, such as data.TokenBlocks gives"
        )
