"""A distillation from start to report: what it writes, that it can be interrupted anywhere, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CONFIG, build_llama
from distill_runs import STEPS, Interrupt, distil, losses, small, write_text
from toy_tokenizers import byte_llama, byte_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.evaluation import perplexity as evaluation
from srf_retrofit.evaluation.settings import EvalSettings
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.pipeline import run as pipeline
from srf_retrofit.pipeline.data import RecallDataset, prepare

NOTHING = EvalSettings(parts=())


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40, 140).unsqueeze(0), use_cache=False).logits


def test_a_whole_run(tmp_path, text) -> None:
    """Every stage leaves what it says, the saved model is the trained one, and it came nearer to its teacher."""
    given: dict[str, Any] = {"srf": CONFIG.replace(window=2, sinks=1, retained=0), "weigh_features": True}
    rates: dict[str, Any] = {"learning_rate": 3e-4, "transfer_learning_rate": 1e-4, "tokens": 20 * 256}
    settings = small(tmp_path / "out", text, transfer_tokens=2 * 256, eval_untrained=True, **given, **rates)
    model, results = distil(settings)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "model", "stages", "recipe.json", "progress.json", "results.json", "report.md", "report.png",
    }  # fmt: skip
    stages = ["01-retrofit", "02-evaluate-untrained", "03-transfer", "04-logits", "05-evaluate"]
    assert sorted(p.name for p in (out / "stages").iterdir()) == stages
    progress = json.loads((out / "progress.json").read_text())["stages"]
    assert [line["directory"] for line in progress] == [f"stages/{name}" for name in stages]
    assert json.loads((out / "results.json").read_text()) == results
    assert json.loads((out / "recipe.json").read_text())["srf"]["window"] == 2

    again = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    assert type(again).__name__ == "SRFLlamaForCausalLM"
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(out / "stages/04-logits/model")), logits_of(model)
    )
    untrained = AutoModelForCausalLM.from_pretrained(out / "stages/01-retrofit/model").eval()
    assert srf_attentions(untrained)[0].attn_fn.query_shift.abs().sum() > 0  # calibrated
    held_out = prepare(settings, byte_tokenizer()).held_out
    teacher = byte_llama()
    before, after = (evaluation.distance(teacher, m, held_out, progress=False).kl for m in (untrained, again))
    assert after < before
    assert results["untrained"]["distance"]["kl"] == pytest.approx(before, rel=1e-4)
    assert results["evaluation"]["distance"]["kl"] == pytest.approx(after, rel=1e-4)

    assert len(losses(results, "logits")) == 20
    assert results["training"]["transfer"]["steps"] == 2
    assert results["training"]["logits"]["tokens"] == 20 * 256
    page = (out / "report.md").read_text()
    assert "### Beside the teacher" in page
    assert "| KL to teacher |" in page
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    """The run that interrupted ones must equal, with features drawn at every step."""
    output = tmp_path_factory.mktemp("whole") / "out"
    settings = small(output, text, transfer_tokens=4 * 256, schedule="every_step", eval=NOTHING)
    return distil(settings)


@pytest.mark.parametrize(("training", "step"), [(1, 3), (2, 1), (2, 5)], ids=["transfer", "before a save", "logits"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, text, uninterrupted, training, step) -> None:
    given: dict[str, Any] = {"transfer_tokens": 4 * 256, "schedule": "every_step", "eval": NOTHING}
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, **given), callbacks=[Interrupt(step, training)])
    finished = json.loads((tmp_path / "out/progress.json").read_text())["stages"]
    assert len(finished) == training
    model, results = distil(small(tmp_path / "out", text, resume=True, **given))
    whole, expected = uninterrupted
    for stage in ("transfer", "logits"):
        assert losses(results, stage) == pytest.approx(losses(expected, stage), rel=1e-6)
    assert torch.equal(logits_of(model), logits_of(whole))
    assert not (tmp_path / "out/checkpoints").exists()
    # A finished run that is resumed trains nothing, and says the same.
    distil(small(tmp_path / "out", text, resume=True, **given), callbacks=[Interrupt(1)])


def test_a_torn_checkpoint_is_passed_over(tmp_path, text, uninterrupted) -> None:
    given: dict[str, Any] = {"transfer_tokens": 4 * 256, "schedule": "every_step", "eval": NOTHING}
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, **given), callbacks=[Interrupt(5, 2)])
    (tmp_path / "out/checkpoints/03-logits/checkpoint-4/trainer_state.json").unlink()
    _, results = distil(small(tmp_path / "out", text, resume=True, **given))
    assert losses(results, "logits") == pytest.approx(losses(uninterrupted[1], "logits"), rel=1e-6)


def test_other_settings_are_not_resumed(tmp_path, text) -> None:
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, eval=NOTHING), callbacks=[Interrupt(3)])
    before = (tmp_path / "out/progress.json").read_text()
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.002; srf.window was 8, is 4: resume"):
        distil(
            small(tmp_path / "out", text, resume=True, learning_rate=2e-3, srf=CONFIG.replace(window=4), eval=NOTHING)
        )
    with pytest.raises(ValueError, match=r"holds a run already: go on with it by resume"):
        distil(small(tmp_path / "out", text, eval=NOTHING))
    assert (tmp_path / "out/progress.json").read_text() == before
    # What it takes to fit into less memory may change; and another run may take the place of this one.
    distil(small(tmp_path / "out", text, resume=True, batch_size=1, chunk_size=32, eval=NOTHING))
    distil(small(tmp_path / "out", text, overwrite=True, tokens=256, eval=NOTHING))
    assert [p.name for p in sorted((tmp_path / "out/stages").iterdir())] == ["01-retrofit", "02-logits", "03-evaluate"]


@pytest.mark.parametrize("settle", ["freeze", "train"])
def test_features_settle_half_way(tmp_path, text, settle) -> None:
    """One decay of the learning rate goes through both halves; maps move only when they are to be trained."""
    given: dict[str, Any] = {"settle": settle, "tokens": 8 * 256, "feature_learning_rate": 1e-2, "eval": NOTHING}
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, **given), callbacks=[Interrupt(3, 2)])
    model, results = distil(small(tmp_path / "out", text, resume=True, **given))
    assert list(results["training"]) == ["logits", "logits-settled"]
    assert model.config.srf_config.feature_map == "trained"
    settled = AutoModelForCausalLM.from_pretrained(tmp_path / "out/stages/03-settle/model")
    pairs = zip(srf_attentions(settled), srf_attentions(model), strict=True)
    same = [torch.equal(a.attn_fn.key_weight, b.attn_fn.key_weight) for a, b in pairs]
    assert same == [settle == "freeze"] * 2
    assert not torch.equal(settled.lm_head.weight, model.lm_head.weight)
    # The rate of the scheduler after steps 1 to 4 of each part: warm-up of one step, then the whole's cosine.
    rates = [
        [line["learning_rate"] for line in results["training"][stage]["history"] if "loss" in line]
        for stage in ("logits", "logits-settled")
    ]
    late = [0.5e-3 * (1 + math.cos(math.pi * n / 8)) for n in (5, 6, 7)]
    assert rates[1][1:] == pytest.approx(late, rel=1e-5)
    assert rates[0][-1] > rates[1][1]


def test_settled_beforehand(tmp_path, text) -> None:
    given: dict[str, Any] = {"settle": "train", "settle_share": 0.0, "eval": NOTHING, "tokens": 512}
    model, results = distil(small(tmp_path / "out", text, **given))
    assert [line["name"] for line in results["stages"]] == ["retrofit", "settle", "logits-settled", "evaluate"]
    assert model.config.srf_config.feature_map == "trained"


@pytest.mark.parametrize(("merge", "gate"), [(True, False), (False, False), (True, True)])
def test_lora(tmp_path, text, merge, gate) -> None:
    given: dict[str, Any] = {"train": "lora", "lora_rank": 2, "lora_merge": merge, "learning_rate": 3e-3}
    srf = {"window": 0, "sinks": 0, "forget_gate": True} if gate else {"window": 2, "sinks": 1}
    given |= {"srf": CONFIG.replace(retained=0, **srf), "tokens": 10 * 256, "eval_untrained": True}
    whole, expected = distil(small(tmp_path / "whole", text, **given))
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, **given), callbacks=[Interrupt(5)])
    model, results = distil(small(tmp_path / "out", text, resume=True, gradient_checkpointing=merge, **given))
    assert not model.is_gradient_checkpointing
    assert losses(results, "logits") == pytest.approx(losses(expected, "logits"), rel=1e-6)
    assert torch.equal(logits_of(model), logits_of(whole))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").eval()
    assert torch.equal(logits_of(saved), logits_of(model))
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "out/stages/01-retrofit/model").eval()
    before_training = logits_of(bare)
    held_out = prepare(small(tmp_path, text, **given), byte_tokenizer()).held_out
    before = evaluation.distance(byte_llama(), bare, held_out, progress=False).kl
    assert results["untrained"]["distance"]["kl"] == pytest.approx(before, rel=1e-4)
    assert torch.equal(logits_of(bare), logits_of(saved)) == (not merge)
    if gate:
        begun, ended = (srf_attentions(m)[0].attn_fn.gate for m in (bare, saved))
        assert not torch.equal(begun.weight, ended.weight)

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(bare, tmp_path / "out/adapter").eval()
    named = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(named).eval()), before_training)
    if merge:
        torch.testing.assert_close(logits_of(adapted), logits_of(model), rtol=1e-3, atol=1e-3)
    kl = evaluation.distance(byte_llama(), adapted.get_base_model(), held_out, progress=False).kl
    assert kl < before
    assert results["evaluation"]["distance"]["kl"] == pytest.approx(kl, rel=1e-4)


def test_lora_on_weights_in_bfloat16(tmp_path, text) -> None:
    """Weights stay as they are in bfloat16, feature maps in float32, the adapter learns in float32."""
    given: dict[str, Any] = {"train": "lora", "dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True}
    byte_llama().save_pretrained(tmp_path / "softmax")  # loading, unlike `to`, leaves the frequencies in float32
    model, results = pipeline.distill_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", dtype=torch.bfloat16),
        byte_tokenizer(),
        small(tmp_path / "out", text, settle="freeze", settle_share=0.0, eval=NOTHING, **given),
        progress=False,
    )
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in srf_attentions(model)[0].attn_fn.parameters()} == {torch.float32}
    assert model.config.srf_config.feature_map == "trained"
    assert all(math.isfinite(loss) for loss in losses(results, "logits-settled"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype=torch.bfloat16).eval()
    assert torch.equal(logits_of(saved), logits_of(model))


MAPS = {
    "hedgehog": ({"feature_map": "hedgehog", "retained": 0}, {"transfer_tokens": 512, "transfer_train": "features"}),
    "t2r": ({"feature_map": "relu", "retained": 0}, {}),
    "favor": ({"projection": "orthogonal", "retained": 0}, {"geometry": "identity", "schedule": "every_step"}),
    "window": ({"num_features": 0, "retained": 0}, {}),
    "retained": ({"num_features": 0, "retained": 8}, {}),
    "pure": ({"window": 0, "sinks": 0, "retained": 0}, {"settle": "freeze", "settle_share": 1.0}),
    "gated": (
        {"window": 0, "sinks": 0, "retained": 0, "forget_gate": True},
        {"settle": "freeze", "settle_share": 0.0, "feature_learning_rate": 1e-2},
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_to_compare_with(tmp_path, text, name) -> None:
    srf, given = MAPS[name]
    settings = small(tmp_path / "out", text, srf=CONFIG.replace(**srf), tokens=512, eval=NOTHING, **given)
    model, results = distil(settings)
    stage = "logits-settled" if given.get("settle_share") == 0 else "logits"
    assert results["training"][stage]["steps"] == 2
    assert (", a forget gate." in (tmp_path / "out/report.md").read_text()) == (name == "gated")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").eval()
    assert torch.equal(logits_of(saved), logits_of(model))


@pytest.mark.parametrize("boundaries", ["cross", "respect", "pad"])
def test_recall_rows_and_several_sources(tmp_path, text, boundaries) -> None:
    other = tmp_path / "other"
    other.mkdir()
    given: dict[str, Any] = {
        "text": (str(text), str(write_text(other, 60))),
        "text_weights": (3.0, 1.0),
        "length": 192,
        "batch_size": 1,
        "tokens_per_step": 384,
        "tokens": 8 * 384,
        "recall_share": 0.25,
        "boundaries": boundaries,
        "max_epochs": 2,
        "held_out": str(text),
    }
    settings = small(tmp_path / "out", **given)
    found = prepare(settings, byte_tokenizer())
    assert len(found.training) == 16
    assert found.facts["recall_rows"] == pytest.approx(4, abs=1)
    counts = [source["rows"] for source in found.facts["sources"]]
    assert counts[0] == pytest.approx(9, abs=1)
    first = found.training[0]
    again = prepare(settings, byte_tokenizer()).training[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    recall = found.training.sources[-1]
    assert isinstance(recall, RecallDataset)
    assert set(recall[0]) == set(first)
    distil(settings)


def test_too_little_text(tmp_path, text) -> None:
    with pytest.raises(ValueError, match=r"fills [\d,]+ tokens of rows, and [\d,]+ are needed .* max_epochs: 6"):
        distil(small(tmp_path / "out", text, tokens=400 * 256))
    with pytest.raises(ValueError, match="do not fill one block"):
        distil(
            small(
                tmp_path / "out", write_text(tmp_path, 3), length=4096, batch_size=1, tokens_per_step=4096, tokens=4096
            )
        )
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is no text in"):
        distil(small(tmp_path / "out", tmp_path / "empty.jsonl"))
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(tmp_path, text) -> None:
    def refused(message: str, model: Any = None, teacher: Any = None, **given: Any) -> None:
        with pytest.raises(ValueError, match=message):
            pipeline.distill_model(
                byte_llama() if model is None else model,
                byte_tokenizer(),
                small(tmp_path / "out", text, **given),
                teacher=teacher,
                progress=False,
            )
        assert not (tmp_path / "out").exists()

    refused("does not fit model .* has 97 embeddings", model=build_llama())
    refused("a vocabulary of 300, the student of 257", teacher=build_llama(vocab_size=300))
    same = byte_llama()
    refused("teacher and student are one object", model=same, teacher=same)
    refused("the teacher is a retrofitted model", teacher=retrofit(byte_llama(), CONFIG))
    refused("would be the teacher of itself", model=retrofit(byte_llama(), CONFIG))
    refused("is retrofitted already, with", model=retrofit(byte_llama(), SRFConfig()), teacher=byte_llama())
    refused("beyond the 4096 positions", length=8192, batch_size=1, tokens_per_step=8192, tokens=8192)
    refused("load it in float32", model=byte_llama().to(torch.bfloat16))
    refused("held-out text: .* do not fill one block of 5000", eval=EvalSettings(length=5000, tokens=5000))


def test_a_retrofitted_model_trains_on(tmp_path, text) -> None:
    _, results = pipeline.distill_model(
        retrofit(byte_llama(), CONFIG),
        byte_tokenizer(),
        small(tmp_path / "out", text, teacher="exact", tokens=512, eval=NOTHING),
        progress=False,
    )
    assert results["training"]["logits"]["steps"] == 2
    assert "plan" not in results["retrofit"]


class Poison(TrainerCallback):
    """Damages a weight after some steps."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            model.model.layers[1].mlp.up_proj.weight.data[3] = float("inf")


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(tmp_path, text) -> None:
    with pytest.raises(FloatingPointError) as info:
        distil(small(tmp_path / "out", text, eval=NOTHING), callbacks=[Poison()])
    message = str(info.value)
    assert f"at step 5 of {STEPS}" in message
    assert "that of model.layers.1.mlp.up_proj (its weight is not finite)" in message
    assert f"the last good checkpoint is {tmp_path / 'out/checkpoints/02-logits/checkpoint-4'}" in message


def test_out_of_memory_names_what_to_lower(tmp_path, text) -> None:
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(RuntimeError) as info:
        distil(small(tmp_path / "out", text, eval=NOTHING), callbacks=[Full()])
    expected = (
        "stage 'logits': lower, or switch on, in this order: batch_size (2), length (64), chunk_size (1024), gradient"
    )
    assert expected in str(info.value)
    with pytest.raises(KeyboardInterrupt):
        distil(small(tmp_path / "out", text, eval=NOTHING, resume=True, batch_size=1), callbacks=[Interrupt(1)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "everything"}, "train must be one of"),
        ({"tokens": 100}, "less than one step of tokens_per_step=256"),
        ({"tokens_per_step": 300}, "must be a multiple of length x batch_size = 64 x 2 = 128: 256 would be one"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"recall_share": 0.5}, "needs rows of length >= 192"),
        ({"transfer_tokens": 512, "boundaries": "respect"}, "'cross' or 'pad'"),
        ({"transfer_tokens": 512, "transfer_train": "features"}, "needs maps that can be trained"),
        ({"settle": "train", "train": "lora"}, "needs train 'all'"),
        ({"settle": "freeze", "train": "lora"}, "settle_share must be 0"),
        ({"settle": "freeze", "schedule": "settle:0.5"}, "settles by itself"),
        ({"settle": "train", "srf": CONFIG.replace(feature_map="hedgehog")}, "is for random features"),
        ({"dtype": "bfloat16"}, "loses small updates"),
        ({"schedule": "sometimes"}, "schedule 'sometimes'"),
        ({"text_weights": (1.0, 2.0)}, "2 entries for 1 sources"),
        ({"lora_targets": (), "train": "lora"}, "lora_targets is empty"),
        ({"eval": EvalSettings(text="x")}, "eval.text is decided by the run"),
        ({"template": "poem"}, "template must be one of"),
        ({"compile": True, "gradient_checkpointing": True}, "exclude one another"),
        ({"cuda_graph": True}, "tokens_per_step=256 must be length x batch_size = 64 x 2"),
        ({"cuda_graph": True, "batch_size": 4, "boundaries": "pad"}, "cuda_graph needs boundaries='cross'"),
        ({"settle": "freeze", "settle_share": 0.01}, "leaves one side without a step"),
    ],
)
def test_settings_that_cannot_be(tmp_path, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, tmp_path, **given)


def test_what_is_not_installed(tmp_path, text, monkeypatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    missing = ("peft", "tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ValueError, match=r"needs peft, .* pip install 'srf-retrofit\[peft\]'"):
        pipeline.run(small(tmp_path / "out", text, train="lora"))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        pipeline.run(small(tmp_path / "out", text, report_to="tensorboard"))
