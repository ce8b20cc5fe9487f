"""A model that teaches: made from the student, checked against it, and kept out of its training."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..modeling.attention import srf_attentions
from .guards import divergence_message, first_not_finite
from .release import release

PARTS = ("all", "weights", "attention", "queries_keys", "features", "as_is")


def frozen_copy(model: nn.Module) -> PreTrainedModel:
    """The softmax model that a retrofitted one stands in for, as a teacher of its own.

    Parameters that the student does not train (`requires_grad` False) are shared with it; only the others are copied.
    Under PEFT that leaves nothing to copy but the adapter, which the teacher goes without. Take the copy before any
    training: it teaches what the weights are now.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With retrofitted layers.

    Returns
    -------
    PreTrainedModel
        Exact softmax attention everywhere, in evaluation mode, without gradients.

    Raises
    ------
    ValueError
        When the model has no retrofitted layer: its copy could teach it nothing.
    """
    if not srf_attentions(model):
        raise ValueError(f"this {type(model).__name__} has no retrofitted layers: retrofit it first, or pass a teacher")
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin: Any = copy.deepcopy(model, shared)
    if hasattr(twin, "peft_config"):
        twin = twin.unload()
    for layer in srf_attentions(twin):
        layer.use_fast_attn_(False)
    return twin.requires_grad_(False).eval()


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside this context calls of `module` run `forward`, with its hooks around it as before."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class TeacherTrainer(Trainer):
    """What the two trainers below share: a teacher that is neither trained, nor saved, nor wrapped.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        The student.
    args : TrainingArguments, optional
    teacher : PreTrainedModel, optional
        Put on the student's device and into evaluation mode. By default `frozen_copy(model)`.
    feature_learning_rate : float, optional
        Peak learning rate of the parameters of feature maps (`LearnedMaps`); by default `args.learning_rate`.
    part_of : (int, int), optional
        `(first, total)`: this training is the part from optimizer step `first` of a longer one of `total` steps, whose
        cosine decay it follows, after a warm-up of its own. By default it is the whole.
    **kwargs
        Passed to `Trainer`.

    Raises
    ------
    ValueError
        When teacher and student do not fit together, or the set-up cannot work (`torch_compile`,
        several GPUs in one process, `compute_metrics`).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        feature_learning_rate: float | None = None,
        part_of: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.part_of = part_of
        if feature_learning_rate is not None and not feature_learning_rate > 0:
            raise ValueError(f"feature_learning_rate must be > 0, got {feature_learning_rate}")
        self.feature_learning_rate = feature_learning_rate
        if model is None:
            raise ValueError(f"{type(self).__name__} needs the student as `model`; `model_init` is not supported")
        if kwargs.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics needs logits, which are never formed as a whole: "
                "use srf_retrofit.evaluation.perplexity"
            )
        if args is not None and args.torch_compile:
            raise ValueError(
                "torch_compile=True would compile anew at every step here: train inside "
                "`training.compilation.compiled_layers(model, teacher)` instead (`distill(..., compile=True)`)"
            )
        teacher = frozen_copy(model) if teacher is None else teacher
        check_pair(teacher, model)
        # Whatever trained it last: a prepared model would be taken as it is.
        release(model)
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs: start one process each (torchrun or accelerate launch), or "
                "set CUDA_VISIBLE_DEVICES to one of them"
            )
        if self.place_model_on_device and not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)  # type: ignore[arg-type]
        # A plain attribute of the trainer: in nobody's state_dict, optimizer or process group.
        self.teacher = teacher.eval()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`, the loss alone: there are no logits to return."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`, with feature maps and forget gates in a group of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.feature_learning_rate is not None:
            assert self.model is not None
            maps = {id(p) for layer in srf_attentions(self.model) for p in layer.attn_fn.parameters()}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in maps]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in maps]
                    rest = {k: v for k, v in group.items() if k != "params"}
                    optimizer.add_param_group({**rest, "params": mine, "lr": self.feature_learning_rate})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As in `Trainer`, unless this training is a part of a longer one."""
        if self.part_of is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        first, total = self.part_of
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            # The moments of the optimizer begin anew with every part, and need a warm-up each.
            rise = min(1.0, step / warmup) if warmup else 1.0
            start = 0 if first else warmup
            done = (first + step - start) / max(1, total - start)
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _checked(self, loss: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss, if it is finite; `inputs` are those of the forward that it comes from."""
        if bool(torch.isfinite(loss.detach())):
            return loss
        assert self.model is not None
        inputs = {**inputs, "logits_to_keep": 1}  # the head's weights show at one position, too
        with self.accelerator.autocast():
            student = first_not_finite(self.accelerator.unwrap_model(self.model), inputs)
            teacher = None if student is not None else first_not_finite(self.teacher, inputs)
        what = f"the loss is {loss.item()}"
        raise FloatingPointError(divergence_message(what, self.state, self.args, student, teacher))


def check_pair(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher that cannot teach this student.

    Raises
    ------
    ValueError
        When they are one model or share weights that are being trained, when a vocabulary differs, or when a head
        does more to its logits than a matrix product.
    """
    if teacher is student:
        raise ValueError(
            "teacher and student are one object: leave out the teacher to get a frozen copy of the student"
        )
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if any(id(p) in trained for p in teacher.parameters()):
        raise ValueError("teacher and student share weights that are trained: the teacher would change under training")
    sizes = []
    for role, model in (("teacher", teacher), ("student", student)):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"the {role} ({type(model).__name__}) has no language-model head to take logits from")
        sizes.append(head.weight.shape[0])
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"the {role} changes its logits after the head ({name}), which is not supported here")
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher has a vocabulary of {sizes[0]}, the student of {sizes[1]}: logits can only be matched "
            "between models with one tokenizer"
        )


@contextlib.contextmanager
def training_only(model: nn.Module, part: str) -> Iterator[None]:
    """Inside this context only a part of the parameters has `requires_grad`; afterwards all is as before.

    Parameters
    ----------
    model : nn.Module
    part : {"all", "weights", "attention", "queries_keys", "features", "as_is"}
        Every parameter; every one but those of feature maps that are trained or learned; those of the retrofitted
        attention layers; only their query and key projections; only their feature maps, where these are trained, and
        forget gates; or those that have `requires_grad` already (PEFT).

    Raises
    ------
    ValueError
        For another name, or when the part is empty.
    """
    if part not in PARTS:
        raise ValueError(f"train must be one of {', '.join(PARTS)}, got {part!r}")
    before = [(p, p.requires_grad) for p in model.parameters()]
    layers = srf_attentions(model)
    features = {id(p) for layer in layers for p in layer.attn_fn.parameters()}
    gates = {id(p) for layer in layers if layer.attn_fn.gate is not None for p in layer.attn_fn.gate.parameters()}
    if part in ("all", "weights"):
        chosen = {id(p) for p, _ in before} - (features - gates if part == "weights" else set())
    elif part == "attention":
        chosen = {id(p) for layer in layers for p in layer.parameters()}
    elif part == "queries_keys":
        names = ("q_proj.", "k_proj.", "q_norm.", "k_norm.")
        chosen = {id(p) for layer in layers for n, p in layer.named_parameters() if n.startswith(names)}
    elif part == "features":
        chosen = features
    else:
        chosen = {id(p) for p, trained in before if trained}
    if not chosen:
        raise ValueError(f"train={part!r} leaves nothing to train in this {type(model).__name__}: retrofit it first")
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, trained in before:
            p.requires_grad_(trained)
