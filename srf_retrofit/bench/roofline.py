"""What an attention must compute and move at the least, and how fast a device could do that.

Only matrix products are counted as FLOPs (a multiplication and an addition each), only tensors that cross the edge of
the operator as bytes, each once: exponentials, maxima, indices and whatever an implementation spills come on top, and
show as a smaller share of the roofline. Shapes: `B` rows, `H` query and `G` key/value heads, `L` positions, `D` head
dimension, `M` features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..modeling.configuration import SRFConfig
from ..timing import time_calls


@dataclass(frozen=True)
class Sizes:
    """Shape of one call: `batch` rows, `heads` query and `kv_heads` key/value heads, `head_dim`, `length`."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    itemsize: int = 2


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the matrix products, and bytes that have to cross the memory bus."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Work:
        """This work, `count` times."""
        return Work(count * self.flops, count * self.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches in the same run: bytes/s of a copy (read + write), FLOP/s of a large bf16 product."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def least_seconds(self, work: Work) -> float:
        """Time that the roofline allows: computing and moving overlap perfectly, the slower of them decides."""
        return max(work.bytes / self.copy_bytes_per_second, work.flops / self.matmul_flops_per_second)

    def judge(self, work: Work, seconds: float) -> dict[str, Any]:
        """`flops`, `bytes`, `bound` ("memory" or "compute") and `share` of the roofline that `seconds` reaches."""
        memory = work.bytes / self.copy_bytes_per_second
        return {
            "flops": work.flops,
            "bytes": work.bytes,
            "bound": "memory" if memory >= work.flops / self.matmul_flops_per_second else "compute",
            "share": self.least_seconds(work) / seconds,
        }

    def to_dict(self) -> dict[str, float]:
        """Plain dictionary."""
        return asdict(self)


def boundary_bytes(sizes: Sizes, backward: bool) -> float:
    """Bytes of what enters and leaves an attention, each tensor once.

    Forward: q and o (H heads), k and v (G heads), and a float32 normaliser per query. Backward reads q, k, v, o, its
    gradient and the normaliser again and writes three gradients: q, o, do, dq and k, v, dk, dv.
    """
    s = sizes
    row = s.batch * s.length * s.head_dim * s.itemsize
    normaliser = 4 * s.batch * s.heads * s.length
    total = (2 * s.heads + 2 * s.kv_heads) * row + normaliser
    if backward:
        total += (4 * s.heads + 4 * s.kv_heads) * row + normaliser
    return total


def softmax_work(sizes: Sizes, *, backward: bool) -> Work:
    """Causal softmax attention over whole sequences.

    Half of the `L x L` pairs are visible. A pair costs `2 D` in `q k^T` and `2 D` in `p v`, so `2 B H L^2 D` in all.
    Backward has five such products (`q k^T` again, dP, dV, dQ, dK) for the forward's two: `5 B H L^2 D`.
    """
    s = sizes
    pairs = s.batch * s.heads * s.length**2 / 2
    return Work(pairs * 2 * s.head_dim * (7 if backward else 2), boundary_bytes(sizes, backward))


def exact_keys(config: SRFConfig, length: int) -> float:
    """Mean number of exact keys that a query of a causal sequence sees, retained slots in use counted full.

    A query at position i sees its block up to itself and the whole block before: `w + (i mod w) + 1`, at most `i + 1`;
    `s` sinks once they lie outside that, and `h` slots from the third block on (fewer while fewer keys have left).
    """
    w, s, h = config.window, config.sinks, config.retained
    position = torch.arange(length)
    if not w:
        return float((position + 1).clamp_max(s).double().mean())
    start = (torch.div(position, w, rounding_mode="floor") - 1).clamp_min(0) * w
    left = (start - s).clamp_min(0)  # keys that have left the window and are no sinks
    seen = position + 1 - start + start.clamp_max(s) + left.clamp_max(h)
    return float(seen.double().mean())


def srf_work(sizes: Sizes, config: SRFConfig, *, backward: bool, geometry: bool = True) -> Work:
    """Causal attention with exact keys and simplex random features, as `modeling.ops.srf_attention` defines it.

    Forward, per token:

    - features: `2 M D` for each query head and each key head, and `2 D^2` more with a preconditioner (`geometry`);
    - exact keys: `4 D` for each of the `exact_keys` of every query head, as in softmax attention;
    - fold: `2 M D` for each key head, a key's value into all feature sums (with `2 M` for their mass);
    - tail: `2 M D + 2 M` for each query head, the sums weighted by its features.

    Backward, since nothing of size `L x M` is kept: features again and their gradient with respect to q and k (the
    projection is not trained), so twice; exact keys 5 products for 2, as in softmax attention; fold again and its two
    gradients, three times; tail its two gradients. How an implementation splits sequences into chunks is its own
    affair: the products inside of a chunk, which a linear form needs to run in parallel, are not counted.
    """
    s, m, d = sizes, config.num_features, sizes.head_dim
    tokens = s.batch * s.length
    features = (s.heads + s.kv_heads) * (2 * m * d + (2 * d * d if geometry else 0))
    exact = s.heads * exact_keys(config, s.length) * 4 * d
    fold = s.kv_heads * (2 * m * d + 2 * m)
    tail = s.heads * (2 * m * d + 2 * m)
    flops = features + exact + fold + tail
    if backward:
        flops += 2 * features + 2.5 * exact + 3 * fold + 2 * tail
    return Work(tokens * flops, boundary_bytes(sizes, backward))


def linear_work(sizes: Sizes, features: int, *, backward: bool) -> Work:
    """Bare causal linear attention on `features` given features, no grouped heads: `4 F D` a token and head.

    Backward: each of the two products (fold, read) has two gradients and the sums are formed again, `10 F D`. Bytes:
    features of queries and keys (`F` wide), values, output; backward all of them and their gradients.
    """
    s = sizes
    tokens = s.batch * s.length * s.heads
    moved = (2 * features + 2 * s.head_dim) * (3 if backward else 1)
    return Work(tokens * features * s.head_dim * (14 if backward else 4), tokens * moved * s.itemsize)


def tensor_bytes(sizes: Sizes) -> float:
    """Bytes of inputs, output and gradients together: q, k, v, o and a gradient of the same size for each."""
    s = sizes
    return 2 * (2 * s.heads + 2 * s.kv_heads) * s.batch * s.length * s.head_dim * s.itemsize


def measure_ceilings(device: str, *, copy_bytes: int = 1 << 30, matmul_size: int = 8192) -> Ceilings:
    """Time a copy of `copy_bytes` and a square bf16 product of `matmul_size`: the ceilings of this device, today."""
    source = torch.empty(copy_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy = time_calls([partial(target.copy_, source)], device, seconds=0.2)
    a, b = (torch.randn(matmul_size, matmul_size, device=device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    matmul = time_calls([partial(torch.mm, a, b, out=c)], device, seconds=0.3)
    return Ceilings(2 * copy_bytes / copy.median, 2 * matmul_size**3 / matmul.median)
