"""A model as it was before an accelerator prepared it for training."""

from __future__ import annotations

import inspect

from torch import nn


def release(model: nn.Module) -> None:
    """Take back what preparing for mixed precision left on a model, in place.

    Accelerate lays autocast around `model.forward` and marks the model as prepared. Its `unwrap_model(model,
    keep_fp32_wrapper=False)` leaves the mark, and takes the decorators of the class's own `forward` off as well. The
    next trainer then leaves a marked model alone: it trains in the precision of the weights whatever its arguments
    say, several times as slowly, without a word.

    Parameters
    ----------
    model : nn.Module
        What the user has, or `trainer.model`: not the wrapper of a process group.
    """
    if not model.__dict__.pop("_is_accelerate_prepared", False):
        return
    own = type(model).forward
    forward, before = model.__dict__.pop("forward", None), model.__dict__.pop("_original_forward", None)
    bound = forward if before is None else before
    # Any other forward was there before, and somebody wanted it.
    if bound is not None and getattr(bound, "__func__", None) not in (own, inspect.unwrap(own)):
        model.__dict__["forward"] = bound
