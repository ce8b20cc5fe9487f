"""The gates of the GPU benchmarks: no time is taken of an attention, a step or a graph that computes something else.

Errors are relative to the whole tensor: `rms` is `|x - t| / |t|`, `max` the largest entry of `|x - t|` over the largest
of `|t|`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..modeling.configuration import SRFConfig
from ..modeling.feature_map import FeatureMap
from ..modeling.ops import fold, full_precision, srf_attention
from ..modeling.random_features import stream_seed
from ..modeling.recurrent import attend_token
from ..modeling.state import SRFState
from ..testing import quadratic_attention
from .measurement import Triple

# Ragged, no multiple of a block or a tile; but of 16, as the lengths that are timed are: Triton compiles other kernels
# for other lengths, and those checked have to be those timed.
GATE_LENGTH = 1008
GATE_BATCH = 2
# bf16 rounds to 2^-9 = 2e-3; gradients are sums of rounded products. Float32 is compared with float64.
TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (2e-2, 5e-2),
    torch.float32: (1e-4, 1e-4),
}

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class GateError(RuntimeError):
    """A gate that does not open: nothing is timed, or no figure given, behind it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"no speed figure: {what}")


def compare(name: str, result: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, slack: float = 1.0) -> float:
    """The relative rms error of `result`, computed on inputs of `dtype`; `slack` widens the bounds for whole models.

    Raises
    ------
    GateError
        When an entry is not finite, or an error is above the tolerance of the dtype.
    """
    rms_bound, max_bound = (slack * bound for bound in TOLERANCES[dtype])
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    if result.shape != truth.shape or not bool(torch.isfinite(result).all()):
        raise GateError(f"{name} has shape {tuple(result.shape)}, entries not finite or another shape than the truth")
    error = result - truth
    rms = float(error.norm() / truth.norm().clamp_min(1e-30))
    largest = float(error.abs().max() / truth.abs().max().clamp_min(1e-30))
    if rms > rms_bound or largest > max_bound:
        raise GateError(
            f"{name} is off by {rms:.2e} rms (bound {rms_bound:g}) and {largest:.2e} max (bound {max_bound:g})"
        )
    return rms


def check_attention(
    attend: Attend,
    maps: FeatureMap,
    config: SRFConfig,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    length: int = GATE_LENGTH,
    seed: int = 0,
) -> dict[str, float]:
    """Output and gradients of the function that will be timed, on fresh inputs at a ragged length.

    The last row's last key/value head, with its query heads, is compared with the float64 oracle
    (`testing.quadratic_attention`, an L x L matrix); all heads and rows with the PyTorch core in float32.

    Returns
    -------
    dict
        Relative rms errors of `o`, `dq`, `dk`, `dv` against the oracle, and as `all_o` and so on against the core.

    Raises
    ------
    GateError
        When an error is above the tolerance.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, step=length))
    shapes = [(GATE_BATCH, n, length, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    results = _with_gradients(attend, (q, k, v), weight)

    group = heads // kv_heads
    row, head = slice(GATE_BATCH - 1, None), slice(kv_heads - 1, None)
    queries = slice(heads - group, None)
    cuts = [(row, queries), (row, queries), (row, head), (row, head)]
    exact_q, exact_k, exact_v, exact_weight = (
        x[row, heads_of].double().cpu() for x, heads_of in ((q, queries), (k, head), (v, head), (weight, queries))
    )
    one = FeatureMap(*(None if t is None else t[head].cpu() for t in maps))  # type: ignore[arg-type]

    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return quadratic_attention(q, k, v, one, config, dtype=dtype)[0]

    truths = _with_gradients(oracle, (exact_q, exact_k, exact_v), exact_weight)
    names = ("o", "dq", "dk", "dv")
    errors = {
        name: compare(name, result[cut], truth, dtype)
        for name, result, cut, truth in zip(names, results, cuts, truths, strict=True)
    }

    folded = fold(maps, dtype)

    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return srf_attention(q, k, v, folded, config, backend="torch")[0]

    truths = _with_gradients(core, (q.float(), k.float(), v.float()), weight.float())
    for name, result, truth in zip(names, results, truths, strict=True):
        errors[f"all_{name}"] = compare(f"{name} of all heads", result, truth, dtype)
    return errors


def _with_gradients(attend: Attend, inputs: Triple, weight: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = attend(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, weight)]


def check_step(
    step: Callable[..., torch.Tensor],
    maps: FeatureMap,
    config: SRFConfig,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> dict[str, float]:
    """A decoding step in place against `recurrent.attend_token`, through two folds, rows at different positions.

    Parameters
    ----------
    step : callable
        `step(q, k, v, active, state, folded_maps, config, scaling) -> o`, which advances `state` in place.

    Returns
    -------
    dict
        Largest relative rms error of `o`, and of the feature values `kv_mean` at the end.

    Raises
    ------
    GateError
        When an error is above the tolerance, or the rows do not end at the same positions.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, step=1))
    folded, scaling = fold(maps, dtype), head_dim**-0.5
    rows, span = 3, 4 * max(config.window, 8)

    def draw(length: int) -> Triple:
        shapes = [(rows, n, length, head_dim) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        return q, k, v

    # Rows of different lengths: one at the end of a block, one in the middle, one that has seen nothing but sinks.
    lengths = torch.tensor([span, span - max(config.window // 2, 1), min(3, span)])
    mask = (torch.arange(span) < lengths.unsqueeze(-1)).to(device)
    with torch.no_grad():
        _, start = srf_attention(
            *draw(span), folded, config, attention_mask=mask, output_final_state=True, backend="torch"
        )
        assert start is not None
        mine, theirs = (SRFState(*(t.clone() for t in start)) for _ in range(2))
        worst = 0.0
        for _ in range(2 * max(config.window, 4) + 3):
            q, k, v = draw(1)
            result = step(q, k, v, None, mine, folded, config, scaling)
            with full_precision(q.device):
                truth, theirs = attend_token(q, k, v, None, theirs, folded, config, scaling)
            worst = max(worst, compare("output of the step", result, truth, dtype))
    if not torch.equal(mine.length, theirs.length):
        raise GateError(f"rows are at {mine.length.tolist()} after the steps, expected {theirs.length.tolist()}")
    return {"o": worst, "kv_mean": compare("kv_mean after the steps", mine.kv_mean, theirs.kv_mean, dtype)}


def check_tokens(name: str, found: Any, expected: Any) -> int:
    """Tokens of a replayed graph against those of eager steps from the same state; returns how many were compared.

    Raises
    ------
    GateError
        At the first token that differs.
    """
    found, expected = torch.as_tensor(found).cpu(), torch.as_tensor(expected).cpu()
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise GateError(f"{name}: replayed tokens differ from eager ones: {found.tolist()} against {expected.tolist()}")
    return found.numel()
