"""Llama, Mistral, Qwen2 and Qwen3 through the same surgery; and PEFT on top of it."""

from __future__ import annotations

import inspect

import pytest
import torch
from builders import CONFIG, FAMILY_NAMES, build, build_llama, logits, tokens
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from srf_retrofit import exact_attention, retrofit, revert
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.modeling import FAMILIES


@pytest.fixture(params=FAMILY_NAMES)
def family(request) -> str:
    return request.param


def test_retrofit_decode_save_and_revert(family, tmp_path) -> None:
    original, model = build(family), retrofit(build(family), CONFIG)
    ids = tokens(model, 2, 45)
    answer, softmax = logits(model, ids), logits(original, ids)
    assert not torch.allclose(answer, softmax, atol=1e-2)
    assert_close(answer[:, :16], softmax[:, :16], rtol=1e-4, atol=1e-4)  # all inside the window
    with exact_attention(model):
        assert torch.equal(logits(model, ids), softmax)

    cache, pieces = None, []
    with torch.no_grad():
        for part in ids.split([20, 1, 1, 23], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), answer, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), answer)
    assert type(revert(model)) is type(original)
    assert torch.equal(logits(model, ids), softmax)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_with_padding(family, cache) -> None:
    model = retrofit(build(family), CONFIG, layers=[0, 2])
    ids = tokens(model, 2, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, use_cache=False, **settings))
    assert torch.equal(out[1:, 9:], model.generate(ids[1:, 9:], **settings))


def test_gradients_reach_every_parameter(family) -> None:
    model = retrofit(build(family), CONFIG).train()
    ids = tokens(model, 1, 40)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sliding_layers_of_a_hybrid_work() -> None:
    model = build("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    retrofit(model, CONFIG)
    assert [layer.layer_idx for layer in srf_attentions(model)] == [0]
    ids = tokens(model, 1, 30)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)


@pytest.mark.parametrize("classes", FAMILIES, ids=lambda f: f.config.model_type)
def test_forward_signatures_are_those_of_transformers(classes) -> None:
    """Tools and test suites look arguments up by name."""
    for ours, theirs in ((classes.srf_head, classes.head), (classes.srf_model, classes.model)):
        mine, original = inspect.signature(ours.forward).parameters, inspect.signature(theirs.forward).parameters
        assert list(mine) == list(original)
        assert [p.default for p in mine.values()] == [p.default for p in original.values()]


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default targets", "all-linear"])
def test_lora_trains_generates_and_merges(targets) -> None:
    from peft import LoraConfig, get_peft_model

    model = retrofit(build_llama(), CONFIG)
    ids = tokens(model, 1, 40)
    before = logits(model, ids)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted, ids), before)  # LoRA starts from zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    after = logits(adapted, ids)
    assert not torch.allclose(after, before, atol=1e-3)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = adapted.generate(input_ids=ids, **settings)
    merged = adapted.merge_and_unload()
    assert merged is model
    assert_close(logits(merged, ids), after, rtol=1e-3, atol=1e-3)
    assert torch.equal(merged.generate(ids, **settings), generated)


def test_a_wrapped_model_is_refused_with_both_ways_out() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build_llama(), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    ids = tokens(adapted, 1, 30)
    softmax = logits(adapted, ids)
    with pytest.raises(TypeError, match=r"wrapped by PEFT: merge the adapters first .* or pass model.get_base_model"):
        retrofit(adapted, CONFIG)
    assert torch.equal(logits(adapted, ids), softmax)

    retrofit(adapted.get_base_model(), CONFIG)
    inside = logits(adapted, ids)
    assert not torch.allclose(inside, softmax, atol=1e-3)
    merged = adapted.merge_and_unload()
    assert_close(logits(merged, ids), inside, rtol=1e-3, atol=1e-3)
    assert_close(logits(revert(merged), ids), softmax, rtol=1e-3, atol=1e-3)
