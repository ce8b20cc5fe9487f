"""The recipe as a product: from a softmax model and text to a distilled model, its judgement and a report.

`run` loads what the settings name; `distill_model` takes loaded models. Both keep to one output directory:

    OUTPUT/model         the final model, for `AutoModelForCausalLM.from_pretrained`
    OUTPUT/adapter       of a LoRA run
    OUTPUT/recipe.json, results.json, report.md, report.png, evaluation.png
    OUTPUT/progress.json, stages/, checkpoints/    see `run_directory`

An interrupted run that is started again with `resume` goes on after its last finished stage, and inside a training
from its last checkpoint, with the losses it would have had.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from ..data import check_tokenizer
from ..evaluation.suite import check, check_files
from ..modeling.attention import srf_attentions
from ..pretrained import load_model
from ..surgery import plan_retrofit
from ..timing import choose_device, versions
from ..training.guards import memory_advice
from ..training.teacher import check_pair
from . import data as distill_data
from . import stages
from .report import write_distillation
from .run_directory import RunDirectory
from .settings import EXACT, DistillSettings, check_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

# Settings that decide how a run is done, and not what comes of it: a resumed run may change them.
CHANGEABLE = (
    "output", "overwrite", "resume", "device", "save_every", "report_to", "batch_size", "chunk_size",
    "gradient_checkpointing", "compile", "cuda_graph",
)  # fmt: skip


def run(settings: DistillSettings, *, progress: bool = True) -> dict[str, Any]:
    """Distil as the settings say.

    Parameters
    ----------
    settings : DistillSettings
    progress : bool
        Lines and bars on standard error.

    Returns
    -------
    dict
        The contents of `results.json`: `settings`, `text`, `stages`, `training` (by stage, see
        `distillation.distill`), `retrofit`, `untrained` and `evaluation` (see `evaluation.suite`; None where nothing
        was measured), `versions`.

    Raises
    ------
    ValueError
        Before anything is trained or written: for what the machine lacks, an output that may not be written or was
        begun with other settings, models that cannot be loaded, and what `distill_model` refuses.
    FloatingPointError, RuntimeError
        See `distill_model`.
    """
    check_installed(settings)
    check_files(settings.eval)
    device = choose_device(settings.device)
    _open(settings)
    dtype = getattr(torch, settings.dtype)
    model, tokenizer = load_model(settings.model, dtype)
    teacher = None
    if settings.teacher not in (None, EXACT):
        assert settings.teacher is not None
        teacher = load_model(settings.teacher, dtype)[0].to(device)  # type: ignore[arg-type]
    model.to(device)  # type: ignore[arg-type]
    return distill_model(model, tokenizer, settings, teacher=teacher, progress=progress)[1]


def distill_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    *,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Distil a loaded model, where it is; `settings.model` is but its name, `dtype` and `device` are its own.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place, unless the run resumes after its surgery: then it becomes the teacher.
    tokenizer : PreTrainedTokenizerBase
    settings : DistillSettings
        `output` must be set.
    teacher : PreTrainedModel, optional
        Where `settings.teacher` names one; otherwise what `model` is before surgery.
    callbacks : sequence of TrainerCallback
        For every training.
    progress : bool

    Returns
    -------
    PreTrainedModel, dict
        The distilled model and the results, see `run`.

    Raises
    ------
    ValueError
        Before anything is trained or written: for a tokenizer that is not the model's, a teacher that cannot teach it,
        a model that cannot be retrofitted, rows longer than its positions, and too little text.
    FloatingPointError
        When a loss or gradient is not finite; the message names the step, the layer and the last good checkpoint.
    RuntimeError
        When memory runs out; the message names what to lower.
    """
    check_installed(settings)
    directory = _open(settings)
    names = stages.plan(settings)
    _check_models(model, tokenizer, settings, teacher)
    text = distill_data.prepare(settings, tokenizer)
    check(model, settings.eval, teacher=teacher or model, text=text.held_out)
    work = stages.Work(settings, tokenizer, text, directory, model, teacher, tuple(callbacks), progress)
    del model, teacher
    directory.begin()
    set_seed(settings.seed)
    done = len(directory.finished)
    if done:
        work.say(f"{done} of {len(names)} stages are finished: going on from {directory.path}")
        with memory_advice(_knobs(settings), "load"):
            stages.load_student(work)
    for number, name in enumerate(names[done:], done + 1):
        work.say(f"{number}/{len(names)} {name} ...")
        start = time.perf_counter()
        with memory_advice(_knobs(settings), name):
            result = stages.STAGES[name](work, number)
        judged = name in (stages.UNTRAINED, stages.EVALUATE)
        leaves = None if judged else lambda path: stages.save_student(work, path)
        directory.finish(number, name, result, time.perf_counter() - start, leaves)
    final = stages.save_final(work)
    results = _results(settings, text, directory, names)
    write_distillation(results, directory.path)
    work.say(f"report: {directory.path / 'report.md'}")
    return final, results


def _open(settings: DistillSettings) -> RunDirectory:
    if settings.output is None:
        raise ValueError("no output directory: set output (--output DIR)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "the stages run in one process, but WORLD_SIZE is above 1: start it without torchrun, or use "
            "distillation.distill, which runs under DistributedDataParallel"
        )
    return RunDirectory(
        settings.output,
        stages.describe(replace(settings, overwrite=False, resume=False)),
        changeable=CHANGEABLE,
        overwrite=settings.overwrite,
        resume=settings.resume,
    )


def _check_models(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    teacher: PreTrainedModel | None,
) -> None:
    check_tokenizer(tokenizer, model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.length > positions:
        raise ValueError(f"length={settings.length} is beyond the {positions} positions of the model: lower length")
    if teacher is None and settings.teacher not in (None, EXACT):
        raise ValueError(f"settings name the teacher {settings.teacher!r}: load it and pass it as teacher")
    layers = srf_attentions(model)
    if not layers:
        plan_retrofit(model, settings.srf)
    elif (found := model.config.srf_config).replace(layers=None) != settings.srf.replace(layers=None):
        raise ValueError(
            f"the model is retrofitted already, with {found}: give the same srf to train it further, or "
            "start from the softmax model"
        )
    if layers and settings.tune_tokens:
        raise ValueError(
            "tune_tokens is for a softmax model, and this one is retrofitted: start from the softmax model, or leave "
            "tune_tokens out"
        )
    if layers and teacher is None and settings.teacher is None:
        raise ValueError(
            "the model is retrofitted, and would be the teacher of itself: name the softmax model it was made from as "
            "teacher, or set teacher: exact for its own softmax form"
        )
    if teacher is not None:
        if teacher is not model and srf_attentions(teacher):
            raise ValueError(
                "the teacher is a retrofitted model: take the softmax model it was made from, or teacher: exact"
            )
        check_pair(teacher, model)
        check_tokenizer(tokenizer, teacher)
    if settings.train != "lora" and model.dtype != torch.float32:
        raise ValueError(
            f"the model is in {model.dtype}, whose steps are too coarse to train all weights: load it in float32 "
            "(bf16: true still computes in bfloat16), or train: lora"
        )


def _knobs(settings: DistillSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("batch_size", "length", "chunk_size", "gradient_checkpointing")}


def _results(
    settings: DistillSettings, text: distill_data.DistillText, directory: RunDirectory, names: list[str]
) -> dict[str, Any]:
    found = {name: directory.result(number) for number, name in enumerate(names, 1)}
    results = {
        "settings": stages.describe(settings),
        "text": text.facts,
        "stages": directory.finished,
        "retrofit": found.pop("retrofit"),
        "training": {name: result for name, result in found.items() if "history" in result},
        "untrained": found.get(stages.UNTRAINED),
        "evaluation": found[stages.EVALUATE] or None,
        "versions": versions(("srf-retrofit", "torch", "transformers", "accelerate", "peft")),
    }
    return json.loads(json.dumps(results))  # plain JSON types, as a reader of the file gets them
