"""All fits in one call: those of the single calls, each where there is something to fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import CONFIG, PURE, build

from srf_retrofit import calibrate, calibrate_all, calibrate_foresight, calibrate_gain, calibrate_slots, retrofit
from srf_retrofit.calibration import least_row
from srf_retrofit.data import TokenBlocks
from srf_retrofit.modeling.attention import srf_attentions


@pytest.fixture
def blocks() -> TokenBlocks:
    length = least_row(CONFIG) + 30
    return TokenBlocks(torch.randint(3, 90, (6, length), generator=torch.Generator().manual_seed(0)))


def test_it_is_the_single_fits_in_their_order(blocks) -> None:
    lines: list[str] = []
    model, other = retrofit(build(), CONFIG), retrofit(build(), CONFIG)
    fits = calibrate_all(model, blocks.batches(4), spread_tokens=3 * blocks.blocks.shape[1], say=lines.append)
    single = [
        calibrate_foresight(other, blocks.batches(4)),
        calibrate(other, blocks.batches(4), max_tokens=None),
        calibrate_gain(other, blocks.batches(4)),
        calibrate_slots(other, blocks.first(3).batches(1)),
        calibrate_gain(other, blocks.batches(4)),
    ]
    # How long each took is its own.
    single[1] = dataclasses.replace(single[1], seconds=fits.geometry.seconds)
    assert lines == list(map(str, single))
    # Of the gains, those that stay.
    assert list(map(str, fits)) == [*lines[:2], *lines[3:]] == str(fits).splitlines()
    assert model.config.srf_config == other.config.srf_config
    assert model.config.srf_config.layer_retained is not None
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_further_rows_are_for_the_slots_alone(blocks) -> None:
    few = {"foresee": False, "geometry": None, "weigh": False, "spread_tokens": 2 * blocks.blocks.shape[1]}
    alone, beside, whole = (retrofit(build(), CONFIG) for _ in range(3))
    first, rest = blocks.blocks[:2], blocks.blocks[2:5]
    a = calibrate_all(alone, [first], **few)
    b = calibrate_all(beside, [first], spread_also=[{"input_ids": rest}], **few)
    c = calibrate_slots(whole, [first, rest])
    assert (a.slots.tokens, b.slots.tokens) == (2 * blocks.blocks.shape[1], 5 * blocks.blocks.shape[1])
    assert b.slots.cost == c.cost != a.slots.cost


def test_what_there_is_nothing_for_is_left_out(blocks) -> None:
    fits = calibrate_all(retrofit(build(), PURE), blocks.batches(4))
    assert (fits.foresight, fits.slots, fits.gains) == (None, None, None)
    assert fits.geometry is not None
    exact = retrofit(build(), CONFIG.replace(num_features=0))
    fits = calibrate_all(exact, blocks.batches(4), spread_by="layer")
    assert (fits.geometry, fits.gains) == (None, None)
    assert fits.foresight is not None
    assert all(len(slots) == 1 for slots in fits.slots.retained.values())
    learned = retrofit(build(), CONFIG.replace(feature_map="hedgehog", retained=0))
    assert list(calibrate_all(learned, blocks.batches(4))) == []
    short = TokenBlocks(blocks.blocks[:, : least_row(CONFIG)])
    fits = calibrate_all(retrofit(build(), CONFIG), short.batches(4))
    assert fits.foresight is None
    assert fits.slots is not None
    model = retrofit(build(), CONFIG)
    assert (
        list(calibrate_all(model, blocks.batches(4), foresee=False, geometry=None, spread_tokens=0, weigh=False)) == []
    )
    assert model.config.srf_config == CONFIG
    assert all(not layer.attn_fn.query_shift.any() for layer in srf_attentions(model))


def test_refusals(blocks) -> None:
    with pytest.raises(ValueError, match="no retrofitted layer to calibrate"):
        calibrate_all(build(), blocks.batches(4))
    model = retrofit(build(), CONFIG)
    with pytest.raises(ValueError, match="there was no batch to calibrate on"):
        calibrate_all(model, [])
    mask = torch.ones_like(blocks.blocks)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="rows must hold no padding"):
        calibrate_all(model, [{"input_ids": blocks.blocks, "attention_mask": mask}])
    assert model.config.srf_config == CONFIG
