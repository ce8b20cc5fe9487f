"""What goes wrong in a training, said so that it can be acted on: where a number stopped being finite, what to make
smaller when memory ran out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def first_not_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Name of the first module whose output is not finite, found by another forward without gradients.

    Modules count in the order in which they finish, so that the innermost one is named; where its weights are to blame
    the answer says so.

    Parameters
    ----------
    model : nn.Module
    inputs : mapping
        Of its forward, without labels.

    Returns
    -------
    str or None
        None when every output is finite.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if found or not name:
            return
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        if not all(_finite(t) for t in tensors if isinstance(t, torch.Tensor)):
            damaged = [n for n, p in module.named_parameters() if not _finite(p)]
            found.append(name + (f" (its {damaged[0]} is not finite)" if damaged else ""))

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            handle = module.register_forward_hook(lambda m, _, output, name=name: look(name, m, output))
            stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        # A compiled layer would not call the hooks of what is inside it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model(**inputs)
    return found[0] if found else None


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def last_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a `Trainer`, or None; one that was cut off while it was written does not count."""
    numbered = []
    for path in Path(directory).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        # The trainer writes its state last of all.
        if number.isdecimal() and _is_json(path / "trainer_state.json"):
            numbered.append((int(number), path))
    return max(numbered)[1] if numbered else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def divergence_message(
    what: str, state: TrainerState, args: TrainingArguments, where: str | None, teacher: str | None = None
) -> str:
    """What a `FloatingPointError` of a trainer says: step, place, last good checkpoint, remedy."""
    if where is not None:
        place = f"the first output that is not finite is that of {where}"
    elif teacher is not None:
        place = f"it is the teacher whose output is not finite, in {teacher}"
    else:
        place = "the outputs of all layers are finite"
    good = last_checkpoint(args.output_dir or ".")
    saved = f"the last good checkpoint is {good}" if good else "there is no checkpoint of this stage yet"
    return (
        f"{what} at step {state.global_step + 1} of {state.max_steps}: stopped before it reaches the weights; {place}; "
        f"{saved}; lower the learning rate, lengthen the warm-up, or train in float32"
    )


class FiniteGradients(TrainerCallback):
    """Stops a training before a gradient that is not finite reaches the weights.

    Raises
    ------
    FloatingPointError
        From training; the message names the step and the last good checkpoint.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """One reduction over all gradients a step."""
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            raise FloatingPointError(divergence_message("the gradient is not finite", state, args, None))


@contextlib.contextmanager
def memory_advice(knobs: Mapping[str, Any], stage: str) -> Iterator[None]:
    """Inside this context, running out of memory names what to make smaller, in the order in which to try.

    Parameters
    ----------
    knobs : mapping
        Names of settings and their values now.
    stage : str

    Raises
    ------
    RuntimeError
        In place of the allocator's own error, which stays its cause.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in text for s in _OUT_OF_MEMORY)
        if not known:
            raise
        now = ", ".join(f"{name} ({value})" for name, value in knobs.items())
        raise RuntimeError(
            f"out of memory in the stage {stage!r}: lower, or switch on, in this order: {now}. All of these but the "
            "length may change in a run that is resumed"
        ) from error
