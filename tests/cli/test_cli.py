"""The command line: recipes and options meet, JSON is JSON, mistakes are one line and exit status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from srf_retrofit import demo, recipes
from srf_retrofit.bench import operator as benchmark
from srf_retrofit.cli import main as cli
from srf_retrofit.modeling.configuration import SRFConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def retrofitted(llama, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    recipe = out.parent / "recipe.yaml"
    recipe.write_text("calibration_tokens: 512\nlength: 64\nsrf: {window: 8, sinks: 2, retained: 8}\n")
    result = run(
        "retrofit", "--model", llama, "--text", text, "--output", out, "--config", recipe, "--window", 4, "--json"
    )
    summary = json.loads(result.stdout)
    assert summary["settings"]["srf"]["window"] == 4
    assert summary["settings"]["srf"]["sinks"] == 2
    return out


def test_retrofit_saves_a_model_that_loads(retrofitted) -> None:
    model = AutoModelForCausalLM.from_pretrained(retrofitted)
    assert type(model).__name__ == "SRFLlamaForCausalLM"
    config = model.config.srf_config
    assert (config.window, config.sinks, config.retained, config.num_features) == (4, 2, 8, 64)
    assert model.model.layers[0].self_attn.attn_fn.query_shift.abs().sum() > 0
    saved = json.loads((retrofitted / "recipe.json").read_text())
    assert recipes.resolve(cli.RetrofitSettings, saved).srf == config


def test_output_is_protected(retrofitted, llama, text) -> None:
    before = sorted(p.name for p in retrofitted.iterdir())
    result = run("retrofit", "--model", llama, "--text", text, "--output", retrofitted, status=2)
    assert "is not empty: choose another, or pass --overwrite" in result.stderr
    assert sorted(p.name for p in retrofitted.iterdir()) == before


def test_failure_writes_nothing(llama, text, tmp_path, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    arguments = ["--model", llama, "--text", text, "--length", 64, "--calibration-tokens", 512]
    result = run("retrofit", *arguments, "--output", tmp_path / "out", status=2)
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_plan_changes_and_loads_nothing(llama) -> None:
    result = run("plan", "--model", llama, "--layers", "1", "--json")
    assert isinstance(json.loads(result.stdout), dict)
    assert "\n" in run("plan", "--model", llama).stdout


def test_eval(retrofitted, llama, text) -> None:
    arguments = ["--text", text, "--length", 64, "--tokens", 512, "--json"]
    theirs = json.loads(run("eval", "--model", llama, *arguments).stdout)
    mine = json.loads(run("eval", "--model", retrofitted, "--teacher", llama, *arguments).stdout)
    assert list(theirs["perplexity"]) == ["full"]
    assert set(mine["perplexity"]) == {"full", "no_tail", "tail_only", "no_retained"}
    tokens = {cell["tokens"] for found in (theirs, mine) for cell in found["perplexity"].values()}
    assert len(tokens) == 1
    assert mine["distance"]["kl"] > 0
    assert "perplexity" in run("eval", "--model", llama, *arguments[:-1]).stdout


def test_eval_parts_beside_the_teacher(retrofitted, llama, text, tmp_path) -> None:
    recipe, task, out = tmp_path / "eval.yaml", tmp_path / "pick.jsonl", tmp_path / "out"
    recipe.write_text("parts: [lengths]\npairs: [4]\ngaps: [0]\ndepths: [0.5]\ntrials: 1\nmodes: [full]\n")
    task.write_text(json.dumps({"context": "w1 w2", "choices": [" w3", " w4"], "gold": 1}) + "\n")
    arguments = ["--config", recipe, "--text", text, "--length", 64, "--lengths", "32,64", "--tasks", task]
    small = ["--recall", "--distances", "40", "--contexts", "96", "--trials", 2, "--device", "cpu"]
    result = run("eval", "--model", retrofitted, "--teacher", "exact", *arguments, *small, "--output", out, "--json")
    found = json.loads(result.stdout)
    assert {"lengths", "copy", "mqar", "passkey", "tasks", "teacher"} <= set(found)
    assert not {"perplexity", "head_error"} & set(found)
    assert list(found["lengths"]["full"]) == ["32", "64"]
    assert found["copy"]["full"][0]["rows"] == 2  # the option, not the recipe
    assert sorted(p.name for p in out.iterdir()) == ["report.md", "report.png", "results.json"]
    assert json.loads((out / "results.json").read_text()) == found
    without = run("eval", "--model", llama, *arguments, "--no-recall", "--device", "cpu").stdout
    assert "perplexity at 64" in without
    assert "pick acc" in without
    assert "copy" not in without


def test_all_text_is_one_text(llama, text) -> None:
    """Nothing stands between the sections of a file: every token of it but the first is predicted."""
    words = len(text.read_text().split())
    arguments = ["--model", llama, "--text", text, "--all-text", "--length", 600, "--tokens", words, "--json"]
    found = json.loads(run("eval", *arguments).stdout)
    assert found["perplexity"]["full"]["tokens"] == words // 600 * 599
    first = AutoTokenizer.from_pretrained(llama)(text.read_text())["input_ids"][:600]
    ids = torch.tensor([first])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(llama)(ids, labels=ids).loss
    one = json.loads(run("eval", *arguments[:-3], "--tokens", 600, "--json").stdout)
    assert one["perplexity"]["full"]["nll"] == pytest.approx(float(wanted), rel=1e-4)


def test_generate(retrofitted) -> None:
    arguments = ["generate", "w1 w2 w3", "--model", retrofitted, "--new-tokens", 5, "--json"]
    first, second = (json.loads(run(*arguments).stdout) for _ in range(2))
    assert first == second
    assert set(first) == {"model", "prompt", "text"}
    assert "error: the prompt is empty" in run("generate", " ", "--model", retrofitted, status=2).stderr


@pytest.mark.parametrize(
    ("what", "keys"),
    [("attention", {"forward", "forward_backward"}), ("decode", {"vs_softmax", "state_bytes"}), ("seed", {"speedup"})],
)
def test_bench_ends_in_one_line_of_json(what, keys, tmp_path, monkeypatch) -> None:
    # Peak memory is measured in fresh processes, too slow to repeat here.
    monkeypatch.setattr(benchmark, "peak_memory", lambda *a: dict.fromkeys(a[-1], 1.0))
    sizes = ["--lengths", "64" if what == "seed" else "64,128", "--heads", 2, "--kv-heads", 1, "--head-dim", 16]
    path = tmp_path / "bench.json"
    result = run("bench", what, *sizes, "--device", "cpu", "--repeats", 1, "--output", path, "--json")
    found = json.loads(result.stdout)
    assert keys <= set(found)
    assert json.loads(path.read_text()) == found
    assert found["head_dim"] == 16


def test_errors_are_one_line(tmp_path, llama, text) -> None:
    def error(*arguments: object) -> str:
        result = run(*arguments, status=2)
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in result.output
        return lines[-1]

    assert "cannot load" in error("plan", "--model", tmp_path)
    assert "bench measures attention, decode, train or seed, got 'speed'" in error("bench", "speed")
    assert "expected numbers like 1024,4096" in error("bench", "--device", "cpu", "--lengths", "1k")
    assert "heads=4 must be a multiple" in error("bench", "--device", "cpu", "--heads", 4)
    assert "no output directory" in error("retrofit", "--model", llama)
    assert "window must be >= 0, got -3" in error("plan", "--model", llama, "--window", -3)
    assert "layers must look like 0-3,7" in error("plan", "--model", llama, "--layers", "x")
    assert "no such recipe" in error("plan", "--config", tmp_path / "none.yaml")
    assert "no such text file" in error("eval", "--model", llama, "--text", tmp_path / "none.txt")
    assert "fill one block" in error("eval", "--model", llama, "--text", text, "--length", 10**6)
    assert "no such task file" in error("eval", "--model", llama, "--tasks", "none.jsonl")
    assert "parts must be among" in error("eval", "--model", llama, "--parts", "speed")
    assert "dtype must be one of" in error("eval", "--model", llama, "--dtype", "int8")


def test_debug_keeps_the_traceback(tmp_path) -> None:
    result = CliRunner().invoke(cli.app, ["--debug", "plan", "--model", str(tmp_path)])
    assert isinstance(result.exception, ValueError)


def test_parse_layers() -> None:
    assert cli.parse_layers("0-3, 7") == [0, 1, 2, 3, 7]
    with pytest.raises(ValueError, match="runs backwards"):
        cli.parse_layers("5-3")


@pytest.mark.parametrize("name", ["demo", "quick", "large_window"])  # the others: test_cli_distill
def test_recipes_resolve(name) -> None:
    kind = cli.RetrofitSettings if name == "large_window" else demo.DemoSettings
    assert recipes.resolve(kind, recipes.read_recipe(CONFIGS / f"{name}.yaml")).srf


def test_demo_recipe_states_the_defaults() -> None:
    assert recipes.resolve(demo.DemoSettings, recipes.read_recipe(CONFIGS / "demo.yaml")) == demo.DemoSettings()
    assert demo.DemoSettings().srf == SRFConfig(num_features=16, retained=120, state_dtype="bfloat16")
