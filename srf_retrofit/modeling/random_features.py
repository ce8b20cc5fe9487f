"""Random projections whose rows are each standard normal, and coupled so that the kernel estimate varies less.

Every row of a projection `W (M, D)` is `norm * direction`, with the norm chi-distributed with `D` degrees of freedom
and the direction uniform on the sphere, that is `N(0, I_D)`: this alone makes the features unbiased. The couplings
differ in how the directions of one block of at most `D` rows stand to each other:

- `iid`: independent;
- `orthogonal`: at right angles (FAVOR+, 2009.14794);
- `simplex`: at the angles of a regular simplex, cosine `-1/(n-1)` for a block of `n` rows (simplex random features,
  2301.13856): the lowest that `n` vectors can all have pairwise.

`M > D` rows are independent blocks of `D` rows, the last one possibly shorter. A shorter block of the simplex coupling
takes the smaller simplex, which repels more than as many vertices of the large one would.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from .configuration import PROJECTIONS

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_LAYER_BITS = 12
_STEP_BITS = 20


def _mix64(x: int) -> int:
    """Finaliser of splitmix64: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """Finaliser of murmur3: a bijection of 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def stream_seed(seed: int, step: int = 0, layer: int = 0) -> int:
    """Seed of the random stream of one layer at one step.

    PyTorch's CPU generator keeps only the low 32 bits of its seed, so a 64-bit hash would collide after some ten
    thousand draws. Here one `seed` gives a *permutation* of the 32-bit integers, applied to `(step, layer)`: inside one
    run no two streams are equal, for steps below 2**20 and layers below 2**12. Beyond those, and between different
    seeds, streams coincide with probability 2**-32 a pair.

    Parameters
    ----------
    seed, step, layer : int
        All `>= 0`.

    Returns
    -------
    int
        In `[0, 2**32)`.
    """
    key = 0
    for part in (seed, step >> _STEP_BITS, layer >> _LAYER_BITS):
        # Words of 64 bits from the low end, so that seeds of any length count in full.
        while True:
            key = _mix64(key ^ (part & _MASK64))
            part >>= 64
            if not part:
                break
    counter = (step & ((1 << _STEP_BITS) - 1)) << _LAYER_BITS | (layer & ((1 << _LAYER_BITS) - 1))
    return _mix32(_mix32(counter ^ (key & _MASK32)) ^ (key >> 32))


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One CPU thread for many small factorisations.

    Their result then has the same bits whatever number of threads a process was given, and they do not wait at a
    barrier in every step of every small matrix, which on a busy machine costs a hundred times the work itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def haar_rotations(*shape: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal matrices from the Haar measure, `(*shape, dim, dim)` float64 on the CPU.

    QR of a Gaussian matrix is Haar only once the diagonal of R has been made positive (math-ph/0609050).
    """
    gaussian = torch.randn(*shape, dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs.unsqueeze(-2)


def simplex_vertices(count: int) -> torch.Tensor:
    """Unit vectors to the vertices of a regular simplex, `(count, count)` float64 on the CPU.

    Their pairwise inner products are `-1/(count-1)` (2301.13856). They span `count - 1` dimensions; the
    last coordinate is zero. A single vertex is the first unit vector.
    """
    if count == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    n = count
    ones = torch.ones(n, dtype=torch.float64, device="cpu")
    ones[-1] = 0
    vertices = math.sqrt(n / (n - 1)) * torch.eye(n, dtype=torch.float64, device="cpu")
    vertices = vertices - (math.sqrt(n) + 1) / (n - 1) ** 1.5 * ones
    vertices[-1] = ones / math.sqrt(n - 1)
    return vertices


def _block_directions(
    num_heads: int, num_blocks: int, rows: int, dim: int, projection: str, generator: torch.Generator
) -> torch.Tensor:
    """Unit rows of `num_blocks` independent blocks of `rows <= dim`, `(num_heads, num_blocks * rows, dim)` float64."""
    frames = haar_rotations(num_heads, num_blocks, dim=dim, generator=generator)[..., :rows, :]
    if projection == "simplex":
        frames = simplex_vertices(rows) @ frames
    return frames.reshape(num_heads, num_blocks * rows, dim)


def draw_projection(
    num_features: int,
    head_dim: int,
    *,
    num_heads: int,
    projection: str = "simplex",
    seed: int,
    step: int = 0,
    layer: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Draw the random projection of one layer.

    The draw happens on the CPU, in float64, from a generator of its own, whatever the default device and dtype are and
    without touching the global random state: the same arguments give the same matrix on every process and after every
    resume.

    Parameters
    ----------
    num_features : int
        Rows per head, `M >= 0`, below, at or above the head dimension.
    head_dim : int
        `D >= 1`; no divisibility is asked for.
    num_heads : int
        Independent projections, one per key/value head, `G >= 1`.
    projection : {"simplex", "orthogonal", "iid"}
        Coupling of the rows.
    seed, step, layer : int
        Address of the draw, all `>= 0`, see `stream_seed`.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    (G, M, D) tensor on the CPU

    Raises
    ------
    ValueError
        When a size or an address is out of range, or the coupling is unknown.
    """
    for name, value, least in (
        ("num_features", num_features, 0),
        ("head_dim", head_dim, 1),
        ("num_heads", num_heads, 1),
        ("seed", seed, 0),
        ("step", step, 0),
        ("layer", layer, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")

    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, step, layer))
    gaussian = torch.randn(num_heads, num_features, head_dim, generator=generator, dtype=torch.float64, device="cpu")
    if projection == "iid" or not num_features:
        return gaussian.to(dtype)

    # The norm of a Gaussian vector is chi_D distributed and independent of the directions drawn below.
    norms = gaussian.norm(dim=-1, keepdim=True)
    full, rest = divmod(num_features, head_dim)
    directions = []
    with single_thread():
        if full:
            directions.append(_block_directions(num_heads, full, head_dim, head_dim, projection, generator))
        if rest:
            directions.append(_block_directions(num_heads, 1, rest, head_dim, projection, generator))
    return (norms * torch.cat(directions, dim=-2)).to(dtype)
