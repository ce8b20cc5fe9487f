"""The share of the tail is the one in the operator's normaliser, and the exact one is softmax's own."""

from __future__ import annotations

import math

import pytest
import torch
from builders import CONFIG, PURE, build_llama, tokens

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.data import TokenBlocks
from srf_retrofit.evaluation.tail_share import attention_shares, tail_shares
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.ops import fold, srf_attention
from srf_retrofit.testing import random_feature_map

SHAPES = [CONFIG, CONFIG.replace(retained=0), SRFConfig(num_features=16, window=0, sinks=3, retained=0)]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 75, 16, generator=generator, dtype=dtype)
    return q, *torch.randn(2, 2, 2, 75, 16, generator=generator, dtype=dtype)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_share_is_what_a_change_of_scale_says(config) -> None:
    """Scaling the features by e^c moves outputs along the line from the exact part's to the tail's, by t(c) / t(0)."""
    q, k, v = inputs()
    maps = fold(random_feature_map(2, 16, 16).to(torch.float64))
    c = 0.5
    louder = maps._replace(query=maps.query._replace(bias=maps.query.bias + c))

    def output(folded, **kwargs) -> torch.Tensor:
        return srf_attention(q, k, v, folded, config, scaling=0.25, **kwargs)[0]

    exact = output(maps, ablation="no_tail")
    usual, more = output(maps) - exact, output(louder) - exact
    has_tail = usual.norm(dim=-1) > 1e-9
    ratio = (usual * more).sum(-1) / usual.square().sum(-1)
    wanted = torch.where(has_tail, (math.exp(c) / ratio - 1) / (math.exp(c) - 1), 0.0)
    estimated, _ = attention_shares(q, k, maps, config, scaling=0.25, v=v)
    assert has_tail.any()
    torch.testing.assert_close(estimated, wanted.nan_to_num(0.0), rtol=1e-6, atol=1e-8)


def test_exact_share_is_that_of_softmax() -> None:
    """Without retained keys the exact set is known: sinks, the block before, and the own one."""
    q, k, _ = inputs()
    maps = fold(random_feature_map(2, 16, 16).to(torch.float64))
    config = CONFIG.replace(retained=0)
    _, exact = attention_shares(q, k, maps, config, scaling=0.25)
    scores = 0.25 * q @ k.repeat_interleave(2, 1).mT
    i, j = torch.arange(75)[:, None], torch.arange(75)
    outside = (j >= config.sinks) & (i // config.window - j // config.window > 1)
    wanted = (scores.masked_fill(j > i, -torch.inf).softmax(-1) * outside).sum(-1)
    torch.testing.assert_close(exact, wanted, rtol=1e-9, atol=1e-12)
    # Retained keys can only take from the tail, and here they do.
    _, fewer = attention_shares(q, k, maps, CONFIG, scaling=0.25)
    assert (fewer <= exact + 1e-12).all()
    assert fewer.mean() < 0.9 * exact.mean()


def test_many_features_find_the_exact_share() -> None:
    q, k, _ = inputs(torch.float32)
    q, k = 0.5 * q, 0.5 * k
    errors = []
    for count in (16, 4096):
        maps = fold(random_feature_map(2, count, 16, geometry="identity"))
        estimated, exact = attention_shares(q, k, maps, CONFIG.replace(num_features=count), scaling=0.25)
        errors.append(float((estimated - exact).abs().mean()))
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 0.01


def test_pure_form_and_no_features() -> None:
    q, k, _ = inputs(torch.float32)
    maps = fold(random_feature_map(2, 16, 16))
    for shares in attention_shares(q, k, maps, PURE, scaling=0.25):
        torch.testing.assert_close(shares, torch.ones(2, 4, 75))


def test_shares_of_a_model() -> None:
    model = retrofit(build_llama(), CONFIG, layers=[0, 2])
    blocks = TokenBlocks(tokens(model, 2, 40))
    found = tail_shares(model, blocks)
    assert [len(row) for row in found.estimated] == [len(row) for row in found.exact] == [4, 4]
    assert all(0 < x < 1 for rows in (found.estimated, found.exact) for row in rows for x in row)
    assert not any(layer._forward_pre_hooks for layer in srf_attentions(model))
    short = tail_shares(model, TokenBlocks(tokens(model, 2, 16)))  # sinks and two blocks hold all of it
    assert short.estimated == [[0.0] * 4] * 2
    assert all(abs(x) < 1e-6 for row in short.exact for x in row)
    with pytest.raises(ValueError, match="no retrofitted layer"):
        tail_shares(build_llama(), blocks)
