"""The forecast finds what decides, is written to every layer, and is what prefill and decoding compete by."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import CONFIG, PURE, build_llama, logits, tokens

from srf_retrofit import retrofit
from srf_retrofit.calibration import foresight
from srf_retrofit.calibration.foresight import HORIZON, _attention_received, calibrate_foresight
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation.perplexity import head_errors
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.configuration import LEVELS, SRFConfig
from srf_retrofit.modeling.features import no_foresight
from srf_retrofit.modeling.learned_maps import LearnedMaps
from srf_retrofit.modeling.retention import LEAST_LEVEL, forecast, priority_level
from srf_retrofit.training.settling import settle_features


def test_attention_received_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    config = SRFConfig(num_features=8, window=8, sinks=3, retained=2, retention_delay=3)
    length, w = 300, 8
    q, k = torch.randn(2, 2, length, 4, dtype=torch.float64).unbind(0)
    now, later = _attention_received(q, k, config)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    scores = (q @ k.mT).masked_fill(j > i, -math.inf)
    local = scores.masked_fill((i // w - j // w > 1) & (j >= 3), -math.inf).softmax(-1)
    counts = (i - j > 3) & (i // w - j // w <= 1)
    # Sinks are never ranked, so what they received is left at zero.
    expected = local.masked_fill(~counts, 0.0).amax(1)
    torch.testing.assert_close(now[:, 3:], expected[:, 3:])
    after = (i // w - j // w >= 2) & (i - j < HORIZON + 2 * w)
    torch.testing.assert_close(later, (scores.softmax(-1) * after).sum(1))


def test_a_forecast_is_linear_and_rounded_down() -> None:
    torch.manual_seed(0)
    table = torch.randn(2, 1 + 4 * 4)
    k, v = torch.randn(2, 3, 2, 5, 4).unbind(0)
    out = forecast(table, k, v)
    for g in range(2):
        octaves = torch.cat([k[:, g], k[:, g] ** 2, v[:, g], v[:, g] ** 2], -1) @ table[g, 1:]
        distance = octaves * LEVELS - out[:, g]
        assert bool((out[:, g] % (LEVELS // 16) == 0).all())
        assert float(distance.min()) > -1
        assert float(distance.max()) < LEVELS // 16 + 1


def test_levels_with_foresight() -> None:
    config = SRFConfig(num_features=8, window=4, retained=2)
    table = torch.tensor([[0.5, *[0.0] * 16]])
    priority = torch.tensor([0.25, 2.0**-30, 0.0, -math.inf]).view(1, 1, 4)
    block = torch.tensor(3)
    level = priority_level(priority, block, config, table, torch.tensor([256.0, 0.0, -512.0, 0.0]))
    bonus = 3 * config.fade
    least = LEAST_LEVEL // 2 + bonus
    assert level.flatten().tolist() == [(127 - 2) * LEVELS // 2 + 256 + bonus, least, least - 512, -math.inf]
    alone = priority_level(priority, block, config)
    neutral = priority_level(priority, block, config, no_foresight(1, 4), torch.zeros(4))
    assert torch.equal(neutral[..., :1], alone[..., :1])


@pytest.fixture
def model():
    out = build_llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    return retrofit(out, SRFConfig(num_features=8, window=8, sinks=2, retained=8))


def test_finds_the_keys_that_are_looked_at(model) -> None:
    """In a model whose attention is sharpened, the same slots then hold more of it."""
    with torch.no_grad():
        for layer in srf_attentions(model):
            layer.q_proj.weight *= 20
    rows = TokenBlocks(tokens(model, 12, 400))
    held_out = TokenBlocks(tokens(model, 4, 400, seed=2))
    before = torch.tensor(head_errors(model, held_out)).mean()
    received = calibrate_foresight(model, rows.batches(4))
    assert {x for row in received.factors.values() for x in row} == {1.0}
    report = calibrate_foresight(model, rows.batches(4), factor=None)
    assert report.alone == received.alone
    assert report.foreseen > received.foreseen
    after = torch.tensor(head_errors(model, held_out)).mean()
    assert report.tokens == 12 * (400 - 16 - foresight.LEAST_FUTURE - 2)
    assert report.foreseen > report.alone + 0.05
    assert after < 0.95 * before
    assert f"{report.foreseen:.2f}" in str(report)


def test_prefill_and_decoding_keep_the_same_keys(model) -> None:
    calibrate_foresight(model, [tokens(model, 4, 300)])
    ids = tokens(model, 2, 90)
    whole = logits(model, ids)
    with torch.no_grad():
        first = model(ids[:, :33], use_cache=True)
        steps, cache = [first.logits], first.past_key_values
        for i in range(33, 90):
            out = model(ids[:, i : i + 1], past_key_values=cache)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-4)


def test_survives_saving_casting_settling_and_revision_two(model, tmp_path) -> None:
    calibrate_foresight(model, [tokens(model, 4, 300)])
    tables = [layer.attn_fn.foresight.clone() for layer in srf_attentions(model)]
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    for layer, table in zip(srf_attentions(again.bfloat16()), tables, strict=True):
        assert torch.equal(layer.attn_fn.foresight, table)
    settle_features(model)
    expected = logits(model, tokens(model, 1, 80))
    for layer, table in zip(srf_attentions(model), tables, strict=True):
        assert isinstance(layer.attn_fn, LearnedMaps)
        assert torch.equal(layer.attn_fn.folded().foresight, table)
    model.save_pretrained(tmp_path / "b")
    settled = type(model).from_pretrained(tmp_path / "b")
    torch.testing.assert_close(logits(settled, tokens(model, 1, 80)), expected, atol=1e-6, rtol=1e-6)
    # Checkpoints from before there was foresight have none.
    from safetensors.torch import load_file, save_file

    path = tmp_path / "a" / "model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("foresight")}, path, {"format": "pt"})
    older = type(model).from_pretrained(tmp_path / "a")
    for layer in srf_attentions(older):
        assert torch.equal(layer.attn_fn.foresight, no_foresight(2, 16))
        assert layer.attn_fn.folded().foresight is None


def test_refusals_change_nothing(model) -> None:
    with pytest.raises(ValueError, match=r"factor must be in 0\.\.2, got 3"):
        calibrate_foresight(model, [tokens(model, 2, 300)], factor=3)
    with pytest.raises(ValueError, match="no row of more than"):
        calibrate_foresight(model, [tokens(model, 2, 60)])
    assert not any(module.training for module in model.modules())
    ids = tokens(model, 2, 300)
    with pytest.raises(ValueError, match="rows must hold no padding"):
        calibrate_foresight(model, [{"input_ids": ids, "attention_mask": (ids > 5).long()}])
    broken = copy.deepcopy(model)
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 1: keys, values or attention are not finite"):
        calibrate_foresight(broken, [ids])
    assert torch.equal(srf_attentions(broken)[0].attn_fn.foresight, no_foresight(2, 16))
    with pytest.raises(ValueError, match="nothing to foresee"):
        calibrate_foresight(retrofit(build_llama(), PURE), [tokens(model, 2, 400)])
    with pytest.raises(ValueError, match="nothing to foresee"):
        srf_attentions(retrofit(build_llama(), PURE))[0].attn_fn.set_foresight(None)
    mine = srf_attentions(model)[0].attn_fn
    good = mine.foresight.clone()
    for change, message in (
        (lambda t: t[:, :-1], "must have shape"),
        (lambda t: t * math.nan, "not finite"),
        (lambda t: -t, "must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            mine.set_foresight(change(good))
        assert torch.equal(mine.foresight, good)
    mine.set_foresight(2 * good)
    mine.set_foresight(None)
    assert torch.equal(mine.foresight, no_foresight(2, 16))
    assert CONFIG.retained
