"""One call measures what it was asked to, in the modes that mean something, beside the teacher; or refuses first."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from builders import CONFIG, PURE
from toy_tokenizers import WORDS, byte_llama, byte_tokenizer

from srf_retrofit import recipes, retrofit
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation import perplexity as evaluation
from srf_retrofit.evaluation import suite as evaluation_suite
from srf_retrofit.evaluation.settings import PARTS, EvalSettings, needed_tokens
from srf_retrofit.evaluation.suite import check, evaluate_model, headline, sensible_modes, state_cost
from srf_retrofit.modeling.state import SRFState

SMALL = EvalSettings(
    parts=tuple(part for part in PARTS if part not in ("tasks", "harness")),
    length=64,
    tokens=128,
    lengths=(64, 96),
    distances=(50,),
    pairs=(4,),
    gaps=(0,),
    contexts=(160,),
    depths=(0.5,),
    trials=2,
    analysis_length=32,
    analysis_blocks=1,
    modes=("full", "no_tail", "no_retained"),
)
TEXT = TokenBlocks(torch.tensor([byte_tokenizer()(WORDS * 8)["input_ids"][:512]]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("tasks") / "pick.jsonl"
    rows = [{"context": WORDS[i : i + 20], "choices": [" a", " bc"], "gold": i % 2} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(path),)


def student(config=CONFIG, **kwargs):
    return retrofit(byte_llama(), config, **kwargs)


def test_everything_at_once(tasks) -> None:
    model, teacher = student(), byte_llama()
    settings = replace(SMALL, parts=(*SMALL.parts, "tasks"), tasks=tasks)
    found = evaluate_model(model, byte_tokenizer(), settings, teacher=teacher, text=TEXT, progress=False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["seconds"]) == set(settings.parts)
    assert list(found["perplexity"]) == ["full", "no_tail", "no_retained"]
    assert list(found["copy"]) == ["full", "no_tail"]
    assert found["tasks"]["full"]["pick"]["items"] == 3
    assert len(found["head_error"]) == len(found["tail_share"]["exact"]) == 2
    windows = TokenBlocks(TEXT.blocks.view(8, 64)[:2])
    assert found["perplexity"]["full"]["ppl"] == pytest.approx(evaluation.perplexity(model, windows).ppl, rel=1e-5)
    theirs = evaluation.perplexity(teacher, windows).ppl
    assert found["teacher"]["perplexity"] == {"full": {**found["teacher"]["perplexity"]["full"]}}
    row = next(row for row in found["against_teacher"] if row["figure"] == "perplexity")
    assert row["teacher"] == pytest.approx(theirs, rel=1e-5)
    assert row["ratio"] == pytest.approx(row["model"] / row["teacher"])
    assert row["difference"] == pytest.approx(row["model"] - row["teacher"])
    assert found["distance"]["kl"] > 0
    assert found["model"]["srf"] == CONFIG.to_dict()
    assert found["teacher"]["model"]["srf"] is None


def test_a_model_is_its_own_teacher_in_exact_form() -> None:
    settings = replace(SMALL, parts=("perplexity", "distance"))
    model = student()
    found = evaluate_model(model, byte_tokenizer(), settings, teacher=model, text=TEXT, progress=False)
    apart = evaluate_model(model, byte_tokenizer(), settings, teacher=byte_llama(), text=TEXT, progress=False)
    exact = found["teacher"]["perplexity"]["full"]["nll"]
    assert exact == pytest.approx(apart["teacher"]["perplexity"]["full"]["nll"], rel=1e-5)
    assert exact != pytest.approx(found["perplexity"]["full"]["nll"], rel=2e-6)
    assert found["distance"]["kl"] == pytest.approx(apart["distance"]["kl"], rel=1e-3)


def test_a_softmax_model_has_one_mode_and_no_features() -> None:
    found = evaluate_model(byte_llama(), byte_tokenizer(), SMALL, text=TEXT, progress=False)
    assert {mode for part in ("perplexity", "copy", "passkey") for mode in found[part]} == {"full"}
    assert not {"distance", "head_error", "tail_share", "teacher"} & set(found)
    assert found["state"] is None


def test_modes_leave_out_what_is_there() -> None:
    assert sensible_modes(byte_llama()) == ("full",)
    assert sensible_modes(student()) == evaluation.MODES
    assert sensible_modes(student(PURE)) == ("full",)
    assert sensible_modes(student(CONFIG.replace(retained=0))) == ("full", "no_tail", "tail_only")
    assert sensible_modes(student(PURE.replace(sinks=2))) == ("full", "tail_only")


def test_state_cost() -> None:
    model = student(layers=[1])
    found = state_cost(model)
    state = SRFState.empty(CONFIG, 1, 2, 16, dtype=torch.float32)
    assert found == {
        "layers": 1,
        "softmax_layers": 1,
        "state_bytes": state.nbytes(),
        "kv_bytes_per_token": 2 * 2 * 16 * 4,
        "kv_tokens": state.nbytes() / 256,
    }


def test_headline_has_one_number_a_figure() -> None:
    cells = [{"context": 100, "depth": d, "accuracy": d, "whole": 0.0} for d in (0.2, 0.4)]
    results = {
        "perplexity": {"full": {"ppl": 9.0}},
        "copy": {"full": [{"distance": 50, "accuracy": 0.5}], "no_tail": [{"distance": 50, "accuracy": 0.1}]},
        "passkey": {"full": cells},
        "tasks": {"full": {"piqa": {"items": 3, "acc": 0.7, "acc_stderr": 0.1}}},
    }
    assert headline(results) == {
        "perplexity": 9.0,
        "copy at distance 50": 0.5,
        "pass key in 100, digits": pytest.approx(0.3),
        "pass key in 100, whole": 0.0,
        "piqa acc": 0.7,
    }
    assert headline(results, "no_tail") == {"copy at distance 50": 0.1}


def test_what_cannot_run_is_refused_first(tmp_path, tasks) -> None:
    model = student()

    def refused(message: str, **changes) -> None:
        text = changes.pop("text", TEXT)
        with pytest.raises(ValueError, match=message):
            check(model, replace(SMALL, **changes), text=text)

    refused("perplexity needs text: give TokenBlocks", text=None)
    refused("lengths: 512 tokens do not fill one window of 4096", lengths=(64, 4096))
    refused("copy: 512 tokens do not fill one window of 1028", distances=(900,))
    refused("passkey: 512 tokens do not fill one window of 1024", contexts=(1024,))
    refused("no such task file", parts=("tasks",), tasks=(str(tmp_path / "none.jsonl"),))
    refused("task files need different names, got pick, pick", parts=("tasks",), tasks=(*tasks, *tasks))
    with pytest.raises(ValueError, match="parts must be among .*, got 'speed'"):
        EvalSettings(parts=("speed",))
    with pytest.raises(ValueError, match="modes must be among .*, got 'exact'"):
        EvalSettings(modes=("exact",))
    with pytest.raises(ValueError, match="trials must be >= 1, got 0"):
        EvalSettings(trials=0)
    with pytest.raises(ValueError, match="distances must be whole numbers >= 33, got"):
        EvalSettings(distances=(20,))
    with pytest.raises(ValueError, match="the part 'tasks' needs files"):
        EvalSettings(parts=("tasks",))
    assert evaluation_suite.check(byte_llama(), replace(SMALL, parts=("copy", "heads"), prose=False)) == ("copy",)


def test_settings_resolve_and_know_their_text() -> None:
    settings = recipes.resolve(EvalSettings, {"lengths": [128, 512], "parts": ["lengths"]}, trials=3, tokens=None)
    assert (settings.lengths, settings.parts, settings.trials) == ((128, 512), ("lengths",), 3)
    assert needed_tokens(settings) == 8192
    assert needed_tokens(replace(settings, parts=("copy", "mqar"), prose=False)) == 0
    assert needed_tokens(replace(settings, parts=("copy",))) == 4 * 900
