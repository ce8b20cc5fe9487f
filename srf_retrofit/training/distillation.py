"""Teaching a retrofitted model what it knew before, from its teacher's logits.

Shapes: `B` rows, `L` positions.

Both models hand over hidden states, and their heads are applied to a chunk of positions at a time (`divergence`). The
student's part happens inside its own forward, in the place of its head: wrappers that look after parameters there
(DistributedDataParallel, autocast, PEFT) keep working.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..data.token_blocks import IGNORED
from .attention_transfer import AttentionTransferTrainer
from .callbacks import ResampleFeaturesCallback, ResampleSchedule, feature_modules
from .compilation import compiled_layers
from .divergence import DEFAULT_CHUNK, chunked_losses
from .graphs import GraphedSteps, causal_alone, check_batch, check_graphable
from .guards import FiniteGradients
from .release import release
from .teacher import TeacherTrainer, forward_replaced, training_only

_COUNT = "num_items_in_batch"


class DistillationTrainer(TeacherTrainer):
    """`Trainer` whose loss is the divergence from a teacher's next-token distribution.

    `loss = (1 - w) T**2 KL(teacher || student) + w CE`, means over the predicted tokens of the whole optimizer step:
    padding and positions labelled -100 take no part, gradient accumulation and several processes weigh every token
    alike. Verified on one device and under DistributedDataParallel.

    Parameters
    ----------
    model, args, teacher, **kwargs
        See `TeacherTrainer`. Every batch needs `labels` (or `shift_labels`).
    temperature : float
        `T > 0`.
    cross_entropy_weight : float
        `w` in [0, 1]; above 0, `kl` and `ce` are logged beside `loss`, in nats per token.
    chunk_size : int
        Positions whose logits exist at once, see `chunked_losses`.
    cuda_graph : bool
        Replay forward and backward from a CUDA graph, see `graphs.GraphedSteps`: on one GPU, for batches of `input_ids`
        and `labels` alone, without gradient accumulation.

    Raises
    ------
    ValueError
        For values outside these ranges, where a graph cannot be, and see `TeacherTrainer`.
    FloatingPointError
        From training, at the first step whose loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        chunk_size: int = DEFAULT_CHUNK,
        cuda_graph: bool = False,
        **kwargs: Any,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if not 0 <= cross_entropy_weight <= 1:
            raise ValueError(f"cross_entropy_weight must be in [0, 1], got {cross_entropy_weight}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.temperature, self.cross_entropy_weight, self.chunk_size = temperature, cross_entropy_weight, chunk_size
        # Sums of divergence, cross-entropy and tokens since the last log, by whether the model was training.
        self._sums = {mode: torch.zeros(3, device=self.args.device) for mode in (True, False)}
        self._graphs: GraphedSteps | None = None
        if cuda_graph:
            check_graphable(self.args, self.accelerator.num_processes)
            assert self.model is not None
            self._graphs = GraphedSteps(self._graphable_loss, self.model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; from a graph, where there is one."""
        if self._graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        check_batch(inputs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:
            inputs = {**inputs, _COUNT: torch.as_tensor(num_items_in_batch, device=self.args.device)}
        loss = self._graphs(inputs)
        inputs.pop(_COUNT, None)
        inputs.pop("labels")
        return self._checked(loss, {**inputs, "use_cache": False})

    def _graphable_loss(self, inputs):
        inputs = dict(inputs)
        count = inputs.pop(_COUNT, None)
        student = self.accelerator.unwrap_model(self.model_wrapped)
        with causal_alone(student, self.teacher), self.compute_loss_context_manager():
            return self._loss(self.model_wrapped, inputs, count, whole=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one batch; see the class."""
        loss = self._loss(model, inputs, num_items_in_batch, whole=False)
        without = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        loss = self._checked(loss, {**without, "use_cache": False})
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss(self, model, inputs, num_items_in_batch, *, whole):
        """The loss; with `whole` positions that do not count are weighed by 0, since picking others asks the device."""
        inputs = {**inputs, "use_cache": False}
        labels = next_labels(inputs)
        chosen = labels != IGNORED

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x.flatten(0, 1) if whole else x[chosen]

        labels = pick(labels)

        # Without its head, the teacher returns hidden states where logits would be.
        teacher_head = self.teacher.get_output_embeddings()
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            forward_replaced(teacher_head, pick),
        ):
            teacher_hidden = self.teacher(**inputs).logits
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        student_head = head.forward
        # Gradients along with the divergence need whole parameters, and no scaled loss.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        parameters = None if sharded or self.args.fp16 else list(head.parameters())

        def losses(hidden: torch.Tensor) -> torch.Tensor:
            return chunked_losses(
                pick(hidden),
                teacher_hidden,
                labels,
                student_head,
                teacher_head,
                temperature=self.temperature,
                cross_entropy=self.cross_entropy_weight > 0,
                chunk_size=self.chunk_size,
                weight=chosen.flatten().float() if whole else None,
                parameters=parameters,
            )

        with forward_replaced(head, losses):
            sums = model(**inputs).logits

        weight, tokens = self.cross_entropy_weight, chosen.sum()
        loss = (1 - weight) * self.temperature**2 * sums[0] + weight * sums[1]
        self._sums[model.training] += torch.stack([*sums.detach().float(), tokens])
        count = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=loss.device)
        loss = loss / count.clamp_min(1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, whose gradients will be averaged.
            loss = loss * self.accelerator.num_processes
        return loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the positions that the loss counts, also where a collator leaves labels on padding."""
        counted = [{**batch, "shift_labels": next_labels(dict(batch))} for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the two parts of a mixed loss."""
        for key in [key for key in logs if key == "loss" or (key.endswith("_loss") and key != "train_loss")]:
            sums = self._sums[key == "loss"]
            kl, ce, tokens = self.accelerator.reduce(sums.clone(), "sum").tolist()
            sums.zero_()
            if self.cross_entropy_weight and tokens:
                logs[key.removesuffix("loss") + "kl"] = kl / tokens
                logs[key.removesuffix("loss") + "ce"] = ce / tokens
        super().log(logs, start_time)


def next_labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Take the labels out of a batch: (B, L), the token each position is to predict, or -100.

    Raises
    ------
    ValueError
        When the batch has none.
    """
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if shifted is not None:
        return shifted
    if labels is None:
        raise ValueError(
            "distillation needs labels in every batch, to know which positions count: let the data set return them, or "
            "use DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        # Neither a position of padding predicts, nor is padding predicted.
        real = mask.bool()
        labels = labels.masked_fill(~(real & functional.pad(real[:, 1:], (0, 1))), IGNORED)
    return labels


def distill(
    model: nn.Module,
    teacher: PreTrainedModel | None,
    dataset: Any,
    *,
    steps: int,
    output_dir: str | Path,
    learning_rate: float = 5e-5,
    feature_learning_rate: float | None = None,
    schedule: str | ResampleSchedule = "settle:0.5",
    objective: str = "logits",
    train: str = "all",
    part_of: tuple[int, int] | None = None,
    batch_size: int = 2,
    gradient_accumulation_steps: int = 1,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    chunk_size: int = DEFAULT_CHUNK,
    bf16: bool | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    save_steps: int | None = None,
    resume: bool | str | Path = False,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> dict[str, Any]:
    """Train a retrofitted model, in place, towards its softmax teacher; defaults that suit a short run anywhere.

    AdamW without weight decay, a cosine schedule with a tenth of the steps as warm-up, no external reports.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        The student. It comes back in evaluation mode and without gradients.
    teacher : PreTrainedModel, optional
        `None` takes `frozen_copy(model)` of what the student is now.
    dataset : torch or datasets Dataset
        Items with `input_ids` and `labels` of one length (`data.TokenBlocks`), or give `data_collator`.
    steps : int
        Optimizer steps, `>= 1`.
    output_dir : path
        For checkpoints (`save_steps`), and to resume from.
    learning_rate : float
        At its peak. The default suits a thousand tokens a step; 3e-4 suits sixteen thousand.
    feature_learning_rate : float, optional
        Of trained or learned feature maps; by default that of everything else.
    schedule : str or ResampleSchedule
        See `ResampleFeaturesCallback`; means nothing to a model without random features.
    objective : {"logits", "attention", "text"}
        `DistillationTrainer` or `AttentionTransferTrainer`; or the next token of the text itself, with neither teacher
        nor `feature_learning_rate` and `part_of`, for any causal language model, retrofitted or not.
    train : {"all", "weights", "attention", "queries_keys", "features", "as_is"}
        See `training_only`.
    part_of : (int, int), optional
        See `TeacherTrainer`.
    batch_size : int
        Rows per device and forward.
    temperature, cross_entropy_weight, chunk_size
        See `DistillationTrainer`; used by the logits alone.
    bf16 : bool, optional
        Autocast; by default where CUDA supports it.
    compile : bool
        Compile the decoder layers of all models there are, see `compilation.compiled_layers`: on a GPU steps take less
        time, and the first one some half a minute more. Not for attention, which is matched by hooks inside the layers.
    cuda_graph : bool
        See `DistillationTrainer`; logits only.
    resume : bool or path
        Continue from the last checkpoint in `output_dir`, or from this one.
    data_collator, eval_dataset, **arguments
        The first two go to the trainer, the others to `TrainingArguments`, over the values chosen here.

    Returns
    -------
    dict
        `first_loss` and `last_loss` (means of the first and last logged interval), `steps` and input `tokens` of the
        whole run, `seconds` of this call, and `history`, the trainer's log.

    Raises
    ------
    ValueError
        For values out of range and for what the trainers refuse.
    FloatingPointError
        At the first step whose loss or gradient is not finite.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if objective not in ("logits", "attention", "text"):
        raise ValueError(f"objective must be 'logits', 'attention' or 'text', got {objective!r}")
    if objective == "text" and any(x is not None for x in (teacher, feature_learning_rate, part_of)):
        raise ValueError("objective 'text' has no teacher, feature_learning_rate or part_of: leave them out")
    names = ("data_collator", "eval_dataset")
    for_trainer: dict[str, Any] = {name: arguments.pop(name) for name in names if name in arguments}
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.0,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "bf16": (torch.cuda.is_available() and torch.cuda.is_bf16_supported()) if bf16 is None else bf16,
        "logging_steps": max(1, steps // 20),
        "include_num_input_tokens_seen": "all",
        # Not finite is what `_checked` and `FiniteGradients` stop at; another look would make the host wait again.
        "logging_nan_inf_filter": False,
        "save_strategy": "no" if save_steps is None else "steps",
        "save_steps": save_steps or 500,
        "report_to": "none",
        "disable_tqdm": not progress,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
    }
    values.update(arguments)
    settings = TrainingArguments(**values)
    if compile and settings.gradient_checkpointing:
        raise ValueError("compile=True and gradient_checkpointing=True exclude one another: leave one of them off")
    with training_only(model, train):
        drawn = [ResampleFeaturesCallback(schedule)] if feature_modules(model) else []
        common: dict[str, Any] = {
            "train_dataset": dataset, "callbacks": [*drawn, FiniteGradients(), *callbacks], **for_trainer,
        }  # fmt: skip
        taught = common | {"teacher": teacher, "part_of": part_of, "feature_learning_rate": feature_learning_rate}
        trainer: Trainer
        if objective == "text":
            release(model)
            trainer = Trainer(model, settings, **common)
        elif objective == "attention":
            trainer = AttentionTransferTrainer(model, settings, **taught)
        else:
            trainer = DistillationTrainer(
                model,
                settings,
                temperature=temperature,
                cross_entropy_weight=cross_entropy_weight,
                chunk_size=chunk_size,
                cuda_graph=cuda_graph,
                **taught,
            )
        if not progress:
            trainer.remove_callback(PrinterCallback)
        models = (model, trainer.teacher) if isinstance(trainer, TeacherTrainer) else (model,)
        both = compiled_layers(*models) if compile and objective != "attention" else contextlib.nullcontext()
        try:
            again = str(resume) if isinstance(resume, (str, Path)) else resume or None
            with both:
                result = trainer.train(resume_from_checkpoint=again)
        finally:
            # Mixed precision leaves a wrapper around `model.forward`, the last step its gradients.
            release(model)
            model.zero_grad(set_to_none=True)
            model.eval()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "steps": result.global_step,
        "seconds": result.metrics["train_runtime"],
        "tokens": trainer.state.num_input_tokens_seen,
        "history": trainer.state.log_history,
    }
