"""Who keeps a slot: levels of priorities, how they fade, and that prefill, decoding and kernels agree on them."""

from __future__ import annotations

import pytest
import torch

from srf_retrofit.modeling.configuration import LEVELS, SRFConfig
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.retention import priority_level, rank_and_evict, round_priority
from srf_retrofit.testing import assert_close, quadratic_attention, random_feature_map, stepwise_attention

FADING = SRFConfig(num_features=8, window=4, sinks=1, retained=3, retention_half_life=16)


def test_levels_order_priorities_and_count_octaves() -> None:
    p = round_priority(torch.rand(2000, generator=torch.Generator().manual_seed(0)).pow(6))
    level = priority_level(p, torch.zeros((), dtype=torch.int64), FADING)
    order = p.sort().indices
    assert (level[order].diff() >= 0).all()
    assert ((level[order].diff() == 0) == (p[order].diff() == 0)).all()
    halves = priority_level(round_priority(torch.tensor([1.0, 0.5, 0.25])), torch.zeros((), dtype=torch.int64), FADING)
    assert halves.diff().tolist() == [-LEVELS, -LEVELS]


def test_a_half_life_is_worth_one_octave() -> None:
    blocks = torch.arange(8)
    level = priority_level(torch.full((8,), 0.5), blocks, FADING)
    assert level[4] - level[0] == LEVELS  # four blocks of four tokens are the half-life
    never = priority_level(torch.full((8,), 0.5), blocks, FADING.replace(retention_half_life=0))
    assert len(set(never.tolist())) == 1


def test_what_may_not_compete_has_no_level() -> None:
    p = torch.tensor([0.5, -torch.inf, 0.0])
    level = priority_level(p, torch.tensor(1000), FADING)
    assert level[1] == -torch.inf
    assert level[2] == 1000 * FADING.fade


def test_old_keys_make_room_only_when_priorities_fade() -> None:
    """One strong key, then many that are weaker by a factor of two: forgotten after a half-life, or never."""
    priority = torch.full((1, 1, 12, 4), 0.2)
    priority[0, 0, 0, 0] = 0.4
    kept = {}
    for half_life in (0, 16):
        config = FADING.replace(retention_half_life=half_life)
        level = priority_level(priority, torch.arange(12).view(1, 1, 12, 1), config)
        slots, _, _, _ = rank_and_evict(torch.full((1, 1, 3), -torch.inf), level)
        kept[half_life] = [3 in slots[0, 0, n] for n in range(13)]  # the first candidate has index h + 0
    assert all(kept[0][1:])
    assert kept[16][1]
    assert not kept[16][-1]


@pytest.mark.parametrize("half_life", [0, 5, 16, 300])
@pytest.mark.parametrize("length", [3, 61, 130])
def test_chunked_and_step_by_step_agree_with_their_oracles(half_life: int, length: int) -> None:
    config = FADING.replace(retention_half_life=half_life)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (2 * torch.randn(2, n, length, 8, generator=generator) for n in (4, 2, 2))
    maps = random_feature_map(2, 8, 8)
    right, right_state = quadratic_attention(q, k, v, maps, config, output_final_state=True)
    assert_close(stepwise_attention(q, k, v, maps, config), right, 1e-9)
    o, state = srf_attention(q, k, v, maps, config, output_final_state=True, chunk_size=16)
    assert_close(o, right, 1e-5)
    assert torch.equal(state.retained_priority.double(), right_state.retained_priority)

    outputs, running = [], None
    for t in range(length):
        step = [x[:, :, t : t + 1] for x in (q, k, v)]
        o, running = srf_attention(*step, maps, config, initial_state=running, output_final_state=True)
        outputs.append(o)
    assert_close(torch.cat(outputs, 2), right, 1e-5)
    assert torch.equal(running.retained_priority, state.retained_priority)


def test_rows_that_continue_at_different_positions_fade_by_their_own() -> None:
    config = FADING
    maps = random_feature_map(2, 8, 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, n, 90, 8, generator=generator) for n in (4, 2, 2))
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, :37] = False
    whole, _ = srf_attention(q, k, v, maps, config, attention_mask=mask)
    first, state = srf_attention(
        *(x[:, :, :50] for x in (q, k, v)), maps, config, attention_mask=mask[:, :50], output_final_state=True
    )
    rest, _ = srf_attention(*(x[:, :, 50:] for x in (q, k, v)), maps, config, initial_state=state)
    assert_close(torch.cat([first, rest], 2), whole, 1e-5)
    alone, _ = srf_attention(*(x[:1, :, 37:] for x in (q, k, v)), maps, config)
    assert_close(whole[:1, :, 37:], alone, 1e-5)
