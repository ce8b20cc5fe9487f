"""Log-weights of heads: the choice lowers the error it is made by, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from builders import CONFIG, build

from srf_retrofit import SRFConfig, calibrate, retrofit
from srf_retrofit.calibration.gain import GAINS, _HeadErrors, calibrate_gain
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation.perplexity import head_errors
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.ops import srf_attention


@pytest.fixture
def blocks() -> TokenBlocks:
    return TokenBlocks(torch.randint(3, 90, (3, 96), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def model(blocks):
    model = build()
    retrofit(model, CONFIG)
    calibrate(model, blocks.batches(1))
    return model


def test_the_chosen_gains_are_the_best_for_every_head(model, blocks) -> None:
    report = calibrate_gain(model, blocks.batches(2))
    errors = {}
    for gain in GAINS:
        for layer in srf_attentions(model):
            layer.attn_fn.set_log_weight(torch.tensor(gain))
        # Squared errors of a group's query heads together, as the choice was made by.
        errors[gain] = torch.tensor(head_errors(model, blocks)).square().view(3, 2, 2)
    for index, gains in report.gains.items():
        for head, chosen in enumerate(gains):
            # Relative errors of the two heads of a group are weighed by their outputs; the choice must at least not be
            # beaten on both.
            mine = errors[min(GAINS, key=lambda g: abs(g - chosen))][index, head]
            assert not any((other[index, head] < 0.999 * mine).all() for other in errors.values())
    assert report.after <= report.before
    assert "log-weights of 6 heads" in str(report)


def test_the_closed_form_is_the_error_at_every_gain(model) -> None:
    layer = srf_attentions(model)[1]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 90, 16, generator=generator) for n in (4, 2, 2))
    layer._project = lambda *_: (q, k, v)
    errors = _HeadErrors(GAINS)
    with torch.no_grad():
        errors(layer, (None,), {"position_embeddings": None})
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for gain, found in zip(GAINS, errors.wrong, strict=True):
            layer.attn_fn.set_log_weight(torch.tensor(gain))
            o, _ = srf_attention(q, k, v, layer.attn_fn.folded(), CONFIG)
            right = (o - exact).square().double().sum((0, 2, 3)).view(2, 2).sum(-1)
            torch.testing.assert_close(found, right, rtol=1e-3, atol=0)


def test_the_gains_are_written_and_the_model_is_as_it_was(model, blocks) -> None:
    model.train()
    projection = srf_attentions(model)[0].attn_fn.projection.clone()
    report = calibrate_gain(model, blocks.batches(2))
    assert model.training
    for layer in srf_attentions(model):
        written = layer.attn_fn.log_weight
        torch.testing.assert_close(written, torch.tensor(report.gains[layer.layer_idx]).unsqueeze(-1).expand(2, 16))
        assert not layer._forward_pre_hooks
    assert torch.equal(srf_attentions(model)[0].attn_fn.projection, projection)
    again = calibrate_gain(model, blocks.batches(2))
    assert again.gains == report.gains  # the gains of before do not enter


def test_a_silenced_head_is_a_head_without_features(blocks) -> None:
    model = build()
    retrofit(model, CONFIG)
    for layer in srf_attentions(model):
        layer.attn_fn.set_log_weight(torch.tensor(GAINS[-1]))
    silent = model(blocks.blocks).logits
    for layer in srf_attentions(model):
        layer.ablation = "no_tail"
    torch.testing.assert_close(silent, model(blocks.blocks).logits, atol=1e-4, rtol=0)


def test_refusals_leave_the_weights(model) -> None:
    with pytest.raises(ValueError, match="there was no batch"):
        calibrate_gain(model, [])
    assert not srf_attentions(model)[0].attn_fn.log_weight.any()
    with pytest.raises(ValueError, match="gains is empty"):
        calibrate_gain(model, [torch.ones(1, 8, dtype=torch.int64)], gains=())
    other = build()
    retrofit(other, SRFConfig(num_features=0, window=8, retained=4))
    with pytest.raises(ValueError, match="no layer with random features"):
        calibrate_gain(other, [torch.ones(1, 8, dtype=torch.int64)])
    with pytest.raises(ValueError, match="not finite"):
        srf_attentions(model)[0].attn_fn.set_log_weight(torch.tensor(torch.inf))
