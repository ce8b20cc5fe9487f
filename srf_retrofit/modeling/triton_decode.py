"""The one-token step as a kernel launch, or two: `recurrent.attend_token`, with the state updated in place.

One launch a layer, and one before it where there are many rows (`MANY`), that projects their queries and finds those
that fold, to be served first; on memory that never moves, without a look at any value on the host: they can be captured
in a CUDA graph, for rows at different positions, inactive ones among them. Registered with PyTorch as
`srf_retrofit::decode_step`, so that `torch.compile(fullgraph=True)` sees one opaque operator.

Bytes that a step must move, per row and key/value head of `D` dimensions, with `e` bytes a number of the model and `f`
of the state's values, `p` tokens of the current block before this one, `R` query heads:

- read: `2 e D (s + w + p + h)` exact keys and values, `f M D + 8 M` features, `4 (w + p + h)` priorities,
  `e D (R + 2)` of q, k, v;
- write: `2 e D` the new key and value, `4 (w + p)` priorities, `e D R` outputs.

Where keys and values are stored in eight bits, `e D` is `row_width(D)` but for q, k, v and outputs.

With `D = M = 64`, `w = 32`, `s = 4`, `h = 64` in bfloat16, and values in float32: 48 KB at `p = 16`, where the keys and
values of softmax attention take 256 bytes a token. The feature map is shared by all rows and stays in the caches; with
many rows even that costs time, as every program fetches and splits it (32 KB at these sizes) for a few queries. In the
pure form, features are read and written. One step in `w` also folds the block that leaves: its keys are read once
more, features and retained keys read and written.
"""

from __future__ import annotations

from typing import Any

import torch

from .configuration import SRFConfig
from .feature_map import FoldedMap
from .fused_call import interpreted
from .operators import operator_name
from .state import SRFState

try:
    import triton
    import triton.language as tl

    from .triton_decode_kernel import decode_kernel, project_kernel
except ImportError:  # checkpoints travel to machines without it, where `available` says so
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Places of retained and leaving keys fit the 11 bits that `triton_common.sort_keys` has for them.
LARGEST_POOL = 2048
LARGEST_WINDOW = 128
LARGEST_DIM = 256
# Keys of a block that is folded, padded to powers of two: several times that must fit into shared memory.
LARGEST_BLOCK_BYTES = 32768
# From so many rows times key/value heads on, queries are projected by a launch of its own, `LINES` in a program, that
# also puts the rows into order: a layer of 256 took 31.7 us with it and 29.9 without, one of 2,048 took 76 and 88.
MANY = 1024
LINES = 64
# CUDA's second axis ends at 65,535; a multiple of 16 leaves every part of the order aligned alike.
GRID = 65_520
# Registers for three programs of four warps on a multiprocessor, which hides the loads of each behind others, or four
# where there are many programs: 56.1 and 52.2 us for 2,048 of them, 24.7 and 28.1 for 256 (all on one H100).
REGISTERS = 168
REGISTERS_OF_MANY = 128

# Types of the operands of products.
_OPERANDS = (
    {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32} if triton is not None else {}
)
_MAP_FIELDS = ("weight", "bias", "norm_weight", "norm_bias")
_SIDES = ("query", "key")
_MAP_NAMES = [f"{side}_{field}" for side in _SIDES for field in _MAP_FIELDS]
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? active, "
    + ", ".join(f"Tensor({chr(97 + i)}!) {name}" for i, name in enumerate(SRFState._fields))
    + "".join(f", Tensor{'?' if 'norm' in name else ''} {name}" for name in _MAP_NAMES)
    + ", Tensor? foresight, Tensor? slot_bounds, int retained, int delay, int fade, float scaling, bool use_tail, "
    "bool rounded) -> Tensor"
)


def available() -> bool:
    """Whether the kernel can run here: Triton is installed, and there is a CUDA device or the interpreter is on."""
    return triton is not None and (interpreted() or torch.cuda.is_available())


def refusal(config: SRFConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot serve such a layer, or `None` if it can."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
        return f"the decode kernel needs CUDA tensors, got {device}"
    if dtype not in DTYPES:
        return f"the decode kernel takes float16, bfloat16 or float32, got {dtype}"
    if head_dim > LARGEST_DIM:
        return f"the decode kernel takes head dimensions up to {LARGEST_DIM}, got {head_dim}"
    if config.window > LARGEST_WINDOW:
        return f"the decode kernel takes windows up to {LARGEST_WINDOW}, got window={config.window}"
    block = _power(config.window) * _power(head_dim) * dtype.itemsize
    if block > LARGEST_BLOCK_BYTES:
        return (
            f"the decode kernel takes blocks of keys up to {LARGEST_BLOCK_BYTES} bytes, but window={config.window} of "
            f"head dimension {head_dim} in {dtype} takes {block}"
        )
    if config.retained + config.window > LARGEST_POOL:
        return f"the decode kernel takes retained + window up to {LARGEST_POOL}, got {config.retained + config.window}"
    return None


def decode_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    active: torch.Tensor | None,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
    scaling: float,
    *,
    use_tail: bool = True,
) -> torch.Tensor:
    """Attention of one token per row; `state` is updated in place.

    Parameters
    ----------
    q : (B, H, 1, D); k, v : (B, G, 1, D), of one dtype: float16, bfloat16 or float32
        After rotary embedding, unscaled; any strides.
    active : (B,) bool, optional
        Rows whose token is real; the others' output is 0 and their state untouched. `None`: all.
    state : SRFState
        As `SRFState.layout` of this configuration, every tensor contiguous.
    maps : FoldedMap
        Float32, one map per key/value head; with `slot_bounds` where heads differ in their slots.
    config : SRFConfig
    scaling : float
        Softmax scale.
    use_tail : bool
        False leaves the features out of the softmax; the state is the same.

    Returns
    -------
    (B, H, 1, D), the dtype of `q`

    Raises
    ------
    ValueError
        Naming the tensor or the value, before anything is computed or changed. Gradients are not computed: inputs
        that require one are refused where gradients are enabled.
    """
    _check(q, k, v, active, state, maps, config)
    tensors = (q, k, v, active, *state, *maps.query, *maps.key, maps.foresight, maps.slot_bounds)
    delay = min(config.retention_delay, config.window // 2)
    # The operator's dispatch costs more than the kernel at small batches, so it is for graphs alone.
    step = decode_step if torch.compiler.is_compiling() else _launch
    rounded = maps.rounded_to == q.dtype
    return step(*tensors, config.retained, delay, config.fade, float(scaling), use_tail, rounded)


def _launch(*arguments: Any) -> torch.Tensor:
    """The operator `srf_retrofit::decode_step`; arguments as in its schema."""
    q, k, v, active, *rest = arguments
    state = SRFState(*rest[:12])
    maps = [None if x is None else x.contiguous() for x in rest[12:22]]
    h, delay, fade, scaling, use_tail, rounded = rest[22:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    b, heads, _, d = q.shape
    g, m = state.k_sum.shape[1:]
    w, s, wide = state.window_key.shape[2] // 2, state.sink_key.shape[2], state.window_key.shape[3]
    out = torch.empty((b, heads, 1, d), dtype=q.dtype, device=q.device)
    if b == 0:
        return out
    dp = _power(d)
    many = b * g >= MANY
    projected = use_tail and m > 0 and many
    half = q.dtype != torch.float32
    # Rows of a matrix that are handled at a time: float32 products run without tensor cores and take more registers.
    tile = max(16, min(64, 4096 // dp)) if half else 16
    sizes = {
        "G": g, "R": heads // g, "RP": _power(heads // g), "D": d, "DP": dp, "M": m,
        "W": w, "WP": _power(2 * w), "EP": _power(w), "S": s, "SP": _power(s),
        "H": h, "HT": min(_power(h), 64) if half else 16, "UNEVEN": maps[9] is not None,
        "WIDE": wide, "WIDEP": _power(wide), "POOL": _power(h + w), "DELAY": delay, "FADE": fade,
        "MT": min(_power(m), tile), "NT": min(dp, tile), "FT": min(_power(m), tile, 32),
        "TAIL": use_tail, "PROJECTED": projected, "MASKED": active is not None,
        "QUERY_MATRIX": maps[2] is not None, "QUERY_SHIFT": maps[3] is not None,
        "KEY_MATRIX": maps[6] is not None, "KEY_SHIFT": maps[7] is not None, "FORESIGHT": maps[8] is not None,
        # The interpreter multiplies no bfloat16 matrices.
        "OPERAND": _OPERANDS[torch.float32 if interpreted() and q.dtype == torch.bfloat16 else q.dtype],
        "ROUNDED": rounded,
        "num_stages": 1,
        "num_warps": 8,
    }  # fmt: skip
    if half and dp <= 64 and w <= 64:
        sizes |= {"num_warps": 4, "maxnreg": REGISTERS_OF_MANY if many else REGISTERS}
    mask, mask_stride = (None, 0) if active is None else (active.view(torch.uint8), active.stride(0))
    query_logs = torch.empty((b, heads, m), dtype=torch.float32, device=q.device) if projected else None
    order = torch.empty(b, dtype=torch.int32, device=q.device) if projected else None
    with torch.cuda.device_of(q):
        if projected:
            names = ("G", "R", "D", "DP", "M", "MT", "NT", "W", "MASKED", "OPERAND", "ROUNDED", "num_stages")
            project_kernel[(-(-b * (heads // g) // LINES) + 1, g)](
                q, mask, state.length, query_logs, order, *maps[:4], scaling**0.5,
                b, q.stride(0), q.stride(1), mask_stride,
                LINES=_power(LINES), MATRIX=sizes["QUERY_MATRIX"], SHIFT=sizes["QUERY_SHIFT"], num_warps=4,
                **{n: sizes[n] for n in names},
            )  # fmt: skip
        # In the given order rows lie along the grid's second axis.
        for rows in [None] if order is None else order.split(GRID):
            decode_kernel[(b, g) if rows is None else (g, len(rows))](
                q, k, v, out, mask, query_logs, rows, *state, *maps, state.retained_key.shape[1], scaling, scaling**0.5,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), mask_stride, **sizes,
            )  # fmt: skip
    return out


decode_step = torch.library.custom_op(
    operator_name("decode_step"), _launch, mutates_args=SRFState._fields, schema=_SCHEMA
)


@decode_step.register_fake
def _(*arguments: Any) -> torch.Tensor:
    q = arguments[0]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _power(n: int) -> int:
    """The least power of two that is neither below `n` nor below the 16 that products need."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    active: torch.Tensor | None,
    state: SRFState,
    maps: FoldedMap,
    config: SRFConfig,
) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[2] != 1 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"q must be (B, H, 1, D) and k, v (B, G, 1, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    b, heads, _, d = q.shape
    g = k.shape[1]
    if k.shape[2] != 1 or heads % g:
        raise ValueError(f"k must be (B, G, 1, D) with G dividing the {heads} query heads, got {tuple(k.shape)}")
    reason = refusal(config, d, q.dtype, q.device)
    if reason is not None:
        raise ValueError(reason)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("the decode kernel computes no gradients: run it under torch.no_grad()")
    if active is not None and (active.shape != (b,) or active.dtype != torch.bool or active.device != q.device):
        raise ValueError(
            f"active must be bool of shape ({b},) on {q.device}, got {active.dtype} of shape {tuple(active.shape)} on "
            f"{active.device}"
        )
    if (maps.slot_bounds is None) != (config.head_retained is None):
        raise ValueError(f"maps.slot_bounds must say where the slots of head_retained={config.head_retained} begin")
    layout = SRFState.layout(config, b, g, d, q.dtype)
    for name, x in zip(SRFState._fields, state, strict=True):
        shape, dtype = layout[name]
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"state.{name} must be {dtype} of shape {shape} on {q.device}, got {x.dtype} of shape "
                f"{tuple(x.shape)} on {x.device}"
            )
        if not x.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous, as it is updated in place; got strides {x.stride()}")
    shapes = {"weight": (g, config.num_features, d), "bias": (g, config.num_features)}
    shapes |= {"norm_weight": (g, d, d), "norm_bias": (g, d)}
    for side in _SIDES:
        for name, part in zip(_MAP_FIELDS, getattr(maps, side), strict=True):
            if part is not None and (
                part.shape != shapes[name] or part.dtype != torch.float32 or part.device != q.device
            ):
                raise ValueError(
                    f"maps.{side}.{name} must be float32 of shape {shapes[name]} on {q.device}, got {part.dtype} of "
                    f"shape {tuple(part.shape)} on {part.device}"
                )


def decode_bytes(
    config: SRFConfig,
    batch: int,
    kv_heads: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    phase: int | None = None,
) -> int:
    """Bytes that one step of a layer must move, once no slot is empty: a step that does not fold.

    Every used part of the state is read once, what changes is written, q, k, v are read and o is written. Feature
    maps are not counted: all rows share them.

    Parameters
    ----------
    config : SRFConfig
    batch, kv_heads, heads, head_dim : int
        `B`, `G`, `H`, `D`.
    dtype : torch.dtype
        Of the model.
    phase : int, optional
        Tokens of the current block before this one, in `0..w - 1`; by default half a block.
    """
    layout = SRFState.layout(config, 1, kv_heads, head_dim, dtype)
    w, s, m, slots = config.window, config.sinks, config.num_features, sum(config.slots(kv_heads))
    element = dtype.itemsize
    phase = w // 2 if phase is None else phase
    row = head_dim * element
    stored = layout["window_key"][0][-1] * layout["window_key"][1].itemsize
    features = m * head_dim * layout["kv_mean"][1].itemsize + 2 * m * 4
    read = 2 * stored * (s + (w + phase if w else 0)) + features + 2 * row
    written = 2 * stored if w else features
    if slots:
        # Priorities of the keys for which this query counts.
        ranked = max(0, w + phase - min(config.retention_delay, w // 2))
        read += 4 * ranked
        written += 4 * ranked
    per_row = kv_heads * (read + written) + slots * (2 * stored + 4) + 2 * heads * row
    per_row += 2 * layout["length"][1].itemsize
    return batch * per_row
