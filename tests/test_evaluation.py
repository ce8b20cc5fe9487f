"""Figures mean what they say: the same tokens for every model, exact zero distance to oneself, parts left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from srf_retrofit import evaluation
from srf_retrofit.data import TokenBlocks
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


class Copying(torch.nn.Module):
    """Names the token that followed the last earlier occurrence of the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 1000})()
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: object):
        logits = torch.zeros(*input_ids.shape, 1000)
        for row, out in zip(input_ids.tolist(), logits, strict=True):
            last: dict[int, int] = {}
            for i, token in enumerate(row):
                if token in last:
                    out[i, last[token]] = 1
                if i:
                    last[row[i - 1]] = token
        return type("Output", (), {"logits": logits})()


def test_copy_recall(model) -> None:
    assert evaluation.copy_recall(Copying(), length=12) > 0.9  # random strings may repeat a token
    assert evaluation.copy_recall(model, length=64) < 0.2
    with pytest.raises(ValueError, match="length >= 2"):
        evaluation.copy_recall(model, length=1)


class Characters:
    """One token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_passkey_recall_hides_and_asks() -> None:
    seen = []

    class Reader(Copying):
        def forward(self, input_ids: torch.Tensor, **_: object):
            seen.append("".join(map(chr, input_ids[0])))
            logits = torch.zeros(*input_ids.shape, 1000)
            logits[0, :-1].scatter_(1, input_ids[0, 1:, None], 1.0)  # knows every next token
            return type("Output", (), {"logits": logits})()

    filler = TokenBlocks(torch.full((4, 100), ord(".")))
    assert evaluation.passkey_recall(Reader(), Characters(), filler, context=100, trials=3) == 1.0
    assert len(seen) == 3
    keys = {text[-5:] for text in seen}
    assert len(keys) == 3
    for text in seen:
        assert text.count(text[-5:]) == 3
        assert text.count(".") == 100 + 2
    assert evaluation.passkey_recall(Copying(), Characters(), filler, context=100, trials=2) < 1.0
    with pytest.raises(ValueError, match="need 500 tokens, got 400"):
        evaluation.passkey_recall(Reader(), Characters(), filler, context=100, trials=5)


def test_decode_times(model) -> None:
    times = evaluation.decode_times(model, [5, 20, 60], tokens=3)
    assert len(times) == 3
    assert all(t > 0 for t in times)
    with pytest.raises(ValueError, match="must rise by more than"):
        evaluation.decode_times(model, [5, 8], tokens=3)
