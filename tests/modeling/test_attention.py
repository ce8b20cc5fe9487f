"""The attention layer: what it adopts, its features, teacher mode, padding, packing, and gradients through it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from builders import CONFIG, PURE, build_llama, logits, tokens
from torch.testing import assert_close

from srf_retrofit import ablated_attention, exact_attention, retrofit
from srf_retrofit.modeling.attention import SRFLlamaAttention, srf_attentions
from srf_retrofit.modeling.features import SRFFeatures
from srf_retrofit.modeling.random_features import draw_projection


@pytest.fixture(params=[CONFIG, PURE], ids=["hybrid", "pure"])
def model(request):
    return retrofit(build_llama(), request.param)


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_are_drawn_by_seed_step_and_layer() -> None:
    features = SRFFeatures(CONFIG.replace(seed=3), 2, 16, layer=5)
    features.resample(7)
    expected = draw_projection(16, 16, num_heads=2, seed=3, step=7, layer=5)
    assert torch.equal(features.projection, expected)
    features.redraw_()
    assert torch.equal(features.projection, draw_projection(16, 16, num_heads=2, seed=3, step=8, layer=5))


def test_resampling_keeps_the_buffer_and_the_geometry() -> None:
    features = SRFFeatures(CONFIG, 2, 16)
    shift = torch.randn(2, 16)
    features.set_geometry(key_shift=shift)
    pointer = features.projection.data_ptr()
    features.resample(1)
    assert features.projection.data_ptr() == pointer
    assert torch.equal(features.key_shift, shift)


def test_identity_geometry_is_left_out_until_it_is_set() -> None:
    features = SRFFeatures(CONFIG, 2, 16)
    assert all(part is None for part in features.feature_map()[1:])
    features.set_geometry(query_shift=torch.ones(2, 16))
    maps = features.feature_map()
    assert torch.equal(maps.query_shift, torch.ones(2, 16))
    assert torch.equal(maps.key_shift, torch.zeros(2, 16))
    assert maps.preconditioner is None
    assert maps.proposal is None
    features.set_geometry()
    assert all(part is None for part in features.feature_map()[1:])


def test_the_fold_is_kept_and_notices_changes_behind_its_back() -> None:
    features = SRFFeatures(CONFIG, 2, 16)
    first = features.folded()
    assert features.folded() is first
    features.proposal.fill_(-0.1)  # in place
    second = features.folded()
    assert second is not first
    assert features.feature_map().proposal is not None
    features.projection = torch.zeros_like(features.projection)  # another tensor, as loaders do
    assert not torch.equal(features.folded().query.weight, second.query.weight)
    assert copy.deepcopy(features).folded() is not features.folded()


def test_a_fold_made_in_inference_mode_does_not_leak_into_training() -> None:
    model = retrofit(build_llama(), CONFIG)
    for layer in srf_attentions(model):
        layer.attn_fn.set_geometry(query_shift=torch.full((2, 16), 0.1))
    ids = tokens(model, 1, 20)
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("cast", [torch.Tensor.half, torch.Tensor.bfloat16], ids=["half", "bfloat16"])
def test_features_stay_float32(cast) -> None:
    features = SRFFeatures(CONFIG, 2, 16)
    before = {name: buffer.clone() for name, buffer in features.named_buffers()}
    getattr(features, cast.__name__)()
    features.to(torch.bfloat16)
    for name, buffer in features.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    assert features.double().projection.dtype == torch.float64


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"query_shift": torch.zeros(3, 16)}, r"query_shift must have shape \(2, 16\)"),
        ({"key_shift": torch.full((2, 16), torch.nan)}, "key_shift has values that are not finite"),
        ({"proposal": torch.full((2, 16), 0.25)}, "proposal must stay below 1/4"),
        ({"preconditioner": torch.eye(16).expand(2, 16, 16)}, "belong together"),
    ],
)
def test_bad_geometry_is_refused_and_changes_nothing(geometry, message) -> None:
    features = SRFFeatures(CONFIG, 2, 16)
    before = {name: buffer.clone() for name, buffer in features.named_buffers()}
    with pytest.raises(ValueError, match=message):
        features.set_geometry(**geometry)
    assert all(torch.equal(buffer, before[name]) for name, buffer in features.named_buffers())


# -- the layer ---------------------------------------------------------------------------------------------------------


def test_adoption_keeps_module_parameters_mode_and_hooks() -> None:
    layer = build_llama().model.layers[1].self_attn.train()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(layer.named_parameters())
    adopted = SRFLlamaAttention.adopt(layer, CONFIG)
    assert adopted is layer
    assert isinstance(layer, transformers.models.llama.modeling_llama.LlamaAttention)
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert layer.training
    assert layer.attn_fn.training
    x, angles = torch.randn(1, 5, layer.config.hidden_size), torch.ones(1, 5, layer.head_dim)
    layer(x, position_embeddings=(angles, torch.zeros_like(angles)))
    assert calls == [1]
    with pytest.raises(TypeError, match="adopts a LlamaAttention, got a SRFLlamaAttention"):
        SRFLlamaAttention.adopt(layer, CONFIG)


def test_exact_mode_is_the_original_model(model) -> None:
    original, ids = build_llama(), tokens(model, 2, 30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with exact_attention(model):
        assert torch.equal(logits(model, ids, attention_mask=mask), logits(original, ids, attention_mask=mask))
        assert torch.equal(
            model.generate(ids, max_new_tokens=5, do_sample=False),
            original.generate(ids, max_new_tokens=5, do_sample=False),
        )
    assert not torch.equal(logits(model, ids), logits(original, ids))


def test_short_sequences_are_exact_and_longer_ones_close() -> None:
    """Everything inside sinks and window is softmax attention itself."""
    model, original = retrofit(build_llama(), CONFIG), build_llama()
    ids = tokens(model, 2, 16)
    assert_close(logits(model, ids), logits(original, ids), rtol=1e-5, atol=1e-5)


def test_observer_sees_queries_and_keys_in_both_modes(model) -> None:
    seen = []
    layer = srf_attentions(model)[0]
    layer.observer = lambda q, k, mask: seen.append((q.clone(), k.clone(), mask))
    ids = tokens(model, 2, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits(model, ids, attention_mask=mask, position_ids=positions)
    with exact_attention(model):
        logits(model, ids, attention_mask=mask, position_ids=positions)
    (q, k, given), (exact_q, exact_k, exact_given) = seen
    c = model.config
    assert q.shape == (2, c.num_attention_heads, 10, c.head_dim)
    assert k.shape == (2, c.num_key_value_heads, 10, c.head_dim)
    assert torch.equal(q, exact_q)
    assert torch.equal(k, exact_k)
    assert torch.equal(given, mask.bool())
    assert torch.equal(exact_given, mask.bool())


def test_the_seeds_loop_runs_unchanged() -> None:
    """The loop of the srf-attention README, on a retrofitted Llama."""
    model = retrofit(build_llama(), CONFIG)
    for module in model.modules():
        if isinstance(module, transformers.models.llama.modeling_llama.LlamaAttention):
            module.use_fast_attn_(True)
            module.attn_fn.redraw_on_call_(False)
    before = [layer.attn_fn.projection.clone() for layer in srf_attentions(model)]
    for module in model.modules():
        if isinstance(module, transformers.models.llama.modeling_llama.LlamaAttention):
            module.attn_fn.redraw_(next(model.parameters()).device)
    after = [layer.attn_fn.projection for layer in srf_attentions(model)]
    assert all(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    for layer in srf_attentions(model):
        layer.use_fast_attn_(False)
    ids = tokens(model, 1, 20)
    assert torch.equal(logits(model, ids), logits(build_llama(), ids))


def test_redraw_on_call_redraws_once_a_training_forward() -> None:
    model = retrofit(build_llama(), CONFIG)
    layers = srf_attentions(model)
    for layer in layers:
        layer.attn_fn.redraw_on_call_(True)
    ids = tokens(model, 1, 10)
    logits(model, ids)
    assert [layer.attn_fn.step for layer in layers] == [0] * len(layers)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert [layer.attn_fn.step for layer in layers] == [1] * len(layers)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="redraw_on_call_"):
        model(ids)


@pytest.mark.parametrize("ablation", ["no_tail", "tail_only", "no_retained"])
def test_ablations_change_the_answer_and_are_undone(ablation) -> None:
    model = retrofit(build_llama(), CONFIG)
    ids = tokens(model, 1, 60)
    whole = logits(model, ids)
    with ablated_attention(model, ablation):
        assert not torch.allclose(logits(model, ids), whole, atol=1e-4)
    assert torch.equal(logits(model, ids), whole)
    with pytest.raises(ValueError, match="ablation must be one of"), ablated_attention(model, "half"):
        pass


# -- padding and packing -----------------------------------------------------------------------------------------------


def test_padding_anywhere_changes_nothing(model) -> None:
    """Left, right, and holes; each row's real tokens give what they give alone."""
    ids = tokens(model, 1, 37)
    alone = logits(model, ids)[0]
    layouts = {
        "left": [0] * 9 + [1] * 37,
        "right": [1] * 37 + [0] * 9,
        "holes": [1] * 5 + [0] * 3 + [1] * 20 + [0] * 6 + [1] * 12,
    }
    mask = torch.tensor(list(layouts.values()))
    batch = tokens(model, 3, mask.shape[1], seed=2)
    batch[mask.bool()] = ids.expand(3, -1).reshape(-1)
    out = logits(model, batch, attention_mask=mask)
    for row, name in enumerate(layouts):
        assert_close(out[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_row_does_not_know_its_batch_mates(model) -> None:
    ids = tokens(model, 3, 33)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    mask[2, 5:] = 0
    out = logits(model, ids, attention_mask=mask)
    other = ids.clone()
    other[1:] = tokens(model, 2, 33, seed=9)
    assert_close(logits(model, other, attention_mask=mask)[0], out[0], rtol=1e-5, atol=1e-5)
    assert_close(logits(model, ids[:1])[0], out[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=["all layers", "hybrid"])
@pytest.mark.parametrize("how", ["positions", "cu_seq_lens", "both"])
def test_packed_documents_equal_separate_ones(layers, how) -> None:
    model = retrofit(build_llama(), CONFIG, layers=layers)
    lengths = [13, 1, 30, 8]
    documents = [tokens(model, 1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, 13, 14, 44, 52], dtype=torch.int32)
    given = {}
    if how != "cu_seq_lens":
        given["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    if how != "positions":
        given |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "max_length_k": 30}
    packed = model(torch.cat(documents, 1), **given)
    assert packed.past_key_values is None
    separate = torch.cat([logits(model, ids) for ids in documents], 1)
    assert_close(packed.logits, separate, rtol=1e-5, atol=1e-5)


def test_packed_rows_of_a_batch() -> None:
    model = retrofit(build_llama(), CONFIG)
    ids = tokens(model, 2, 24)
    positions = torch.tensor([[*range(10), *range(14)], [*range(24)]])
    out = logits(model, ids, position_ids=positions)
    first = torch.cat([logits(model, ids[:1, :10]), logits(model, ids[:1, 10:])], 1)
    assert_close(out[:1], first, rtol=1e-5, atol=1e-5)
    assert_close(out[1:], logits(model, ids[1:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "must be a padding mask"),
        ({"attention_mask": torch.ones(2, 6)}, r"must cover 1 row\(s\)"),
        ({"attention_mask": torch.ones(1, 4)}, "of at least 6 tokens"),
        ({"output_attentions": True}, "never form the attention matrix"),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])}, "differ"),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "not both"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": True}, "no single state"),
    ],
)
def test_what_cannot_be_done_is_refused(given, message) -> None:
    model = retrofit(build_llama(), CONFIG)
    with pytest.raises(ValueError, match=message):
        model(tokens(model, 1, 6), **given)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(model, ids: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(model, reentrant) -> None:
    model.train()
    ids = tokens(model, 2, 40)
    plain = gradients(model, ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model, ids)
    assert set(plain) == set(checkpointed) == {name for name, _ in model.named_parameters()}
    for name, value in plain.items():
        assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7)


def test_training_with_a_cache_gives_the_same_gradients(model) -> None:
    """`use_cache` is on by default, also in training."""
    ids = tokens(model, 2, 40)
    plain = gradients(model, ids, use_cache=False)
    cached = gradients(model, ids, use_cache=True)
    for name, value in plain.items():
        assert_close(cached[name], value, rtol=1e-5, atol=1e-7)


def test_two_cached_forwards_can_both_go_backward(model) -> None:
    """The cache is overwritten in place; the first forward's graph must not see that."""
    ids = tokens(model, 1, 40)
    first = model(ids[:, :17], labels=ids[:, :17])
    second = model(ids[:, 17:], labels=ids[:, 17:], past_key_values=first.past_key_values)
    third = model(ids[:, :9], labels=ids[:, :9], past_key_values=second.past_key_values)
    (first.loss + second.loss + third.loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_runs_in_bfloat16(model) -> None:
    ids = tokens(model, 1, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model, ids)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 33)
    full = logits(model, ids)
    assert (out.float() - full).norm() <= 0.1 * full.norm()


def test_double_precision_model(model) -> None:
    ids = tokens(model, 1, 30)
    single = logits(model, ids)
    assert_close(logits(model.double(), ids).float(), single, rtol=1e-4, atol=1e-4)
