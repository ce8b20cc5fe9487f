"""One call of the fused kernels: its compile-time sizes, its tables, its feature maps as the kernels read them."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .block_tables import BlockTables, plan_blocks

try:
    import triton.language as tl
except ImportError:  # the kernels are then not there either, see `fused`
    tl = None

# Block of the pure form, whose length nothing but speed depends on.
PURE_BLOCK = 64
# Keys, features included, that a program takes at a time.
PART = 64


class Sizes(NamedTuple):
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

    @property
    def MP(self) -> int:
        return power(self.M)

    @property
    def DP(self) -> int:
        return power(self.D)

    @property
    def WP(self) -> int:
        return power(self.W)

    @property
    def HP(self) -> int:
        return power(self.H)

    @property
    def SP(self) -> int:
        return power(self.SINKS)

    @property
    def feature_parts(self) -> int:
        return -(-self.MP // PART)

    @property
    def slot_parts(self) -> int:
        return -(-self.HP // PART) if self.H else 0

    def heads(self, lines: int) -> int:
        """Query heads of one tile of about so many lines, a power of two."""
        return 1 if self.PURE else max(min(lines // self.WP, power(self.R, 1)), 1)

    def scan_step(self) -> int:
        """Features that one program of a scan carries."""
        return min(16, self.MP)


def power(n: int, least: int = 16) -> int:
    """The least power of two that is neither below `n` nor below `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class Side(NamedTuple):
    """A folded map of one side, scaled by the root of `scaling`; in two halves where operands are bfloat16."""

    weight: torch.Tensor
    weight_low: torch.Tensor
    bias: torch.Tensor
    norm: torch.Tensor
    norm_low: torch.Tensor
    norm_bias: torch.Tensor


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
    high, low = _halves(weight, root, split)
    # Without a matrix the kernels are compiled not to read one; a pointer has to be given all the same.
    norm_high, norm_low = (high, low) if norm is None else _halves(norm, root, split)
    if norm_bias is None:
        norm_bias = bias.new_zeros(weight.shape[0], weight.shape[2])
    return Side(high, low, bias.contiguous(), norm_high, norm_low, norm_bias.contiguous())


def _halves(x: torch.Tensor, root: float, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = (x * root).contiguous()
    if not split:
        return x, x
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


class Call(NamedTuple):
    """What both passes of one call agree on."""

    sizes: Sizes
    tables: BlockTables
    query: Side
    key: Side
    root: float
    one_batch: int
    kinds: dict[str, Any]  # operand type and precision of products
    maps: dict[str, Any]  # which matrices there are, and whether weights come in halves

    @property
    def blocks(self) -> int:
        return len(self.tables.block_row)

    @property
    def rows(self) -> int:
        return len(self.tables.boundary)

    @property
    def runs(self) -> int:
        return len(self.tables.run_table)


def begin(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    documents: list[int] | None,
    seen: torch.Tensor | None,
    folded: list[torch.Tensor | None],
    ints: list[int],
    scaling: float,
) -> Call:
    """Plan a call; arguments as of `fused.attend`."""
    w, sinks, h, _, tail = ints
    b, heads, length, d = q.shape
    pure = w == 0
    w = w or PURE_BLOCK
    pairs = None if documents is None else list(itertools.pairwise(documents))
    tables = plan_blocks(
        b, length, w, sinks, q.device, mask=mask, documents=pairs, seen=seen, retained=h, pure=pure
    )  # fmt: skip
    split = q.dtype == torch.bfloat16
    root = scaling**0.5
    assert folded[0] is not None
    sizes = Sizes(k.shape[1], heads // k.shape[1], folded[0].shape[1], d, w, sinks, h, pure, bool(tail))
    return Call(
        sizes,
        tables,
        prepared_side(folded[:4], root, split),
        prepared_side(folded[4:], root, split),
        root,
        int(documents is not None),
        {"OPERAND": tl.bfloat16 if split else tl.float32, "PRECISION": "tf32x3"},
        {"MATRIX": folded[2] is not None, "KEY_MATRIX": folded[6] is not None, "SPLIT": split},
    )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of the tensors, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along its last dimension; any other strides do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
