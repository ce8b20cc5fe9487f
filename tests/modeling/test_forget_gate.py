"""The forget gate of the pure form: core, one-token step and kernels against the oracles; what a model makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from core_inputs import assert_states_close
from fused_checks import BFLOAT16

from srf_retrofit import retrofit
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.forget_gate import FARTHEST, NEAREST, ForgetGate, forgotten
from srf_retrofit.modeling.learned_maps import LearnedMaps
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import (
    assert_close,
    quadratic_attention,
    random_feature_map,
    stepwise_attention,
    tiny_llama,
)
from srf_retrofit.training.settling import settle_features
from srf_retrofit.training.teacher import training_only

pytestmark = pytest.mark.usefixtures("small_parts")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = SRFConfig(num_features=16, window=0, sinks=0, retained=0, forget_gate=True)
BACKENDS = ("torch", "triton")
MAPS = random_feature_map(2, 16, 16, geometry="preconditioner")


def inputs(length, *, batch=1, dtype=torch.float32, strength=0.2, seed=0, dim=16):
    """q, k, v and log-factors, of which some forget nearly all."""
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(batch, n, length, dim, generator=generator).to(DEVICE, dtype) for n in (4, 2, 2)]
    forget = -strength * torch.rand(batch, 2, length, generator=generator)
    forget = torch.where(torch.rand(forget.shape, generator=generator) < 0.1, 20 * forget, forget)
    return [x.requires_grad_() for x in (*xs, forget.to(DEVICE))]


def attend(xs, config=CONFIG, maps=MAPS, **more):
    q, k, v, forget = xs
    return srf_attention(q, k, v, maps.to(DEVICE), config, log_forget=forget, **more)


def compare(backend, xs, maps, config):
    dtype = xs[0].dtype
    ys = [x.detach().double().cpu().requires_grad_() for x in xs]
    o, state = attend(xs, config, maps, backend=backend, output_final_state=True)
    expected, right = quadratic_attention(*ys[:3], maps, config, log_forget=ys[3], output_final_state=True, dtype=dtype)
    # An exponent of that size, in float32, is off by as much as its last bit.
    close = 1e-5 + float(ys[3].detach().sum(-1).abs().max()) * 2**-23 if dtype == torch.float32 else BFLOAT16
    assert_close(o, expected, close, "o")
    if dtype == torch.float32:
        # Masses are relative to the largest key, in the one as in the other, but not always to the same.
        masses = [s.k_sum.double().log().cpu() + s.k_max.double().cpu() for s in (state, right)]
        assert_close(*masses, close, "log mass")
        assert_close(state.kv_mean, right.kv_mean, close, "means")
    weight = torch.randn(o.shape, dtype=torch.float64)
    grads = torch.autograd.grad((o * weight.to(o)).sum(), xs)
    rights = torch.autograd.grad((expected * weight).sum(), ys)
    for name, mine, theirs in zip(("q", "k", "v", "log_forget"), grads, rights, strict=True):
        if name == "log_forget":
            # Sums over all earlier keys, whose errors add up: each key by itself is as exact as any gradient, and what
            # bfloat16 leaves in hundreds of them was 1.2e-2 to 1.7e-2.
            per_key = [x - torch.nn.functional.pad(x[..., 1:], (0, 1)) for x in (mine, theirs)]
            assert_close(*per_key, close, "grad log_forget, by key", least_scale=0.1)
            assert_close(mine, theirs, close if dtype == torch.float32 else 2 * close, "grad log_forget")
        else:
            assert_close(mine, theirs, close, f"grad {name}", least_scale=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [0.02, 2.0, 8.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_quadratic_oracle(backend, strength, dtype):
    compare(backend, inputs(53, dtype=dtype, strength=strength), MAPS, CONFIG)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "features"), [(64, 64), (64, 256), (128, 128)])
def test_real_shapes_on_a_device(dim, features, dtype):
    maps = random_feature_map(2, features, dim, geometry="preconditioner")
    compare("triton", inputs(400, dtype=dtype, dim=dim), maps, CONFIG.replace(num_features=features))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_packing_and_states(backend):
    xs = [x.detach() for x in inputs(40, batch=2)]
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    padded, padded_state = attend(xs, attention_mask=mask.to(DEVICE), output_final_state=True, backend=backend)
    for row in range(2):
        index = mask[row].nonzero().flatten().to(DEVICE)
        alone, state = attend(
            [x[row : row + 1].index_select(2, index) for x in xs], output_final_state=True, backend=backend
        )
        assert_close(padded[row : row + 1].index_select(2, index), alone, 2e-6, "padded row")
        assert_states_close(padded_state.index_select(torch.tensor([row])), state, 2e-6)

    # Both rows packed into one, with an empty document between them; then continued.
    joined = [x.transpose(0, 1).reshape(1, x.shape[1], 80, *x.shape[3:]) for x in xs]
    packed, packed_state = attend(
        joined, cu_seqlens=torch.tensor([0, 40, 40, 80], device=DEVICE), output_final_state=True, backend=backend
    )
    whole, state = attend(xs, output_final_state=True, backend=backend)
    assert_close(packed.view(4, 2, 40, 16).transpose(0, 1), whole, 2e-6, "packed")
    assert_states_close(packed_state.index_select(torch.tensor([0, 2])), state, 2e-6)
    more = [x.detach() for x in inputs(9, batch=2, seed=2)]
    longer, end = attend(
        [torch.cat(pair, 2) for pair in zip(xs, more, strict=True)], output_final_state=True, backend=backend
    )
    continued, after = attend(more, initial_state=state, output_final_state=True, backend=backend)
    assert_close(continued, longer[:, :, 40:], 2e-6, "continued")
    assert_close(after.k_max.double() + after.k_sum.log(), end.k_max.double() + end.k_sum.log(), 2e-6, "log mass")


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token(backend):
    xs = [x.detach() for x in inputs(21, batch=2, strength=2.0)]
    state = SRFState.empty(CONFIG, 2, 2, 16, dtype=torch.float32, device=DEVICE)
    kept = state.k_max.clone()
    active = torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    outputs = []
    for i in range(21):
        token = [x[:, :, i : i + 1] for x in xs]
        if i == 5:
            # A row that rests forgets nothing, whatever its token says.
            idle = torch.tensor([[True], [False]], device=DEVICE)
            _, rested = attend(
                token, initial_state=state, attention_mask=idle, output_final_state=True, backend=backend
            )
            assert torch.equal(rested.k_max[1], state.k_max[1])
        o, state = attend(token, initial_state=state, attention_mask=active, output_final_state=True, backend=backend)
        outputs.append(o)
    q, k, v, forget = (x.cpu() for x in xs)
    assert_close(torch.cat(outputs, 2), stepwise_attention(q, k, v, MAPS, CONFIG, log_forget=forget), 1e-5)
    assert bool((kept == -torch.inf).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token_has_the_gradient_of_its_factor(backend):
    xs = [x.detach() for x in inputs(9)]
    factors = [xs[3], xs[3][..., -1:]]
    for factor in factors:
        factor.requires_grad_(True)
    o, _ = attend((*xs[:3], factors[0]), backend=backend)
    _, state = attend([x[:, :, :-1].detach() for x in xs], output_final_state=True, backend=backend)
    last, _ = attend((*[x[:, :, -1:] for x in xs[:3]], factors[1]), initial_state=state, backend=backend)
    whole, own = (
        torch.autograd.grad(out[:, :, -1].sum(), factor)[0] for out, factor in zip((o, last), factors, strict=True)
    )
    assert_close(own, whole[..., -1:], 1e-5)


def test_a_gate_that_keeps_all_is_none():
    q, k, v, _ = inputs(30)
    plain, _ = srf_attention(q, k, v, MAPS.to(DEVICE), CONFIG.replace(forget_gate=False))
    gated, _ = attend((q, k, v, torch.zeros(1, 2, 30, device=DEVICE)))
    assert torch.equal(plain, gated)


def test_a_long_row_keeps_its_precision():
    """What is counted from the row's first token grows to thousands; what matters is the difference of a few."""
    xs = [x.detach() for x in inputs(6000, strength=1.0)]
    o, _ = attend(xs)
    last = [x[:, :, -2048:].double() for x in xs]
    maps = MAPS.to(DEVICE, torch.float64)
    expected, _ = attend(last, maps=maps)
    assert_close(o[:, :, -64:], expected[:, :, -64:], 1e-3)


def test_sums_start_anew_with_every_document():
    forget = -torch.rand(1, 2, 10)
    total, ends = forgotten(forget, None, [(0, 4), (4, 4), (4, 10)])
    assert_close(total[..., :4], forget[..., :4].cumsum(-1), 1e-6)
    assert_close(total[..., 4:], forget[..., 4:].cumsum(-1), 1e-6)
    assert_close(ends, torch.stack([forget[0, :, :4].sum(-1), torch.zeros(2), forget[0, :, 4:].sum(-1)]), 1e-6)


def test_first_spans_run_from_near_to_far():
    gate = ForgetGate(3, 8)
    log_factor = gate(torch.randn(2, 5, 8))
    assert log_factor.shape == (2, 3, 5)
    spans = -1 / log_factor[0, :, 0].detach().double()
    middle = (NEAREST * FARTHEST) ** 0.5
    assert_close(spans, torch.tensor([NEAREST, middle, FARTHEST], dtype=torch.float64), 1e-3)
    assert gate.half().weight.dtype == torch.float32
    assert gate.double().weight.dtype == torch.float64


def gated_model(**changes):
    model = tiny_llama(**changes)
    retrofit(model, CONFIG)
    with torch.no_grad():
        for layer in srf_attentions(model):
            layer.attn_fn.gate.weight.normal_(std=0.2)
    return model


def test_a_model_generates_what_it_computes_in_one_go(tmp_path):
    model = gated_model()
    ids = torch.randint(3, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    full = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], 1)
    logits = model(out, attention_mask=full).logits
    assert torch.equal(logits[:, 11:-1].argmax(-1), out[:, 12:])

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(out, attention_mask=full).logits, logits)


def test_training_and_settling_keep_the_gate():
    model = gated_model()
    ids = torch.randint(3, 97, (2, 20))
    before = model(ids).logits
    gates = [layer.attn_fn.gate for layer in srf_attentions(model)]
    settle_features(model)
    assert all(isinstance(layer.attn_fn, LearnedMaps) for layer in srf_attentions(model))
    assert [layer.attn_fn.gate for layer in srf_attentions(model)] == gates
    assert_close(model(ids).logits, before, 1e-5)
    model(ids, labels=ids).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for gate in gates for p in gate.parameters())
    assert copy.deepcopy(model)(ids).logits.equal(model(ids).logits)


def test_a_gate_is_trained_where_features_are_kept():
    model = gated_model()
    settle_features(model)
    features = srf_attentions(model)[0].attn_fn
    for part, gated in (("weights", True), ("features", True), ("queries_keys", False)):
        with training_only(model, part):
            assert features.gate.weight.requires_grad == gated
            assert features.query_weight.requires_grad == (part == "features")


def test_documents_of_a_packed_row_forget_on_their_own():
    model = gated_model()
    a, b = torch.randint(3, 97, (1, 9)), torch.randint(3, 97, (1, 7))
    positions = torch.cat([torch.arange(9), torch.arange(7)]).unsqueeze(0)
    packed = model(torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
    assert_close(packed[:, 9:], model(b).logits, 1e-5)


def test_refusals():
    q, k, v, forget = inputs(6)
    with pytest.raises(ValueError, match=r"forget_gate=True fades keys .*\(window=8, sinks=0\)"):
        CONFIG.replace(window=8)
    with pytest.raises(ValueError, match="forget_gate must be True or False, got 1"):
        CONFIG.replace(forget_gate=1)
    with pytest.raises(ValueError, match="give log_forget"):
        srf_attention(q, k, v, MAPS.to(DEVICE), CONFIG)
    with pytest.raises(ValueError, match="forget_gate=False"):
        attend((q, k, v, forget), CONFIG.replace(forget_gate=False))
    with pytest.raises(ValueError, match=r"log_forget must be torch.float32 of shape \(1, 2, 6\)"):
        attend((q, k, v, forget[..., :5]))
    with pytest.raises(ValueError, match="needs causal=True"):
        attend((q, k, v, forget), causal=False)
    with pytest.raises(ValueError, match="hidden_size"):
        LearnedMaps(CONFIG.replace(feature_map="trained"), 2, 16)
