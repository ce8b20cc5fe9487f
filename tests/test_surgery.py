"""Planning, applying and undoing a retrofit; and everything it refuses before anything is changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from builders import CONFIG, build, build_llama, logits, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import srf_retrofit.calibration
from srf_retrofit import SRFConfig, plan_retrofit, retrofit, revert, state_bytes
from srf_retrofit.modeling.attention import SRFLlamaAttention, srf_attentions
from srf_retrofit.modeling.modeling import SRFLlamaForCausalLM, SRFLlamaModel


def snapshot(model) -> tuple:
    """Everything that a refused retrofit must leave alone."""
    return (
        type(model),
        type(model.config),
        copy.deepcopy(model.config.to_dict()),
        [type(module) for module in model.modules()],
        {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        list(model.state_dict()),
    )


def assert_same(before: tuple, after: tuple) -> None:
    assert before[:4] == after[:4]
    assert before[5] == after[5]
    for name, (identity, value) in before[4].items():
        assert after[4][name][0] == identity
        assert torch.equal(after[4][name][1], value) or not value.isfinite().all()


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_counts_and_changes_nothing() -> None:
    model = build_llama()
    before = snapshot(model)
    plan = plan_retrofit(model, CONFIG, layers=[0, -1])
    assert_same(before, snapshot(model))
    assert plan.layers == (0, 2)
    assert plan.softmax_layers == (1,)
    assert plan.parameters == sum(p.numel() for i in (0, 2) for p in model.model.layers[i].self_attn.parameters())
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimension, float32
    assert plan.kv_bytes(10) == 10 * plan.kv_bytes_per_token
    n = plan.break_even_length
    assert plan.kv_bytes(n) >= plan.state_bytes > plan.kv_bytes(n - 1)

    retrofit(model, CONFIG, layers=[0, -1])
    cache = DynamicCache(config=model.config)
    logits(model, tokens(model, 1, 50), past_key_values=cache, use_cache=True)
    assert state_bytes(cache) == plan.state_bytes
    assert sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "attn_fn" in n) == plan.buffer_bytes


def test_plan_reads_as_text_and_as_json() -> None:
    plan = plan_retrofit(build_llama(), CONFIG, layers=[0, 2])
    text = str(plan)
    for part in ("LlamaForCausalLM -> SRFLlamaForCausalLM", "2 of 3: 0, 2", "break-even", "keys/values at 65,536"):
        assert part in text
    data = json.loads(json.dumps(plan.to_dict(lengths=[100])))
    assert data["layers"] == [0, 2]
    assert data["kv_bytes"] == {"100": plan.kv_bytes(100)}
    assert SRFConfig.from_dict(data["config"]) == plan.config


def test_plan_needs_no_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(build_llama().config)
    assert plan_retrofit(model, CONFIG) == plan_retrofit(build_llama(), CONFIG)
    with pytest.raises(ValueError, match="meta device: load the weights first"):
        retrofit(model, CONFIG)
    assert type(model) is LlamaForCausalLM


# -- apply and undo ----------------------------------------------------------------------------------------------------


def test_retrofit_works_in_place() -> None:
    model = build_llama().train()
    parameters = dict(model.named_parameters())
    layers = list(model.model.layers)
    assert retrofit(model, CONFIG) is model
    assert type(model) is SRFLlamaForCausalLM
    assert type(model.model) is SRFLlamaModel
    assert isinstance(model, LlamaForCausalLM)
    assert all(type(layer.self_attn) is SRFLlamaAttention for layer in layers)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config.model_type == "srf_llama"
    assert model.config is model.model.config is layers[0].self_attn.config
    assert SRFConfig.from_dict(model.config.srf) == CONFIG


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [0, 1, 2]), ([1], [1]), ([-1, 0], [0, 2]), (slice(1, None), [1, 2]), (range(2), [0, 1])],
)
def test_layers_are_chosen(layers, expected) -> None:
    model = retrofit(build_llama(), CONFIG, layers=layers)
    assert [layer.layer_idx for layer in srf_attentions(model)] == expected
    assert model.config.srf["layers"] == (None if len(expected) == 3 else expected)


def test_the_configuration_can_choose_layers_too() -> None:
    model = retrofit(build_llama(), CONFIG.replace(layers=(1,)))
    assert [layer.layer_idx for layer in srf_attentions(model)] == [1]
    model = retrofit(build_llama(), CONFIG.replace(layers=(1,)), layers=[0])
    assert [layer.layer_idx for layer in srf_attentions(model)] == [0]


def test_every_layer_and_head_draws_for_itself() -> None:
    model = retrofit(build_llama(), CONFIG)
    draws = [head for layer in srf_attentions(model) for head in layer.attn_fn.projection]
    assert all(not torch.equal(x, y) for i, x in enumerate(draws) for y in draws[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype) -> None:
    model = retrofit(build_llama().to(dtype), CONFIG)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {layer.attn_fn.projection.dtype for layer in srf_attentions(model)} == {torch.float32}
    assert logits(model, tokens(model, 1, 30)).dtype == dtype


@pytest.mark.parametrize("layers", [None, [1]])
def test_revert_gives_the_softmax_model_back_bit_for_bit(layers, tmp_path) -> None:
    model = build_llama()
    ids = tokens(model, 2, 30)
    before, answer = snapshot(model), logits(model, ids)
    for _ in range(2):
        retrofit(model, CONFIG, layers=layers)
        model.save_pretrained(tmp_path)
        assert not torch.equal(logits(model, ids), answer)
        assert revert(model) is model
        after = snapshot(model)
        for config in (before[2], after[2]):
            config.update(architectures=None, dtype=None)  # what any save writes
        assert_same(before, after)
        assert torch.equal(logits(model, ids), answer)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    assert vars(model.model.layers[0].self_attn).keys() == vars(build_llama().model.layers[0].self_attn).keys()


def test_revert_of_a_loaded_checkpoint(tmp_path) -> None:
    model = build_llama()
    ids = tokens(model, 1, 20)
    answer = logits(model, ids)
    retrofit(model, CONFIG).save_pretrained(tmp_path / "srf")
    loaded = revert(SRFLlamaForCausalLM.from_pretrained(tmp_path / "srf"))
    assert torch.equal(logits(loaded, ids), answer)
    loaded.save_pretrained(tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"srf", "auto_map"} & set(config)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "back"), ids), answer)


def test_a_base_model_can_be_retrofitted() -> None:
    base = build_llama().model
    original = copy.deepcopy(base)
    ids = tokens(base, 1, 30)
    out = retrofit(base, CONFIG)(ids).last_hidden_state
    assert type(base) is SRFLlamaModel
    assert not torch.equal(out, original(ids).last_hidden_state)
    assert torch.equal(revert(base)(ids).last_hidden_state, original(ids).last_hidden_state)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hidden_states_can_be_had(when) -> None:
    model = build_llama()
    ids = tokens(model, 1, 10)
    if when == "before":  # the hooks that capture them are installed at the first call
        model(ids, output_hidden_states=True)
    out = retrofit(model, CONFIG)(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(1, 10, 64)] * 4


def test_embeddings_can_be_resized() -> None:
    model = retrofit(build_llama(), CONFIG)
    model.resize_token_embeddings(120)
    assert logits(model, torch.tensor([[119, 5, 7]])).shape == (1, 3, 120)


def test_hooks_of_accelerate_survive() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = build_llama()
    ids = tokens(model, 1, 30)
    expected = logits(retrofit(build_llama(), CONFIG), ids)
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(logits(retrofit(model, CONFIG), ids), expected)
    assert all(hasattr(layer.self_attn, "_hf_hook") for layer in model.model.layers)


def test_a_model_read_from_gguf_can_be_saved_and_goes_back_as_it_was(tmp_path) -> None:
    from transformers.quantizers.auto import GgufConfig, GgufHfQuantizer

    model = build_llama()
    model.hf_quantizer = GgufHfQuantizer(GgufConfig(gguf_file="model.gguf"))
    model.is_quantized, model.quantization_method = True, model.hf_quantizer.quantization_config.quant_method
    model.config.quantization_config = model.hf_quantizer.quantization_config
    marks = (model.hf_quantizer, model.config.quantization_config)
    retrofit(model, CONFIG).save_pretrained(tmp_path)
    assert type(SRFLlamaForCausalLM.from_pretrained(tmp_path)) is SRFLlamaForCausalLM
    revert(model)
    assert (model.hf_quantizer, model.config.quantization_config) == marks
    assert model.is_quantized


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_is_called_and_undone_if_it_fails(monkeypatch) -> None:
    batches, seen = [torch.zeros(1, 4, dtype=torch.long)], []
    monkeypatch.setattr(srf_retrofit.calibration, "calibrate", lambda model, given: seen.append((model, given)))
    model = retrofit(build_llama(), CONFIG, calibration=batches)
    assert seen == [(model, batches)]

    def fail(model, given):
        raise ValueError("too few tokens")

    monkeypatch.setattr(srf_retrofit.calibration, "calibrate", fail)
    model = build_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="too few tokens"):
        retrofit(model, CONFIG, calibration=batches)
    assert_same(before, snapshot(model))


# -- refusals ----------------------------------------------------------------------------------------------------------


def with_nan(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    return model


def quantised(model):
    model.is_quantized = True
    model.quantization_method = type("Method", (), {"value": "bitsandbytes"})
    return model


def with_integers(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


def with_another_attention(model):
    class Patched(LlamaAttention):
        pass

    model.model.layers[2].self_attn.__class__ = Patched
    return model


@pytest.mark.parametrize(
    ("prepare", "arguments", "error", "message"),
    [
        (lambda m: m, {"layers": []}, ValueError, "layers is empty"),
        (lambda m: m, {"layers": slice(5, 9)}, ValueError, "layers is empty"),
        (lambda m: m, {"layers": [0, 3]}, ValueError, r"layer\(s\) \[3\] do not exist: the model has layers 0 to 2"),
        (lambda m: m, {"layers": [-4]}, ValueError, r"layer\(s\) \[-4\] do not exist"),
        (lambda m: m, {"layers": ["0"]}, TypeError, "layers must be integers or a slice"),
        (lambda m: m, {"config": {"window": 8}}, TypeError, "config must be an SRFConfig, got dict"),
        (with_nan, {}, ValueError, "model.layers.1.mlp.up_proj.weight has values that are not finite"),
        (quantised, {}, ValueError, r"quantised \(bitsandbytes\)"),
        (with_integers, {}, ValueError, "quantised"),
        (with_another_attention, {}, ValueError, "attention of layer 2 is a Patched"),
    ],
)
def test_refused_and_unchanged(prepare, arguments, error, message) -> None:
    model = prepare(build_llama())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        retrofit(model, **{"config": CONFIG, **arguments})
    assert_same(before, snapshot(model))


def test_dropout_of_attention_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0.1 drops entries"):
        retrofit(build_llama(attention_dropout=0.1), CONFIG)


def test_retrofit_twice_and_revert_of_a_softmax_model_are_refused() -> None:
    model = retrofit(build_llama(), CONFIG)
    with pytest.raises(ValueError, match="retrofitted already"):
        retrofit(model, CONFIG)
    with pytest.raises(ValueError, match="nothing to revert"):
        revert(build_llama())


def test_other_models_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, n_positions=8))
    with pytest.raises(TypeError, match="GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mistral"):
        retrofit(gpt2, CONFIG)
    with pytest.raises(TypeError, match="wrapped in a DataParallel"):
        retrofit(torch.nn.DataParallel(build_llama()), CONFIG)
    with pytest.raises(TypeError, match="expected a Transformers model, got str"):
        retrofit("meta-llama/Llama-2-7b-hf", CONFIG)


def test_sliding_layers_keep_their_attention() -> None:
    model = build("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layer\(s\) \[1\] do not have full attention"):
        retrofit(model, CONFIG, layers=[0, 1])
    assert plan_retrofit(model, CONFIG).layers == (0,)
    with pytest.raises(ValueError, match="every layer of this model has sliding-window attention"):
        retrofit(build("mistral", sliding_window=8), CONFIG)


def test_head_dimension_one_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**build_llama().config.to_dict(), "head_dim": 1, "model_type": "llama"}))
    with pytest.raises(ValueError, match="head_dim must be at least 2, got 1"):
        retrofit(model, CONFIG)


def test_a_model_from_a_checkpoint_is_retrofitted_and_reverted(tmp_path):
    """A loaded configuration carries `model_type` as an attribute of its own, which a change of class leaves behind."""
    build_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    expected = logits(model, tokens(model, 1, 30))
    retrofit(model, CONFIG)
    assert model.config.model_type == "srf_llama"
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "srf_llama"
    revert(model)
    assert model.config.model_type == "llama"
    assert torch.equal(logits(model, tokens(model, 1, 30)), expected)
