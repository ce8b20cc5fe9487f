"""Rows of the core: padding, packed documents, rows at different positions, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from core_inputs import DIM, FEATURES, assert_states_close, config_of, decode, inputs

from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, random_feature_map

MASKS = {
    "right": lambda n, length: torch.arange(length) < n,
    "left": lambda n, length: torch.arange(length) >= length - n,
    "holes": lambda n, length: torch.randperm(length, generator=torch.Generator().manual_seed(n)) < n,
}


@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (32, 0, 0), (32, 4, 16)], ids=str)
def test_padding_leaves_no_trace_and_rows_do_not_see_each_other(mode, pattern, chunk_size):
    config = config_of(mode)
    length, counts = 150, (150, 97, 33, 1, 0)
    q, k, v = (x.requires_grad_() for x in inputs(length, batch=len(counts)))
    maps = random_feature_map(2, FEATURES, DIM)
    mask = torch.stack([MASKS[pattern](n, length) for n in counts])
    o, state = srf_attention(
        q, k, v, maps, config, attention_mask=mask.long(), output_final_state=True, chunk_size=chunk_size
    )
    weight = torch.randn_like(o)
    grads = torch.autograd.grad((o * weight).sum(), (q, k, v))
    for row, count in enumerate(counts):
        assert not o[row][:, ~mask[row]].any()
        alone = [x[row : row + 1][:, :, mask[row]].detach().requires_grad_() for x in (q, k, v)]
        expected, end = srf_attention(*alone, maps, config, output_final_state=True)
        assert_close(o[row : row + 1][:, :, mask[row]], expected, 1e-5, f"row {row}")
        assert_states_close(state.index_select(torch.tensor([row])), end, 1e-5)
        if not count:
            continue
        right = torch.autograd.grad((expected * weight[row][:, mask[row]]).sum(), alone)
        for name, mine, theirs in zip("qkv", grads, right, strict=True):
            assert_close(mine[row : row + 1][:, :, mask[row]], theirs, 1e-5, f"grad {name} of row {row}")
            assert not mine[row][:, ~mask[row]].any()


@pytest.mark.parametrize("mode", [(0, 0, 0), (0, 4, 0), (32, 4, 16)], ids=str)
def test_packed_documents_equal_separate_ones(mode):
    config = config_of(mode)
    bounds = [0, 3, 3, 150, 151, 215, 300]
    q, k, v = (x.requires_grad_() for x in inputs(bounds[-1]))
    maps = random_feature_map(2, FEATURES, DIM)
    o, state = srf_attention(
        q, k, v, maps, config, cu_seqlens=torch.tensor(bounds), output_final_state=True, chunk_size=64
    )
    weight = torch.randn_like(o)
    grads = torch.autograd.grad((o * weight).sum(), (q, k, v))
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        alone = [x[:, :, start:stop].detach().requires_grad_() for x in (q, k, v)]
        expected, end = srf_attention(*alone, maps, config, output_final_state=True)
        assert_states_close(state.index_select(torch.tensor([i])), end, 1e-5)
        if start == stop:
            continue
        assert_close(o[:, :, start:stop], expected, 1e-5, f"document {i}")
        right = torch.autograd.grad((expected * weight[:, :, start:stop]).sum(), alone)
        for name, mine, theirs in zip("qkv", grads, right, strict=True):
            assert_close(mine[:, :, start:stop], theirs, 1e-5, f"grad {name} of document {i}")


@pytest.mark.parametrize("mode", [(0, 4, 0), (32, 4, 16)], ids=str)
@torch.no_grad()
def test_rows_at_different_positions_continue_and_decode_together(mode):
    config = config_of(mode)
    maps = random_feature_map(2, FEATURES, DIM)
    q, k, v = inputs(160, batch=3)
    starts = (0, 31, 77)
    mask = torch.stack([torch.arange(77) < n for n in starts])
    _, state = srf_attention(
        q[:, :, :77], k[:, :, :77], v[:, :, :77], maps, config, attention_mask=mask, output_final_state=True
    )
    tails = [torch.stack([x[i, :, n : n + 70] for i, n in enumerate(starts)]) for x in (q, k, v)]
    expected = torch.cat(
        [
            srf_attention(*(x[i : i + 1, :, : n + 70] for x in (q, k, v)), maps, config)[0][:, :, n:]
            for i, n in enumerate(starts)
        ]
    )
    decoded, end = decode(*tails, maps, config, state)
    assert_close(decoded, expected, 1e-5, "decoded")
    together, end_together = srf_attention(*tails, maps, config, initial_state=state, output_final_state=True)
    assert_close(together, expected, 1e-5, "prefilled")
    assert_states_close(end, end_together, 1e-5)


@torch.no_grad()
def test_a_masked_token_in_decoding_changes_nothing():
    config = config_of((4, 2, 8))
    maps = random_feature_map(2, FEATURES, DIM)
    q, k, v = inputs(40, batch=2)
    _, state = srf_attention(q, k, v, maps, config, output_final_state=True)
    token = [x[:, :, :1] for x in (q, k, v)]
    mask = torch.tensor([[1], [0]])
    o, after = srf_attention(*token, maps, config, attention_mask=mask, initial_state=state, output_final_state=True)
    assert not o[1].any()
    for before, now in zip(state, after, strict=True):
        assert torch.equal(before[1], now[1])
    assert after.length.tolist() == [41, 40]


BAD = {
    "q, k, v must be": lambda a: a.update(q=a["q"][0]),
    "k and v must": lambda a: a.update(k=a["k"][:, :, :-1]),
    "multiple of": lambda a: a.update(q=a["q"][:, :3]),
    "share a floating dtype": lambda a: a.update(v=a["v"].double()),
    "feature map is for": lambda a: a.update(feature_map=random_feature_map(1, FEATURES, DIM)),
    "chunk_size must": lambda a: a.update(chunk_size=0),
    "backend must": lambda a: a.update(backend="cuda"),
    "ablation must": lambda a: a.update(ablation="no_window"),
    "attention_mask must": lambda a: a.update(attention_mask=torch.ones(1, 3, dtype=torch.long)),
    "cu_seqlens must rise": lambda a: a.update(cu_seqlens=torch.tensor([0, 7])),
    "cu_seqlens must be a 1-D": lambda a: a.update(cu_seqlens=torch.tensor([0.0, 10.0])),
    "not both": lambda a: a.update(cu_seqlens=torch.tensor([0, 10]), attention_mask=torch.arange(10).view(1, 10)),
    "causal=False needs": lambda a: a.update(causal=False),
    "initial_state.kv_mean": lambda a: a.update(
        initial_state=SRFState.empty(a["config"].replace(num_features=3), 1, 2, DIM, dtype=torch.float32)
    ),
    "must be torch.float32": lambda a: a.update(feature_map=a["feature_map"].to(torch.float64)),
    "run it without one": lambda a: a.update(ablation="tail_only", output_final_state=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    q, k, v = inputs(10)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "feature_map": random_feature_map(2, FEATURES, DIM),
        "config": config_of((4, 1, 2)),
    }
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        srf_attention(**arguments)
