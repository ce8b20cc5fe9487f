"""Figures mean what they say: the same tokens for every model, exact zero distance to oneself, parts left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation import perplexity as evaluation
from srf_retrofit.modeling.attention import exact_attention, srf_attentions
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.configuration_hf import SRFLlamaConfig
from srf_retrofit.modeling.modeling import SRFLlamaForCausalLM

VOCABULARY = 97


def small_model(**srf: object) -> SRFLlamaForCausalLM:
    torch.manual_seed(0)
    config = SRFLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
        srf=SRFConfig(**{"num_features": 16, "window": 4, "sinks": 1, "retained": 4, **srf}).to_dict(),
    )
    return SRFLlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> SRFLlamaForCausalLM:
    return small_model()


@pytest.fixture(scope="module")
def blocks() -> TokenBlocks:
    return TokenBlocks(torch.randint(VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(1)))


def test_perplexity_is_the_mean_over_all_predictions(model, blocks) -> None:
    found = evaluation.perplexity(model, blocks, batch_size=2)
    with torch.no_grad():
        logits = torch.cat([model(row[None], use_cache=False).logits for row in blocks.blocks])
    right = functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks.blocks[:, 1:].flatten())
    assert found.tokens == 5 * 39
    assert found.nll == pytest.approx(float(right), rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(found.nll))
    assert evaluation.perplexity(model, blocks, batch_size=5).nll == pytest.approx(found.nll, rel=1e-6)


def test_perplexity_overflow_is_finite() -> None:
    assert math.isfinite(evaluation.Perplexity(1e6, 1).ppl)


def test_modes_differ_and_leave_nothing_behind(model, blocks) -> None:
    values = {mode: evaluation.perplexity(model, blocks, mode=mode).nll for mode in evaluation.MODES}
    assert len(set(values.values())) == len(evaluation.MODES) == 4
    assert evaluation.perplexity(model, blocks).nll == values["full"]
    with pytest.raises(RuntimeError), evaluation.ablation(model, "no_tail"):
        assert all(layer.ablation == "no_tail" for layer in srf_attentions(model))
        raise RuntimeError
    assert all(layer.ablation is None for layer in srf_attentions(model))


def test_short_rows_need_no_features(blocks) -> None:
    """Within the window nothing is estimated, so leaving the features out changes nothing."""
    wide = small_model(window=64)
    exact = evaluation.perplexity(wide, blocks, mode="no_tail").nll
    assert evaluation.perplexity(wide, blocks).nll == pytest.approx(exact, rel=1e-6)
    with exact_attention(wide):
        assert evaluation.perplexity(wide, blocks).nll == pytest.approx(exact, rel=1e-5)


def test_unknown_mode_and_softmax_models_are_refused(model, blocks) -> None:
    with pytest.raises(ValueError, match="mode must be one of full, no_tail, tail_only, no_retained, got 'window'"):
        evaluation.perplexity(model, blocks, mode="window")
    plain = torch.nn.Linear(2, 2)
    with (
        pytest.raises(ValueError, match="no retrofitted layer to run 'no_tail'"),
        evaluation.ablation(plain, "no_tail"),
    ):
        pass
    with pytest.raises(ValueError, match="no retrofitted layer"):
        evaluation.head_errors(plain, blocks)
    with pytest.raises(ValueError, match="blocks of one token"):
        evaluation.perplexity(model, TokenBlocks(torch.zeros(3, 1)))


def test_distance(model, blocks) -> None:
    other = small_model(window=64)
    zero = evaluation.distance(other, other, blocks)
    assert zero.kl == pytest.approx(0, abs=1e-6)
    assert zero.agreement == 1
    far = evaluation.distance(model, model, blocks)
    assert far.kl > 1e-3
    assert far.tokens == 5 * 39
    apart = evaluation.distance(other, model, blocks, batch_size=2)  # `other` is exact here, with equal weights
    assert apart.kl == pytest.approx(far.kl, rel=1e-3)


def test_head_errors(blocks) -> None:
    model = small_model()
    errors = evaluation.head_errors(model, blocks.first(2))
    assert [len(row) for row in errors] == [4, 4]
    assert all(error > 1e-3 for row in errors for error in row)
    within = evaluation.head_errors(small_model(window=64), blocks.first(2))
    assert all(error < 1e-5 for row in within for error in row)
    # More features, smaller error; the hooks are gone.
    many = evaluation.head_errors(small_model(num_features=512), blocks.first(2))
    assert sum(map(sum, many)) < sum(map(sum, errors))
    assert not any(layer._forward_pre_hooks for layer in srf_attentions(model))


def test_training_mode_comes_back(blocks) -> None:
    model = small_model().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    evaluation.perplexity(model, blocks)
    assert [module.training for module in model.modules()] == before


def test_decode_times(model) -> None:
    times = evaluation.decode_times(model, [5, 20, 60], tokens=3)
    assert len(times) == 3
    assert all(t > 0 for t in times)
    with pytest.raises(ValueError, match="must rise by more than"):
        evaluation.decode_times(model, [5, 8], tokens=3)
