"""The ranking kernels alone, on priorities made for them, against `retention.rank_and_evict`."""

from __future__ import annotations

import pytest
import torch

from srf_retrofit.modeling import block_tables
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.fused_call import power
from srf_retrofit.modeling.retention import priority_level, rank_and_evict, round_priority
from srf_retrofit.modeling.state import slot_bounds

triton_retain = pytest.importorskip("srf_retrofit.modeling.triton_retain")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [(0, 17), (17, 18), (18, 18), (18, 26)]
SINKS = 2


def made_up(kind: str, *shape: int) -> torch.Tensor:
    """Priorities: `tied`, as `wide` as float32 allows, or hardly any (`few`)."""
    x = torch.rand(shape)
    if kind == "tied":
        x = torch.exp2(-(3 * x).floor())
    elif kind == "wide":
        x = torch.exp2(-120 * x)
    x = round_priority(x)
    return x.masked_fill(torch.rand(shape) < {"few": 0.95}.get(kind, 0.1), -torch.inf)


def rank(config: SRFConfig, t, received, start, g: int, run_warps: int, bounds):
    """Priorities, levels, slots and folded tokens, as the three kernels find them."""
    w, h, n, rows = config.window, config.retained, len(t.block_row), len(t.boundary)
    runs, per_run = len(t.run_table), block_tables.run_blocks(w)
    sizes = {"G": g, "W": w, "H": h, "HP": power(h), "UNEVEN": bounds is not None, "num_warps": run_warps}
    keys = power(per_run * w)

    def full(*shape, dtype=torch.float32):
        return torch.full(shape, 12345, dtype=dtype, device=DEVICE)

    run_token, run_priority = full(runs, g, h, dtype=torch.int32), full(runs, g, h)
    priority, level = full(n + rows, g, w), full(g, n, w)
    slots, top, fold = full(n + rows, g, h, dtype=torch.int32), full(n + rows, g, h), full(n, g, w, dtype=torch.int32)
    window, token, slot_level = start
    begins = sizes | {"WP": power(w), "START": window is not None}
    triton_retain.rank_run_kernel[(runs, g, 1)](
        t.run_table, t.block_row, t.row_block, t.key_token, t.key_position, t.block_full, received, window, None, None,
        bounds, 1, 0, n, priority, level, run_token, run_priority,
        KEYS=keys, SINKS=SINKS, D=8, FADE=config.fade, FORESIGHT=False, **begins,
    )  # fmt: skip
    triton_retain.rank_scan_kernel[(rows, g, 1)](
        t.row_run, t.row_block, token, slot_level, window, run_token, run_priority, bounds, priority, slots, top,
        **begins,
    )  # fmt: skip
    triton_retain.rank_block_kernel[(n, g, 1)](
        t.block_row, t.row_block, t.row_run, t.key_token, level, run_token, run_priority, bounds, n, slots, top,
        fold,        RUN=per_run, KEYS=keys, **sizes,
    )  # fmt: skip
    return [x.cpu() for x in (priority, level, slots, top, fold)]


@pytest.mark.parametrize("kind", ["tied", "wide", "few"])
@pytest.mark.parametrize("continues", [False, True], ids=["fresh", "continues"])
@pytest.mark.parametrize(
    ("w", "counts", "run"), [(4, (3,), 8), (3, (20,), 9), (5, (7,), 64), (4, (3, 5), 8), (3, (0, 20, 18), 9)], ids=str
)
def test_slots_and_folded_keys_are_those_of_the_core(monkeypatch, kind, continues, w, counts, run):
    monkeypatch.setattr(block_tables, "RUN_TOKENS", run)
    rows, g, h = len(ROWS), len(counts), max(counts)
    config = SRFConfig(num_features=8, window=w, sinks=SINKS, retained=h, retention_half_life=16)
    bounds = slot_bounds(counts, torch.device(DEVICE))
    absent = torch.arange(h) < h - torch.tensor(counts).view(g, 1)
    seen = torch.tensor([0, 2 * w + 1, w, 7]).to(DEVICE) if continues else None
    t = block_tables.plan_blocks(1, 26, w, SINKS, torch.device(DEVICE), documents=ROWS, seen=seen, retained=h)
    received = made_up(kind, len(t.block_row), g, 2, w)
    window = token = slot_level = None
    if continues:
        window = made_up(kind, rows, g, 2 * w)
        free = torch.arange(h) < torch.tensor([h, h // 2, 0, h - 1]).view(rows, 1, 1)
        slot_level = priority_level(made_up(kind, rows, g, h), torch.tensor(0), config)
        slot_level = slot_level.masked_fill(free | absent, -torch.inf)
        token = torch.where(slot_level > -torch.inf, torch.arange(h), -1).int()
    start = [None if x is None else x.to(DEVICE) for x in (window, token, slot_level)]
    for warps in (1, 4) if DEVICE == "cuda" else (1,):
        priority, level, slots, top, fold = rank(config, t, received.to(DEVICE), start, g, warps, bounds)
        for row in range(rows):
            first, last = t.row_block[row : row + 2].tolist()
            right = torch.full((last - first + 1, g, w), -torch.inf)
            right[:-1] = received[first:last, :, 0]
            right[1:] = torch.maximum(right[1:], received[first:last, :, 1])
            if window is not None:
                both = window[row].view(g, 2, w).transpose(0, 1)[: len(right)]
                right[:2] = torch.maximum(right[:2], both)
            assert torch.equal(priority[first + row : last + row + 1], right)
            if first == last:
                continue
            keys, position = t.key_token.cpu()[first + row : last + row], t.key_position.cpu()[first + row : last + row]
            position = position.unsqueeze(-1) + torch.arange(w)
            may = (keys >= 0) & (position >= SINKS) & (t.block_full.cpu()[first:last] > 0).unsqueeze(-1)
            candidates = right[:-1].transpose(0, 1).masked_fill(~may, -torch.inf)
            candidates = priority_level(candidates, position.div(w, rounding_mode="floor"), config)
            assert torch.equal(level[:, first:last], candidates)
            begin = torch.full((g, h), -torch.inf) if slot_level is None else slot_level[row]
            named = torch.full((g, h), -1) if token is None else token[row]
            named = torch.cat([named, keys.reshape(1, -1).expand(g, -1)], 1)
            begin = begin.masked_fill(absent, torch.inf)
            kept, kept_level, gone, gone_level = (x[0] for x in rank_and_evict(begin[None], candidates[None]))
            kept_level = kept_level.masked_fill(absent.unsqueeze(1), -torch.inf)

            def tokens(index, levels, named=named):
                found = named.unsqueeze(1).expand(-1, index.shape[1], -1).gather(2, index)
                return torch.where(levels > -torch.inf, found, -1).transpose(0, 1).int()

            assert torch.equal(slots[first + row : last + row + 1], tokens(kept, kept_level))
            found = top[first + row : last + row + 1].masked_fill(absent, -torch.inf)
            assert torch.equal(found, kept_level.transpose(0, 1))
            assert torch.equal(fold[first:last], tokens(gone, gone_level))
