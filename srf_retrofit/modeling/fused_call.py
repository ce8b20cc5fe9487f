"""One call of the fused kernels: its compile-time sizes, its tables, its feature maps as the kernels read them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .block_tables import BlockTables, block_counts, plan_blocks
from .retention import PURE_BLOCK
from .triton_launch import Launcher, integer_class, is_aligned

try:
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    # The kernels are then not there either, see `fused_forward` and `fused_backward`.
    HAS_TRITON = False

# Keys, features included, that a program takes at a time.
PART = 64


@dataclass(frozen=True)
class Sizes:
    """Compile-time constants of the kernels, by their names there; a trailing `P` rounds up to a power of two."""

    G: int
    R: int
    M: int
    D: int
    W: int
    SINKS: int
    H: int
    PURE: bool
    TAIL: bool
    PART: int
    FADE: int
    LEARNED: bool
    HALF: bool  # operands are bfloat16; all others are float32

    @functools.cached_property
    def MP(self) -> int:
        return power(self.M)

    @functools.cached_property
    def DP(self) -> int:
        return power(self.D)

    @functools.cached_property
    def WP(self) -> int:
        return power(self.W)

    @functools.cached_property
    def HP(self) -> int:
        return power(self.H)

    @functools.cached_property
    def SP(self) -> int:
        return power(self.SINKS)

    @functools.cached_property
    def feature_parts(self) -> int:
        return -(-self.MP // self.PART)

    @functools.cached_property
    def state_part(self) -> int:
        """Features that a program of the gradient of states takes; it fetches all queries for them."""
        return min(2 * self.PART if self.DP > 64 else self.PART, self.MP)

    @functools.cached_property
    def slot_parts(self) -> int:
        return -(-self.HP // self.PART) if self.H else 0

    @functools.cached_property
    def scan_step(self) -> int:
        """Features that one program of a scan carries."""
        return min(16, self.MP)

    @functools.cached_property
    def scan_parts(self) -> int:
        return -(-self.M // self.scan_step)

    @functools.cached_property
    def tiles(self) -> dict[str, Tile]:
        """How each kernel is launched, by its name in `launch_shapes`."""
        return {name: self.tile(*shape) for name, shape in launch_shapes(self).items()}

    def tile(self, lines: int, warps: int, stages: int = 1, registers: int | None = None) -> Tile:
        """`lines` queries at a time or a few more, in whole heads and no more than there are."""
        heads = max(min(lines // self.WP, power(self.R, 1)), 1)
        return Tile(heads, -(-self.R // heads), {"num_warps": warps, "num_stages": stages, "maxnreg": registers})


class Tile(NamedTuple):
    """Query heads that a program takes at a time, how many times, and Triton's launch options."""

    heads: int
    rounds: int
    options: dict[str, int | None]


def launch_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Queries that a program of each kernel takes at a time, and its warps; where it takes none, 64."""
    wide = s.DP > 64
    # Eight warps on tiles of 64 queries ended in illegal accesses in the pure form (Triton 3.6, sm_90); four are right.
    plain = (64, 4)
    return {
        "priority": (64, 4),
        # A single warp adds up without a barrier, and that is most of what ranking does.
        "rank": (64, 1 if s.HP <= 256 else 4),
        "run": (64, 4),
        # Two parts are loaded ahead of use; of float32 there is no room for three.
        "attend": (128, 8, 3 if s.HALF else 1) if wide and not s.PURE and s.R * s.WP > 64 else (64, 4),
        "query": plain,
        # A group of four warps takes 64 features.
        "state": (64, 4 * max(s.state_part // 64, 1)),
        "slots": (64, 4),
        "key": plain,
        "fold": plain,
    }


@functools.lru_cache(maxsize=256)
def _sizes(*fields: Any) -> Sizes:
    return Sizes(*fields)


def sizes_of(q: torch.Tensor, k: torch.Tensor, features: int, ints: list[int]) -> Sizes:
    """Sizes of a call on q (B, H, L, D) and the pool k (B, G, E + L, D)."""
    # Where `torch.compile` traces dynamic shapes these are symbols, and kernels are compiled for numbers.
    w, sinks, h, _, tail, fade, learned = map(int, ints)
    heads, g, d, m = map(int, (q.shape[1], k.shape[1], q.shape[3], features))
    half = q.dtype == torch.bfloat16
    return _sizes(g, heads // g, m, d, w or PURE_BLOCK, sinks, h, w == 0, bool(tail), PART, fade, bool(learned), half)


@functools.lru_cache(maxsize=256)
def power(n: int, least: int = 16) -> int:
    """The least power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class Side(NamedTuple):
    """A folded map of one side as operands of the kernels; the norm is scaled by the root of `scaling`.

    Where operands are bfloat16, weights have been rounded to it, and the norm's matrix comes in two halves.
    `|norm x + norm_bias|^2 / 2` has the gradient `gram x + gram_bias`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor
    norm_low: torch.Tensor
    norm_bias: torch.Tensor
    gram: torch.Tensor
    gram_bias: torch.Tensor


_SIDES: Any = WeakIdKeyDictionary()


def prepared_side(folded: list[torch.Tensor | None], root: float, split: bool) -> Side:
    """`prepare_side`, kept for as long as the folded map is there and unchanged."""
    weight = folded[0]
    assert weight is not None
    if torch.compiler.is_compiling() or any(x is not None and x.is_inference() for x in folded):
        return prepare_side(folded, root, split)
    stamp = (root, split, *(None if x is None else (id(x), x._version) for x in folded))
    kept = _SIDES.get(weight)
    if kept is None or kept[0] != stamp:
        with torch.no_grad(), torch.inference_mode(False):
            kept = stamp, prepare_side(folded, root, split)
        _SIDES[weight] = kept
    return kept[1]


def prepare_side(folded: list[torch.Tensor | None], root: float, split: bool) -> Side:
    """`folded`: weight, bias, norm_weight, norm_bias of a `LinearFeatures`."""
    weight, bias, norm, norm_bias = folded
    assert weight is not None
    assert bias is not None
    weight = (weight.bfloat16() if split else weight).contiguous()
    if norm_bias is None:
        norm_bias = bias.new_zeros(weight.shape[0], weight.shape[2])
    norm_bias = norm_bias.contiguous()
    if norm is None:
        # The kernels are compiled not to read a matrix; a pointer has to be given all the same.
        return Side(weight, bias.contiguous(), weight, weight, norm_bias, weight, norm_bias)
    scaled = norm * root
    gram, gram_bias = scaled.mT @ scaled, (scaled.mT @ norm_bias.unsqueeze(-1)).squeeze(-1)
    high = low = scaled.contiguous()
    if split:
        high, gram = high.bfloat16(), gram.bfloat16()
        low = (scaled - high.float()).bfloat16()
    return Side(weight, bias.contiguous(), high, low, norm_bias, gram, gram_bias)


class Call(NamedTuple):
    """What both passes of one call agree on."""

    sizes: Sizes
    tables: BlockTables
    query: Side
    key: Side
    root: float
    one_batch: int
    kinds: dict[str, Any]  # operand type and precision of products
    maps: dict[str, Any]  # which matrices there are, and whether they come in halves
    slot_bounds: torch.Tensor | None  # where heads differ in their slots, of which `sizes.H` is the most
    continues: bool  # rows continue from states
    kind: tuple[Any, ...]  # of kernels, as far as both passes share it, see `launcher`

    @property
    def blocks(self) -> int:
        return self.tables.block_row.shape[0]

    @property
    def rows(self) -> int:
        return self.tables.boundary.shape[0]

    @property
    def runs(self) -> int:
        return self.tables.run_table.shape[0]


def begin(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[int] | None,
    seen: torch.Tensor | None,
    folded: list[torch.Tensor | None],
    ints: list[int],
    scaling: float,
    slot_bounds: torch.Tensor | None,
) -> Call:
    """Plan a call; arguments as of `fused.attend`."""
    assert folded[0] is not None
    s = sizes_of(q, k, folded[0].shape[1], ints)
    tables = plan_blocks(
        q.shape[0], q.shape[2], s.W, s.SINKS, q.device, mask=mask, documents=_pairs(documents), seen=seen,
        retained=s.H, pure=s.PURE,
    )  # fmt: skip
    split = q.dtype == torch.bfloat16
    # Learned features act on unscaled vectors.
    root = 1.0 if s.LEARNED else scaling**0.5
    maps = (folded[2] is not None, folded[6] is not None, split)
    one_batch = int(documents is not None)
    return Call(
        s,
        tables,
        prepared_side(folded[:4], root, split),
        prepared_side(folded[4:], root, split),
        root,
        one_batch,
        {"OPERAND": tl.bfloat16 if split else tl.float32, "PRECISION": "tf32x3"},
        dict(zip(("MATRIX", "KEY_MATRIX", "SPLIT"), maps, strict=True)),
        slot_bounds,
        seen is not None,
        (q.device, q.dtype, s, maps, one_batch, seen is None, slot_bounds is None),
    )


def count_blocks(q: torch.Tensor, s: Sizes, documents: list[int] | None, seen: torch.Tensor | None) -> tuple[int, int]:
    """Blocks and rows of a call, as `begin` finds them."""
    rows = q.shape[0] if documents is None else len(documents) - 1
    return sum(block_counts(rows, q.shape[2], s.W, _pairs(documents), seen is not None and not s.PURE)), rows


def _pairs(documents: list[int] | None) -> list[tuple[int, int]] | None:
    return None if documents is None else list(itertools.pairwise(documents))


def launcher(
    call: Call, name: str, numbers: tuple[int, ...], tensors: tuple[torch.Tensor | None, ...], *more: Any
) -> Launcher:
    """For one pass of a call, by what its kernels may be compiled for.

    Parameters
    ----------
    call : Call
    name : str
        Of the pass.
    numbers : tuple of int
        Every integer argument of its kernels.
    tensors : tuple of tensor
        Those arguments that the call was given; all others are fresh.
    more
        Whatever else decides.
    """
    if interpreted() or not is_aligned(tensors):
        return Launcher(None)
    return Launcher((name, call.kind, more, tuple(map(integer_class, numbers))))


def carve(x: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    """Parts of a flat tensor of `room_for` these sizes, one after the other, each as aligned as the whole."""
    return x.split_with_sizes([_rounded(n) for n in sizes])


def room_for(*sizes: int) -> int:
    """Elements of a tensor for `carve`."""
    return sum(map(_rounded, sizes))


def _rounded(n: int) -> int:
    return -(-n // 32) * 32


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of the tensors, whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along its last dimension; any other strides do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of rows, heads and positions; none of a row by itself, so that its length is compiled for as any other's."""
    return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1), x.stride(2)
