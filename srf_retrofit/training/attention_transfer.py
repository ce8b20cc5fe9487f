"""Teaching each retrofitted layer on its own: what exact attention would have said to the same input."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..modeling.attention import SRFAttention, srf_attentions
from .teacher import TeacherTrainer, forward_replaced


class AttentionTransferTrainer(TeacherTrainer):
    """`Trainer` that matches each retrofitted layer with exact attention on the same input (2410.10254, section 3.2).

    The exact model runs once and feeds every layer of the student (teacher forcing), so that layers learn
    independently of one another and no gradient passes between them. The loss is the mean over layers of
    `|o - o*|^2 / |o*|^2`, outputs after `o_proj`, over real tokens. Evaluation logs the same figure.

    Parameters
    ----------
    model, args, teacher, **kwargs
        See `TeacherTrainer`. A teacher that is given must be retrofitted in the same layers, and switched to exact
        attention; by default it is `frozen_copy(model)`. Batches hold whole rows: padding is fine, packed documents
        are not.

    Raises
    ------
    ValueError
        When parameters outside the retrofitted layers are trained, which get no gradient here (`training_only` chooses
        them); for another teacher; for packed documents; and see `TeacherTrainer`.
    FloatingPointError
        From training, at the first step whose loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, teacher=teacher, **kwargs)
        assert model is not None
        here = srf_attentions(model)
        inside = {id(p) for layer in here for p in layer.parameters()}
        outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
        if outside:
            raise ValueError(
                f"attention transfer trains the retrofitted layers alone, but {outside[0]} and "
                f"{len(outside) - 1} other parameters are trainable: freeze them (training_only(model, 'attention'))"
            )
        exact = [layer.layer_idx for layer in srf_attentions(self.teacher) if layer.exact]
        if exact != [layer.layer_idx for layer in here]:
            raise ValueError("the teacher must be a copy of the student with exact attention: leave it out to get one")
        # The loss is a mean over a batch: the trainer averages it over the batches of an accumulation.
        self.loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one batch; see the class."""
        inputs = {**inputs, "use_cache": False}
        for name in ("labels", "shift_labels"):
            inputs.pop(name, None)
        packed = sorted({"position_ids", "cu_seq_lens_q", "seq_idx"} & set(inputs))
        if packed:
            raise ValueError(f"attention transfer takes whole rows, but the batch has {', '.join(packed)}: do not pack")
        student = self.accelerator.unwrap_model(model)
        with forward_replaced(student, partial(self._transfer, srf_attentions(student))):
            loss = model(**inputs)
        loss = self._checked(loss, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _transfer(self, layers: list[SRFAttention], **inputs: Any) -> torch.Tensor:
        errors: list[torch.Tensor] = []
        mask = inputs.get("attention_mask")
        with_gradients = torch.is_grad_enabled()

        def match(layer: SRFAttention, teacher_layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with torch.set_grad_enabled(with_gradients):
                ours, exact = layer(*args, **kwargs)[0], output[0]
                real = 1.0 if mask is None else mask.unsqueeze(-1).float()
                errors.append(((ours - exact).float().square() * real).sum() / (exact.float().square() * real).sum())

        with contextlib.ExitStack() as stack:
            for layer, teacher_layer in zip(layers, srf_attentions(self.teacher), strict=True):
                hook = teacher_layer.register_forward_hook(partial(match, layer), with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.accelerator.autocast())
            self.teacher.base_model(**inputs)
        return torch.stack(errors).mean()
