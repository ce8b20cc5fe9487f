"""Small distillations: a byte-level Llama of two layers, a page of random sentences, settings of seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from builders import CONFIG
from toy_tokenizers import WORDS, byte_llama, byte_tokenizer
from transformers import TrainerCallback

from srf_retrofit.evaluation.settings import EvalSettings
from srf_retrofit.pipeline import run as pipeline
from srf_retrofit.pipeline.settings import DistillSettings

EVAL = EvalSettings(length=64, tokens=256, modes=("full", "no_tail"))
STEPS = 6


def write_text(directory: Path, documents: int = 80) -> Path:
    """Sentences of known words in random order, one document a line; no two are the same."""
    draw, words = random.Random(0), WORDS.split()
    path = directory / "text.jsonl"
    rows = [" ".join(draw.choices(words, k=50)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def small(output: Path, text: Path | tuple[str, ...], **given: Any) -> DistillSettings:
    """Six steps of four rows of 64 tokens, in two forwards each."""
    values: dict[str, Any] = {
        "model": "bytes", "text": text if isinstance(text, tuple) else str(text), "output": str(output),
        "length": 64, "batch_size": 2, "tokens_per_step": 256, "tokens": STEPS * 256, "calibration_tokens": 256,
        "learning_rate": 1e-3, "device": "cpu", "save_every": 2, "weigh_features": False, "srf": CONFIG, "eval": EVAL,
    }  # fmt: skip
    return DistillSettings(**{**values, **given})


class Interrupt(TrainerCallback):
    """Raises at the end of one step of the training number `training`, as a machine that goes down would stop."""

    def __init__(self, step: int, training: int = 1) -> None:
        self.step, self.training, self.begun = step, training, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.begun == self.training and state.global_step == self.step:
            raise KeyboardInterrupt


def losses(results: dict[str, Any], stage: str) -> list[float]:
    """The logged losses of a training."""
    return [line["loss"] for line in results["training"][stage]["history"] if "loss" in line]


def distil(settings: DistillSettings, **given: Any) -> tuple[Any, dict[str, Any]]:
    """The byte-level Llama distilled as the settings say: the model and the results."""
    return pipeline.distill_model(byte_llama(), byte_tokenizer(), settings, progress=False, **given)
