"""When training draws new features: never between a forward and its backward, and the same in every process.

The projection of a layer is a pure function of (seed, step, layer), so all that a schedule decides is which step's
draw is in force. That is again a pure function, of the trainer's global step: a run that is resumed, or that runs in
several processes, needs no communication and no saved random state to have the same features.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..modeling.features import SRFFeatures

logger = logging.getLogger(__name__)

_FORMS = "'every_step', 'every:N', 'settle:FRACTION', 'every:N,settle:FRACTION' or 'fixed'"


@dataclass(frozen=True)
class ResampleSchedule:
    """Which step's draw of the features is in force at each optimizer step.

    Parameters
    ----------
    every : int
        Draw at optimizer steps 0, `every`, `2 every`, ...; 0 never draws and leaves the features as they are.
    settle : float, optional
        Fraction of the training, strictly between 0 and 1, after which the last draw is kept. Features that settle
        let the weights grow accustomed to the draw that the model will be used with. `None` never settles.

    Raises
    ------
    TypeError, ValueError
        For values of another type or outside these ranges.
    """

    every: int = 1
    settle: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"every must be a whole number of optimizer steps, got {self.every!r}")
        if self.every < 0:
            raise ValueError(f"every must be >= 1, or 0 for fixed features, got {self.every}")
        if self.settle is None:
            return
        if isinstance(self.settle, bool) or not isinstance(self.settle, (int, float)):
            raise TypeError(f"settle must be a fraction of the training, got {self.settle!r}")
        if not 0 < self.settle < 1:
            raise ValueError(
                f"settle must be strictly between 0 and 1, got {self.settle}: leave it out to resample to the end, "
                "use 'fixed' never to resample"
            )
        if not self.every:
            raise ValueError("fixed features are settled from the start: leave out settle")

    @classmethod
    def parse(cls, text: str | ResampleSchedule) -> ResampleSchedule:
        """Read `'every_step'`, `'every:N'`, `'settle:FRACTION'`, `'every:N,settle:FRACTION'` or `'fixed'`.

        Raises
        ------
        TypeError, ValueError
            For anything else; the message names the part that was not understood.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a schedule is {_FORMS}, got {text!r}")
        fields: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition(":")
            if name == "every_step" and not value:
                name, value = "every", "1"
            elif name == "fixed" and not value:
                name, value = "every", "0"
            elif name == "every" and value.strip() == "0":
                raise ValueError(f"schedule {text!r}: every must be >= 1; use 'fixed' never to resample")
            if name not in ("every", "settle"):
                raise ValueError(f"schedule {text!r}: {part.strip()!r} is not known; a schedule is {_FORMS}")
            if name in fields:
                raise ValueError(f"schedule {text!r} sets {name} twice")
            try:
                fields[name] = int(value) if name == "every" else float(value)
            except ValueError:
                kind = "a whole number of steps" if name == "every" else "a fraction"
                raise ValueError(f"schedule {text!r}: {name} takes {kind}, got {value!r}") from None
        return cls(**fields)

    def __str__(self) -> str:
        if not self.every:
            return "fixed"
        every = "every_step" if self.every == 1 else f"every:{self.every}"
        return every if self.settle is None else f"{every},settle:{self.settle!r}"

    def settles_at(self, max_steps: int) -> int | None:
        """First optimizer step that never draws again, or `None` when the features do not settle."""
        return None if self.settle is None else math.ceil(self.settle * max_steps)

    def features_step(self, step: int, max_steps: int) -> int | None:
        """The step whose draw is in force at optimizer step `step` of `max_steps`; `None` when nothing is drawn.

        Raises
        ------
        ValueError
            When `step` is negative, or the schedule settles and `max_steps` is not known (`<= 0`).
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if not self.every:
            return None
        settles_at = self.settles_at(max_steps)
        if settles_at is not None:
            if max_steps <= 0:
                raise ValueError(f"schedule '{self}' needs the length of the training, got max_steps={max_steps}")
            step = min(step, settles_at - 1)
        return step - step % self.every


def feature_modules(model: nn.Module) -> list[SRFFeatures]:
    """The features of every retrofitted layer, however the model is wrapped (PEFT, DDP, FSDP, `torch.compile`)."""
    return [module for module in model.modules() if isinstance(module, SRFFeatures)]


def resample_features(model: nn.Module, step: int) -> int:
    """Give every retrofitted layer the draw of (its seed, `step`, its index), in place; the geometry stays.

    For training loops written by hand: call it before the first forward of an optimizer step, never between a forward
    and its backward (a checkpointed recomputation would silently see other features than the forward did).

    Parameters
    ----------
    model : nn.Module
        A retrofitted model, wrapped or not.
    step : int
        Optimizer step, `>= 0`. Equal steps give equal features, in every process and after every restart.

    Returns
    -------
    int
        Number of layers that were resampled.

    Raises
    ------
    TypeError, ValueError
        When `step` is not an integer `>= 0`, or the model has no retrofitted layer.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an integer, got {step!r}")
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    layers = _required_features(model)
    for features in layers:
        features.resample(step)
    return len(layers)


class ResampleFeaturesCallback(TrainerCallback, ExportableState):
    """Draws new random features at the beginning of optimizer steps, for `transformers.Trainer` and its subclasses.

    A draw happens only where an optimizer step begins: the forwards of one gradient accumulation share their features,
    as do a forward and its checkpointed recomputation, and evaluation sees those of the last training step. A resumed
    run has the features that it would have had without the interruption, settled ones included.

    Every line of `state.log_history` gets `srf/features_step`, the step whose draw is in force. Schedule, length of the
    run and seed are saved in `trainer_state.json`; a resume that would change them is warned about.

    Parameters
    ----------
    schedule : str or ResampleSchedule
        `'every_step'`, `'every:N'`, `'settle:FRACTION'` (every step up to there, then fixed),
        `'every:N,settle:FRACTION'`, or `'fixed'` (the features stay as the model has them).

    Raises
    ------
    TypeError, ValueError
        For a schedule that cannot be read; and, from the trainer, for a model without retrofitted layers, layers that
        redraw on every call, or an FSDP2 set-up that cannot load persistent buffers.
    """

    def __init__(self, schedule: str | ResampleSchedule = "every_step") -> None:
        self.schedule = ResampleSchedule.parse(schedule)
        self.features_step: int | None = None
        self.seed: int | None = None
        self.max_steps: int | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps."""
        return {
            "args": {"schedule": str(self.schedule)},
            "attributes": {"features_step": self.features_step, "seed": self.seed, "max_steps": self.max_steps},
        }

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot work before any time is spent on it."""
        if model is not None:
            self._check(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Draw the features of the first step: an evaluation before it then sees what a resumed run would see."""
        assert model is not None
        layers = self._check(model)
        self.seed, self.max_steps = layers[0].config.seed, state.max_steps
        self._compare_with_checkpoint(state)
        self.features_step = None  # whatever a checkpoint brought, it is drawn afresh
        self._resample(layers, state)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Once per optimizer step, before the first forward of its gradient accumulation."""
        assert model is not None
        self._resample(feature_modules(model), state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `srf/features_step` to the history, and to `logs` for the callbacks that come after this one."""
        if self.features_step is None:
            return
        # The trainer has already appended a copy of `logs` to the history.
        for line in (logs, state.log_history[-1] if state.log_history else None):
            if line is not None:
                line["srf/features_step"] = self.features_step

    def _resample(self, layers: list[SRFFeatures], state: TrainerState) -> None:
        step = self.schedule.features_step(state.global_step, state.max_steps)
        if step is None or step == self.features_step:
            return
        for features in layers:
            features.resample(step)
        self.features_step = step

    def _check(self, model: nn.Module) -> list[SRFFeatures]:
        layers = _required_features(model)
        if any(features.redraw_on_call for features in layers):
            raise ValueError(
                "redraw_on_call_ is on: the model would draw again before every forward, also within one gradient "
                "accumulation; switch it off (redraw_on_call_(False)) and let the schedule decide"
            )
        plugin = getattr(AcceleratorState(), "fsdp_plugin", None) if AcceleratorState._shared_state else None
        if getattr(plugin, "fsdp_version", 1) == 2 and getattr(plugin, "cpu_ram_efficient_loading", False):
            raise ValueError(
                "accelerate's FSDP2 with cpu_ram_efficient_loading cannot load models with persistent buffers, such "
                "as these features: set fsdp_cpu_ram_efficient_loading to false in the accelerate configuration "
                "(FSDP_CPU_RAM_EFFICIENT_LOADING=false)"
            )
        return layers

    def _compare_with_checkpoint(self, state: TrainerState) -> None:
        stored = state.stateful_callbacks
        if not isinstance(stored, dict):
            return
        # A trainer that resumes a checkpoint made without this callback would otherwise fail at its first save.
        before = stored.setdefault(type(self).__name__, self.state())
        if not state.global_step or not isinstance(before, dict):
            return
        old = {**before.get("args", {}), **before.get("attributes", {})}
        new = {"schedule": str(self.schedule), "seed": self.seed}
        if self.schedule.settle is not None:
            new["max_steps"] = self.max_steps
        changed = [f"{k} was {old[k]!r}, is {v!r}" for k, v in new.items() if old.get(k) is not None and old[k] != v]
        if changed:
            logger.warning(
                "the features of this resumed run will differ from those of the run that was saved: %s",
                "; ".join(changed),
            )


def _required_features(model: nn.Module) -> list[SRFFeatures]:
    layers = feature_modules(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no retrofitted layers: call retrofit(model) first")
    return layers
