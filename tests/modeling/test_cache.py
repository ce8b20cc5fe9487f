"""The recurrent state inside stock caches: stable, of constant size, and never mistaken for keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import CONFIG, build_llama, logits, tokens
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from srf_retrofit import exact_attention, retrofit, state_bytes
from srf_retrofit.modeling.cache import SRFCacheLayer
from srf_retrofit.modeling.state import SRFState


@pytest.fixture(params=["model", "int8"])
def model(request):
    return retrofit(build_llama(), CONFIG.replace(kv_dtype=request.param))


def pointers(cache) -> list[int]:
    return [tensor.data_ptr() for layer in cache.layers for tensor in layer.state]


def make(kind: str, model):
    return {
        "bare": DynamicCache,
        "configured": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[kind]()


@pytest.mark.parametrize("kind", ["bare", "configured", "static"])
def test_forwards_through_a_users_cache_equal_one_without(model, kind) -> None:
    ids = tokens(model, 2, 45)
    cache = make(kind, model)
    pieces = [
        logits(model, part, past_key_values=cache, use_cache=True) for part in ids.split([17, 1, 1, 9, 1, 16], dim=1)
    ]
    assert_close(torch.cat(pieces, 1), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == 45
    assert all(isinstance(layer, SRFCacheLayer) for layer in cache.layers)


@pytest.mark.parametrize("kind", ["bare", "static"])
def test_state_is_updated_in_place_and_stays_as_large(model, kind) -> None:
    ids = tokens(model, 1, 60)
    cache = make(kind, model)
    logits(model, ids[:, :5], past_key_values=cache, use_cache=True)
    at_first, size = pointers(cache), state_bytes(cache)
    for token in ids[:, 5:50].split(1, dim=1):
        logits(model, token, past_key_values=cache, use_cache=True)
    logits(model, ids[:, 50:], past_key_values=cache, use_cache=True)
    assert pointers(cache) == at_first
    assert state_bytes(cache) == size
    c = model.config
    expected = SRFState.empty(c.srf_config, 1, c.num_key_value_heads, c.head_dim, dtype=torch.float32).nbytes()
    assert size == c.num_hidden_layers * expected


@pytest.mark.parametrize("kind", ["bare", "static"])
def test_reset_starts_over(model, kind) -> None:
    ids = tokens(model, 1, 30)
    cache = make(kind, model)
    first = logits(model, ids, past_key_values=cache, use_cache=True)
    before = pointers(cache)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(logits(model, ids, past_key_values=cache, use_cache=True), first)
    assert pointers(cache) == before


def test_rows_can_be_reordered_repeated_and_selected(model) -> None:
    ids, new = tokens(model, 3, 20), tokens(model, 3, 1, seed=5)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    kept = copy.deepcopy(cache)

    def follow(rows: list[int], changed) -> None:
        expected = logits(model, torch.cat([ids[rows], new[: len(rows)]], 1))[:, -1:]
        out = logits(model, new[: len(rows)], past_key_values=changed, use_cache=True)
        assert_close(out, expected, rtol=1e-4, atol=1e-4)

    before = pointers(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert pointers(cache) == before
    follow([2, 0, 0], cache)
    repeated = copy.deepcopy(kept)
    repeated.batch_select_indices(torch.tensor([1]))
    assert repeated.batch_size == 1
    repeated.batch_repeat_interleave(3)
    follow([1, 1, 1], repeated)
    follow([0, 1, 2], kept)


def test_a_copied_cache_is_a_branch_point(model) -> None:
    ids = tokens(model, 1, 25)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :20], past_key_values=cache, use_cache=True)
    branch = copy.deepcopy(cache)
    first = logits(model, ids[:, 20:], past_key_values=cache, use_cache=True)
    assert torch.equal(logits(model, ids[:, 20:], past_key_values=branch, use_cache=True), first)


def test_offload_and_prefetch_keep_the_state(model) -> None:
    ids = tokens(model, 1, 20)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    before = [tensor.clone() for tensor in cache.layers[0].state]
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert all(torch.equal(x, y) for x, y in zip(before, cache.layers[0].state, strict=True))


def test_crop_is_refused_except_for_nothing(model) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, tokens(model, 1, 10), past_key_values=cache, use_cache=True)
    cache.crop(0)
    assert not cache.is_croppable
    for count in (-1, 5):
        with pytest.raises(ValueError, match=rf"crop\({count}\) is not possible"):
            cache.crop(count)


def test_caches_do_not_cross_between_exact_and_random_features(model) -> None:
    ids = tokens(model, 1, 10)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    with exact_attention(model), pytest.raises(ValueError, match="holds a random-feature state"):
        logits(model, ids, past_key_values=cache, use_cache=True)
    cache = DynamicCache(config=model.config)
    with exact_attention(model):
        logits(model, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="holds keys and values of softmax attention"):
        logits(model, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="tried to append keys"):
        SRFCacheLayer(CONFIG).update(torch.zeros(1), torch.zeros(1))


def test_another_batch_size_is_refused(model) -> None:
    cache = DynamicCache(config=model.config)
    logits(model, tokens(model, 1, 10), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"holds 1 row\(s\)"):
        logits(model, tokens(model, 3, 10), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("kind", ["bare", "configured", "static"])
def test_hybrid_layers_share_one_cache(kind) -> None:
    model = retrofit(build_llama(), CONFIG, layers=[0, 2])
    ids = tokens(model, 2, 40)
    cache = make(kind, model)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    pieces = []
    for start, stop in ((0, 15), (15, 16), (16, 30), (30, 40)):
        part = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        pieces.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True, **part))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["SRFCacheLayer", "StaticLayer" if kind == "static" else "DynamicLayer", "SRFCacheLayer"]
    out, expected = torch.cat(pieces, 1), logits(model, ids, attention_mask=mask)
    assert_close(out[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_training_leaves_no_graph_in_the_cache(model) -> None:
    ids = tokens(model, 1, 20)
    cache = model.train()(ids, use_cache=True).past_key_values
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.state)


def test_an_empty_layer_stands_for_a_stock_one() -> None:
    layer = SRFCacheLayer(CONFIG)
    assert layer.get_seq_length() == 0
    assert layer.get_max_length() == -1
    assert layer.state_bytes() == 0
    assert layer.get_mask_sizes(5) == (5, 0)
    assert isinstance(layer.softmax_layer(), DynamicLayer)
    assert SRFCacheLayer(CONFIG, 12).get_mask_sizes(5) == (12, 0)
