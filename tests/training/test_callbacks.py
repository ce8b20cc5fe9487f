"""Schedules are pure functions of the step; the callback applies them and refuses what cannot work."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from srf_retrofit import SRFConfig
from srf_retrofit.modeling.random_features import draw_projection
from srf_retrofit.surgery import retrofit
from srf_retrofit.testing import tiny_llama
from srf_retrofit.training import callbacks
from srf_retrofit.training.callbacks import (
    ResampleFeaturesCallback,
    ResampleSchedule,
    feature_modules,
    resample_features,
)

CONFIG = SRFConfig(num_features=8, window=4, sinks=1, retained=2, seed=3)


@pytest.fixture
def model() -> nn.Module:
    return retrofit(tiny_llama(), CONFIG)


def projections(model: nn.Module) -> list[torch.Tensor]:
    return [features.projection.clone() for features in feature_modules(model)]


@pytest.mark.parametrize(
    ("text", "every", "settle"),
    [
        ("every_step", 1, None),
        ("every:1", 1, None),
        ("every:10", 10, None),
        ("settle:0.5", 1, 0.5),
        ("every:4,settle:0.25", 4, 0.25),
        ("settle:0.1, every:2", 2, 0.1),
        ("fixed", 0, None),
    ],
)
def test_schedules_are_read_and_written(text: str, every: int, settle: float | None) -> None:
    schedule = ResampleSchedule.parse(text)
    assert schedule == ResampleSchedule(every, settle)
    assert ResampleSchedule.parse(str(schedule)) == schedule
    assert ResampleSchedule.parse(schedule) is schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not known"),
        ("sometimes", "'sometimes' is not known"),
        ("every", "every takes a whole number of steps, got ''"),
        ("every:x", "got 'x'"),
        ("every:2.5", "got '2.5'"),
        ("every:0", "use 'fixed'"),
        ("every:-2", "every must be >= 1"),
        ("settle:half", "settle takes a fraction"),
        ("settle:0", "strictly between 0 and 1"),
        ("settle:1", "strictly between 0 and 1"),
        ("settle:nan", "strictly between 0 and 1"),
        ("every:2,every:3", "sets every twice"),
        ("fixed,every:3", "sets every twice"),
        ("fixed,settle:0.5", "leave out settle"),
        ("fixed:1", "is not known"),
        ("every_step,later", "'later' is not known"),
    ],
)
def test_schedules_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResampleSchedule.parse(text)


@pytest.mark.parametrize("value", [3, None, 0.5, ["every_step"]])
def test_schedules_of_the_wrong_type(value: object) -> None:
    with pytest.raises(TypeError, match="a schedule is"):
        ResampleSchedule.parse(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="every"):
        ResampleSchedule(every=True)
    with pytest.raises(TypeError, match="settle"):
        ResampleSchedule(settle="0.5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("every_step", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:3", [0, 0, 0, 3, 3, 3, 6, 6]),
        ("settle:0.5", [0, 1, 2, 3, 3, 3, 3, 3]),
        ("settle:0.01", [0] * 8),
        ("every:2,settle:0.6", [0, 0, 2, 2, 4, 4, 4, 4]),
        ("every:3,settle:0.7", [0, 0, 0, 3, 3, 3, 3, 3]),
        ("fixed", [None] * 8),
    ],
)
def test_step_in_force(text: str, steps: list[int | None]) -> None:
    schedule = ResampleSchedule.parse(text)
    assert [schedule.features_step(step, 8) for step in range(8)] == steps


@given(st.integers(1, 50), st.floats(0.01, 0.99), st.integers(1, 400))
def test_settled_features_are_those_of_the_last_draw(every: int, settle: float, max_steps: int) -> None:
    schedule = ResampleSchedule(every, settle)
    steps = [schedule.features_step(step, max_steps) for step in range(max_steps)]
    drawn = [step for step, current in enumerate(steps) if step == current]
    settles_at = schedule.settles_at(max_steps)
    assert drawn == [step for step in range(settles_at) if step % every == 0]
    assert set(steps[drawn[-1] :]) == {drawn[-1]}
    assert steps == sorted(steps)


def test_settling_needs_the_length_of_the_training() -> None:
    assert ResampleSchedule(2).features_step(5, -1) == 4
    with pytest.raises(ValueError, match="needs the length"):
        ResampleSchedule(settle=0.5).features_step(5, -1)
    with pytest.raises(ValueError, match="step must be >= 0"):
        ResampleSchedule().features_step(-1, 10)


def test_features_are_the_draw_of_seed_step_and_layer(model: nn.Module) -> None:
    layers = feature_modules(model)
    before = projections(model)
    assert resample_features(model, 7) == len(layers) == len(model.model.layers)
    for index, (features, old) in enumerate(zip(layers, before, strict=True)):
        g, m, d = features.projection.shape
        expected = draw_projection(m, d, num_heads=g, projection="simplex", seed=3, step=7, layer=index)
        assert torch.equal(features.projection, expected)
        assert not torch.equal(features.projection, old)
    resample_features(nn.ModuleDict({"wrapped": nn.Sequential(model)}), 0)
    assert all(map(torch.equal, projections(model), before))


def test_resampling_leaves_geometry_and_weights_alone(model: nn.Module) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items() if not name.endswith("attn_fn.projection")}
    resample_features(model, 5)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_bad_steps_and_models(model: nn.Module) -> None:
    before = projections(model)
    for step in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="step must be an integer"):
            resample_features(model, step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be >= 0"):
        resample_features(model, -1)
    with pytest.raises(ValueError, match="no retrofitted layers: call retrofit"):
        resample_features(tiny_llama(), 0)
    assert all(map(torch.equal, projections(model), before))


@pytest.fixture
def arguments(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_callback_draws_at_step_begins_only(model: nn.Module, arguments: TrainingArguments) -> None:
    callback, control = ResampleFeaturesCallback("every:2"), TrainerControl()
    state = TrainerState(max_steps=6)
    callback.on_train_begin(arguments, state, control, model=model)
    seen = []
    for step in range(6):
        state.global_step = step
        callback.on_step_begin(arguments, state, control, model=model)
        current = projections(model)
        for event in ("on_substep_end", "on_optimizer_step", "on_step_end", "on_evaluate", "on_save"):
            getattr(callback, event)(arguments, state, control, model=model)
        assert all(map(torch.equal, projections(model), current))
        seen.append(callback.features_step)
    assert seen == [0, 0, 2, 2, 4, 4]


def test_fixed_features_stay_what_they_are(model: nn.Module, arguments: TrainingArguments) -> None:
    resample_features(model, 41)
    before = projections(model)
    callback, state = ResampleFeaturesCallback("fixed"), TrainerState(max_steps=6, global_step=3)
    callback.on_train_begin(arguments, state, TrainerControl(), model=model)
    callback.on_step_begin(arguments, state, TrainerControl(), model=model)
    assert all(map(torch.equal, projections(model), before))
    logs = {"loss": 1.0}
    callback.on_log(arguments, state, TrainerControl(), logs=logs)
    assert logs == {"loss": 1.0}


def test_softmax_models_are_refused(arguments: TrainingArguments) -> None:
    with pytest.raises(ValueError, match="no retrofitted layers"):
        ResampleFeaturesCallback().on_init_end(arguments, TrainerState(), TrainerControl(), model=tiny_llama())


def test_layers_that_redraw_on_every_call_are_refused(model: nn.Module, arguments: TrainingArguments) -> None:
    feature_modules(model)[-1].redraw_on_call_(True)
    with pytest.raises(ValueError, match="redraw_on_call_"):
        ResampleFeaturesCallback().on_train_begin(arguments, TrainerState(max_steps=1), TrainerControl(), model=model)


@pytest.mark.parametrize(("version", "efficient", "refused"), [(2, True, True), (2, False, False), (1, True, False)])
def test_fsdp2_that_cannot_load_buffers_is_refused(
    model: nn.Module, arguments: TrainingArguments, monkeypatch, version: int, efficient: bool, refused: bool
) -> None:
    class State:
        _shared_state = ("in use",)
        fsdp_plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)

    monkeypatch.setattr(callbacks, "AcceleratorState", State)
    callback = ResampleFeaturesCallback()
    if refused:
        with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading to false"):
            callback.on_init_end(arguments, TrainerState(), TrainerControl(), model=model)
    else:
        callback.on_init_end(arguments, TrainerState(), TrainerControl(), model=model)


def test_a_resume_that_changes_the_features_is_warned_about(
    model: nn.Module, arguments: TrainingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    def resume(schedule: str, stored: str, max_steps: int = 10) -> list[str]:
        caplog.clear()
        saved = ResampleFeaturesCallback(stored)
        saved.seed, saved.max_steps = 3, 10
        state = TrainerState(max_steps=max_steps, global_step=4)
        state.stateful_callbacks = {"ResampleFeaturesCallback": saved.state()}
        ResampleFeaturesCallback(schedule).on_train_begin(arguments, state, TrainerControl(), model=model)
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING, logger="srf_retrofit.training.callbacks"):
        assert resume("settle:0.5", "settle:0.5") == []
        assert resume("every_step", "every_step", max_steps=20) == []
        (message,) = resume("every_step", "settle:0.5")
        assert "schedule was 'every_step,settle:0.5', is 'every_step'" in message
        (message,) = resume("settle:0.5", "settle:0.5", max_steps=20)
        assert "max_steps was 10, is 20" in message
