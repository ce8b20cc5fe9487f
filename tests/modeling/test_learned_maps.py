"""Trained features begin as the random ones they come from; learned maps compute what their papers say."""

from __future__ import annotations

import pytest
import torch
from builders import CONFIG, build
from transformers import AutoModelForCausalLM

from srf_retrofit import SRFConfig, calibrate, plan_retrofit, retrofit, revert
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.feature_map import RELU_FLOOR, log_features
from srf_retrofit.modeling.learned_maps import LearnedMaps
from srf_retrofit.modeling.ops import choose_backend, srf_attention
from srf_retrofit.training.callbacks import feature_modules, resample_features
from srf_retrofit.training.settling import settle_features

HEDGEHOG = CONFIG.replace(feature_map="hedgehog")
RELU = CONFIG.replace(feature_map="relu")
EXACT_ONLY = CONFIG.replace(num_features=0)
KINDS = {
    "hedgehog": HEDGEHOG,
    "relu": RELU,
    "trained": CONFIG.replace(feature_map="trained"),
    "none": EXACT_ONLY,
    "hedgehog, uneven heads": HEDGEHOG.with_slots((0, 6)),
    "random, uneven heads": CONFIG.with_slots((2, 7)),
    "pure hedgehog": SRFConfig(num_features=16, window=0, sinks=0, retained=0, feature_map="hedgehog"),
    "pure relu": SRFConfig(num_features=16, window=0, sinks=2, retained=0, feature_map="relu"),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_prefill_and_decoding_agree_and_every_map_gets_a_gradient(config: SRFConfig, ids: torch.Tensor) -> None:
    model = build()
    plan = plan_retrofit(model, config)
    retrofit(model, config)
    stored = [t for name, t in model.state_dict().items() if ".attn_fn." in name]
    assert sum(t.numel() * t.element_size() for t in stored) == plan.buffer_bytes
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :30], use_cache=True)
        parts, cache = [out.logits], out.past_key_values
        for t in range(30, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    maps = [p for layer in srf_attentions(model) for p in layer.attn_fn.parameters()]
    assert bool(maps) == (config.feature_map != "random")
    assert all(p.grad is not None and bool(p.grad.any()) for p in maps)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_checkpoints_bring_the_maps(config: SRFConfig, ids: torch.Tensor, tmp_path) -> None:
    model = build()
    retrofit(model, config)
    with torch.no_grad():
        for layer in srf_attentions(model):
            for p in layer.attn_fn.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        right = model(ids).logits
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(again(ids).logits, right)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for layer in srf_attentions(half) for p in layer.attn_fn.parameters()} <= {torch.float32}


def test_settling_changes_nothing_at_first_and_frees_every_part(ids: torch.Tensor) -> None:
    model, original = build(), build()
    retrofit(model, CONFIG)
    calibrate(model, [torch.randint(3, 90, (2, 200), generator=torch.Generator().manual_seed(1))], geometry="proposal")
    for layer in srf_attentions(model):
        layer.attn_fn.set_log_weight(torch.tensor([[-0.5], [0.0]]))
    before = model(ids).logits
    assert settle_features(model) == 3
    assert torch.equal(model(ids).logits, before)
    assert model.config.srf["feature_map"] == "trained"
    assert not feature_modules(model)
    with pytest.raises(ValueError, match="no retrofitted layers"):
        resample_features(model, 1)
    with pytest.raises(ValueError, match="no random features to settle"):
        settle_features(model)
    assert set(dict(srf_attentions(model)[0].attn_fn.named_parameters())) == {
        f"{side}_{name}" for side in ("query", "key") for name in ("weight", "bias", "norm_weight", "norm_bias")
    }
    revert(model)
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_hedgehog_features_are_two_softmaxes() -> None:
    maps = LearnedMaps(HEDGEHOG, 2, 16, num_heads=4)
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    got = log_features(x, maps.folded().key, 0.25).exp()
    h = torch.einsum("bgld,gmd->bglm", x, maps.get_parameter("key_weight"))
    torch.testing.assert_close(got, torch.cat([h.softmax(-1), (-h).softmax(-1)], -1))
    assert got.shape[-1] == HEDGEHOG.num_features


def test_relu_features_are_clipped_and_never_quite_zero() -> None:
    maps = LearnedMaps(RELU, 2, 16, num_heads=4)
    with torch.no_grad():
        maps.get_parameter("query_bias").fill_(-0.5)
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    got = log_features(x, maps.folded().query, 0.25).exp()
    h = torch.einsum("bgld,gmd->bglm", x, maps.get_parameter("query_weight")) - 0.5
    torch.testing.assert_close(got, h.clamp_min(0) + RELU_FLOOR)
    assert (h < 0).any()


def test_learned_features_stand_beside_exact_keys_as_in_lolcats() -> None:
    """Weights written out: exp(s - max s) for exact keys, e^mixing phi(q) phi(k) for the others, one normaliser."""
    config = SRFConfig(num_features=8, window=4, sinks=1, retained=0, feature_map="hedgehog")
    maps = LearnedMaps(config, 1, 8, num_heads=2)
    with torch.no_grad():
        maps.get_parameter("mixing").copy_(torch.tensor([[0.7, -0.4]]))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 14, 8, generator=generator) for n in (2, 1, 1))
    o, _ = srf_attention(q, k, v, maps.folded(), config)
    fq, fk = (log_features(x, side, 1.0).exp() for x, side in zip((q[:, :1], k), maps.folded()[:2], strict=True))
    fq = torch.stack([log_features(q[:, r : r + 1], maps.folded().query, 1.0).exp()[0, 0] for r in range(2)])
    i = 13  # block 3: exact are the sink and positions 8..13, features stand for 1..7
    exact = [0, *range(8, 14)]
    for r, mixing in enumerate((0.7, -0.4)):
        s = (k[0, 0, exact] @ q[0, r, i]) * 8**-0.5
        near = (s - s.max()).exp()
        far = torch.tensor(mixing).exp() * (fk[0, 0, 1:8] @ fq[r, i])
        right = (near @ v[0, 0, exact] + far @ v[0, 0, 1:8]) / (near.sum() + far.sum())
        torch.testing.assert_close(o[0, r, i], right, atol=1e-5, rtol=1e-5)


def test_kernels_refuse_what_they_do_not_compute() -> None:
    q = torch.randn(1, 4, 8, 16)
    with pytest.raises(ValueError, match="cannot run this call"):
        choose_backend(q, RELU, backend="triton")
    for config in (HEDGEHOG, RELU):
        with pytest.raises(ValueError, match="cannot run this call"):
            choose_backend(q[:, :, :1], config, step=True, backend="triton")


def test_without_features_nothing_is_known_of_what_left() -> None:
    """num_features = 0 is the ablation "no_tail", with a state that has no room for features."""
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    with_tail, without = build(), build()
    retrofit(with_tail, CONFIG)
    retrofit(without, EXACT_ONLY)
    for layer in srf_attentions(with_tail):
        layer.ablation = "no_tail"
    torch.testing.assert_close(without(ids).logits, with_tail(ids).logits, atol=1e-5, rtol=0)
    assert plan_retrofit(build(), EXACT_ONLY).state_bytes < plan_retrofit(build(), CONFIG).state_bytes


def test_calibration_is_for_random_features_alone(ids: torch.Tensor) -> None:
    model = build()
    retrofit(model, HEDGEHOG)
    with pytest.raises(ValueError, match="fits the geometry of random features, this model's are 'hedgehog'"):
        calibrate(model, [ids])
