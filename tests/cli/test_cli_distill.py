"""`srf-retrofit distill`: recipe and options reach the run, JSON is JSON, mistakes are one line; every recipe holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distill_runs import write_text
from toy_tokenizers import byte_llama, byte_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from srf_retrofit import recipes
from srf_retrofit.cli import main as cli
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.pipeline.settings import DistillSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COMPARED = ("favor", "hedgehog", "retained", "seed", "t2r", "window")
OURS = ("hybrid", "instruct", "llama-2-7b", "llama-3.2-1b", "no_training", "pure", "pure_longer", "tuned_first")
RECIPES = (*OURS, *(f"compare/{name}" for name in COMPARED))

RECIPE = """
length: 64
batch_size: 2
tokens_per_step: 256
tokens: 9216
calibration_tokens: 256
weigh_features: false
save_every: 0
eval: {length: 64, tokens: 128, modes: [full]}
srf: {num_features: 16, window: 8, sinks: 2, retained: 4}
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[object]:
    """A recipe and the options every call needs."""
    directory = tmp_path_factory.mktemp("llama")
    byte_llama().save_pretrained(directory / "model")
    byte_tokenizer().save_pretrained(directory / "model")
    (directory / "recipe.yaml").write_text(RECIPE)
    text = write_text(directory)
    return [directory / "recipe.yaml", "--model", directory / "model", "--text", text, "--device", "cpu"]


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(cli.app, ["distill", *[str(a) for a in arguments]])
    if result.exit_code == 1 and result.exception is not None:
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_from_the_shell(given, tmp_path) -> None:
    out = tmp_path / "out"
    options = ["--output", out, "--tokens", 512, "--learning-rate", 1e-4, "--window", 4, "--no-bf16"]
    result = run(*given, *options, "--json")
    found = json.loads(result.stdout)  # nothing but JSON
    assert found == json.loads((out / "results.json").read_text())
    assert found["settings"]["learning_rate"] == 1e-4
    assert found["settings"]["srf"]["window"] == 4
    assert found["settings"]["srf"]["retained"] == 4
    assert found["training"]["logits"]["steps"] == 2
    assert found["evaluation"]["perplexity"]["full"]["tokens"] == 126
    assert "2/3 logits ..." in result.stderr
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.srf_config.window == 4
    again = run(*given, *options, "--resume")  # finished: says what it found
    assert "same next token" in again.stdout
    assert f"model: {out / 'model'}" in again.stdout
    # What was saved beside the results is a recipe of the same run.
    saved = json.loads((out / "recipe.json").read_text())
    assert recipes.resolve(DistillSettings, saved).tokens == 512


def test_mistakes_are_one_line(given, tmp_path) -> None:
    def error(*arguments: object) -> str:
        result = run(*given, *arguments, status=2)
        assert "Traceback" not in result.output
        return result.stderr.strip().splitlines()[-1]

    out = tmp_path / "out"
    assert "error: no output directory: set output" in error()
    assert "train must be one of" in error("--output", out, "--train", "x")
    assert "are needed (tokens=2,560,000" in error("--output", out, "--tokens", 2_560_000)
    assert "cannot load" in error("--output", out, "--teacher", tmp_path / "nobody")
    assert "no such text file" in error("--output", out, "--held-out", "none.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    assert "not an earlier output" in error("--output", tmp_path / "full", "--overwrite")
    assert not out.exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold(name) -> None:
    settings = recipes.resolve(DistillSettings, recipes.read_recipe(CONFIGS / f"{name}.yaml"))
    assert (settings.steps > 0) == (name not in ("no_training", "tuned_first"))
    assert settings.output is not None
    assert recipes.resolve(DistillSettings, recipes.to_dict(settings)) == settings
    if settings.train == "lora":
        assert (settings.dtype, settings.bf16, settings.gradient_checkpointing) == ("bfloat16", True, True)


def test_compared_recipes_are_all_there_and_alike() -> None:
    """One text budget, one state: of two hundred tokens of cache, within a hundredth; the same settings otherwise."""
    assert {p.stem for p in (CONFIGS / "compare").glob("*.yaml")} == set(COMPARED)
    found = [
        recipes.resolve(DistillSettings, recipes.read_recipe(CONFIGS / f"compare/{name}.yaml")) for name in COMPARED
    ]
    for settings in found:
        state = SRFState.empty(settings.srf, 1, 3, 64, dtype=torch.bfloat16, device="meta").nbytes()
        assert state / (2 * 3 * 64 * 2) == pytest.approx(198, rel=0.011)
        assert settings.tokens + settings.transfer_tokens == found[0].tokens
    assert len({(s.length, s.tokens_per_step, s.learning_rate, s.text, s.recall_share, s.eval) for s in found}) == 1
