"""The demonstration end to end: on a tiny Llama for its every promise, on the real SmolLM2 in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shell import run

from srf_retrofit import demo, recipes

QUICK = Path(__file__).resolve().parent.parent / "configs" / "quick.yaml"


def settings(**changes: object) -> demo.DemoSettings:
    return recipes.resolve(demo.DemoSettings, recipes.read_recipe(QUICK), **changes)


def test_tiny_demo(llama, text, tmp_path) -> None:
    out = tmp_path / "out"
    small = ["--length", "64", "--steps", "30", "--batch-size", "8", "--learning-rate", "1e-3", "--eval-tokens", "2048"]
    state = ["--num-features", "16", "--window", "8", "--sinks", "2", "--retained", "8"]
    places = ["--model", llama, "--text", text, "--output", out]
    result = run("demo", "--config", QUICK, *places, *small, *state, "--json")
    results = json.loads(result.stdout)  # and nothing else on standard output
    assert sorted(p.name for p in out.iterdir()) == ["model", "report.md", "report.png", "results.json"]
    assert json.loads((out / "results.json").read_text()) == results
    assert results["reload"] == {"bit_equal": True, "max_difference": 0.0}
    assert results["distance"]["tuned"]["kl"] < results["distance"]["zero_shot"]["kl"]
    assert set(results["perplexity"]) == {"teacher", "zero_shot", "tuned"}
    assert set(results["perplexity"]["tuned"]) == {"full", "no_tail", "tail_only"}
    spans = {cell["tokens"] for row in results["perplexity"].values() for cell in row.values()}
    assert len(spans) == 1


def test_refusals_come_before_work(llama, text, tmp_path, monkeypatch) -> None:
    def never(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(demo, "distil", never)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        demo.run(settings(model=str(llama), output=str(tmp_path / "full")), quiet=True)
    with pytest.raises(ValueError, match="calibration text: .* fill one block of 5000"):
        demo.run(settings(model=str(llama), text=str(text), output=str(tmp_path / "o"), length=5000), quiet=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"resample": "often"}, "'often' is not known"),
        ({"geometry": "flat"}, "geometry must be one of"),
    ],
)
def test_bad_settings(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        demo.DemoSettings(**change)


def test_a_reload_that_fails_is_said(tmp_path, llama) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(RuntimeError, match="could not be loaded in a fresh process"):
        demo.reload(model, tmp_path, torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.real
@pytest.mark.timeout(1500)
def test_real_demo_in_small(tmp_path) -> None:
    out = tmp_path / "out"
    results = demo.run(settings(output=str(out)), quiet=True)
    assert results["reload"]["bit_equal"]
    perplexity = {name: row["full"]["ppl"] for name, row in results["perplexity"].items()}
    assert perplexity["teacher"] < perplexity["zero_shot"] < 3 * perplexity["teacher"]
    assert results["distance"]["tuned"]["kl"] < results["distance"]["zero_shot"]["kl"]
    assert len(results["head_error"]["tuned"]) == 30
    assert all(sample["teacher"] for sample in results["samples"])
    assert (out / "report.md").read_text().startswith("# SmolLM2-135M-Instruct, retrofitted")
