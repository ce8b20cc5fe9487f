"""Speed and memory of the attention operator and of decoding, beside softmax attention and the seed's operator.

Every figure is measured beside its rival in one run: same tensors, repeats interleaved, medians. None is given before
the operator has agreed with the float64 oracle on the same device. On a CPU only ratios are reported, since absolute
times there tell of the machine; on a GPU milliseconds too. Each function prints a table, ends in one line of JSON, and
returns what that line holds. A ratio below 1 means that this package is the faster.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from ..modeling.configuration import SRFConfig
from ..modeling.ops import FoldedMap, fold, srf_attention
from ..modeling.state import SRFState
from .measurement import (
    Call,
    Shape,
    Triple,
    attention_call,
    check_operator,
    check_output,
    environment,
    figure,
    finish,
    growth_per_doubling,
    is_gpu,
    measure,
    peak_memory,
    positive_sizes,
)

LENGTHS = (1024, 2048, 4096, 8192, 16384)
CONTEXTS = (1024, 4096, 16384, 65536)
PURE = SRFConfig(window=0, sinks=0, retained=0)
VARIANTS: Mapping[str, SRFConfig] = {"default": SRFConfig(), "pure": PURE}
_PREFILL_CHUNK = 4096
_SEED_TILES = (256, 1024)


def attention(
    *,
    lengths: Sequence[int] = LENGTHS,
    variants: Mapping[str, SRFConfig] = VARIANTS,
    geometry: str = "preconditioner",
    repeats: int = 5,
    memory: bool = True,
    output: str | Path | None = None,
    quiet: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    """Causal attention over whole sequences, against PyTorch's `scaled_dot_product_attention`.

    Parameters
    ----------
    lengths : sequence of int
    variants : mapping of names to SRFConfig
    geometry : {"identity", "shift", "preconditioner", "proposal"}
        Of the feature maps, `calibration.calibrate`'s levels.
    repeats : int
        Timed rounds, after two that are not.
    memory : bool
        Also measure peak memory (on a CPU in a fresh process for each operator).
    output : path, optional
        JSON file to write, whole or not at all.
    quiet : bool
        Print the JSON line alone.
    **shape
        Fields of `Shape`.

    Returns
    -------
    dict
        `forward` and `forward_backward`: `vs_softmax` and `growth` (per doubling of the length) of each variant by
        length, and `milliseconds` on a GPU; `peak_memory` in bytes with its growth; `gate`; `environment`.

    Raises
    ------
    ValueError
        For sizes out of range.
    RuntimeError
        When the gate is red.
    """
    sizes = Shape(**shape)
    lengths = positive_sizes("lengths", lengths)
    result = _begin("attention", sizes, output, variants=variants, geometry=geometry, repeats=repeats)
    result["gate"] = {name: check_operator(sizes, config, geometry) for name, config in variants.items()}
    maps = {name: sizes.feature_map(config, geometry) for name, config in variants.items()}
    rows: list[list[str]] = [["", "operator", *map(str, lengths)]]
    inputs = {length: sizes.tensors(length, requires_grad=True) for length in lengths}
    for key, backward in (("forward", False), ("forward_backward", True)):
        calls = {
            (name, length): attention_call(tensors, maps.get(name), variants.get(name), backward=backward)
            for name in ("softmax", *variants)
            for length, tensors in inputs.items()
        }
        seconds = measure(calls, repeats, sizes.device, key)
        times = {name: {n: seconds[name, n] for n in lengths} for name in ("softmax", *variants)}
        part: dict[str, Any] = {
            "growth": {name: growth_per_doubling(by_length) for name, by_length in times.items()},
            "vs_softmax": {name: {n: times[name][n] / times["softmax"][n] for n in lengths} for name in variants},
        }
        if is_gpu(sizes.device):
            part["milliseconds"] = {name: {n: 1e3 * t for n, t in x.items()} for name, x in times.items()}
        result[key] = part
        for quantity, by_name in part.items():
            title = f"{key} {quantity}"
            rows += [[title, name, *(figure(x.get(n)) for n in lengths)] for name, x in by_name.items()]
    del inputs
    if memory:
        peaks = {}
        for name in ("softmax", *variants):
            peaks[name] = peak_memory(sizes, variants.get(name), geometry, lengths)
        result["peak_memory"] = {"bytes": peaks, "growth": {name: growth_per_doubling(x) for name, x in peaks.items()}}
        rows += [["peak MiB, f+b", name, *(figure(x[n] / 2**20) for n in lengths)] for name, x in peaks.items()]
    return finish(result, rows, output, quiet)


def decode(
    *,
    contexts: Sequence[int] = CONTEXTS,
    variants: Mapping[str, SRFConfig] = VARIANTS,
    geometry: str = "preconditioner",
    steps: int = 64,
    repeats: int = 9,
    output: str | Path | None = None,
    quiet: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    """Time of one token in one layer against the context behind it, beside softmax over a key/value cache.

    Parameters
    ----------
    contexts : sequence of int
        Tokens of prefill.
    variants, geometry, repeats, output, quiet, **shape
        As in `attention`.
    steps : int
        Tokens of a timed round, at least; rounded up to whole windows, so that folds count in full.

    Returns
    -------
    dict
        `vs_first_context` and `vs_softmax` of each variant by context, `milliseconds` a token on a GPU, `state_bytes`,
        `kv_bytes`; `gate`; `environment`.

    Raises
    ------
    ValueError, RuntimeError
        As `attention`.
    """
    sizes = Shape(**shape)
    contexts = positive_sizes("contexts", contexts)
    (steps,) = positive_sizes("steps", (steps,))
    whole = math.lcm(*(max(config.window, 1) for config in variants.values()))
    steps = whole * math.ceil(steps / whole)
    result = _begin("decode", sizes, output, variants=variants, geometry=geometry, repeats=repeats)
    result["steps"] = steps
    result["gate"] = {name: check_operator(sizes, config, geometry) for name, config in variants.items()}
    folded = {name: fold(sizes.feature_map(config, geometry)) for name, config in variants.items()}
    tokens = [sizes.tensors(1, stream=i) for i in range(steps)]
    calls: dict[Any, Call] = {}
    state_bytes: dict[str, int] = {}
    for context in tqdm(contexts, desc="prefill", file=sys.stderr, leave=False):
        states: dict[str, SRFState | None] = dict.fromkeys(variants)
        keys, values = [], []
        with torch.no_grad():
            for start in range(0, context, _PREFILL_CHUNK):
                q, k, v = sizes.tensors(min(_PREFILL_CHUNK, context - start), stream=steps + start)
                keys.append(k)
                values.append(v)
                for name, config in variants.items():
                    states[name] = srf_attention(
                        q, k, v, folded[name], config, initial_state=states[name], output_final_state=True
                    )[1]
        spare = keys[0].new_empty(*keys[0].shape[:2], steps, sizes.head_dim)
        calls["softmax", context] = _cached_softmax(
            torch.cat([*keys, spare], 2), torch.cat([*values, spare], 2), tokens
        )
        for name, config in variants.items():
            state = states[name]
            assert state is not None
            calls[name, context] = _recurrent(state, folded[name], config, tokens)
            state_bytes[name] = state.nbytes()
    # By operator, so that no context's turn comes just after a large cache went through the processor's.
    calls = {(name, n): calls[name, n] for name in ("softmax", *variants) for n in contexts}
    seconds = measure(calls, repeats, sizes.device, "decode")
    times = {name: {n: seconds[name, n] / steps for n in contexts} for name in ("softmax", *variants)}
    result["vs_first_context"] = {name: {n: x[n] / x[contexts[0]] for n in contexts} for name, x in times.items()}
    result["vs_softmax"] = {name: {n: times[name][n] / times["softmax"][n] for n in contexts} for name in variants}
    if is_gpu(sizes.device):
        result["milliseconds"] = {name: {n: 1e3 * t for n, t in x.items()} for name, x in times.items()}
    element = getattr(torch, sizes.dtype).itemsize
    result["state_bytes"] = state_bytes
    result["kv_bytes"] = {n: 2 * sizes.batch_size * sizes.kv_heads * n * sizes.head_dim * element for n in contexts}
    rows = [["", "operator", *map(str, contexts)]]
    for quantity in ("vs_first_context", "vs_softmax", "milliseconds"):
        rows += [[quantity, name, *(figure(x[n]) for n in contexts)] for name, x in result.get(quantity, {}).items()]
    rows.append(["cache KiB", "softmax", *(figure(n_bytes / 1024) for n_bytes in result["kv_bytes"].values())])
    rows += [["state KiB", name, *[figure(x / 1024)] * len(contexts)] for name, x in state_bytes.items()]
    return finish(result, rows, output, quiet)


def seed_operator(
    *,
    length: int = 4096,
    repeats: int = 3,
    output: str | Path | None = None,
    quiet: bool = False,
    **shape: Any,
) -> dict[str, Any]:
    """The seed's operator (srf-attention 1.0.16) against the pure form, forward and backward, M = D.

    The seed knows no grouped-query attention, so `kv_heads` equals `heads`; of the tile sizes 256 and 1024 (its
    README's) the faster one counts.

    Returns
    -------
    dict
        `speedup`: time of the seed over time of this package, for the same tensors.

    Raises
    ------
    ModuleNotFoundError
        When srf-attention is not installed; the message says how to.
    ValueError, RuntimeError
        As `attention`.
    """
    try:
        from srf_attention import Attention as SeedAttention
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing: pip install --no-deps srf-attention==1.0.16 and pip install einops scipy"
        ) from None
    shape["kv_heads"] = shape.setdefault("heads", Shape.heads)
    sizes = Shape(**shape)
    (length,) = positive_sizes("length", (length,))
    config = PURE.replace(num_features=sizes.head_dim)
    result = _begin("seed", sizes, output, variants={"pure": config}, geometry="identity", repeats=repeats)
    result["length"] = length
    result["gate"] = {"pure": check_operator(sizes, config, "identity")}
    q, k, v = sizes.tensors(length, requires_grad=True)
    torch.manual_seed(sizes.seed)
    seed = SeedAttention(d=sizes.head_dim, causal=True, device=sizes.device)

    def run(tile: int) -> None:
        o = seed(q, k, v, mode="train", attn_fn="torch", chunk_size=tile)
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    maps = sizes.feature_map(config, "identity")
    calls: dict[Any, Call] = {tile: partial(run, tile) for tile in _SEED_TILES}
    calls["pure"] = attention_call((q, k, v), maps, config, backward=True)
    seconds = measure(calls, repeats, sizes.device, "seed")
    result["speedup"] = min(seconds[tile] for tile in _SEED_TILES) / seconds["pure"]
    result["speedup_by_tile"] = {tile: seconds[tile] / seconds["pure"] for tile in _SEED_TILES}
    rows = [["seed's tile", "times slower than the pure form"]]
    rows += [[str(tile), figure(x)] for tile, x in result["speedup_by_tile"].items()]
    return finish(result, rows, output, quiet)


def _cached_softmax(keys: torch.Tensor, values: torch.Tensor, tokens: list[Triple]) -> Call:
    """Decode `tokens` after the cache `keys`, `values` (B, G, context + steps, D), writing them at its end."""
    context = keys.shape[2] - len(tokens)

    def run() -> None:
        with torch.no_grad():
            for i, (q, k, v) in enumerate(tokens):
                end = context + i + 1
                keys[:, :, end - 1 : end] = k
                values[:, :, end - 1 : end] = v
                scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], enable_gqa=True)

    return run


def _recurrent(state: SRFState, maps: FoldedMap, config: SRFConfig, tokens: list[Triple]) -> Call:
    """Decode `tokens` after `state`, which stays as it is."""

    def run() -> None:
        current: SRFState | None = state
        with torch.no_grad():
            for q, k, v in tokens:
                _, current = srf_attention(q, k, v, maps, config, initial_state=current, output_final_state=True)

    return run


def _begin(
    name: str,
    sizes: Shape,
    output: str | Path | None,
    *,
    variants: Mapping[str, SRFConfig],
    repeats: int,
    geometry: str,
) -> dict[str, Any]:
    """Check what is checked before minutes are spent, and start a result with all settings."""
    if not variants or "softmax" in variants:
        raise ValueError(f"variants must name at least one configuration, and none 'softmax'; got {list(variants)}")
    positive_sizes("repeats", (repeats,))
    check_output(output)
    configs = {key: config.to_dict() for key, config in variants.items()}
    settings = {"variants": configs, "geometry": geometry, "repeats": repeats}
    return {"benchmark": name, "environment": environment(sizes.device), **asdict(sizes), **settings}
