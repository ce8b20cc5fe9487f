"""Where the blocks of every row lie: the tables that the fused kernels walk.

Any mix of padding, packed documents and rows that continue in mid-block becomes the same thing: rows of whole blocks
of `w` slots, each naming a token or nothing. Keys are named in a *pool* `(B, G, E + L, D)`: for rows that continue,
the `E` exact keys of their state stand before the new ones.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .state import SRFState, slots_by_head

# Tokens that one program adds up before the scan over runs takes over.
RUN_TOKENS = 512


def run_blocks(w: int) -> int:
    """Blocks of `w` slots in a run."""
    return max(RUN_TOKENS // w, 1)


class BlockTables(NamedTuple):
    """All int32, on the device; `N` blocks in `B` rows, `N + B` entries (see `triton_common`), `w` slots each.

    A row's entry `i` is the block before its block `i`; its last entry is its last block.
    """

    block_row: torch.Tensor  # (N,) row of each block
    row_block: torch.Tensor  # (B + 1,) first block of each row
    block_full: torch.Tensor  # (N,) whether the block's last slot is taken once the call is over
    entry_table: torch.Tensor  # (N + B, 3) row, own block or -1, next block or -1
    run_table: torch.Tensor  # (runs, 2) first block, number of blocks
    row_run: torch.Tensor  # (B + 1,) first run of each row
    query_token: torch.Tensor  # (N, w) token of the call, or -1
    key_token: torch.Tensor  # (N + B, w) key of the pool, or -1
    key_position: torch.Tensor  # (N + B,) position of the entry's first slot in its sequence
    sink_token: torch.Tensor  # (B, s) key of the pool, or -1
    boundary: torch.Tensor  # (B,) int64, full blocks of each row, as an index into its entries


def plan_blocks(
    b: int,
    length: int,
    w: int,
    sinks: int,
    device: torch.device,
    *,
    mask: torch.Tensor | None = None,
    documents: list[tuple[int, int]] | None = None,
    seen: torch.Tensor | None = None,
    retained: int = 0,
    pure: bool = False,
) -> BlockTables:
    """Tables for `b` rows of `length` tokens (or for the documents of a packed row).

    Parameters
    ----------
    b, length : int
    w : int
        Slots per block.
    sinks : int
    device : torch.device
    mask : (B, L) bool, optional
    documents : list of (start, end), optional
    seen : (rows,) int64, optional
        Tokens that the rows' states have seen; the pool then starts with the states' exact keys, see `pool_keys`.
    retained : int
        Retained slots of such a state, by head: the most of any.
    pure : bool
        Blocks start where the call starts, whatever the state has seen.
    """
    if mask is None and documents is None and seen is None:
        return _plain_tables(b, length, w, sinks, device)
    return _tables(b, length, w, sinks, device, mask, documents, seen, retained, pure)


@functools.lru_cache(maxsize=32)
def _plain_tables(b: int, length: int, w: int, sinks: int, device: torch.device) -> BlockTables:
    # Kept across calls, so not under inference mode, whose tensors no backward pass may save.
    with torch.inference_mode(False):
        return _tables(b, length, w, sinks, device, None, None, None, 0, False)


def _tables(
    b: int,
    length: int,
    w: int,
    sinks: int,
    device: torch.device,
    mask: torch.Tensor | None,
    documents: list[tuple[int, int]] | None,
    before: torch.Tensor | None,
    retained: int,
    pure: bool,
) -> BlockTables:
    rows = b if documents is None else len(documents)
    continues = before is not None and not pure
    window = sinks + retained  # of a state's keys, where those of the window begin
    extra = 0 if before is None else window + (0 if pure else 2 * w)
    whole: dict[str, Any] = {"dtype": torch.int64, "device": device}

    count = torch.tensor(block_counts(rows, length, w, documents, continues), dtype=torch.int64)
    row_block = torch.cat([count.new_zeros(1), count.cumsum(0)])
    per_run = run_blocks(w)
    runs = -(-count // per_run)
    row_run = torch.cat([runs.new_zeros(1), runs.cumsum(0)])
    run_row = torch.arange(rows).repeat_interleave(runs)
    run_first = row_block[run_row] + (torch.arange(len(run_row)) - row_run[run_row]) * per_run
    run_count = torch.minimum(row_block[run_row + 1] - run_first, torch.tensor(per_run))
    block_row = torch.arange(rows).repeat_interleave(count)
    entry_row = torch.arange(rows).repeat_interleave(count + 1)
    index = torch.arange(len(entry_row)) - (row_block + torch.arange(rows + 1))[entry_row]  # entry's place in its row
    own = row_block[entry_row] + index - 1
    following = torch.where(index < count[entry_row], own + 1, -1)
    own = torch.where(index > 0, own, -1)
    entry_table = torch.stack([entry_row, own, following], 1)
    block_row, row_block, entry_table, row_run, entry_row, index, run_table = (
        x.to(device, non_blocking=True)
        for x in (block_row, row_block, entry_table, row_run, entry_row, index, torch.stack([run_first, run_count], 1))
    )

    # What each row brings.
    seen = torch.zeros(rows, **whole) if before is None else before
    phase = seen % w if continues else torch.zeros(rows, **whole)
    if documents is not None:
        bounds = torch.tensor(documents, dtype=torch.int64).reshape(-1, 2).to(device, non_blocking=True)
        starts, new = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
        rank = None
    elif mask is not None:
        new = mask.sum(-1)
        rank = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    else:
        new, rank = torch.full((rows,), length, **whole), None

    def token(row: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Token of the call at place `t` of a row, -1 where there is none."""
        inside = (t >= 0) & (t < new[row])
        if documents is not None:
            found = starts[row] + t
        else:
            found = t if rank is None else rank[row, t.clamp(0, max(length - 1, 0))]
        return torch.where(inside, found, -1)

    def key(row: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        """The same as a key of the pool."""
        offset = extra if documents is None else extra * rows
        return torch.where(found >= 0, found + offset, -1)

    def kept(row: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Key `place` of a row's state, in the pool."""
        return place if documents is None else row * extra + place

    slot = torch.arange(w, device=device)
    row = entry_row.unsqueeze(-1)
    t = (index.unsqueeze(-1) - 1) * w + slot - phase[row]
    found = token(row, t)
    own_entry = block_row + torch.arange(1, len(block_row) + 1, device=device)
    query_token = found[own_entry]
    key_token = key(row, found)
    first = seen - phase  # position of each row's first slot of block 0
    key_position = first[entry_row] + (index - 1) * w
    if continues:
        place = index.unsqueeze(-1) * w + slot
        in_state = (t < 0) & (key_position.unsqueeze(-1) + slot >= 0)
        key_token = torch.where(in_state, kept(row, window + place), key_token)
    sink = torch.arange(sinks, device=device)
    sink_row = torch.arange(rows, device=device).unsqueeze(-1)
    sink_token = key(sink_row, token(sink_row, sink - seen.unsqueeze(-1)))
    if before is not None:
        sink_token = torch.where(sink < seen.unsqueeze(-1), kept(sink_row, sink.expand(rows, -1)), sink_token)
    boundary = (phase + new) // w
    full = (index <= boundary[entry_row])[own_entry]
    found_here = (
        block_row, row_block, full, entry_table, run_table, row_run, query_token, key_token, key_position, sink_token,
    )  # fmt: skip
    return BlockTables._make([*(x.to(torch.int32).contiguous() for x in found_here), boundary])


def block_counts(rows: int, length: int, w: int, documents: list[tuple[int, int]] | None, continues: bool) -> list[int]:
    """Blocks of every row, known without asking the device: rows that may continue in mid-block get room for it."""
    lead = w - 1 if continues else 0
    if documents is None:
        return [-(-(length + lead) // w)] * rows
    return [-(-(end - start + lead) // w) for start, end in documents]


def pool_keys(state: SRFState, x: torch.Tensor, side: str, packed: bool, slots: tuple[int, ...]) -> torch.Tensor:
    """`x` (B, G, L, D) with the state's exact keys (or values) before it, as `plan_blocks` names them.

    `slots` are those of each head.
    """
    sink, retained, window = (getattr(state, f"{part}_{side}") for part in ("sink", "retained", "window"))
    kept = torch.cat([sink, slots_by_head(retained, slots), window], 2)
    if packed:
        kept = kept.transpose(0, 1).flatten(1, 2).unsqueeze(0)
    return torch.cat([kept.to(x.dtype), x], 2)
