"""The stages of a distillation, one function each: what they do to the student, and what they report.

Every stage takes the `Work` in hand and returns its result as JSON types; `plan` says which stages settings ask for.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..calibration import calibrate_all
from ..evaluation.suite import check, evaluate_model, state_cost
from ..files import atomic_directory
from ..modeling.attention import srf_attentions
from ..recipes import to_dict
from ..surgery import plan_retrofit, retrofit
from ..training.adapters import with_adapters
from ..training.distillation import distill
from ..training.guards import last_checkpoint
from ..training.settling import settle_features
from ..training.teacher import frozen_copy
from .data import DistillText
from .run_directory import RunDirectory
from .settings import EXACT, DistillSettings

MODEL, ADAPTER = "model", "adapter"
UNTRAINED, EVALUATE = "evaluate-untrained", "evaluate"


@dataclass
class Work:
    """What the stages hand on.

    Attributes
    ----------
    settings, tokenizer, text, directory
    student : PreTrainedModel or PeftModel
        Softmax until the stage "retrofit".
    teacher : PreTrainedModel, optional
        None before "retrofit", and under LoRA until the adapters are there: then both share what is not trained.
    callbacks : sequence of TrainerCallback
        For the trainers of all stages.
    progress : bool
    """

    settings: DistillSettings
    tokenizer: PreTrainedTokenizerBase
    text: DistillText
    directory: RunDirectory
    student: Any
    teacher: PreTrainedModel | None = None
    callbacks: Sequence[TrainerCallback] = field(default_factory=tuple)
    progress: bool = True

    def say(self, text: str) -> None:
        """A line of progress."""
        if self.progress:
            print(text, file=sys.stderr, flush=True)


def plan(settings: DistillSettings) -> list[str]:
    """Names of the stages, in order."""
    names = ["tune"] if settings.tune_steps else []
    names.append("retrofit")
    if settings.eval_untrained and settings.eval.parts and (settings.transfer_steps or settings.steps):
        names.append(UNTRAINED)
    if settings.transfer_steps:
        names.append("transfer")
    first = settings.steps_before_settling
    if first:
        names.append("logits")
    if settings.settle != "none":
        names.append("settle")
        if first < settings.steps:
            names.append("logits-settled")
    return [*names, EVALUATE]


def shares_teacher(settings: DistillSettings) -> bool:
    """Whether teacher and student can share the weights that stay as they are: adapters alone are trained."""
    kept = not settings.transfer_steps or settings.transfer_train == "features"
    return settings.train == "lora" and settings.teacher in (None, EXACT) and kept


def run_tune(work: Work, number: int) -> dict[str, Any]:
    """The softmax model on the text itself; what comes out is retrofitted, and is the teacher."""
    s = work.settings
    return _train(
        work,
        number,
        "tune",
        first_row=0,
        steps=s.tune_steps,
        teacher=None,
        objective="text",
        train="all",
        learning_rate=s.tune_learning_rate,
        warmup_steps=min(100, -(-s.tune_steps // 10)),
    )


def run_retrofit(work: Work, number: int) -> dict[str, Any]:
    """Surgery, geometry and log-weights of the features; also where the teacher is set apart."""
    s, student = work.settings, work.student
    result: dict[str, Any] = {}
    if not srf_attentions(student):
        if work.teacher is None and not shares_teacher(s):
            work.teacher = copy.deepcopy(student).requires_grad_(False)
        found = plan_retrofit(student, s.srf)
        retrofit(student, s.srf)
        result["plan"] = found.to_dict()
        length = s.calibration_length or s.length
        rows = list(work.text.calibration.batches(max(1, s.batch_size * s.length // length)))
        fits = calibrate_all(
            student, rows, foresee=s.foresee, factor=s.foresight_factor, geometry=s.geometry,
            spread_tokens=s.spread_tokens, spread_by=s.spread_by, spread_also=work.text.asking,
            weigh=s.weigh_features, say=work.say,
        )  # fmt: skip
        named = {"foresight": fits.foresight, "calibration": fits.geometry, "slots": fits.slots}
        result |= {name: str(report) for name, report in named.items() if report is not None}
        if fits.gains is not None:
            gain = fits.gains
            result["gains"] = {"before": gain.before, "after": gain.after, "summary": str(gain)}
    elif work.teacher is None and not shares_teacher(s):
        work.teacher = frozen_copy(student)
    result["state"] = state_cost(student)
    # Now that there are retrofitted layers, what an evaluation of them needs can be checked, too.
    check(student, s.eval, teacher=work.teacher or student, text=work.text.held_out)
    return result


def run_transfer(work: Work, number: int) -> dict[str, Any]:
    """Every layer on its own, towards what exact attention says to the same input."""
    s = work.settings
    return _train(
        work,
        number,
        "transfer",
        first_row=s.tune_steps * s.rows_per_step,
        steps=s.transfer_steps,
        teacher=None,
        objective="attention",
        train=s.transfer_train,
        learning_rate=s.transfer_learning_rate,
        feature_learning_rate=None if s.transfer_train == "features" else s.feature_learning_rate,
        warmup_steps=min(100, -(-s.transfer_steps // 20)),
    )


def run_logits(work: Work, number: int) -> dict[str, Any]:
    """The whole model towards the teacher's logits, with the features it began with."""
    s = work.settings
    train = s.train
    if s.train == "lora":
        attach_adapters(work)
        train = "as_is"
    return _train_logits(work, number, "logits", 0, s.steps_before_settling, train)


def run_settle(work: Work, number: int) -> dict[str, Any]:
    """Random features become maps."""
    return {"layers": settle_features(work.student)}


def run_logits_settled(work: Work, number: int) -> dict[str, Any]:
    """The rest of the logit stage, with maps that are trained or kept."""
    s = work.settings
    train = "weights" if s.settle == "freeze" and s.train == "all" else s.train
    if s.train == "lora":
        attach_adapters(work)
        train = "as_is"
    first = s.steps_before_settling
    return _train_logits(work, number, "logits-settled", first, s.steps - first, train)


def run_evaluate_untrained(work: Work, number: int) -> dict[str, Any]:
    """What the settings ask to measure, of the model that has only been retrofitted."""
    return _evaluate(work, "retrofitted, untrained")


def run_evaluate(work: Work, number: int) -> dict[str, Any]:
    """What the settings ask to measure; nothing for no parts."""
    return _evaluate(work, "distilled") if work.settings.eval.parts else {}


def _evaluate(work: Work, what: str) -> dict[str, Any]:
    s = work.settings
    model = bare(work.student)  # adapters are active in the model they were put into
    # Before there are adapters, a student that shares its weights with its teacher is its own softmax form.
    teacher = work.teacher or model
    results = evaluate_model(
        model, work.tokenizer, s.eval, teacher=teacher, text=work.text.held_out, progress=work.progress
    )
    results["model"]["name"] = f"{Path(s.model).name}, {what}"
    return results


STAGES: dict[str, Callable[[Work, int], dict[str, Any]]] = {
    "tune": run_tune,
    "retrofit": run_retrofit,
    UNTRAINED: run_evaluate_untrained,
    "transfer": run_transfer,
    "logits": run_logits,
    "settle": run_settle,
    "logits-settled": run_logits_settled,
    EVALUATE: run_evaluate,
}


def _train_logits(work: Work, number: int, name: str, first: int, steps: int, train: str) -> dict[str, Any]:
    s = work.settings
    whole = steps == s.steps
    return _train(
        work,
        number,
        name,
        first_row=(s.tune_steps + s.transfer_steps + first) * s.rows_per_step,
        steps=steps,
        teacher=work.teacher,
        objective="logits",
        train=train,
        learning_rate=s.learning_rate,
        feature_learning_rate=s.feature_learning_rate,
        part_of=None if whole else (first, s.steps),
        warmup_steps=min(s.warmup, steps),
        temperature=s.temperature,
        cross_entropy_weight=s.cross_entropy_weight,
        chunk_size=s.chunk_size,
    )


def _train(work: Work, number: int, name: str, *, first_row: int, steps: int, **given: Any) -> dict[str, Any]:
    s = work.settings
    directory = work.directory.checkpoints(number, name)
    again = last_checkpoint(directory)
    if again is not None:
        work.say(f"resuming from {again}")
    checkpointing: dict[str, Any] = {}
    if s.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    # The trainer prints its losses; standard output belongs to the caller.
    with contextlib.redirect_stdout(sys.stderr), _logged_to(work.directory.path / "runs" / f"{number:02}-{name}"):
        result = distill(
            work.student,
            dataset=work.text.rows(first_row, steps * s.rows_per_step),
            steps=steps,
            output_dir=directory,
            schedule=s.schedule,
            batch_size=s.batch_size,
            gradient_accumulation_steps=s.accumulation,
            compile=s.compile,
            cuda_graph=s.cuda_graph,
            bf16=s.bf16 if s.bf16 is not None else (None if _on_gpu(work) else False),
            save_steps=s.save_every or None,
            resume=again or False,
            seed=s.seed,
            progress=work.progress,
            callbacks=work.callbacks,
            adam_beta2=s.adam_beta2,
            max_grad_norm=s.max_grad_norm,
            logging_steps=max(1, steps // 100),
            save_total_limit=2,
            report_to=s.report_to,
            use_cpu=not _on_gpu(work),
            **checkpointing,
            **given,
        )
    if s.gradient_checkpointing:
        bare(work.student).gradient_checkpointing_disable()
    return result


@contextlib.contextmanager
def _logged_to(directory: Path) -> Iterator[None]:
    """Inside this context TensorBoard's files go there, and not to the checkpoints, which do not stay."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        del os.environ[name]


def _on_gpu(work: Work) -> bool:
    return next(work.student.parameters()).device.type == "cuda"


def attach_adapters(work: Work) -> None:
    """Wrap the student in LoRA adapters; a teacher that is missing is what lies below them."""
    s = work.settings
    work.student = with_adapters(
        work.student, rank=s.lora_rank, alpha=s.lora_alpha, targets=s.lora_targets, seed=s.seed
    )
    if work.teacher is None:
        work.teacher = frozen_copy(work.student)


def bare(student: Any) -> PreTrainedModel:
    """The Transformers model inside a PEFT wrapper, adapters and all; any other model as it is."""
    return student.get_base_model() if hasattr(student, "peft_config") else student


def save_student(work: Work, directory: Path) -> None:
    """What a stage leaves of the student: the model, or of a model with adapters these alone."""
    if hasattr(work.student, "peft_config"):
        work.student.save_pretrained(directory / ADAPTER)
    else:
        work.student.save_pretrained(directory / MODEL)
        work.tokenizer.save_pretrained(directory / MODEL)


def load_student(work: Work) -> None:
    """The student as the last finished stage left it, in place of the softmax model that takes the teacher's role."""
    s, original = work.settings, work.student
    path = work.directory.latest(MODEL)
    assert path is not None
    device, dtype = original.device, original.dtype

    def load(path: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    if s.tune_steps:
        # The teacher is not what the run began with, but what the first stage made of it.
        tuned = work.directory.path / work.directory.finished[0]["directory"] / MODEL
        original = load(tuned)
        if path == tuned:
            work.student = original
            return
    if work.teacher is None and not shares_teacher(s):
        work.teacher = frozen_copy(original) if srf_attentions(original) else original.requires_grad_(False)
    work.student = load(path)
    adapter = work.directory.latest(ADAPTER)
    if adapter is not None:
        from peft import PeftModel

        work.student = PeftModel.from_pretrained(work.student, adapter).eval()
        if work.teacher is None:
            work.teacher = frozen_copy(work.student)


def save_final(work: Work) -> PreTrainedModel:
    """Write the final model, and the adapter beside it; the student is a plain Transformers model afterwards."""
    s, student = work.settings, work.student
    path = work.directory.path
    if hasattr(student, "peft_config"):
        # What the adapter belongs to is the retrofitted model below it, not the softmax model that was loaded.
        below = work.directory.latest(MODEL) if s.lora_merge else path / MODEL
        student.peft_config["default"].base_model_name_or_path = str(Path(below or path).absolute())
        with atomic_directory(path / ADAPTER, overwrite=True, mark="adapter_config.json") as scratch:
            student.save_pretrained(scratch)
        work.teacher = None  # it may share the weights that merging changes
        student = student.merge_and_unload() if s.lora_merge else student.unload()
    student = student.eval()
    with atomic_directory(path / MODEL, overwrite=True, mark="config.json") as scratch:
        student.save_pretrained(scratch)
        work.tokenizer.save_pretrained(scratch)
    work.student = student
    return student


def describe(settings: DistillSettings) -> dict[str, Any]:
    """Settings as they are saved with the run."""
    return to_dict(settings)
