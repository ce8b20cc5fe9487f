"""The softmax model tuned on the text before it is retrofitted is the teacher, also of a run that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG
from distill_runs import STEPS, Interrupt, distil, losses, small, write_text
from toy_tokenizers import byte_llama, byte_tokenizer
from transformers import AutoModelForCausalLM

from srf_retrofit import retrofit
from srf_retrofit.evaluation.settings import EvalSettings
from srf_retrofit.pipeline import run as pipeline
from srf_retrofit.pipeline import stages
from srf_retrofit.training.distillation import distill

TUNE: dict[str, Any] = {"tune_tokens": 4 * 256, "tune_learning_rate": 1e-2, "eval": EvalSettings(parts=())}
IDS = torch.arange(40, 140).unsqueeze(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, *distil(small(output, text, **TUNE))


def test_what_was_tuned_is_retrofitted_and_teaches(tmp_path, text, uninterrupted, monkeypatch) -> None:
    output, _, results = uninterrupted
    assert [line["name"] for line in results["stages"]] == ["tune", "retrofit", "logits", "evaluate"]
    tuning = losses(results, "tune")
    assert tuning[-1] < tuning[0] - 0.5
    with torch.no_grad():
        tuned = AutoModelForCausalLM.from_pretrained(output / "stages/01-tune/model")(IDS).logits
        assert not torch.allclose(tuned, byte_llama()(IDS).logits, atol=0.1)

    seen: list[tuple[str, list[int]]] = []

    def note(student: Any, teacher: Any = None, *, dataset: Any, objective: str, **given: Any) -> Any:
        seen.append((objective, list(dataset.indices)))
        if objective == "logits":
            with torch.no_grad():
                assert torch.equal(teacher(IDS).logits, tuned)
        return distill(student, teacher, dataset, objective=objective, **given)

    monkeypatch.setattr(stages, "distill", note)
    distil(small(tmp_path / "out", text, **TUNE))
    # No text is read twice as long as there is enough.
    assert seen == [("text", list(range(16))), ("logits", list(range(16, 16 + 4 * STEPS)))]


@pytest.mark.parametrize(("training", "step"), [(1, 3), (2, 1), (2, 4)])
def test_an_interrupted_run_has_the_same_teacher(tmp_path, text, uninterrupted, training, step) -> None:
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, **TUNE), callbacks=[Interrupt(step, training)])
    model, results = distil(small(tmp_path / "out", text, resume=True, **TUNE))
    _, whole, expected = uninterrupted
    for stage in ("tune", "logits"):
        assert losses(results, stage) == pytest.approx(losses(expected, stage), rel=1e-6)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)


def test_a_run_that_stopped_between_tuning_and_surgery_goes_on(tmp_path, text, uninterrupted, monkeypatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(stages.STAGES, "retrofit", stop)
        with pytest.raises(KeyboardInterrupt):
            distil(small(tmp_path / "out", text, **TUNE))
    _, results = distil(small(tmp_path / "out", text, resume=True, **TUNE))
    assert losses(results, "logits") == pytest.approx(losses(uninterrupted[2], "logits"), rel=1e-6)


def test_adapters_lie_on_what_was_tuned(tmp_path, text) -> None:
    model, results = distil(small(tmp_path / "out", text, train="lora", **TUNE))
    assert list(results["training"]) == ["tune", "logits"]
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out/stages/01-tune/model")
    assert torch.equal(model.model.embed_tokens.weight, tuned.model.embed_tokens.weight)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, tuned.model.layers[0].self_attn.q_proj.weight)


def test_what_cannot_be_tuned(tmp_path, text) -> None:
    with pytest.raises(ValueError, match=r"the tuned model the teacher, but teacher='exact': leave one of them out"):
        small(tmp_path, text, teacher="exact", **TUNE)
    with pytest.raises(ValueError, match=r"tune_tokens trains all weights, which needs dtype float32, got 'bfloat16'"):
        small(tmp_path, text, dtype="bfloat16", train="lora", **TUNE)
    with pytest.raises(ValueError, match=r"tune_tokens=100 is less than one step of tokens_per_step=256"):
        small(tmp_path, text, **{**TUNE, "tune_tokens": 100})
    model = byte_llama()
    retrofit(model, CONFIG)
    with pytest.raises(ValueError, match=r"tune_tokens is for a softmax model, and this one is retrofitted"):
        pipeline.distill_model(model, byte_tokenizer(), small(tmp_path / "out", text, **TUNE), progress=False)
    with pytest.raises(ValueError, match=r"tune_tokens=1,024,000 are 16,024 rows of 64\): give more text"):
        distil(small(tmp_path / "out", text, **{**TUNE, "tune_tokens": 4000 * 256}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"objective 'text' has no teacher"):
        distill(model, byte_llama(), None, steps=1, output_dir=tmp_path, objective="text")
