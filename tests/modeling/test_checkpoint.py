"""Checkpoints: complete, bit-equal, readable with and without the package, and never silently a softmax model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from builders import CONFIG, build_llama, logits, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import srf_retrofit.modeling.saving as saving
from srf_retrofit import retrofit
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.configuration import CONFIG_VERSION
from srf_retrofit.modeling.configuration_hf import SRFLlamaConfig
from srf_retrofit.modeling.modeling import SRFLlamaForCausalLM, SRFLlamaModel


@pytest.fixture
def model():
    """Retrofitted, with features and geometry that no fresh model has."""
    model = retrofit(build_llama(), CONFIG)
    for layer in srf_attentions(model):
        layer.attn_fn.resample(17)
        shift = torch.linspace(-0.2, 0.3, 32).view(2, 16) * (1 + layer.layer_idx)
        layer.attn_fn.set_geometry(query_shift=shift, key_shift=-shift, proposal=-shift.abs())
    return model


def assert_equal_models(loaded, model) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}], ids=["one file", "shards"])
def test_reload_is_bit_equal(model, tmp_path, options) -> None:
    model.save_pretrained(tmp_path / "m", **options)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > bool(options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(loaded) is SRFLlamaForCausalLM
    assert_equal_models(loaded, model)
    ids = tokens(model, 2, 40)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_base_model_reloads_from_the_language_models_checkpoint(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert type(base) is SRFLlamaModel
    assert_equal_models(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_equal_models(AutoModel.from_pretrained(tmp_path / "base"), model.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_features_in_float32(model, tmp_path, dtype) -> None:
    model.save_pretrained(tmp_path / "m")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    assert half.lm_head.weight.dtype == dtype
    for mine, theirs in zip(srf_attentions(half), srf_attentions(model), strict=True):
        for name, buffer in theirs.attn_fn.named_buffers():
            assert torch.equal(getattr(mine.attn_fn, name), buffer)
    half.save_pretrained(tmp_path / "half")
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "half"), half)
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto"), half)


def test_device_map(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    ids = tokens(model, 1, 30)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map="auto")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_weights_offloaded_to_disk_still_answer(model, tmp_path) -> None:
    """Projections are called, not read: accelerate brings them in when they are."""
    from accelerate import cpu_offload

    ids = tokens(model, 1, 30)
    expected = logits(model, ids)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert torch.equal(logits(model, ids), expected)


def test_raw_weights_get_a_fresh_draw(tmp_path) -> None:
    """Softmax weights into the retrofitted class: what `retrofit` gives, on the meta device first as loaders do."""
    build_llama().save_pretrained(tmp_path / "raw")
    config = SRFLlamaConfig.from_pretrained(tmp_path / "raw", srf=CONFIG.to_dict())
    loaded = SRFLlamaForCausalLM.from_pretrained(tmp_path / "raw", config=config)
    assert_equal_models(loaded, retrofit(build_llama(), CONFIG))
    half = SRFLlamaForCausalLM.from_pretrained(tmp_path / "raw", config=config, dtype=torch.bfloat16)
    assert torch.equal(srf_attentions(half)[0].attn_fn.projection, srf_attentions(loaded)[0].attn_fn.projection)


def test_a_model_from_a_configuration_alone() -> None:
    config = SRFLlamaConfig(**{**build_llama().config.to_dict(), "srf": {"num_features": 8, "layers": [1]}})
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is SRFLlamaForCausalLM
    assert [layer.layer_idx for layer in srf_attentions(model)] == [1]
    assert srf_attentions(model)[0].attn_fn.projection.std() > 0.5
    assert model.model.layers[0].mlp.up_proj.weight.std() < 0.1  # initialised as a Llama


def test_configuration_round_trip(model, tmp_path) -> None:
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SRFLlamaConfig
    assert config.srf_config == CONFIG


def test_saving_leaves_the_configuration_as_it_was(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "a")
    assert not hasattr(model.config, "auto_map")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


# -- without the package -----------------------------------------------------------------------------------------------

STRANGER = """
import importlib.abc, json, sys
import torch

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "srf_retrofit":
            raise ImportError("srf_retrofit is not installed here")

sys.meta_path.insert(0, Blocker())
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForCausalLM

directory, trust, again = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust)
except Exception as error:
    print("\\n" + json.dumps({"refused": f"{type(error).__name__}: {error}"}))  # after a question left unanswered
    raise SystemExit
ids = torch.arange(3, 43).view(1, -1)
with torch.no_grad():
    sums = model(ids, use_cache=False).logits.double().sum((0, 2)).tolist()
generated = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
base = AutoModel.from_pretrained(directory, trust_remote_code=True)
model.save_pretrained(again)
print(json.dumps({"class": type(model).__name__, "base": type(base).__name__, "sums": sums, "ids": generated}))
"""


def as_a_stranger(directory: Path, trust: bool | None, tmp_path: Path) -> dict:
    """Load in a process of its own, elsewhere, where the package cannot be imported."""
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, str(directory), json.dumps(trust), str(tmp_path / "again")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_trusted_code_runs_the_checkpoint_without_the_package(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    ids = torch.arange(3, 43).view(1, -1)
    expected = {
        "sums": logits(model, ids).double().sum((0, 2)).tolist(),
        "ids": model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0).tolist(),
    }
    for directory in (tmp_path / "m", tmp_path / "again"):  # what it saves again can be loaded again
        answer = as_a_stranger(directory, True, tmp_path)
        assert (answer["class"], answer["base"]) == ("SRFLlamaForCausalLM", "SRFLlamaModel")
        assert answer["sums"] == pytest.approx(expected["sums"], rel=1e-4, abs=1e-4)
        assert answer["ids"] == expected["ids"]
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("trust", [None, False])
def test_silent_softmax_on_reload_is_impossible(model, tmp_path, trust) -> None:
    """Without the package and without trust: a refusal that says what to do."""
    model.save_pretrained(tmp_path / "m")
    assert "trust_remote_code=True" in as_a_stranger(tmp_path / "m", trust, tmp_path)["refused"]


def test_no_code_and_no_package_is_refused_too(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]
    path.write_text(json.dumps(config))
    assert "srf_llama" in as_a_stranger(tmp_path / "m", None, tmp_path)["refused"]


def test_with_the_package_its_own_classes_are_used_even_if_trusted(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(loaded) is SRFLlamaForCausalLM


# -- damaged and foreign checkpoints -----------------------------------------------------------------------------------


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["srf"].update(changes)
    path.write_text(json.dumps(config))


def change_weights(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


FIRST = "model.layers.0.self_attn.attn_fn."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: change_config(d, version=CONFIG_VERSION + 1),
            f"has version {CONFIG_VERSION + 1}, but this release of srf_retrofit reads up to version {CONFIG_VERSION}",
        ),
        (lambda d: change_config(d, kernel="cosine"), r"unknown SRF configuration field\(s\) kernel"),
        (lambda d: change_config(d, window=-1), "window must be >= 0, got -1"),
        (lambda d: change_config(d, layers=[7]), r"srf names layer\(s\) \[7\]"),
        (lambda d: change_weights(d, lambda w: w.pop(FIRST + "projection")), "1 of 21 feature tensors are missing"),
        (lambda d: change_weights(d, lambda w: w[FIRST + "proposal"].fill_(torch.nan)), "proposal has values that are"),
    ],
    ids=["future version", "unknown field", "bad value", "bad layer", "missing tensor", "not finite"],
)
def test_damaged_checkpoints_are_refused(model, tmp_path, damage, message) -> None:
    model.save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_features_of_another_shape_are_refused(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    change_config(tmp_path / "m", num_features=8)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_truncated_weights_are_refused(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match="(?i)safetensor|header|incomplete"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


# -- whole or not at all -----------------------------------------------------------------------------------------------


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "over an earlier one"])
@pytest.mark.parametrize("fails", ["first shard", "last shard", "code"])
def test_a_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch, earlier, fails) -> None:
    target = tmp_path / "m"
    if earlier:
        model.save_pretrained(target)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write, count = transformers.modeling_utils.safe_save_file, []

    def fail_later(tensors, path, **kwargs):
        count.append(path)
        (full_disk if len(count) == 3 else write)(tensors, path, **kwargs)

    name = "custom_object_save" if fails == "code" else "safe_save_file"
    monkeypatch.setattr(transformers.modeling_utils, name, fail_later if fails == "last shard" else full_disk)
    with pytest.raises(OSError, match="No space left on device; nothing was written there"):
        model.save_pretrained(target, max_shard_size="100KB")
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["m"] if earlier else [])


def test_unwritable_places_are_refused(model, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="it is a file, not a directory"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot save to .*nothing was written there"):
        model.save_pretrained(tmp_path / "file" / "below")

    def forbidden(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(saving.Path, "mkdir", forbidden)
    with pytest.raises(PermissionError, match=r"cannot save to .*Permission denied"):
        model.save_pretrained(tmp_path / "locked")


def test_an_earlier_save_is_replaced_and_other_files_stay(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path), model)
